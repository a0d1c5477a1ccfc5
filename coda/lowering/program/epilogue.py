"""The scalar program of one kernel: what is computed at one element, and where it goes.

A GEMM's epilogue and a row kernel are the same thing here: expressions at a *point*, which is one
row and one column, or one row and a *pair* of columns. Leaves are the accumulator, loads and
statistics; results are stores and sinks. `columns` makes it from a kernel of the Program, and the
emitters turn it into CuTe DSL.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from coda.ir.scalars import SCALARS
from coda.ir.types import DType
from coda.lowering.program.access import Access, Line, Partial, Span, Tile


@dataclass(frozen=True)
class Acc:
    """The float32 accumulator at this point: column lane 0, or lane 1 of a pair."""

    lane: int = 0


@dataclass(frozen=True)
class Load:
    """An operand at this point; `lane` picks the column of a pair (row and tile operands)."""

    operand: str
    lane: int = 0


@dataclass(frozen=True)
class Stat:
    """The finished value of a statistic of the row (or of the column group) of this point.

    `plane` picks a plane for monoids of several planes (the mean of "variance" is plane 0).
    A statistic named by its plane alone is the finished one: `plane=None`.
    """

    name: str
    plane: str | None = None


@dataclass(frozen=True, eq=False)
class Literal:
    """A number of the user's program. By repr, -0.0 is not 0.0, and NaN is NaN."""

    value: float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Literal) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


class _Interned(type):
    """Make equal calls one object, so that a value that is used twice is not two trees."""

    def __call__(cls, fn: str, args: tuple[Expr, ...]) -> Any:
        found = _interned.get((fn, args))
        if found is None:
            found = _interned[fn, args] = type.__call__(cls, fn, args)
        return found


_interned: weakref.WeakValueDictionary[tuple[str, tuple[Expr, ...]], Call] = (
    weakref.WeakValueDictionary()
)


@dataclass(frozen=True, eq=False, repr=False)
class Call(metaclass=_Interned):
    """A scalar function of `coda.ir.scalars`, by name; equality is identity.

    `depth` is the number of calls on the longest way down.
    """

    fn: str
    args: tuple[Expr, ...]
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        below = (a.depth for a in self.args if isinstance(a, Call))
        object.__setattr__(self, "depth", 1 + max(below, default=0))

    def __repr__(self) -> str:
        return f"<{self.fn} of {len(self.args)}, {self.depth} deep>"


Expr = Acc | Load | Stat | Literal | Call


@dataclass(frozen=True)
class Operand:
    """A tensor that the kernel reads beside its main operands: dtype, and which elements where."""

    name: str
    dtype: DType
    access: Access


@dataclass(frozen=True)
class Statistic:
    """A reduction over columns whose finished value the same kernel uses again.

    In a row kernel: over `width` columns of the row, `expr` being 0 in all others, or over each
    aligned group of `group` of them; of `expr`, or by folding `operand`
    (partials of a split reduction, `count` values in each part, the last part ragged). Partials of
    sums over rows, and lines of values of rows, have any number of parts: `count` and, over rows
    whose number a call tells, `width` are 0.
    In a GEMM's epilogue: over aligned groups of `group` columns of the tile (a head), taken from
    the accumulator before the main pass.
    """

    name: str
    monoid: str
    expr: Expr | None
    width: int
    group: int = 0
    operand: str | None = None
    count: int = 0


@dataclass(frozen=True)
class StoreExpr:
    """A matrix written element by element.

    `lanes` has one expression (element mode, or one value for each pair: half the columns) or two
    (pair mode, both columns). `split` tells where the two columns of a pair lie in the buffer:
    0 for adjacent, else the distance between them (half a head: column j and j + split).
    `narrow` marks a value without columns, [M, 1], of a row kernel; `span` one that has only some
    of its columns.
    """

    buffer: str
    dtype: DType
    lanes: tuple[Expr, ...]
    split: int = 0
    narrow: bool = False
    span: Span | None = None


