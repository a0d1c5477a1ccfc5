"""`Epilogue`: the scalar program that a kernel runs at each element or column pair.

A GEMM's epilogue and a row-wise kernel have the same form: expressions at a *point*, which is one
element or one column pair of a row. Leaves are the accumulator, loads and statistics; results are
stores and sinks. The placement constructs it, and the emitters translate it into CuTe DSL.

    silu(x wᵀ + b) · r      load b row, r col;  y = mul(silu(add(acc, b)), r);  store y
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from coda.ir.dims import Dim, Shape, inverse
from coda.ir.monoids import PLAIN_SUM
from coda.ir.scalars import SCALARS
from coda.ir.types import DType
from coda.lowering.program.access import (
    Access,
    Alternating,
    ColumnVector,
    Line,
    Partial,
    Shifted,
    Span,
    Tile,
    row_of,
)


@dataclass(frozen=True)
class Acc:
    """The float32 accumulator: of the element, or of column `lane` (0 or 1) of a pair."""

    lane: int = 0


@dataclass(frozen=True)
class Load:
    """An operand's element at this point; `lane` is the pair's column, or the neighbour."""

    operand: str
    lane: int = 0


@dataclass(frozen=True)
class Stat:
    """The value of a statistic for this row, or for this row's column group.

    With `plane`, a plane of the monoid (of "variance", "mean"); with None, the finished value.
    """

    name: str
    plane: str | None = None


@dataclass(frozen=True)
class Position:
    """A number that follows from where the point is: row // inner % count, or its column.

    Attributes:
        axis: "row" or "column", of the kernel. Column numbers are those of single columns.
        inner: rows for which the number stays the same. In a kernel of rows [b, h, s] the number of
            the head has inner s and count h, that of the token 1 and s.
        count: it begins at 0 again after so many numbers; 0 if it never does.
    """

    axis: str
    inner: int = 1
    count: int = 0

    def __str__(self) -> str:
        inner = f"//{self.inner}" if self.inner > 1 else ""
        return self.axis + inner + (f"%{self.count}" if self.count else "")


@dataclass(frozen=True)
class Between:
    """Whether the row's index along an axis (`RowStep`) is at least `first` and below `end`."""

    first: Dim
    end: Dim
    size: Dim
    inner: Dim

    def __str__(self) -> str:
        inner = "" if self.inner.constant == 1 else f"//({self.inner})"
        return f"row{inner}%({self.size}) in [{self.first}, {self.end})"


@dataclass(frozen=True, eq=False)
class Literal:
    """A constant. Compared by repr: -0.0 differs from 0.0, and NaN equals NaN."""

    value: float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Literal) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


class _InternedExpr(type):
    """Intern calls: equal calls are one object, so an expression is a graph with shared nodes."""

    def __call__(cls, fn: str, args: tuple[Expr, ...]) -> Any:
        found = _interned.get((fn, args))
        if found is None:
            found = _interned[fn, args] = type.__call__(cls, fn, args)
        return found


_interned: weakref.WeakValueDictionary[tuple[str, tuple[Expr, ...]], Call] = (
    weakref.WeakValueDictionary()
)


@dataclass(frozen=True, eq=False, repr=False)
class Call(metaclass=_InternedExpr):
    """A call of a scalar function of `coda.ir.scalars`, by name. Interned: equality is identity.

    `depth` is the number of calls on the longest path to a leaf.
    """

    fn: str
    args: tuple[Expr, ...]
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        below = (a.depth for a in self.args if isinstance(a, Call))
        object.__setattr__(self, "depth", 1 + max(below, default=0))

    def __repr__(self) -> str:
        return f"<{self.fn} of {len(self.args)}, {self.depth} deep>"


Expr = Acc | Load | Stat | Position | Between | Literal | Call


@dataclass(frozen=True)
class Operand:
    """A tensor that the body loads: its dtype in memory, and the access (shape and index map)."""

    name: str
    dtype: DType
    access: Access


@dataclass(frozen=True)
class Statistic:
    """A reduction over columns whose value the same kernel reads.

    In a row-wise kernel: of `expr` over `width` columns of the row (it is 0 in all others) or over
    each aligned group of `group` columns, or the fold of the partials in `operand`, each of `count`
    values, the last one perhaps of fewer. In a GEMM's epilogue: of the accumulator over each
    aligned group of `group` columns of the tile (a head), before the main pass over the tile.

    Attributes:
        name: by which `Stat` reads it.
        monoid: a row of `coda.ir.monoids`.
        expr: the reduced expression; None if `operand` is folded.
        width: the number of reduced values; 0 if only the call knows it.
        group: columns of a group; 0 for full rows.
        operand: the folded Partial or Line operand, by name.
        count: values per partial; 0 for partials of sums over rows and for lines.
    """

    name: str
    monoid: str
    expr: Expr | None
    width: int
    group: int = 0
    operand: str | None = None
    count: int = 0


