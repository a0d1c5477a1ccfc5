"""Progress on stderr: after two seconds, on a terminal or where it is asked for."""

import io
import sys
import time

import pytest

import coda
from coda.errors import CodaError
from coda.runtime import progress as module
from coda.runtime.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def three(names=("one", "two", "three"), pause=0.0):
    with progress("a task", 3) as step:
        for name in names:
            step(name)
            time.sleep(pause)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)


def test_nothing_is_shown_where_nobody_looks(capsys, impatient):
    three(pause=0.1)
    assert capsys.readouterr() == ("", "")


def test_lines_where_they_are_asked_for(capsys, impatient, monkeypatch):
    monkeypatch.setenv("CODA_PROGRESS", "1")
    three(pause=0.1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "coda: a task, 2 of 3: two (0 s)",
        "coda: a task, 3 of 3: three (0 s)",
    ]


def test_what_is_quick_is_not_shown(capsys, monkeypatch):
    monkeypatch.setenv("CODA_PROGRESS", "1")
    three()
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    three()
    assert "a task" not in terminal.getvalue()


def test_a_terminal_sees_tasks_within_tasks_and_keeps_none(impatient, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress("outside", 2) as step:
        step("first")
        three(pause=0.3)
        step("second")
    shown = terminal.getvalue()
    assert "outside: first" in shown
    assert "a task: two" in shown
    assert shown.endswith("\x1b[2K\x1b[?25h\r")  # the lines are erased
    assert "[progress" not in shown
    monkeypatch.setenv("CODA_PROGRESS", "0")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    three(pause=0.1)
    assert terminal.getvalue() == ""


def test_an_error_ends_the_display(impatient, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())

    def fails():
        with progress("a task"):
            time.sleep(0.1)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    with progress("the next") as step:
        step("one")


def test_a_lowering_shows_its_choices(capsys, monkeypatch):
    monkeypatch.setenv("CODA_PROGRESS", "1")
    monkeypatch.setattr(module, "PATIENCE", 0.0)

    @coda.block
    def mlp(x: coda.Tensor["M D"], g: coda.Tensor["D"], w: coda.Tensor["F D"]):
        return coda.silu(coda.rms_norm(x, g) @ w.T)

    mlp.lower("sm_90a", {"M": 64, "D": 64, "F": 96})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("coda: lowering mlp, 1: laws and placement")
    assert lines[1].startswith("coda: lowering mlp, 2: choice 2")


def test_the_switch(monkeypatch):
    monkeypatch.setenv("CODA_PROGRESS", "loud")
    with pytest.raises(CodaError, match="CODA_PROGRESS is one of 0, 1"), progress("a task"):
        pass
