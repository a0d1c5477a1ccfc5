"""The house keeps its order: imports run one way, files and functions stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "coda").rglob("*.py"))
# What a package may import of coda; the face and the integrations know every package.
KNOWS = {
    "ir": {"errors"},
    "frontend": {"errors", "ir"},
    "lowering": {"errors", "ir"},
    "runtime": {"errors", "version", "ir", "lowering", "sim"},
    "sim": set(),
}


def imported(tree):
    """The first names below `coda` that a file imports, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1:2] for a in node.names if a.name.startswith("coda"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "coda":
            path = node.module.split(".")[1:2]
            yield from [path] if path else ([a.name] for a in node.names)


@pytest.mark.parametrize("package", KNOWS)
def test_imports_run_one_way(package):
    files = sorted((ROOT / "coda" / package).rglob("*.py"))
    found = {n for f in files for names in imported(ast.parse(f.read_text())) for n in names}
    assert found - {package} <= KNOWS[package]


def test_files_and_functions_are_short():
    long = [f"{f.relative_to(ROOT)}" for f in FILES if f.read_text().count("\n") > 600]
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 70:
                long.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long
