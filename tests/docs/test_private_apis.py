"""docs/private-apis.md is true: each API is installed as it says, and none is missing there."""

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/private-apis.md").read_text()
ROWS = re.findall(r"^\| `([\w.]+):([\w.]+)(?:\(([\w, ]*)\))?` \|", PAGE, re.M)
MENTIONS = re.compile(r"quack|flash_attn|cutlass|torch[\w.]*\._|^from torch.* import .*\b_", re.M)
PRIVATE = ("quack", "flash_attn", "cutlass.base_dsl", "cutlass.cutlass_dsl", "cutlass._mlir")


def found(module, path):
    """The attribute of a module, or of a class's instances; raises AttributeError."""
    value = importlib.import_module(module)
    for name in path.split("."):
        owner = value
        value = getattr(owner, name, None)
        if value is None and not hasattr(owner, name):
            if not inspect.isclass(owner) or not of_instances(owner, name):
                raise AttributeError(f"{owner!r} has no {name}")
            return None
    return value


def of_instances(owner, name):
    """Whether instances of a class have an attribute: declared, or set by its own code."""
    if any(name in vars(c).get("__annotations__", {}) for c in owner.__mro__):
        return True
    try:
        return f"self.{name} = " in inspect.getsource(owner)
    except (OSError, TypeError):  # a class that is not written in Python
        return False


@pytest.mark.parametrize(("module", "path", "parameters"), ROWS, ids=lambda x: x)
def test_it_is_installed(module, path, parameters):
    value = found(module, path)
    if parameters:
        known = inspect.signature(value).parameters
        assert set(parameters.split(", ")) <= known.keys()


def test_an_attribute_that_is_not_there_fails():
    with pytest.raises(AttributeError):
        found("torch", "Tensor._is_not_there")
    with pytest.raises(ImportError):
        found("torch._is_not_there", "f")


def is_private(module, name):
    parts = f"{module}.{name}".split(".")
    return module.startswith(PRIVATE) or (
        parts[0] in ("torch", "cutlass") and any(p.startswith("_") for p in parts)
    )


def uses(file):
    """(module, name) of what a file imports, and of each chain of attributes of a library."""
    text = file.read_text()
    if not MENTIONS.search(text):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
            while isinstance(node.value, ast.Attribute):
                node = node.value
                names.append(node.attr)
            if isinstance(node.value, ast.Name) and node.value.id in ("torch", "quack", "cutlass"):
                yield ".".join([node.value.id, *reversed(names[1:])]), names[0]


def test_no_private_api_is_missing():
    """A module may stand for what is in it, and a class for its attributes."""
    rows = {f"{module}.{path}" for module, path, _ in ROWS}
    missing = set()
    for file in sorted((ROOT / "coda").rglob("*.py")):
        for module, name in uses(file):
            whole = f"{module}.{name}"
            told = any(f"{r}.".startswith(f"{whole}.") or whole.startswith(f"{r}.") for r in rows)
            if is_private(module, name) and not name.startswith("__") and not told:
                missing.add(f"{file.relative_to(ROOT)}: {whole}")
    assert not missing


def test_the_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    table = re.findall(r"^\| `([\w-]+)` \| `(.*)` \| (\S+) \|$", PAGE, re.M)
    assert [name for name, _, _ in table]
    for name, bound, tested in table:
        assert f"{name}{bound}" in project
        assert pins[name] == tested
