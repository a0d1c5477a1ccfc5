"""Values of a kernel's stores and sinks -> its Epilogue, column order, and packed row vectors.

If no element reads two columns, the kernel's points are single columns. Otherwise the points are
column pairs: all pairs must have the same distance in the buffers, and the kernel's columns (the
rows of its weight) are permuted so that the columns of a pair are adjacent.

RoPE of one head of 4 columns, whose arrays are at the head of `columns.py`:

    before, 4 elements:   expr     e1 e1 e2 e2          slots  [0 2] [1 3] [0 2] [1 3]
    after, 2 points:      columns  [0 2] [1 3]          lanes  (e1, e2) (e1, e2)

The distance is 2. Both points have the same two expressions, and point p loads cos[p] and sin[p] as
Periodic(2). The store has two lanes and split 2, so the buffer keeps its column order.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from coda.ir.dims import ONE, Dim, product
from coda.ir.graph import Node, Reduce, Slice
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import AT_MOST, CHOICE, SUM
from coda.ir.types import DType, f32
from coda.lowering.placement.columns import GROUPED, Space
from coda.lowering.placement.space_state import RowStatistic
from coda.lowering.placement.stores import Picked, Reduced, Sink, Store, Summed
from coda.lowering.placement.values import (
    LEAF,
    NO_LANE,
    UNALIKE,
    Refused,
    Value,
    beside,
    distinct_rows,
)
from coda.lowering.program.access import (
    Access,
    ColumnVector,
    Grouped,
    Line,
    Partial,
    Periodic,
    RowVector,
    Scalar,
    Span,
    Tile,
)
from coda.lowering.program.body import Body, Ints, Packed, Spread, paired_columns
from coda.lowering.program.epilogue import (
    Acc,
    Call,
    Epilogue,
    Expr,
    Literal,
    Load,
    Operand,
    PickColumn,
    ReduceColumns,
    SinkExpr,
    Statistic,
    StoreExpr,
    SumRows,
    stat_names,
)

STAGED = 24  # bytes of shared memory per element, in the smallest tile, for loads and stores


def pairing(width: int, values: Iterable[Value]) -> int | None:
    """The distance of column pairs in the buffers; None if every element reads one column at most.

    Raises Refused if distances differ or pairs do not tile the columns.
    """
    split: int | None = None
    for value in values:
        distance = value.distance
        if distance is None:
            continue
        split = split or distance
        if distance != split or width % (2 * split) or np.any(value.partners[:, 0] // split % 2):
            raise Refused(UNALIKE)
    return split


@dataclass
class Layout:
    """The points of a kernel, and the operands, stores and sinks laid out so far.

    Attributes:
        space: the space in which the values were computed.
        operand_of: operand name -> node and dtype in memory.
        split: the distance of the columns of a pair in the buffers; None for single columns.
        shape: (split, width, group width): another shape is another layout.
        operands, nodes: operand name -> its declaration, and the node that it loads.
        packed: the packed row vectors.
        lanes_used: name of a packed vector -> number of its lanes in use.
        vectors: contents of a vector, as bytes -> its operand and lane.
        spread: operand name -> expansion over the row axes.
        stored, sunk, statistics: the stores, sinks and statistics that are laid out.
    """

    space: Space
    operand_of: Callable[[str], tuple[Node, DType]]
    split: int | None
    shape: tuple[int | None, int, int]
    operands: dict[str, Operand] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    packed: list[Packed] = field(default_factory=list)
    lanes_used: dict[str, int] = field(default_factory=dict)
    vectors: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    spread: MutableMapping[str, Spread] = field(init=False)
    stored: dict[tuple[Node, ...], StoreExpr] = field(default_factory=dict)
    sunk: dict[Node, SinkExpr] = field(default_factory=dict)
    statistics: dict[str, Statistic] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spread = ChainMap({}, self.space.spread)

    @staticmethod
    def of(
        space: Space,
        stores: Sequence[Store],
        sinks: Sequence[Sink],
        operand_of: Callable[[str], tuple[Node, DType]],
        before: Layout | None = None,
    ) -> Layout:
        """The layout of a kernel's stores and sinks. Raises Refused if there is none.

        Args:
            space: the space in which the values were computed.
            stores, sinks: all that the kernel writes.
            operand_of: operand name -> node and dtype in memory.
            before: a layout of some of the stores and sinks in the same space. It is extended in
                place if its shape is the same; after a refusal it must not be used again.
        """
        values = [v for s in stores for v in s.values] + [s.value for s in sinks]
        values += [s.value for s in space.statistics.values()]
        split = pairing(space.width, values)
        shape = split, space.width, space.group_size
        found = before
        if found is None or found.shape != shape:
            found = Layout(space, operand_of, split, shape)
        found.write(stores, sinks)
        return found

    def write(self, stores: Sequence[Store], sinks: Sequence[Sink]) -> None:
        """Lay out stores and sinks. Raises Refused if the kernel cannot write them together."""
        old = self.stored
        self.stored = {s.nodes: old.get(s.nodes) or _store(self, s) for s in stores}
        apart, whole = self.split is not None, self.space.whole_rows
        found = self.stored.values()
        if apart and not whole:
            neighbours = [s for s in found if len(s.lanes) == 2 and self.split == 1]
            if sum(s.dtype.size != 2 for s in neighbours) > 1:
                raise Refused(
                    "an epilogue writes one matrix of neighbouring pairs of 8 or of 32 bits"
                )
        if not whole and any(_is_ragged(self.split, s) for s in found):
            raise Refused(f"pairs of columns {self.split} apart are not stored in whole vectors")
        if apart and not whole and any(isinstance(s, Summed) for s in sinks):
            raise Refused("a sum over the rows of pairs of columns")
        self.sunk = {s.node: self.sunk.get(s.node) or _sink(self, s) for s in sinks}
        for sink in sinks:
            if isinstance(sink, Picked):
                self.bind(Load(sink.index, NO_LANE), {})

    def check(self) -> None:
        """Raise Refused if statistics cannot be laid out, or shared memory does not suffice."""
        if self.space.groups or self.space.statistics:
            roots = [e for s in (*self.stored.values(), *self.sunk.values()) for e in s.lanes]
            _own_statistics(self, stat_names(roots))
        if not self.space.whole_rows:
            _check_staged(self, self.stored.values())

    @property
    def points(self) -> int:
        return self.space.width // (1 if self.split is None else 2)

    @cached_property
    def columns(self) -> Ints:
        """[points, lanes] int64: the columns of each point, in the order of the buffers."""
        if self.split is None:
            return np.arange(self.space.width)[:, None]
        return paired_columns(self.space.width, self.split)

    def lanes(self, value: Value) -> tuple[Expr, ...]:
        """One expression per lane, or a single one for a value with one element per pair.

        Raises Refused for a value of any other width.
        """
        columns = self.columns
        if value.count == self.space.width:
            return tuple(self.at(value, columns[:, i], columns) for i in range(columns.shape[1]))
        if self.split is not None and value.count == self.points:
            return (self.at(value, np.arange(self.points), columns),)
        raise Refused(f"it has {value.count} columns where the kernel has {self.space.width}")

    def is_filled_by(self, value: Value) -> bool:
        """Whether a value has one element per column, or one per column pair."""
        if self.split is None or value.count != self.points:
            return value.count == self.space.width
        columns = self.columns
        inside = (value.slots[:, :, None] == columns[:, None, :]).any(-1) | (value.slots < 0)
        return bool(inside.all())

    def at(self, value: Value, element: Ints, columns: Ints) -> Expr:
        """The expression, common to all points, of one element per point.

        Args:
            value: the value.
            element: [points], the element that each point computes.
            columns: [points, lanes], as `self.columns`.
        """
        if value.count == len(element) and np.array_equal(element, np.arange(value.count)):
            slots, group, leaves, numbers = value.slots, value.group, value.leaves, value.expr
        else:
            slots, group = value.slots[element], value.group[element]
            leaves, numbers = value.leaves[element], value.expr[element]
        lane = self.lanes_at(slots, columns)
        size = self.space.group_size
        if size:
            if self.split is not None and size % (2 * self.split):
                raise Refused("pairs of columns cross the groups of a statistic")
            if np.any((group >= 0) & (group != columns[:, 0] // size)):
                raise Refused("an element reads the statistic of another group of columns")
        names = [self.vector(leaves[:, i]) for i in range(leaves.shape[1])]
        first, which = distinct_rows(np.concatenate([numbers[:, None], lane], 1))
        exprs = [
            _place(self.space.exprs[int(numbers[i])], tuple(map(int, lane[i])), names, {})
            for i in first
        ]
        memo: dict[Expr, Expr] = {}
        exprs = [self.bind(e, memo) for e in exprs]
        return self.select(exprs, which)

    def lanes_at(self, slots: Ints, columns: Ints) -> Ints:
        """Slots [points, k] -> lanes of the same point, -1 for none. Raises Refused for others."""
        if slots.shape[1] == 0 or np.array_equal(slots, columns):
            return np.broadcast_to(np.arange(slots.shape[1]), slots.shape)
        same = slots[:, :, None] == columns[:, None, :]
        if not (same.any(-1) | (slots < 0)).all():
            raise Refused("an element reads columns of another point")
        return np.where(slots >= 0, np.argmax(same, -1), -1)

    def select(self, exprs: list[Expr], which: Ints) -> Expr:
        """One expression for points with several: a choice by the segment number of the column.

        Args:
            exprs: the distinct expressions.
            which: [points], the index of each point's expression.
        """
        kinds = list(dict.fromkeys(exprs)) or [Literal(0.0)]  # a value without elements
        if len(kinds) == 1:
            return kinds[0]
        if len(kinds) > 8:
            raise Refused(f"its columns have {len(kinds)} different formulas")
        number = np.array([kinds.index(e) for e in exprs], np.float64)[which]
        segment = self.constant(number)
        out = kinds[-1]
        for i in range(len(kinds) - 2, -1, -1):
            test = Call(AT_MOST, (segment, Literal(float(i))))
            out = Call(CHOICE, (test, kinds[i], out))
        return out

    # Row operands.

    def vector(self, leaf: NDArray) -> Load:
        """The load of `leaf` [points, 2], the (source, index) of one vector element per point."""
        source, index = leaf[:, 0], leaf[:, 1]
        sources = self.space.sources
        tables = {s for s in np.unique(source) if s >= 0 and sources[s] in self.space.tables}
        if tables:
            return self.table(source, index, tables)
        key = source.tobytes() + index.tobytes()
        if key not in self.vectors:
            self.vectors[key] = self.lane_of_row(Packed("", source, index))
        return Load(*self.vectors[key])

    def constant(self, numbers: NDArray[np.float64]) -> Load:
        """The load of a packed vector of constants, [points]."""
        key = b"numbers" + numbers.tobytes()
        if key not in self.vectors:
            none = np.full(len(numbers), -1)
            self.vectors[key] = self.lane_of_row(Packed("", none, none, numbers))
        return Load(*self.vectors[key])

    def lane_of_row(self, part: Packed) -> tuple[str, int]:
        """Put a vector into a free lane of a packed row operand: (operand, lane)."""
        lanes = 1 if self.split is None else 2
        last = self.packed[-1] if self.packed else None
        if last is None or self.lanes_used[last.name] == lanes:
            name = f"row{len(self.packed)}"
            none = np.full(self.points * lanes, -1)
            last = Packed(name, none, none.copy(), np.zeros(self.points * lanes))
            self.packed.append(last)
            self.lanes_used[name] = 0
            self.operands[name] = Operand(name, f32, RowVector())
        lane = self.lanes_used[last.name]
        self.lanes_used[last.name] += 1
        last.source[lane::lanes], last.index[lane::lanes] = part.source, part.index
        if part.numbers is not None and last.numbers is not None:
            last.numbers[lane::lanes] = part.numbers
        return last.name, lane

    def table(self, source: Ints, index: Ints, tables: set[int]) -> Load:
        """The load of a table that repeats along the columns, or has one element per group.

        `source` and `index` [points] are those of each point's element; `tables` are the sources.
        """
        used = source >= 0
        if len(tables) > 1 or np.any(source[used] != next(iter(tables))):
            raise Refused("its columns read different tables")
        node = self.space.sources[next(iter(tables))]
        period = self.space.tables[node]
        point = np.arange(len(source))
        group, rest = divmod(len(source), period)
        if group > 1 and not rest and np.array_equal(index[used], point[used] // group):
            if not self.space.whole_rows:
                raise Refused(GROUPED)
            return self.repeated(node, Grouped(group))
        if np.any(index[used] != point[used] % period):
            node, period = self.part(node, period, point[used], index[used])
        columns = period * (1 if self.split is None else 2)
        fits = any(t % columns == 0 or columns % t == 0 for t in (64, 128, 256))
        if not (fits or self.space.whole_rows):
            raise Refused(f"a table of {columns} columns is not a part of a tile")
        return self.repeated(node, Periodic(period))

    def repeated(self, node: Node, access: Periodic | Grouped) -> Load:
        """The load of a matrix by a Periodic or Grouped access."""
        name = self.space.leaf(node)
        if name is None:
            raise Refused("a table that is not in memory")
        found = Operand(name, node.dtype, access)
        if self.operands.setdefault(name, found) != found:
            raise Refused("a table is read in two ways")
        self.nodes[name] = node
        return Load(name, 0)

    def part(self, node: Node, period: int, point: Ints, index: Ints) -> tuple[Node, int]:
        """A slice of a table that repeats along the pairs: one half, or every second column."""
        half = period // 2
        whole = node.rank and self.space.size(node.shape[-1]) == period
        for start, step in ((0, 1), (half, 1), (0, 2), (1, 2)):
            if half and whole and np.array_equal(index, point % half * step + start):
                found = Slice(node, -1, Dim.of(start), Dim.of(half), step)
                known, name = self.space.leaf(node), self.space.leaf(found)
                if name is not None and known is not None and known in self.spread:
                    self.spread[name] = self.spread[known]
                return found, half
        raise Refused("a table does not repeat along the columns")

    # Other operands.

    def bind(self, expr: Expr, memo: dict[Expr, Expr]) -> Expr:
        """Declare the operands of an expression; loads without a lane get lane 0."""
        if expr not in memo:
            memo[expr] = self._bind(expr, memo)
        return memo[expr]

    def _bind(self, expr: Expr, memo: dict[Expr, Expr]) -> Expr:
        match expr:
            case Load(operand=name, lane=lane):
                if name not in self.operands:
                    self.declare(name, lane)
                return Load(name, max(lane, 0))
            case Call(fn=fn, args=args):
                return Call(fn, tuple(self.bind(a, memo) for a in args))
        return expr

    def declare(self, name: str, lane: int) -> None:
        node, dtype = self.operand_of(name)
        if lane != NO_LANE:
            access: Access = self.tile(name, node)
        else:
            count = product(node.shape)
            over_rows = count.symbols & self.space.rows.symbols
            one = count == ONE or (not over_rows and self.space.size(count) == 1)
            access = Scalar() if one else ColumnVector()
        self.operands[name] = Operand(name, dtype, access)
        self.nodes[name] = node

    def tile(self, name: str, node: Node) -> Tile:
        """The access to a matrix: to all columns of the kernel, or to a span of them."""
        if self.split not in (None, 1) and not self.space.whole_rows:
            raise Refused("partners of a tile operand are not neighbours in memory")
        if name not in self.space.offsets:
            return Tile()
        spread = self.spread.get(name)
        first = self.space.split(node) if spread is None else node.rank - spread.columns
        columns = self.space.size(product(node.shape[first:]))
        return Tile(Span(self.space.offsets[name], columns))


def _place(expr: Expr, lanes: tuple[int, ...], names: list[Load], memo: dict[Call, Expr]) -> Expr:
    """An element's expression at a point: slots become lanes, row leaves become loads."""
    match expr:
        case Acc(lane=lane):
            return Acc(lanes[lane])
        case Load(operand=name) if name.startswith(LEAF):
            return names[int(name[1:])]
        case Load(operand=name, lane=lane) if lane != NO_LANE:
            return Load(name, lanes[lane])
        case Call(fn=fn, args=args):
            if expr not in memo:
                memo[expr] = Call(fn, tuple(_place(a, lanes, names, memo) for a in args))
            return memo[expr]
    return expr