@dataclass(frozen=True)
class RowOrder:
    """The order in which a buffer has the rows of a kernel, as a permutation of the rows' axes.

    Attributes:
        axes: the axes of the kernel's rows, outer to inner.
        order: for each axis of the buffer's rows, outer to inner, its number among `axes`.
    """

    axes: Shape
    order: tuple[int, ...]

    @property
    def inverse(self) -> tuple[int, ...]:
        """For each of `axes`, its number among the axes of the buffer's rows."""
        return inverse(self.order)


@dataclass(frozen=True)
class StoreExpr:
    """A matrix that is written element by element.

    Attributes:
        buffer: its name.
        dtype: the dtype in memory, to which float32 values are rounded.
        lanes: one expression (of an element; or one per column pair: half the columns), or two
            (columns of a pair, or Alternating neighbours); of a ColumnVector one per column.
        access: a Tile for [M, columns], whose span tells which of the kernel's columns it covers;
            Alternating for [M, 2 · columns]; a ColumnVector for [M, numbers of a row].
        rows: the order of the buffer's rows; None for the kernel's own.
    """

    buffer: str
    dtype: DType
    lanes: tuple[Expr, ...]
    access: Tile | Alternating | ColumnVector = Tile()  # noqa: RUF009, an immutable value
    rows: RowOrder | None = None

    @property
    def is_column(self) -> bool:
        """Whether it writes values of rows: one, or a few that are known apart."""
        return isinstance(self.access, ColumnVector)

    @property
    def span(self) -> Span | None:
        """The kernel's columns that it covers; None for all."""
        return self.access.span if isinstance(self.access, Tile) else None


@dataclass(frozen=True)
class ReduceColumns:
    """A reduction over columns: one float32 partial per tile of columns, planes [M, parts].

    Attributes:
        buffer: the name of the partials.
        monoid: a row of `coda.ir.monoids`.
        lanes: the reduced expressions; both columns of a pair are reduced together.
    """

    buffer: str
    monoid: str
    lanes: tuple[Expr, ...]


@dataclass(frozen=True)
class PickColumn:
    """One element of each row, [M] float32: the one whose column equals the row's index.

    Attributes:
        buffer: the name of the elements; rows without such a column stay unchanged.
        index: the integer column-vector operand, by name.
        lanes: the expressions to choose from; for a column pair, of both its columns.
    """

    buffer: str
    index: str
    lanes: tuple[Expr, ...]
    monoid: ClassVar[str] = "pick"


@dataclass(frozen=True)
class SumRows:
    """A sum over rows, or another reduction: one float32 partial per tile of rows, [N, parts].

    Attributes:
        buffer: the name of the partials.
        lanes: the reduced expressions, as for a store.
        span: in a row-wise kernel, the kernel's columns that it covers; None for all.
        within: the rows of a sequence, if each is summed alone: [sequences · N, parts].
        monoid: the reduction; in a row-wise kernel a sum.
        whole: whether a CTA sums a whole sequence: the buffer has the sums, [sequences · N, 1].
    """

    buffer: str
    lanes: tuple[Expr, ...]
    span: Span | None = None
    within: Dim | None = None
    monoid: str = PLAIN_SUM
    whole: bool = False


SinkExpr = ReduceColumns | PickColumn | SumRows


