"""Emitted texts -> imported Python modules."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from coda.sim.host import kept


def load_module(text: str, name: str, directory: Path) -> ModuleType:
    """Write an emitted module as a file of its own, and import it.

    A real file keeps tracebacks and debuggers working, and gives quack's kernel identity (which
    hashes the source that `inspect` finds) a text that belongs to this kernel alone.
    """
    if name in sys.modules:
        return sys.modules[name]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.py"
    if not path.is_file() or path.read_bytes() != text.encode():
        if path.is_dir():
            kept.discard(path)
        scratch = path.with_suffix(f".{id(text)}.tmp")
        scratch.write_text(text)
        scratch.replace(path)
    spec = importlib.util.spec_from_file_location(name, path, loader=_Text(text, name, path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _Text(SourceFileLoader):
    """Runs the text that was emitted, whatever bytecode a file of an earlier process holds."""

    def __init__(self, text: str, name: str, path: Path) -> None:
        super().__init__(name, str(path))
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.text.encode(), self.path)