def assemble(
    space: Space,
    stores: Sequence[Store],
    sinks: Sequence[Sink],
    operand_of: Callable[[str], tuple[Node, DType]],
    partial_of: Callable[[Node], str],
) -> Body:
    """The Body of a kernel. Raises Refused if its stores and sinks have no common layout.

    Args:
        space: the space in which the values were computed.
        stores, sinks: all that the kernel writes.
        operand_of: operand name -> node and dtype in memory.
        partial_of: reduction -> name of the buffer of its partials.
    """
    build = Layout.of(space, stores, sinks, operand_of)
    store_exprs, sink_exprs = tuple(build.stored.values()), tuple(build.sunk.values())
    roots = [e for s in (*store_exprs, *sink_exprs) for e in s.lanes]
    statistics, folded = _statistics(build, roots, partial_of)
    if not space.whole_rows:
        _check_staged(build, store_exprs)
    used = {int(i) for p in build.packed for i in np.unique(p.source) if i >= 0}
    return Body(
        Epilogue(
            build.split or 0,
            tuple(build.operands.values()),
            statistics,
            store_exprs,
            sink_exprs,
        ),
        tuple(build.packed),
        {i: space.sources[i] for i in sorted(used)},
        build.nodes,
        folded,
        {n: build.spread[n] for n in build.nodes if n in build.spread},
    )


