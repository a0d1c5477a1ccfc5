"""Each stage alone, on a text of a few lines: one mechanism each, which the file is named after.

A file is the command that it shows, the block that goes in, and what comes out. `pytest
--update-golden` writes what comes out anew.
"""

import shlex
from pathlib import Path

import pytest

from coda.cli import main
from coda.lowering.stages import STAGES

FILES = sorted((Path(__file__).parent / "stages").glob("*.txt"))
MARK = "----\n"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_stage(file, tmp_path, capsys, request):
    text = file.read_text()
    given = text.partition(MARK)[0]
    coda, stage, name, *options = shlex.split(given.partition("\n")[0].removeprefix("# "))
    assert (coda, stage, name) == ("coda", "stage", file.stem.partition(".")[0])
    block = tmp_path / "block.coda"
    block.write_text(given)
    with pytest.raises(SystemExit) as stopped:
        main([stage, name, str(block), *options])
    found = capsys.readouterr()
    assert not stopped.value.code, found.err
    if request.config.getoption("--update-golden"):
        file.write_text(given + MARK + found.out)
    assert found.out == file.read_text().partition(MARK)[2]


def test_every_stage_has_one():
    assert {f.stem.partition(".")[0] for f in FILES} == STAGES.keys()
