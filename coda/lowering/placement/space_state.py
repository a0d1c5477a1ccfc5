"""The columns of one kernel, and what is known of them: values, statistics, segments, operands.

Input are questions about shapes and about values that `columns` computed; output are columns, rows
and segments as numbers. Nothing here computes a node. An `attempt` that ends in Refused takes back
what it recorded:

    rows M, 128 columns; parts of concat(a [M, 32], b [M, 96])  ->  a at (0, 32), b at (32, 96)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Self

import numpy as np

from coda.ir.dims import ONE, Dim, Shape, broadcast, product
from coda.ir.graph import (
    Concat,
    Node,
    Reduce,
)
from coda.lowering.placement.arrays import constant
from coda.lowering.placement.values import (
    MOST_COLUMNS,
    Refused,
    Value,
    beside,
    first_column,
)
from coda.lowering.program.access import RowStep
from coda.lowering.program.body import Ints, Spread
from coda.lowering.program.epilogue import Expr, Literal, Load, RowOrder, leaves, stat_names

Segment = tuple[int, int]  # columns of a kernel: (first, number)
MOST_NUMBERS = 64  # numbers of a row that a kernel has apart, at most


@lru_cache(maxsize=100_000)
def at_sizes(dim: Dim, sizes: tuple[tuple[str, int], ...]) -> Dim:
    """A dim with the sizes of some symbols substituted."""
    return dim.substitute({symbol: Dim.of(size) for symbol, size in sizes})


def is_number(node: Node) -> bool:
    """Whether all axes of a node are 1."""
    return all(d == ONE for d in node.shape)


@dataclass(frozen=True)
class GroupStatistic:
    """A reduction of a per-column expression over aligned groups of `size` columns (GEMM)."""

    name: str
    fn: str
    expr: Expr
    size: int


@dataclass(frozen=True)
class RowStatistic:
    """A reduction in a row-wise kernel of `value`, which is 0 outside its `count` columns.

    Attributes:
        node, value: the reduction, and what it reduces.
        count: the number of columns with values.
        group: the width of the groups that are reduced separately; 0 for the whole row.
        groups: the number of wide groups of the row, of which these columns are one.
    """

    node: Reduce
    value: Value
    count: int
    group: int = 0
    groups: int = 1


@dataclass
class SpaceState:
    """The columns of one kernel, without the computation of values.

    Attributes:
        width, rows: the numbers of columns and of rows.
        sizes: the sizes of all symbols on which columns may depend.
        leaf: node -> name under which the kernel loads it; None if it does not.
        weights: the weights of the graph, known before the call.
        positions: nodes that follow from where an element is.
        accumulators: contraction of this GEMM -> its first column.
        whole_rows: whether the kernel is row-wise, so that it can read its own row statistics.
        apart: whether it has one column, and each of a few numbers of a row as a value of the row.
        batched: whether its rows are those of the matrices of a batch, one matrix after another.
        reordered: node that it stores with rows in another order -> the node that has the same
            elements in the kernel's order, and that order.
        segmented: whether the parts of a concatenation are each loaded at their own columns.
        values, refused: node -> its value; node that must not be computed here -> the reason.
        exprs, index, sources: expressions by number, their numbers, and sources of row leaves.
        groups, statistics: of column groups in a GEMM; of rows or groups in a row-wise kernel.
        folds: name -> reduction whose partials this kernel folds.
        lines: name -> reduction over rows of values that earlier kernels stored per row.
        leads: the row axes of computed nodes, such as [B, S] for B·S rows.
        spread: name -> expansion of an operand that depends on some of the row axes only.
        shifts: name of an operand of which other rows are read -> their distance.
        tables: source that depends on the rows -> its number of columns.
        segment, segments: the columns at which narrower matrices are loaded now; all so far.
        offsets: operand narrower than the kernel -> its first column.
        sunk: values that are summed over the rows.
        folded: the reductions of `folds`, and the first planes of those with two.
    """

    width: int
    rows: Dim
    sizes: Mapping[str, int]
    leaf: Callable[[Node], str | None] = lambda node: None
    weights: Collection[Node] = ()
    positions: Collection[Node] = ()
    accumulators: Mapping[Node, int] = field(default_factory=dict[Node, int])
    whole_rows: bool = False
    batched: bool = False
    apart: bool = False
    reordered: dict[Node, tuple[Node, RowOrder]] = field(
        default_factory=dict[Node, tuple[Node, RowOrder]]
    )
    segmented: bool = True
    values: dict[Node, Value] = field(default_factory=dict[Node, Value])
    refused: dict[Node, str] = field(default_factory=dict[Node, str])
    exprs: list[Expr] = field(default_factory=list[Expr])
    index: dict[Expr, int] = field(default_factory=dict[Expr, int])
    sources: list[Node] = field(default_factory=list[Node])
    groups: list[GroupStatistic] = field(default_factory=list[GroupStatistic])
    statistics: dict[str, RowStatistic] = field(default_factory=dict[str, RowStatistic])
    folds: dict[str, Node] = field(default_factory=dict[str, Node])
    lines: dict[str, Reduce] = field(default_factory=dict[str, Reduce])
    leads: dict[Shape, None] = field(default_factory=dict[Shape, None])
    spread: dict[str, Spread] = field(default_factory=dict[str, Spread])
    shifts: dict[str, tuple[RowStep, ...]] = field(default_factory=dict[str, tuple[RowStep, ...]])
    tables: dict[Node, int] = field(default_factory=dict[Node, int])
    segment: Segment | None = None
    segments: dict[Segment, None] = field(default_factory=dict[Segment, None])
    offsets: dict[str, int] = field(default_factory=dict[str, int])
    sunk: list[Value] = field(default_factory=list[Value])
    folded: set[Node] = field(default_factory=set[Node])

    def emptied(self) -> Self:
        """The same columns before anything is computed, but for what is folded from partials."""
        return replace(
            self,
            values={n: v for n, v in self.values.items() if n in self.folded},
            exprs=list(self.exprs),
            index=dict(self.index),
            sources=[],
            groups=[],
            statistics={},
            leads=dict(self.leads),
            spread={},
            shifts={},
            tables={},
            segment=None,
            segments=dict(self.segments),
            offsets={},
            sunk=[],
        )

    def order_of(self, node: Node) -> RowOrder | None:
        """The order of the rows of a stored node; None for the kernel's own."""
        return self.reordered[node][1] if node in self.reordered else None

    def size(self, dim: Dim) -> int:
        """The size of a column axis. Raises Refused if it depends on the number of rows."""
        if dim.symbols - self.sizes.keys():
            raise Refused("its columns are rows, of which a call has any number")
        return dim.size(self.sizes)

    @contextmanager
    def inside(self, segment: Segment | None) -> Generator[None]:
        """Inside, load matrices that are as wide as the segment at its columns. None: no change."""
        before = self.segment
        self.segment = segment or before
        try:
            yield
        finally:
            self.segment = before

    def parts(self, node: Node) -> list[tuple[Node, Segment | None]]:
        """The operands of a node; those of a concatenation along the columns with their segment."""
        plain: list[tuple[Node, Segment | None]] = [(o, None) for o in node.operands]
        if not (self.whole_rows and self.segmented and isinstance(node, Concat)):
            return plain
        axes = node.rank - self.split(node)
        first, count = self.segment or (0, self.width)
        if axes != -node.axis or self.size(product(node.shape[-axes:])) != count:
            return plain
        found: list[tuple[Node, Segment | None]] = []
        for arg in node.args:
            size = self.size(product(arg.shape[-axes:]))
            found.append((arg, (first, size)))
            self.segments.setdefault((first, size))
            first += size
        return found

    def matches(self, elements: Dim) -> bool:
        """Whether a matrix of so many elements has the kernel's width, or the segment's."""
        part = self.segment is not None and self.is_filled_by(elements, self.segment[1])
        return part or self.is_filled_by(elements)

    def is_filled_by(self, elements: Dim, width: int | None = None) -> bool:
        """Whether `elements` = rows · width, by default the kernel's width."""
        known = tuple(self.sizes.items())
        whole = at_sizes(self.rows, known) * (self.width if width is None else width)
        return at_sizes(elements, known) == whole

    def has_rows(self, node: Node) -> bool:
        """Whether some leading axes of a node are the rows."""
        return any(product(node.shape[:i]) == self.rows for i in range(node.rank + 1))

    @contextmanager
    def scratch(self) -> Generator[None]:
        """Inside there is no segment, and expressions that get numbers are discarded at the end."""
        known, segment = len(self.exprs), self.segment
        self.segment = None
        try:
            yield
        finally:
            self.segment = segment
            for expr in self.exprs[known:]:
                del self.index[expr]
            del self.exprs[known:]

    @contextmanager
    def attempt(self, kept: Callable[[Node], bool]) -> Generator[None]:
        """Roll back the values computed inside if Refused is raised, except for `kept` nodes."""
        nodes, offsets = set(self.values), dict(self.offsets)
        statistics, segments = dict(self.statistics), dict(self.segments)
        groups, tables = list(self.groups), set(self.tables)
        try:
            yield
        except Refused:
            for node in set(self.values) - nodes:
                if not kept(node):
                    del self.values[node]
            stay = set(self.values) - nodes
            self.statistics = self.needed(statistics, stay)
            self.groups = self.read_groups(groups, stay)
            self.offsets, self.segments = offsets | self.offsets_of(stay), segments
            tables |= self.sources_of(stay)
            self.tables = {n: c for n, c in self.tables.items() if n in tables}
            raise

    def values_with(self, nodes: Iterable[Node]) -> list[Value]:
        """The values of some nodes, of the sinks, and of the statistics."""
        own = [self.values[n] for n in nodes]
        return [*own, *self.sunk, *(s.value for s in self.statistics.values())]

    def sources_of(self, nodes: Iterable[Node]) -> set[Node]:
        """The vectors and tables that some nodes, sinks or statistics read."""
        values = self.values_with(nodes)
        return {self.sources[s] for v in values for s in v.sources}

    def needed(
        self, before: Mapping[str, RowStatistic], nodes: Iterable[Node]
    ) -> dict[str, RowStatistic]:
        """The statistics of `before`, and those on which some nodes or sinks depend."""
        values = [self.values[n] for n in nodes] + self.sunk
        found = dict(before)
        for name, one in reversed(self.statistics.items()):
            if name in before or name in stat_names(self.expressions(values)):
                found[name] = one
                values.append(one.value)
        return {name: found[name] for name in self.statistics if name in found}

    def read_groups(
        self, before: Sequence[GroupStatistic], nodes: Iterable[Node]
    ) -> list[GroupStatistic]:
        """The group statistics of `before`, and those that some nodes read."""
        names = {g.name for g in before}
        if len(self.groups) > len(before):
            names |= stat_names(self.expressions([self.values[n] for n in nodes]))
        return [g for g in self.groups if g.name in names]

    def offsets_of(self, nodes: Iterable[Node]) -> dict[str, int]:
        """The offsets of the narrower matrices that some nodes, sinks or statistics load."""
        values = self.values_with(nodes)
        read = {e.operand for e in leaves(self.expressions(values)) if isinstance(e, Load)}
        return {name: first for name, first in self.offsets.items() if name in read}

    def expressions(self, values: Iterable[Value]) -> list[Expr]:
        """The distinct expressions of each value."""
        return [self.exprs[i] for v in values for i in v.numbers]

    def place_of(self, value: Value) -> int:
        """The column of a value's first element. Raises Refused if columns are not consecutive."""
        if value.count == self.width:
            return 0
        first = first_column(value)
        if first < 0 and self.segment is not None and self.segment[1] == value.count:
            first = self.segment[0]
        if first < 0 or first + value.count > self.width:
            raise Refused("its columns are not those of the kernel, one by one")
        return first

    def widened(self, value: Value) -> Value:
        """A value padded with 0 to the kernel's width. Raises Refused, as `place_of`."""
        first = self.place_of(value)
        rest = self.width - first - value.count
        zeros = [self.at((n,), Literal(0.0), None) for n in (first, rest)]
        return beside([v for v in (zeros[0], value, zeros[1]) if v.count] or [value])

    @property
    def most_columns(self) -> int:
        """How many columns of a row an element may read: two lanes, or what swaps reach."""
        return MOST_COLUMNS if self.whole_rows else 2

    @property
    def group_size(self) -> int:
        """The width of the column groups of statistics; 0 if there are none."""
        sizes = [g.size for g in self.groups]
        return next(iter(sizes + [s.group for s in self.statistics.values() if s.group]), 0)

    @property
    def widths(self) -> set[int]:
        """The numbers of columns of what is computed here: all, one for each group, one a row."""
        groups = {self.width // self.group_size} if self.group_size else set[int]()
        return {self.width, 1} | groups | {s.groups for s in self.statistics.values()}

    def id(self, expr: Expr) -> int:
        """The number of an expression."""
        if expr not in self.index:
            self.index[expr] = len(self.exprs)
            self.exprs.append(expr)
        return self.index[expr]

    def split(self, node: Node) -> int:
        """The number of leading axes of a node that are the rows. Raises Refused if none are."""
        if self.rows != ONE and is_number(node):
            return 0
        total = ONE
        for i in range(node.rank + 1):
            if total == self.rows and (i or self.rows == ONE):
                if (
                    i == node.rank
                    and i > 1
                    and node.shape[0] == ONE != self.rows
                    and self.width > 1
                ):
                    raise Refused("its last axis may be rows or columns of the kernel")
                self.leads.setdefault(node.shape[:i])
                return i
            if i < node.rank:
                total = total * node.shape[i]
        for lead in self.leads:
            mine = node.shape[: len(lead)]
            if len(mine) == len(lead) and broadcast(mine, lead) == lead:
                return len(lead)
        raise Refused("its leading axes are not the rows of the kernel")

    def over_rows(self, name: str, node: Node, columns: int) -> bool:
        """Whether an operand depends on the rows; one of some row axes is recorded in `spread`."""
        axes = node.shape[: max(0, node.rank - columns)]
        if product(axes) in (ONE, self.rows):
            return product(axes) != ONE
        fitting = [lead for lead in self.leads if broadcast(axes, lead) == lead]
        if len(fitting) != 1:
            raise Refused("an operand depends on some of the row axes only")
        found = Spread(fitting[0], min(columns, node.rank))
        if self.spread.setdefault(name, found) != found:
            raise Refused("an operand is spread over the rows in two ways")
        return True

    def columns(self, node: Node) -> tuple[int, ...]:
        """The sizes of the node's column axes."""
        return tuple(self.size(d) for d in node.shape[self.split(node) :])

    def anchored(self, name: str) -> int:
        """The first column of a matrix of the segment's width. Raises Refused if it has another."""
        assert self.segment is not None
        if self.offsets.setdefault(name, self.segment[0]) != self.segment[0]:
            raise Refused("a matrix is read at two places of the kernel's columns")
        return self.offsets[name]

    def at(self, shape: tuple[int, ...], expr: Expr, slots: Ints | None) -> Value:
        count = prod(shape)
        none = np.zeros((count, 0), np.int64)
        return Value(
            shape,
            constant(count, self.id(expr)),
            none if slots is None else slots.reshape(-1, 1),
            np.zeros((count, 0, 2), np.int64),
            constant(count, -1),
        )
