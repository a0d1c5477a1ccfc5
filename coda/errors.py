"""The catalogue of errors: what the user did, where, what was found, and what would work."""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType

_PACKAGE = str(Path(__file__).parent)


@dataclass(frozen=True)
class Where:
    """A place in the user's source: file, line (from 1) and a range of columns (from 0)."""

    file: str
    line: int
    column: int = 0
    end_column: int = 0

    @staticmethod
    def caller() -> Where | None:
        """The innermost expression outside coda that is being evaluated now."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith((_PACKAGE, "<string>")):
            frame = frame.f_back
        if frame is None:
            return None
        positions = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
        line, end_line, column, end = positions
        last = end if end_line == line else None
        return Where(frame.f_code.co_filename, line or 0, column or 0, last or 0)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def snippet(self) -> str:
        """The source line with the range underlined, as rustc shows it."""
        text = linecache.getline(self.file, self.line).rstrip()
        head = f"  --> {self.file}:{self.line}:{self.column + 1}"
        if not text:
            return head
        bar = " " * len(str(self.line))
        end = max(self.end_column, self.column + 1) if self.end_column else len(text)
        mark = " " * self.column + "^" * max(1, end - self.column)
        return f"{head}\n{bar} |\n{self.line} | {text}\n{bar} | {mark}"


class CodaError(Exception):
    """A mistake that the user can mend: a message, where it is, what was found and what would work.

    Attributes:
        message: one sentence.
        found: the shapes, dtypes or values that were there, or "".
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


class ShapeError(CodaError):
    """Shapes do not fit together."""


class DtypeError(CodaError):
    """Element types do not fit together, or an operation does not take them."""


class DimError(CodaError):
    """A dim is unknown, has no size, or has two different sizes."""


class TraceError(CodaError):
    """The block does something that cannot be written as a graph."""


class TextError(CodaError):
    """A `.coda` text cannot be read."""


class UnsupportedError(CodaError):
    """Something that coda does not do."""


class ArchError(CodaError):
    """An architecture, tile configuration or device that does not fit."""


class CallError(CodaError):
    """A compiled block was called with tensors that do not fit it."""


class CacheError(CodaError):
    """The cache directory cannot be used."""


class InternalError(CodaError):
    """A broken invariant of coda itself: please report it."""