@dataclass(frozen=True)
class Epilogue:
    """The scalar program of a kernel, in this order: loads, statistics, stores and sinks.

    Attributes:
        distance: 0 for a kernel of single columns; otherwise the distance of the two columns of a
            pair in the buffers, 1 for adjacent ones. Inside the kernel a pair's columns are always
            adjacent, so the kernel's column order differs from that of its buffers.
        operands: the loaded tensors, each once.
        statistics: reductions that the expressions read; computed first.
        stores: matrices that are written element by element.
        sinks: reductions that are written as partials.
    """

    distance: int
    operands: tuple[Operand, ...]
    statistics: tuple[Statistic, ...]
    stores: tuple[StoreExpr, ...]
    sinks: tuple[SinkExpr, ...]

    @property
    def pair(self) -> bool:
        """Whether the body is computed per column pair."""
        return self.distance > 0

    @property
    def lanes(self) -> int:
        """Columns of a point: 1, or 2 for a column pair."""
        return 2 if self.distance else 1

    @property
    def split(self) -> int:
        """The distance of a pair's columns in the buffers; 0 if the kernel keeps their order."""
        return self.distance if self.distance > 1 else 0

    def apart(self, result: StoreExpr | SumRows) -> int:
        """The distance in its buffer of a result's two lanes; 0 for one lane, or adjacent ones."""
        return self.split if len(result.lanes) == 2 else 0

    @property
    def row_sums(self) -> list[SumRows]:
        """The sinks that sum over the rows."""
        return [s for s in self.sinks if isinstance(s, SumRows)]

    @property
    def tiles(self) -> list[str]:
        """The names of the operands with one element per row and column."""
        return [o.name for o in self.operands if isinstance(row_of(o.access), Tile)]

    @property
    def shifted(self) -> dict[str, Shifted]:
        """The operands of which other rows are read, by name."""
        return {o.name: o.access for o in self.operands if isinstance(o.access, Shifted)}

    @property
    def partials(self) -> list[str]:
        """The names of the operands that are partials, which are those of their buffers."""
        return [o.name for o in self.operands if isinstance(o.access, Partial)]

    @property
    def lines(self) -> list[str]:
        """The names of the operands with values per row that are reduced."""
        return [o.name for o in self.operands if isinstance(o.access, Line)]

    @property
    def tests(self) -> list[Between]:
        """The distinct tests of the row, in a fixed order."""
        return sorted((e for e in leaves(self.exprs) if isinstance(e, Between)), key=str)

    @property
    def results(self) -> list[Expr]:
        """The expressions of all stores and sinks."""
        return [e for s in (*self.stores, *self.sinks) for e in s.lanes]

    @property
    def exprs(self) -> list[Expr]:
        """All expressions: those of the results, then those of the statistics."""
        return [*self.results, *(s.expr for s in self.statistics if s.expr is not None)]

    def mapped(self, change: Callable[[Expr], Expr]) -> Epilogue:
        """The same with `change` of each expression."""

        def lanes(many: tuple[Expr, ...]) -> tuple[Expr, ...]:
            return tuple(map(change, many))

        return replace(
            self,
            statistics=tuple(replace(s, expr=s.expr and change(s.expr)) for s in self.statistics),
            stores=tuple(replace(s, lanes=lanes(s.lanes)) for s in self.stores),
            sinks=tuple(replace(s, lanes=lanes(s.lanes)) for s in self.sinks),
        )


def held(epilogue: Epilogue) -> int:
    """Values live at once at an element, for register pressure: tiles, stores, and sinks."""
    matrices = len(epilogue.tiles) + len(epilogue.stores)
    twice = (*epilogue.operands, *epilogue.operands, *epilogue.stores)
    matrices += sum(isinstance(x.access, Alternating) for x in twice)
    return matrices + sum(not isinstance(s, PickColumn) for s in epilogue.sinks)


def conditions(epilogue: Epilogue) -> int:
    """The number of predicates that an epilogue computes at an element."""
    return sum(SCALARS[c.fn].result == "bool" for c in calls(epilogue.results) if c.fn in SCALARS)


def rounds_to_halves(epilogue: Epilogue) -> bool:
    """Whether an epilogue's results contain a rounding to a dtype of 16 bits."""
    called = [SCALARS[c.fn] for c in calls(epilogue.results) if c.fn in SCALARS]
    return any(f.rounds_to is not None and f.rounds_to.bits == 16 for f in called)


def rewritten(change: Callable[[Expr], Expr | None]) -> Callable[[Expr], Expr]:
    """A function of expressions that replaces the outermost parts for which `change` has another.

    `change` returns None for a part that stays; its arguments are then looked at.
    """
    memo: dict[Expr, Expr] = {}

    def rewrite(expr: Expr) -> Expr:
        if expr not in memo:
            found = change(expr)
            if found is None:
                inner = isinstance(expr, Call)
                found = Call(expr.fn, tuple(map(rewrite, expr.args))) if inner else expr
            memo[expr] = found
        return memo[expr]

    return rewrite


def leaves(exprs: Iterable[Expr]) -> set[Expr]:
    """All leaves of some expressions."""
    seen: set[Expr] = set()
    stack = list(exprs)
    while stack:
        expr = stack.pop()
        if expr not in seen:
            seen.add(expr)
            stack.extend(expr.args if isinstance(expr, Call) else ())
    return {e for e in seen if not isinstance(e, Call)}


def calls(exprs: Iterable[Expr]) -> list[Call]:
    """Each distinct call in some expressions, arguments first."""
    found: dict[Call, None] = {}

    def visit(expr: Expr) -> None:
        if isinstance(expr, Call) and expr not in found:
            for arg in expr.args:
                visit(arg)
            found[expr] = None

    for expr in exprs:
        visit(expr)
    return list(found)


def positions(epilogue: Epilogue) -> list[Position]:
    """The distinct positions that an Epilogue reads, in a fixed order."""
    return sorted((e for e in leaves(epilogue.exprs) if isinstance(e, Position)), key=str)


def stat_names(exprs: Iterable[Expr]) -> set[str]:
    """The names of the statistics that expressions read."""
    return {e.name for e in leaves(exprs) if isinstance(e, Stat)}