def _check_staged(build: Layout, stores: Collection[StoreExpr]) -> None:
    """Raise Refused if the loaded and stored matrices exceed an epilogue's shared memory.

    Kernels have no float64: such a Program is laid out as in float32, and the reference runs it.
    """
    loads = [o for o in build.operands.values() if isinstance(o.access, Tile)]
    lanes = 1 if build.split is None else 2
    staged = sum(min(o.dtype.size, f32.size) * lanes for o in loads)
    staged += sum(min(s.dtype.size, f32.size) * len(s.lanes) for s in stores)
    if staged > STAGED * lanes:
        raise Refused(f"shared memory does not hold {len(loads) + len(stores)} matrices")


def _statistics(
    build: Layout, roots: Sequence[Expr], partial_of: Callable[[Node], str]
) -> tuple[tuple[Statistic, ...], tuple[Node, ...]]:
    """The statistics that expressions read, in order of dependence, and the folded reductions."""
    space = build.space
    needed = stat_names(roots)
    rows, groups = _own_statistics(build, needed)
    folds: list[Statistic] = []
    folded: list[Node] = []
    for name, node in space.folds.items():
        if name in needed and isinstance(node, Reduce):
            buffer = partial_of(node)
            axis = node.arg.shape[node.axis]
            width = 0 if axis.symbols - space.sizes.keys() else axis.size(space.sizes)
            planes = Partial(len(MONOIDS[node.fn].planes))
            build.operands[buffer] = Operand(buffer, f32, planes)
            folds.append(Statistic(name, node.fn, None, width, operand=buffer))
            folded.append(node)
    for name, node in space.lines.items():
        if name in needed:
            folds.append(_line(build, name, node))
    return (*folds, *groups, *rows), tuple(folded)


