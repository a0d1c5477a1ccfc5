"""A wheel, installed into a clean environment of each Python that is here, runs.

    python .ci/check_wheel.py dist/*.whl [PYTHON ...]

PYTHON is a name or a path, by default python3.11, python3.12 and python3.13, where they are. In
each environment, from an empty directory: the README's first block is explained, called on backend
reference, compiled and simulated, and `coda doctor` finds nothing missing. Ends with 1 where
something fails, and where no Python is found.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("python3.11", "python3.12", "python3.13")
CALL = """import sys
import coda
import torch
from readme import mlp
assert coda.__file__.startswith(sys.prefix), coda.__file__
shapes = (32, 64), (64,), (128, 64), (128, 64), (64, 128)
y = mlp(*(torch.randn(s).bfloat16() for s in shapes), backend="reference")
assert y.shape == (32, 64)
"""


def version(python: str) -> tuple[int, int] | None:
    """The version of a Python, None where there is none of this name."""
    try:
        ask = "import sys; print(*sys.version_info[:2])"
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor = map(int, done.stdout.split())
    return major, minor


def admitted(python: tuple[int, int]) -> bool:
    """Whether the project's `requires-python` has this Python."""
    text = (ROOT / "pyproject.toml").read_text()
    asked = re.findall(r"requires-python = \">=3\.(\d+),<3\.(\d+)\"", text)
    ((low, high),) = asked
    return (3, int(low)) <= python < (3, int(high))


def check(python: str, wheel: Path, where: Path) -> None:
    """Install and run. Raises CalledProcessError where a step fails."""
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    (where / "readme.py").write_text(snippet)
    (where / "call.py").write_text(CALL)
    run = lambda *words: subprocess.run(words, cwd=where, check=True)  # noqa: E731
    run(python, "-m", "venv", "env")
    pip = "env/bin/pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")
    run(*pip, "torch")
    run(*pip, str(wheel))
    run("env/bin/python", "call.py")
    run("env/bin/coda", "run", "readme.py:mlp", "--dims", "M=32,D=64,F=128", "--backend", "sim")
    run("env/bin/coda", "doctor")


def main(wheel: Path, pythons: Sequence[str]) -> int:
    """Check a wheel with each Python; the exit code."""
    checked, failed = 0, 0
    for python in pythons:
        found = version(python)
        if found is None or not admitted(found):
            print(f"{python}: {'not here' if found is None else 'the wheel is not for it'}")
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as where:
            try:
                check(python, wheel, Path(where))
                words = "passed"
            except subprocess.CalledProcessError as e:
                failed, words = failed + 1, f"FAILED: {' '.join(map(str, e.cmd))}"
        checked += 1
        print(f"{python}: {words}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{checked - failed} passed, {failed} failed")
    return int(failed > 0 or checked == 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:] or PYTHONS))
