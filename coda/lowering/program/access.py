"""How a kernel reads a tensor beside its main operands: which elements belong to which point.

A point of a kernel is one row and one column, or one row and a pair of columns (two *lanes*). An
`Access` maps a point to elements of the tensor. Where a kernel has M rows and N columns, a
`Periodic(64)` of a kernel of single columns is a matrix [M, 64]; the element at row i and column j
is [i, j % 64].

`PointAccess` is what a `Load` reads at its point, `FoldAccess` is what a `Statistic` folds. There
are no others: code that tells members apart does so by `match` and `assert_never`, so that a type
checker lists what a new member has to be added to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple


class Span(NamedTuple):
    """The columns [first, first + width) of a kernel."""

    first: int
    width: int

    @property
    def end(self) -> int:
        """The column behind the last."""
        return self.first + self.width


@dataclass(frozen=True)
class RowVector:
    """[N], one element for each column, the same in every row.

    In a kernel of pairs the two columns of a pair are neighbours: [N / 2, 2], contiguous.
    """

    word: ClassVar[str] = "row"
    varies_with_row: ClassVar[bool] = False
    varies_with_column: ClassVar[bool] = True

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return 1, points * lanes


@dataclass(frozen=True)
class ColumnVector:
    """[M] or [M, 1], one element for each row, the same in every column."""

    word: ClassVar[str] = "col"
    varies_with_row: ClassVar[bool] = True
    varies_with_column: ClassVar[bool] = False

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return rows, 1


@dataclass(frozen=True)
class Tile:
    """[M, N], one element for each row and column.

    In a kernel of pairs its columns are in the order of the buffer: the two columns of a pair are
    as far apart as the epilogue says.

    Attributes:
        span: the columns of the kernel that it has, where it has no others: [M, span.width].
            Row-wise kernels alone have it.
    """

    span: Span | None = None
    word: ClassVar[str] = "tile"
    varies_with_row: ClassVar[bool] = True
    varies_with_column: ClassVar[bool] = True

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return rows, self.span.width if self.span else points * lanes


@dataclass(frozen=True)
class Periodic:
    """[M, period], one element for each row and point, repeating every `period` points.

    A table of RoPE is [M, d / 2] in a kernel of pairs; it repeats every d columns.
    """

    period: int
    word: ClassVar[str] = "periodic"
    varies_with_row: ClassVar[bool] = True
    varies_with_column: ClassVar[bool] = True

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return rows, self.period


@dataclass(frozen=True)
class Grouped:
    """[M, points / size], one element for each aligned group of `size` points of a row.

    A statistic of each head is one. Row-wise kernels alone read it.
    """

    size: int
    word: ClassVar[str] = "grouped"
    varies_with_row: ClassVar[bool] = True
    varies_with_column: ClassVar[bool] = True

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return rows, points // self.size


@dataclass(frozen=True)
class Scalar:
    """[] or [1], one number."""

    word: ClassVar[str] = "scalar"
    varies_with_row: ClassVar[bool] = False
    varies_with_column: ClassVar[bool] = False

    def shape(self, rows: int, points: int, lanes: int) -> tuple[int, int]:
        """Rows and columns in memory, of a kernel of rows × points × lanes."""
        return 1, 1


@dataclass(frozen=True)
class Line:
    """[M, any number], values that earlier kernels stored for each row; each row is reduced."""

    word: ClassVar[str] = "line"


@dataclass(frozen=True)
class Partial:
    """Partials of a split reduction, [M, parts] for each of the `planes` of its monoid."""

    planes: int
    word: ClassVar[str] = "partial"


PointAccess = RowVector | ColumnVector | Tile | Periodic | Grouped | Scalar
FoldAccess = Line | Partial
Access = PointAccess | FoldAccess