def _own_statistics(build: Layout, needed: set[str]) -> tuple[list[Statistic], list[Statistic]]:
    """The statistics of rows and of groups that this kernel computes; extends `needed`."""
    rows: list[Statistic] = []
    for name, one in reversed(build.space.statistics.items()):
        if name in needed:
            if name not in build.statistics:
                build.statistics[name] = _row_statistic(build, name, one)
            rows.insert(0, build.statistics[name])
            expr = rows[0].expr
            needed |= stat_names([expr]) if expr is not None else set()
    groups = [
        Statistic(g.name, g.fn, build.bind(g.expr, {}), g.size, group=g.size)
        for g in build.space.groups
        if g.name in needed
    ]
    return rows, groups


def _line(build: Layout, name: str, node: Reduce) -> Statistic:
    """The fold of values that earlier kernels stored, one per row."""
    source = build.space.leaf(node.arg)
    if source is None:
        raise Refused("the rows that are reduced are not in memory")
    kept, dtype = build.operand_of(source)
    build.operands[source] = Operand(source, dtype, Line())
    build.nodes[source] = kept
    return Statistic(name, node.fn, None, 0, operand=source)


def _row_statistic(build: Layout, name: str, one: RowStatistic) -> Statistic:
    lanes = build.lanes(one.value)
    expr = lanes[0] if len(lanes) == 1 else Call(SUM, lanes)
    if len(lanes) > 1 and not MONOIDS[one.node.fn].sums:
        raise Refused("a row kernel takes sums of pairs of columns, and no other statistic")
    return Statistic(name, one.node.fn, expr, one.group or one.count, one.group)


