"""Emitted source texts -> imported Python modules."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from coda.sim.host import kept


def load_module(text: str, name: str, directory: Path) -> ModuleType:
    """Write `text` to `directory`/`name`.py and import it; a module of that name is imported once.

    A real file is needed for tracebacks and debuggers, and for quack's kernel identity, which is a
    hash of the source that `inspect` finds.
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
    """A loader that runs the emitted text, and ignores cached bytecode of earlier processes."""

    def __init__(self, text: str, name: str, path: Path) -> None:
        super().__init__(name, str(path))
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.text.encode(), self.path)