@dataclass(frozen=True)
class SinkExpr:
    """A reduction over the columns, written as one partial per tile: planes of shape [M, parts].

    With `rows`, a sum over the rows instead: one partial for each tile of rows, [N, parts]. In a
    pass over rows, `split` and `span` say what they say of a store.

    `monoid` names a row of `coda.ir.monoids`, or is "pick": the element whose column equals the
    integer col operand `index` (a row without such a column is left as it was).
    In pair mode both lanes' expressions are reduced together.
    """

    buffer: str
    monoid: str
    lanes: tuple[Expr, ...]
    index: str | None = None
    rows: bool = False
    split: int = 0
    span: Span | None = None


@dataclass(frozen=True)
class Epilogue:
    """All that happens at a point, in the order: loads, statistics, stores and sinks.

    Attributes:
        distance: 0 where points are single columns; else how far apart the two columns of each
            point are, 1 for neighbours. Such columns are brought beside each other: the kernel has
            them in another order than its buffers have.
        operands: what is read, each once.
        statistics: what is reduced first.
        stores: what is written element by element.
        sinks: what is reduced into partials.
    """

    distance: int
    operands: tuple[Operand, ...]
    statistics: tuple[Statistic, ...]
    stores: tuple[StoreExpr, ...]
    sinks: tuple[SinkExpr, ...]

    @property
    def pair(self) -> bool:
        """Whether points are pairs of columns."""
        return self.distance > 0

    @property
    def lanes(self) -> int:
        """Columns of a point."""
        return 2 if self.distance else 1

    @property
    def split(self) -> int:
        """How far apart columns are that the kernel has side by side; 0 where none moved."""
        return self.distance if self.distance > 1 else 0

    @property
    def tiles(self) -> list[str]:
        """The operands that are matrices with an element for each row and column."""
        return [o.name for o in self.operands if isinstance(o.access, Tile)]

    @property
    def partials(self) -> list[str]:
        """The operands that are partials of split reductions, by the names of their buffers."""
        return [o.name for o in self.operands if isinstance(o.access, Partial)]

    @property
    def lines(self) -> list[str]:
        """The operands that are values of rows, to be reduced."""
        return [o.name for o in self.operands if isinstance(o.access, Line)]


def held(epilogue: Epilogue) -> int:
    """How many values an epilogue has at a point at once: matrices loaded or stored, and sums."""
    matrices = len(epilogue.tiles) + len(epilogue.stores)
    return matrices + sum(s.monoid != "pick" for s in epilogue.sinks)


def conditions(epilogue: Epilogue) -> int:
    """How many conditions an epilogue computes for an element."""
    lanes = [e for s in (*epilogue.stores, *epilogue.sinks) for e in s.lanes]
    return sum(SCALARS[c.fn].result == "bool" for c in calls(lanes) if c.fn in SCALARS)


def leaves(exprs: Iterable[Expr]) -> set[Expr]:
    """What expressions are made of at the bottom."""
    found: set[Expr] = set()
    seen: set[Expr] = set()
    stack = list(exprs)
    while stack:
        expr = stack.pop()
        if expr in seen:
            continue
        seen.add(expr)
        if isinstance(expr, Call):
            stack.extend(expr.args)
        else:
            found.add(expr)
    return found


def calls(exprs: Iterable[Expr]) -> list[Call]:
    """Each distinct call of some expressions, operands first."""
    found: dict[Call, None] = {}

    def visit(expr: Expr) -> None:
        if isinstance(expr, Call) and expr not in found:
            for arg in expr.args:
                visit(arg)
            found[expr] = None

    for expr in exprs:
        visit(expr)
    return list(found)


def stat_names(exprs: Iterable[Expr]) -> set[str]:
    """The statistics that expressions read."""
    return {e.name for e in leaves(exprs) if isinstance(e, Stat)}
