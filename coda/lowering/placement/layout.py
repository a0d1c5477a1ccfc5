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

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import numpy as np

from coda.ir.graph import Node, Reduce
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SUM
from coda.ir.types import DType, f32
from coda.lowering.algebra.roles import sequence_of
from coda.lowering.placement.arrays import distinct
from coda.lowering.placement.columns import Space
from coda.lowering.placement.moved_columns import Elsewhere, Swaps
from coda.lowering.placement.points import Points
from coda.lowering.placement.space_state import RowStatistic
from coda.lowering.placement.stores import Picked, Reduced, Sink, Store, Summed
from coda.lowering.placement.values import (
    NO_LANE,
    UNALIKE,
    Refused,
    Value,
    beside,
)
from coda.lowering.program.access import (
    Alternating,
    ColumnVector,
    Line,
    Partial,
    Span,
    Tile,
    swapped,
)
from coda.lowering.program.body import Body
from coda.lowering.program.epilogue import (
    Call,
    Epilogue,
    Expr,
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
class Layout(Points):
    """The points of a kernel, and the stores and sinks laid out so far.

    Attributes:
        stored, sunk, statistics: the stores, sinks and statistics that are laid out.
    """

    stored: dict[tuple[Node, ...], StoreExpr] = field(
        default_factory=dict[tuple[Node, ...], StoreExpr]
    )
    sunk: dict[Node, SinkExpr] = field(default_factory=dict[Node, SinkExpr])
    statistics: dict[str, Statistic] = field(default_factory=dict[str, Statistic])

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

        def laid_out(split: int | None, *, moves: bool = False) -> Layout:
            shape = split, space.width, space.group_size, moves
            found = before
            if found is None or found.shape != shape:
                found = Layout(space, operand_of, split, shape, Elsewhere() if moves else None)
            found.write(stores, sinks)
            found.check()
            return found

        if before is None or before.elsewhere is None:
            try:
                split = pairing(space.width, values)
                if space.batched and (split is not None or space.tables):
                    raise Refused(
                        "an epilogue reads neither pairs of columns nor tables for a batch"
                    )
                return laid_out(split)
            except Refused:
                if not space.whole_rows or space.width == 1:
                    raise
        return laid_out(None, moves=True)

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
        folds = [MONOIDS[s.node.fn] for s in sinks if isinstance(s, Reduced)]
        if apart and any(monoid.of_pairs for monoid in folds):
            raise Refused("a fold of two values of each column of a pair")
        self.sunk = {s.node: self.sunk.get(s.node) or _sink(self, s) for s in sinks}
        for sink in sinks:
            if isinstance(sink, Picked):
                self.bind(Load(sink.index, NO_LANE), {})

    @property
    def epilogue(self) -> Epilogue:
        """What is laid out so far, without statistics."""
        stores, sinks = tuple(self.stored.values()), tuple(self.sunk.values())
        return Epilogue(self.split or 0, tuple(self.operands.values()), (), stores, sinks)

    def check(self) -> None:
        """Lay out statistics. Raises Refused if that fails, or shared memory does not suffice."""
        if self.space.groups or self.space.statistics:
            roots = [e for s in (*self.stored.values(), *self.sunk.values()) for e in s.lanes]
            _own_statistics(self, stat_names(roots))
        if not self.space.whole_rows:
            _check_staged(self, self.stored.values())


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
    used = {i for p in build.packed for i in distinct(p.source) if i >= 0}
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
    loads = [o for o in build.operands.values() if isinstance(o.access, Tile | Alternating)]
    lanes = 1 if build.split is None else 2
    wide = sum(o.dtype.size for o in loads if isinstance(o.access, Alternating))
    staged = wide + sum(min(o.dtype.size, f32.size) * lanes for o in loads)
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
    elsewhere = build.elsewhere or Elsewhere()
    for name, one in reversed(build.space.statistics.items()):
        for alias, swaps in elsewhere.read_as(name, needed):
            if alias not in build.statistics:
                build.statistics[alias] = _row_statistic(build, alias, one, swaps)
            rows.insert(0, build.statistics[alias])
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


def _row_statistic(build: Layout, name: str, one: RowStatistic, swaps: Swaps) -> Statistic:
    """A statistic of the values in the swapped columns of a row. Raises Refused."""
    value = one.value
    lanes = build.lanes(value.move(lambda a: swapped(a, swaps)) if swaps else value)
    expr = lanes[0] if len(lanes) == 1 else Call(SUM, lanes)
    if len(lanes) > 1 and not MONOIDS[one.node.fn].sums:
        raise Refused(f"`{one.node.fn}` of what is computed for pairs of columns")
    return Statistic(name, one.node.fn, expr, one.group or one.count, one.group)


def _sink(build: Layout, sink: Sink) -> SinkExpr:
    """The SinkExpr of a reduction over columns, a pick, or a sum over rows. Raises Refused."""
    space, value = build.space, sink.value
    if build.alternates(value):
        raise Refused("it has two elements for each column of the kernel")
    match sink:
        case Reduced(node=node):
            return ReduceColumns(sink.buffer, node.fn, build.lanes(value))
        case Picked(index=index):
            return PickColumn(sink.buffer, index, build.lanes(value))
        case Summed():
            if not space.whole_rows:
                return SumRows(sink.buffer, build.lanes(value), monoid=sink.node.fn)
            lanes, within = build.lanes(space.widened(value)), sequence_of(sink.node)
            return SumRows(sink.buffer, lanes, _span(space, value), within)
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
    value, span = beside(store.values), None
    if (value.narrow and space.width != 1) or (value.of_rows and space.apart):
        lanes = build.of_row(value)
        return StoreExpr(store.buffer, store.dtype, lanes, ColumnVector(), store.rows)
    if space.whole_rows and not build.is_filled_by(value):
        value, span = space.widened(value), _span(space, value)
    lanes = build.lanes(value)
    if build.alternates(value):
        if store.dtype.size != 2:
            raise Refused("a GEMM writes two neighbours for each column as 16 bits each")
        return StoreExpr(store.buffer, store.dtype, lanes, Alternating(), store.rows)
    return StoreExpr(store.buffer, store.dtype, lanes, Tile(span), store.rows)
