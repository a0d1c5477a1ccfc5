"""The reference backend: a Program -> its outputs, kernel by kernel in torch, on any device.

It follows the kernels closely: weights in the order in which the kernel reads them, expressions for
each element or column pair, statistics as partials of tiles that are folded, one rounding for each
stored tensor. In float64 without rounding it checks that lowering kept the block's meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor

from coda.ir.dims import Dim
from coda.ir.evaluate import pick
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SCALARS
from coda.lowering.program.access import (
    Alternating,
    ColumnVector,
    Grouped,
    Line,
    OneElement,
    Partial,
    Periodic,
    RowStep,
    RowVector,
    Shifted,
    Span,
    Tile,
    swapped,
)
from coda.lowering.program.body import Body
from coda.lowering.program.epilogue import (
    Acc,
    Between,
    Call,
    Epilogue,
    Expr,
    Literal,
    Load,
    Operand,
    PickColumn,
    Position,
    ReduceColumns,
    RowOrder,
    Stat,
    Statistic,
    StoreExpr,
    SumRows,
)
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program
from coda.runtime.environment import Environment
from coda.runtime.prepare import packed_row

Tensors = Mapping[str, Tensor]


def run_reference(
    program: Program,
    inputs: Sequence[Tensor],
    *,
    exact: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> tuple[Tensor, ...]:
    """The outputs of a Program.

    Args:
        program: the Program to run.
        inputs: the block's arguments in order.
        exact: compute in float64 and never round, instead of float32 with stored tensors rounded.
        sizes: of the symbols in this call, where they differ from those of the lowering.
    """
    return ReferenceRun(program, inputs, exact=exact, sizes=sizes).run()


class ReferenceRun(Environment):
    """One call of a Program in torch."""

    def run(self) -> tuple[Tensor, ...]:
        """The outputs."""
        return self.each(self.kernel)

    def kernel(self, kernel: Kernel[Any]) -> None:
        """Compute one kernel."""
        kernel.kind.reference(self, kernel)

    def body(
        self, body: Body, acc: Tensor | None, points: tuple[int, int], tile_n: int = 0
    ) -> None:
        """Compute a body for all rows and columns, and store its results."""
        compute_body(self, body, acc, points, tile_n)


def compute_body(
    run: Environment, body: Body, acc: Tensor | None, points: tuple[int, int], tile_n: int = 0
) -> None:
    """Compute a body for all rows and columns, and store its results.

    Args:
        run: the call, with the values that operands load.
        body: what to compute.
        acc: the accumulator, [rows, columns]; None if the kernel has no contraction.
        points: the numbers of rows and columns of the kernel.
        tile_n: columns of a tile: with an accumulator, a reduction over columns has a partial for
            each tile.
    """
    rows, width = points
    values = {n: run.value(n) for n in body.sources.values()}
    operands: dict[str, Tensor] = {}
    like = next(iter(run.inputs.values()))
    like = torch.empty(0, dtype=run.compute, device=like.device)
    for packed in body.packed:
        operands[packed.name] = packed_row(packed, body.sources, values, like)
    for name in body.nodes:
        x = run.operand(body, name)
        operands[name] = x.to(run.compute) if x.is_floating_point() else x
    point = _Points(body.epilogue, acc, operands, rows, width, run.compute, run.sizes)
    for statistic in body.epilogue.statistics:
        point.statistic(statistic, run.parts)
    for store in body.epilogue.stores:
        x = in_order(point.store(store), store.rows, run.sizes)
        run.buffers[store.buffer] = x if run.exact else x.to(store.dtype.torch)
    for sink in body.epilogue.sinks:
        match sink:
            case SumRows(buffer=name, span=span, within=within, whole=whole):
                columns = run.program.buffers[name].shape[1].size(run.sizes)
                each = rows if within is None else within.size(run.sizes)
                x = point.ordered(sink, span)
                x = x.reshape(rows // max(1, each), each, x.shape[1]).transpose(0, 1)
                if whole:
                    run.buffers[name] = MONOIDS[sink.monoid].reduce(x, 0).reshape(-1, 1)
                    continue
                run.parts[name] = _over_rows(sink.monoid, x, columns)
            case PickColumn(buffer=name, index=index, lanes=lanes):
                run.buffers[name] = pick(point.columns(lanes), operands[index].reshape(-1))
            case ReduceColumns(buffer=name, lanes=lanes):
                run.parts[name] = _partials(sink, point.columns(lanes), width, tile_n)
            case _ as never:
                assert_never(never)


def in_order(x: Tensor, rows: RowOrder | None, sizes: Mapping[str, int]) -> Tensor:
    """A kernel's matrix [rows, columns] with its rows in the order of a buffer."""
    if rows is None:
        return x
    whole = x.unflatten(0, [d.size(sizes) for d in rows.axes])
    return whole.permute(*rows.order, len(rows.order)).reshape(x.shape)


