"""Something that takes long -> a line of progress on stderr, once it has taken two seconds.

    with progress("lowering", total=3) as step:
        for name in names:
            step(name)  # named before it is done

On a terminal the line has a bar and the time so far; a task within a task is a line below it. All
of them are gone at the end. Elsewhere nothing is shown, unless `CODA_PROGRESS=1` asks for it: then
steps are lines of text, at most one every two seconds.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any

from coda.runtime import settings

PATIENCE = 2.0  # seconds before anything is shown, and between two lines of text

Step = Callable[[str], None]
_shown: ContextVar[Any] = ContextVar("shown", default=None)  # the display of the task around


def is_shown() -> bool:
    """Whether progress is shown at all. Raises CodaError for an unknown `CODA_PROGRESS`."""
    asked = settings.PROGRESS.get()
    return sys.stderr.isatty() if asked == "" else asked == "1"


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Step]:
    """Show a task that takes more than two seconds.

    Args:
        what: the task, in a word or two.
        total: the number of its steps, None if it is not known.

    Yields:
        A function to call with the name of each step, before it begins.
    """
    if not is_shown():
        yield _nothing
    elif not sys.stderr.isatty():
        yield _Lines(what, total).step
    elif _shown.get() is not None:
        with _task(_shown.get(), what, total) as step:
            yield step
    else:
        with _display() as display, _task(display, what, total) as step:
            yield step


def _nothing(_: str) -> None:
    """Nothing is shown."""


class _Lines:
    """Steps as lines of text."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.begun = self.said = monotonic()

    def step(self, name: str) -> None:
        self.done += 1
        now = monotonic()
        if now - self.said >= PATIENCE:
            self.said = now
            of = f" of {self.total}" if self.total is not None else ""
            text = f"coda: {self.what}, {self.done}{of}: {name} ({now - self.begun:.0f} s)"
            print(text, file=sys.stderr, flush=True)


@contextmanager
def _display() -> Iterator[Any]:
    """Bars on the terminal, from two seconds on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    name = TextColumn("{task.description}", markup=False)
    options: Any = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    display = Progress(name, *columns, console=Console(stderr=True), **options)
    timer = threading.Timer(PATIENCE, display.start)
    timer.daemon = True
    token = _shown.set(display)
    timer.start()
    try:
        yield display
    finally:
        _shown.reset(token)
        timer.cancel()
        timer.join()
        display.stop()


@contextmanager
def _task(display: Any, what: str, total: int | None) -> Iterator[Step]:
    """A line of a display."""
    task, begun = display.add_task(what, total=total), False

    def step(name: str) -> None:
        nonlocal begun
        display.update(task, advance=int(begun), description=f"{what}: {name}")
        begun = True

    try:
        yield step
    finally:
        display.remove_task(task)
