"""The catalogue of errors: each says where, what was found, and what would work."""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType

import torch

_PACKAGE = str(Path(__file__).parent)
_COMMAND_LINE = str(Path(__file__).parent / "cli.py")
_SKIPPED = (_PACKAGE, str(Path(torch.__file__).parent), contextlib.__file__, "<string>")


@dataclass(frozen=True)
class Where:
    """A place in the user's source: file, line (from 1) and a range of columns (from 0).

    `calls` are the (file, line) pairs of the user's functions that called it, innermost first: a
    function that a block calls twice gives two places.
    """

    file: str
    line: int
    column: int = 0
    end_column: int = 0
    calls: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def caller() -> Where | None:
        """The innermost expression outside coda and torch that is being evaluated now.

        None if there is no user code: the command line was called.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
            frame = None if frame.f_code.co_filename == _COMMAND_LINE else frame.f_back
        return None if frame is None else Where.of(frame, frame.f_lasti)

    @staticmethod
    def of(frame: FrameType, instruction: int) -> Where:
        """The expression that an instruction of a frame evaluates."""
        positions = next(islice(frame.f_code.co_positions(), instruction // 2, None))
        line, end_line, column, end = positions
        last = end if end_line == line else None
        calls = tuple(_user_lines(frame.f_back))
        return Where(frame.f_code.co_filename, line or 0, column or 0, last or 0, calls)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def is_ours(self) -> bool:
        """Whether the place is in coda or torch, not in the user's files."""
        return self.file.startswith(_SKIPPED)

    def snippet(self) -> str:
        """The source line with the range underlined, in the format of rustc."""
        text = linecache.getline(self.file, self.line).rstrip()
        head = f"  --> {self.file}:{self.line}:{self.column + 1}"
        if not text:
            return head
        bar = " " * len(str(self.line))
        end = max(self.end_column, self.column + 1) if self.end_column else len(text)
        mark = " " * self.column + "^" * max(1, end - self.column)
        return f"{head}\n{bar} |\n{self.line} | {text}\n{bar} | {mark}"


def _user_lines(frame: FrameType | None) -> Iterator[tuple[str, int]]:
    """Lines of the callers, up to coda's call of the traced function."""
    while frame is not None and not frame.f_code.co_filename.startswith(_SKIPPED):
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


class CodaError(Exception):
    """A mistake that the user can correct: message, place, what was found, and what would work.

    Attributes:
        message: one sentence.
        found: the shapes, dtypes or values that were found, or "".
        help: what to write instead.
        where: the place in the user's source, or None.
    """

    def __init__(
        self, message: str, *, found: str = "", help: str = "", where: Where | None = None
    ) -> None:
        self.message, self.found, self.help = message, found, help
        self.where = where or Where.caller()
        lines = [message]
        if self.where is not None:
            lines.append(self.where.snippet())
        if found:
            lines.append(f"found: {found}")
        if help:
            lines.append(f"help: {help}")
        super().__init__("\n".join(lines))


class Reason(str):
    """Why something is left to torch, as a string; "" if it is not.

    Attributes:
        takes: what it would take to change that, or "".
    """

    takes: str

    def __new__(cls, why: str, takes: str = "") -> Reason:
        found = super().__new__(cls, why)
        found.takes = takes
        return found


class ShapeError(CodaError):
    """Shapes do not fit together."""


class DtypeError(CodaError):
    """Element types do not fit together, or an operation does not accept them."""


class DimError(CodaError):
    """A dim is unknown, has no size, or has two different sizes."""


class TraceError(CodaError):
    """The block contains an operation that cannot be written as a graph."""


class TextError(CodaError):
    """A `.coda` text cannot be read."""


class UnsupportedError(CodaError):
    """A feature that coda does not support."""


class ArchError(CodaError):
    """An architecture, tile configuration or device that is unknown, or is not available."""


class CallError(CodaError):
    """A compiled block was called with tensors that do not fit it."""


class InternalError(CodaError):
    """A broken invariant of coda itself: please report it."""
