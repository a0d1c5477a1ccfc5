"""The corpus tells what moved between two trees, and nothing where nothing did."""

import re
import shutil

import pytest
import torch

from benchmarks import corpus

ENTRY = "random_005.small.sm_90a.inference"


def write(directory):
    threads = torch.get_num_threads()
    try:
        corpus.main(["write", str(directory), "--only", ENTRY])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora of one small block."""
    found = tmp_path_factory.mktemp("corpora")
    write(found / "old")
    write(found / "new")
    return found


@pytest.fixture
def written(corpora, tmp_path):
    """The same, to be changed."""
    shutil.copytree(corpora, tmp_path, dirs_exist_ok=True)
    return tmp_path / "old", tmp_path / "new"


def compared(capsys, *arguments):
    """The exit code of `compare`, and what it prints."""
    capsys.readouterr()
    code = corpus.main(["compare", *map(str, arguments)])
    return code, capsys.readouterr().out


def edit(directory, old, new):
    (file,) = directory.iterdir()
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_what_is_written_twice_is_equal(written, capsys):
    assert compared(capsys, *written) == (0, "1 of 1 entries are equal, 0 moved\n")
    (file,) = written[0].iterdir()
    sections = corpus.sections_of(file.read_text())
    assert [*sections] == ["facts", "graph", "normal", "program", "sources", "costs", "bits"]
    assert all(s.strip() for s in sections.values())


def test_what_moved_is_told_with_its_costs(written, capsys):
    edit(written[1], "launches ", "launches 1")
    edit(written[1], "program random", "program other")
    code, out = compared(capsys, *written)
    assert code == 1
    assert "0 of 1 entries are equal, 1 moved: facts 1, program 1" in out
    assert "worse" in out
    assert "-program random" in out
    assert "+program other" in out


def test_renames_are_applied_to_whole_names(written, capsys, tmp_path):
    (file,) = written[0].iterdir()
    module = re.search(r"^from (coda[.\w]+) import", file.read_text(), re.M)[1]
    edit(written[1], module, "coda.elsewhere")
    table = tmp_path / "renames"
    table.write_text(f"{module} coda.elsewhere\n")
    assert compared(capsys, *written)[0] == 1
    assert compared(capsys, *written, "--renames", table)[0] == 0
    table.write_text(f"{module[:-1]} coda.elsewher\n")
    assert compared(capsys, *written, "--renames", table)[0] == 1


def test_a_part_is_compared_with_the_whole(written, capsys):
    (file,) = written[0].iterdir()
    shutil.copy(file, file.with_name("other.txt"))
    assert compared(capsys, *written) == (
        1,
        f"1 of 2 entries are equal, 1 moved\n  other   only in {written[0]}\n",
    )
    assert compared(capsys, *written, "--subset")[0] == 0
    edit(written[1], "launches ", "launches 1")
    assert compared(capsys, *written, "--subset")[0] == 1


def test_an_error_is_an_entry(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "text_of", lambda _: 1 / 0)
    with pytest.raises(SystemExit, match="seam"):
        write(tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.read_text() == "==== error ====\nZeroDivisionError\ndivision by zero\n"
