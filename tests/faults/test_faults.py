"""Each script shows one fault that users met, says what is right, and exits with 1 if it is back."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = sorted(p for p in HERE.glob("*.py") if not p.name.startswith(("test_", "__")))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_fault_is_mended(script):
    done = subprocess.run(
        [sys.executable, script.name], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_script_says_what_is_right():
    for script in SCRIPTS:
        assert "ight" in script.read_text().split('"""')[1], script.name