def _sink(build: Layout, sink: Sink) -> SinkExpr:
    """The SinkExpr of a reduction over columns, a pick, or a sum over rows. Raises Refused."""
    space, value = build.space, sink.value
    match sink:
        case Reduced(node=node):
            return ReduceColumns(sink.buffer, node.fn, build.lanes(value))
        case Picked(index=index):
            return PickColumn(sink.buffer, index, build.lanes(value))
        case Summed():
            if not space.whole_rows:
                return SumRows(sink.buffer, build.lanes(value))
            return SumRows(sink.buffer, build.lanes(space.widened(value)), _span(space, value))
        case _ as never:
            assert_never(never)


def _span(space: Space, value: Value) -> Span | None:
    """The kernel's columns that a value covers; None for all."""
    return None if value.count == space.width else Span(space.place_of(value), value.count)


def _is_ragged(split: int | None, store: StoreExpr) -> bool:
    """Whether a GEMM cannot store two lanes `split` apart: TMA stores tiles of 32 columns."""
    if split is None or split == 1 or len(store.lanes) == 1:
        return False
    return (split % 32 != 0 and 32 % split != 0) or split * store.dtype.size % 16 != 0


def _store(build: Layout, store: Store) -> StoreExpr:
    """The StoreExpr of values concatenated to one matrix, or of one value per row."""
    space = build.space
    if all(v.narrow for v in store.values) and space.width != 1:
        (value,) = store.values
        expr = build.bind(_place(space.exprs[int(value.expr[0])], (), [], {}), {})
        return StoreExpr(store.buffer, store.dtype, (expr,), ColumnVector())
    value, span = beside(store.values), None
    if space.whole_rows and not build.is_filled_by(value):
        value, span = space.widened(value), _span(space, value)
    lanes = build.lanes(value)
    return StoreExpr(store.buffer, store.dtype, lanes, Tile(span))
