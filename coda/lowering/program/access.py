"""`Access`: the index map from an element of a kernel to an element of an epilogue operand.

A kernel of M rows and N columns computes its body at each *point*: an element (row i, column j), or
a column pair (row i, two columns, the *lanes* 0 and 1). So a row has N points, or N / 2 of pairs.
Example: in a kernel of single columns, a `Periodic(64)` operand is a matrix [M, 64], and the
element (i, j) loads [i, j % 64].

A `Load` reads a `PointAccess`; a `Statistic` folds a `FoldAccess`. The unions are closed: code
distinguishes members by `match` and `assert_never`, so that a type checker lists all places that a
new member has to be added to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from coda.ir.dims import Dim

T = TypeVar("T", int, NDArray[np.int64], Tensor)

SHIFTED = "@"  # in the name of a shifted or swapped operand, behind that of what is in memory


def swapped(column: T, swaps: tuple[int, ...]) -> T:
    """The column at which an operand with such swaps (`Tile`) is read for a column, or for many."""
    for distance in swaps:
        column = column + distance - column // distance % 2 * (2 * distance)
    return column


class Span(NamedTuple):
    """The columns [first, first + width) of a kernel."""

    first: int
    width: int

    @property
    def end(self) -> int:
        """The first column after the span."""
        return self.first + self.width


@dataclass(frozen=True)
class RowVector:
    """[N], one element per column, the same in every row.

    In a kernel of column pairs it is [N / 2, 2], contiguous: the columns of a pair are adjacent.
    """

    word: ClassVar[str] = "row"
    varies_with_row: ClassVar[bool] = False
    varies_with_column: ClassVar[bool] = True

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return 1, points * lanes


@dataclass(frozen=True)
class ColumnVector:
    """[M] or [M, 1], one element per row, the same in every column."""

    word: ClassVar[str] = "col"
    varies_with_row: ClassVar[bool] = True
    varies_with_column: ClassVar[bool] = False

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return rows, 1


@dataclass(frozen=True)
class Tile:
    """[M, N], one element per row and column.

    In a kernel of column pairs its columns keep the order of the buffer: the two columns of a pair
    are `Epilogue.distance` apart.

    Attributes:
        span: the kernel's columns that the operand [M, span.width] covers; None for all of them.
            Only row-wise kernels have spans.
        swaps: distances, the largest first, each a multiple of twice the next. Of neighbouring
            blocks of so many columns each is read in the other's place: for a distance of 2,
            columns 0 … 3 read 2 3 0 1. Row-wise kernels of single columns have swaps.
    """

    span: Span | None = None
    swaps: tuple[int, ...] = ()
    word: ClassVar[str] = "tile"
    varies_with_row: ClassVar[bool] = True
    varies_with_column: ClassVar[bool] = True

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return rows, self.span.width if self.span else points * lanes


@dataclass(frozen=True)
class Alternating:
    """[M, 2 N], two neighbouring elements of 16 bits for each row and column: lanes 0 and 1.

    Gate and up in alternating columns are one, in a GEMM of single columns (its kernel reads and
    writes both as a word of 32 bits).
    """

    word: ClassVar[str] = "alternating"
    varies_with_row: ClassVar[bool] = True
    varies_with_column: ClassVar[bool] = True

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return rows, 2 * points * lanes


@dataclass(frozen=True)
class Periodic:
    """[M, period], one element per row and point, repeated every `period` points.

    RoPE's table is [M, d / 2] in a kernel of column pairs: it repeats every d / 2 pairs, which are
    the d columns of one head. In a row-wise kernel of single columns neighbours may share an
    element, and blocks of points be swapped: point p reads `swapped(p, swaps)` // each % period.

    Attributes:
        period: the number of elements.
        each: the neighbouring points that share one, a power of two.
        swaps: as of `Tile`.
    """

    period: int
    each: int = 1
    swaps: tuple[int, ...] = ()
    word: ClassVar[str] = "periodic"
    varies_with_row: ClassVar[bool] = True
    varies_with_column: ClassVar[bool] = True

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return rows, self.period


@dataclass(frozen=True)
class Grouped:
    """[M, points / size], one element per aligned group of `size` points of a row.

    A per-head statistic is one. Only row-wise kernels read it.
    """

    size: int
    word: ClassVar[str] = "grouped"
    varies_with_row: ClassVar[bool] = True
    varies_with_column: ClassVar[bool] = True

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return rows, points // self.size


@dataclass(frozen=True)
class RowStep:
    """The distance of two rows along one axis of the rows, as that of the tokens of a sequence.

    A row's index along the axis is row // inner % size.

    Attributes:
        by: the row that is read has an index that is so much less.
        size: of the axis.
        inner: the rows for which the index is the same: the product of the axes after it.
    """

    by: Dim
    size: Dim
    inner: Dim

    def __str__(self) -> str:
        return f"{-self.by}" + (f" of {self.inner} rows" if self.inner.constant != 1 else "")


@dataclass(frozen=True)
class Shifted:
    """The element of another row, at a fixed distance; 0 where an axis has no such row.

    A token shift reads [B · S, D] one row before, and sequences do not mix: the first row of each
    reads 0. Only row-wise kernels read other rows than their own.

    Attributes:
        of: the access to that row.
        steps: the distance along each axis of the rows.
    """

    of: Tile | ColumnVector
    steps: tuple[RowStep, ...]
    word: ClassVar[str] = "shifted"
    varies_with_row: ClassVar[bool] = True

    @property
    def varies_with_column(self) -> bool:
        """Whether the columns of a row differ."""
        return self.of.varies_with_column

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return self.of.shape(rows, points, lanes)


@dataclass(frozen=True)
class OneElement:
    """[] or [1], one element for the whole kernel."""

    word: ClassVar[str] = "scalar"
    varies_with_row: ClassVar[bool] = False
    varies_with_column: ClassVar[bool] = False

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return 1, 1


@dataclass(frozen=True)
class Line:
    """[M, any number], values that earlier kernels stored per row; each row is reduced."""

    word: ClassVar[str] = "line"


@dataclass(frozen=True)
class Partial:
    """Partials of a split reduction: `planes` float32 matrices [M, parts]."""

    planes: int
    word: ClassVar[str] = "partial"


PointAccess = (
    RowVector | ColumnVector | Tile | Alternating | Periodic | Grouped | Shifted | OneElement
)
FoldAccess = Line | Partial
Access = PointAccess | FoldAccess


def row_of(access: Access) -> Access:
    """The access to the row that a shifted operand reads; any other access itself."""
    return access.of if isinstance(access, Shifted) else access