def _partials(
    sink: ReduceColumns, x: Tensor, width: int, tile_n: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    tile = max(1, tile_n * x.shape[1] // max(width, 1))
    sizes = [min(tile, x.shape[1] - i) for i in range(0, x.shape[1], tile)]
    return MONOIDS[sink.monoid].split(x, 1, sizes)


def _over_rows(
    monoid: str, x: Tensor, columns: int, tile: int = 128
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Reductions of each tile of rows [rows, ...], [columns, parts]; columns may be parts."""
    found = [MONOIDS[monoid].partial(t, 0)[0] for t in torch.split(x, tile)]
    parts = torch.cat(found).reshape(-1, columns).T
    return (parts,), torch.ones((1, parts.shape[1]), dtype=x.dtype, device=x.device)


@dataclass
class _Points:
    """All elements (or column pairs) of one kernel at once: a [rows, points] tensor for each lane.

    A kernel with pairs has two lanes, and half as many points as columns.
    """

    epilogue: Epilogue
    acc: Tensor | None
    operands: Tensors
    rows: int
    width: int
    compute: torch.dtype
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        self.kinds: dict[str, Operand] = {o.name: o for o in self.epilogue.operands}
        self.stats: dict[str, Tensor] = {}
        self.memo: dict[Expr, Tensor] = {}

    @property
    def lanes(self) -> int:
        return self.epilogue.lanes

    @property
    def points(self) -> int:
        return self.width // self.lanes

    @property
    def device(self) -> torch.device | None:
        """The device of the operands."""
        some = next(iter(self.operands.values()), self.acc)
        return some.device if some is not None else None

    def evaluate(self, expr: Expr) -> Tensor:
        """An expression for all elements or pairs, broadcastable to [rows, points]."""
        if expr not in self.memo:
            self.memo[expr] = self._evaluate(expr)
        return self.memo[expr]

    def _evaluate(self, expr: Expr) -> Tensor:
        match expr:
            case Acc(lane=lane):
                assert self.acc is not None
                return self.acc[:, lane :: self.lanes]
            case Load(operand=name, lane=lane):
                return self.load(self.kinds[name], lane)
            case Stat(name=name, plane=plane):
                return self.stats[name if plane is None else f"{name}.{plane}"]
            case Position(axis=axis, inner=inner, count=count):
                number = torch.arange(self.rows if axis == "row" else self.points) // inner
                number = (number % count if count else number).to(self.device, self.compute)
                return number[:, None] if axis == "row" else number[None]
            case Between(first=first, end=end, size=size, inner=inner):
                index = self.row_index(size, inner)
                below = index < end.size(self.sizes)
                return ((index >= first.size(self.sizes)) & below)[:, None]
            case Literal(value=value):
                return torch.tensor(value, dtype=self.compute, device=self.device)
            case Call(fn=fn, args=args):
                return SCALARS[fn].evaluate(*(self.evaluate(a) for a in args))

    def load(self, operand: Operand, lane: int) -> Tensor:
        access = operand.access
        assert not isinstance(access, Line | Partial)
        x = self.operands[operand.name]
        x = x.reshape(access.shape(self.rows, self.points, self.lanes))
        match access:
            case OneElement() | ColumnVector():
                return x
            case Shifted(of=of, steps=steps):
                x = self.other_rows(x, steps)
                return self.lane_of_tile(x, of, lane) if isinstance(of, Tile) else x
            case RowVector():
                return x[:, lane :: self.lanes]
            case Periodic(period=period, each=each, swaps=swaps):
                point = swapped(torch.arange(self.points, device=x.device), swaps)
                return x[:, point // each % period]
            case Grouped(size=size):
                return x[:, torch.arange(self.points, device=x.device) // size]
            case Tile():
                return self.lane_of_tile(x, access, lane)
            case Alternating():
                return x[:, lane::2]
            case _ as never:
                assert_never(never)

    def row_index(self, size: Dim, inner: Dim) -> Tensor:
        """The index of each row along an axis, [rows]."""
        rows = torch.arange(self.rows, device=self.device)
        return rows // inner.size(self.sizes) % max(1, size.size(self.sizes))

    def other_rows(self, x: Tensor, steps: Sequence[RowStep]) -> Tensor:
        """A matrix [rows, columns] with each row replaced by another; 0 where there is none."""
        row = torch.arange(self.rows, device=self.device)
        inside = torch.ones_like(row, dtype=torch.bool)
        for step in steps:
            by = step.by.size(self.sizes)
            index = self.row_index(step.size, step.inner) - by
            inside &= (index >= 0) & (index < step.size.size(self.sizes))
            row = row - by * step.inner.size(self.sizes)
        found = x[torch.where(inside, row, 0)] if self.rows else x
        return torch.where(inside[:, None], found, torch.zeros_like(found))

    def lane_of_tile(self, x: Tensor, access: Tile, lane: int) -> Tensor:
        """One lane of a matrix, [rows, points]; 0 in columns that the matrix does not have."""
        span = access.span
        if access.swaps:
            return x[:, swapped(torch.arange(self.width, device=x.device), access.swaps)]
        if span:
            x = torch.nn.functional.pad(x, (span.first, self.width - span.end))
        split = self.epilogue.split
        if not split:
            return x[:, lane :: self.lanes]
        x = x.reshape(self.rows, self.width // (2 * split), 2, split)[:, :, lane]
        return x.reshape(self.rows, self.points)

    def columns(self, lanes: Sequence[Expr]) -> Tensor:
        """The lanes interleaved in the order of the kernel's columns, [rows, columns]."""
        values = [self.evaluate(e).expand(self.rows, self.points) for e in lanes]
        return torch.stack(values, -1).reshape(self.rows, len(lanes) * self.points)

    def store(self, store: StoreExpr) -> Tensor:
        """The tensor that a store writes, in the column order of the buffer."""
        match store.access:
            case ColumnVector():
                return torch.cat([self.evaluate(e).expand(self.rows, 1) for e in store.lanes], 1)
            case Tile(span=span):
                return self.ordered(store, span)
            case Alternating():
                return self.columns(store.lanes)
            case _ as never:
                assert_never(never)

    def ordered(self, result: StoreExpr | SumRows, span: Span | None) -> Tensor:
        """Columns in a buffer's order: the lanes of a pair put apart, the columns of `span`."""
        x, split = self.columns(result.lanes), self.epilogue.apart(result)
        if split:
            blocks = self.width // (2 * split)
            x = x.reshape(self.rows, blocks, split, 2).transpose(2, 3)
            x = x.reshape(self.rows, self.width)
        return x if span is None else x[:, span.first : span.end]

    def statistic(
        self, stat: Statistic, parts: Mapping[str, tuple[tuple[Tensor, ...], Tensor]]
    ) -> None:
        """Compute a statistic for all elements, and keep it in `stats`."""
        monoid = MONOIDS[stat.monoid]
        if stat.operand in self.kinds and isinstance(self.kinds[stat.operand].access, Line):
            x = self.operands[stat.operand]
            x = x.reshape(self.rows, x.numel() // max(self.rows, 1)).to(self.compute)
            self.stats[stat.name] = monoid.reduce(x, 1)
        elif stat.operand is not None:
            planes, counts = parts[stat.operand]
            merged = monoid.merge(planes, counts, 1)
            self.stats[stat.name] = monoid.finish(merged, stat.width)
            for plane, value in zip(monoid.planes, merged, strict=True):
                self.stats[f"{stat.name}.{plane}"] = value
        elif stat.group and self.acc is not None:
            self.stats[stat.name] = self.group(stat)
        else:
            assert stat.expr is not None
            x = self.evaluate(stat.expr).expand(self.rows, self.points)
            points = stat.group // self.lanes or self.points
            groups = self.points // points if stat.group else 1
            x = x.reshape(self.rows, groups, points)
            x = x.sum(2) / stat.width if monoid.average_of else monoid.reduce(x, 2)
            x = x.reshape(self.rows, groups)
            self.stats[stat.name] = x.repeat_interleave(points, 1) if stat.group else x

    def group(self, stat: Statistic) -> Tensor:
        """A statistic of groups of columns, repeated for each element of its group."""
        assert stat.expr is not None
        assert self.acc is not None
        single = _Points(
            self.epilogue,
            self.acc,
            self.operands,
            self.rows,
            self.width,
            self.compute,
            self.sizes,
        )
        single.epilogue = Epilogue(0, self.epilogue.operands, (), (), ())
        single.stats = self.stats
        x = single.evaluate(stat.expr).expand(self.rows, self.width)
        x = x.reshape(self.rows, self.width // stat.group, stat.group)
        x = MONOIDS[stat.monoid].reduce(x, 2)
        return x.expand(-1, -1, stat.group // self.lanes).reshape(self.rows, self.points)
