"""A GEMM and the tensors of a call -> quack's arguments, and the launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor

from coda.ir.dims import product
from coda.ir.monoids import MONOIDS
from coda.kernels.gemm import quack_target
from coda.kernels.gemm.batch_operands import by_matrix, columns_by_matrix, laid_out
from coda.kernels.gemm.batches import BatchStrides, batches_of, shared_tiles
from coda.kernels.gemm.emit import emit_gemm
from coda.kernels.gemm.mainloop import Gemm, tiles
from coda.kernels.gemm.source import Table
from coda.kernels.gemm.split_k import SharedTiles, parts_of
from coda.kernels.gemm.weights import (
    WeightRead,
    halves,
    one_below_another,
    paired_rows,
    weight_matrix,
    weight_reads,
)
from coda.kernels.protocol import LaunchRun, Tensors
from coda.kernels.tensors import aligned, by_axes, in_bytes, matrix, padded, written
from coda.lowering.program.access import Alternating, ColumnVector, OneElement, Periodic, Tile
from coda.lowering.program.epilogue import PickColumn, ReduceColumns, SumRows
from coda.lowering.program.program import Program


def load(program: Program, kernel: Gemm, directory: Path) -> quack_target.Gemm:
    """The emitted module of a GEMM, written into `directory` and imported."""
    return quack_target.import_kernel(emit_gemm(program, kernel), tiles(kernel), directory)


def _weight_reads(program: Program) -> dict[str, WeightRead]:
    return {r.kernel: r for r in weight_reads(program)}


class GemmBinding:
    """One launch of a GEMM."""

    def __init__(self, run: LaunchRun, kernel: Gemm) -> None:
        self.run, self.kernel = run, kernel
        self.body, self.contracts = kernel.body, kernel.mainloop.contracts
        self.problem = kernel.mainloop.problem(run.sizes)
        self.batch = batches_of(run.program, kernel) if kernel.mainloop.batch else None
        self.matrices = kernel.mainloop.matrices(run.sizes)
        self.gemm = run.loaded(kernel, lambda: load(run.program, kernel, run.directory))
        config, parts = self.gemm.config, parts_of(kernel, run.sizes, self.gemm.config)
        if parts != config.split_k:
            self.gemm = replace(self.gemm, config=replace(config, split_k=parts))

    def launch(self) -> None:
        """Allocate the results, bind the operands, and launch."""
        run, source = self.run, self.gemm.source
        rows = self.kernel.mainloop.points(run.sizes)[0]
        a = self.left(rows)
        stores, sinks = self.results(rows)
        run.buffers |= stores
        self.keep_partials(sinks)
        if rows == 0:
            return
        b = self.matrix()
        if self.problem[2] == 0:  # K = 0: contract over zeros instead
            a, b = (self.zeros(x) for x in (a, b))
        operands = {**run.packed(self.kernel.name, self.body), **self.operands(), **self.tables()}
        for masks, count in ((source.masks, b.shape[-2]), (source.row_masks, a.shape[-2])):
            if masks:
                operands |= dict.fromkeys(masks, self.ones(count, a.device))
        stores = self.written_to(stores)
        sinks = {name: self.by_matrix(x) for name, x in sinks.items()}
        sinks |= {s.buffer: stores[s.buffer] for s in self.body.epilogue.stores if s.is_column}
        splits = {s.buffer: self.body.epilogue.apart(s) for s in self.body.epilogue.stores}
        arguments = self.gemm.arguments(operands, stores, sinks, splits, self.indices())
        d = stores[source.d] if source.d else None
        self.start(a if self.batch else run.ready(a, _transposed), b, d, arguments)

    def left(self, rows: int) -> Tensor:
        """A [M, K], or [L, M, K] of a batch; of no rows as it is."""
        x = self.run.value(self.kernel.mainloop.a)
        if self.batch is None or rows == 0:
            return self.run.ready(x, matrix)
        return self.of_batch(x, self.batch.a)

    def of_batch(self, x: Tensor, step: BatchStrides) -> Tensor:
        """An operand of a batch as [L, R, K]: an alias if its strides allow it."""
        assert self.batch is not None
        lead = tuple(d.size(self.run.sizes) for d in self.kernel.mainloop.batch)
        return self.run.ready(x, partial(laid_out, lead=lead, inner=self.batch.inner, step=step))

    def written_to(self, stores: Tensors) -> dict[str, Tensor]:
        """The matrices of the stores [rows, N], as the kernel writes them; [L, M, N] of a batch."""
        found: dict[str, Tensor] = {}
        for i, store in enumerate(self.body.epilogue.stores):
            x = written(stores[store.buffer])
            if store.is_column:
                found[store.buffer] = x.reshape(-1)
                continue
            if self.batch is None or store.rows is None:
                found[store.buffer] = self.by_matrix(x)
                continue
            whole = by_axes(x, store.rows, self.run.sizes)
            lead, step = tuple(whole.shape[:-2]), self.batch.stores[i]
            found[store.buffer] = laid_out(whole, lead, self.batch.inner, step)
            assert found[store.buffer].data_ptr() == x.data_ptr()
        return found

    def by_matrix(self, x: Tensor) -> Tensor:
        """[rows, ...] of the kernel as [L, rows of a matrix, ...] if it has a batch."""
        return by_matrix(x, self.matrices) if self.batch else x

    def start(self, a: Tensor, b: Tensor, d: Tensor | None, arguments: Mapping[str, Any]) -> None:
        """Launch quack's kernel, and record it."""
        shared = self.shared()
        plan = self.gemm.launch(a, b, d, arguments, shared)
        more = (shared,) if shared else ()
        self.run.launched(quack_target.run_plan, (plan, a, b, d, dict(arguments), *more))

    def shared(self) -> dict[str, Tensor]:
        """Flags [L, rows, columns of tiles], 0, and sums of CTAs that share a tile; {} if none do.

        Each launch has its own: another stream, or a replayed CUDA graph, may run at the same time.
        """
        run, config = self.run, self.gemm.config
        if config.split_k == 1:
            return {}
        tiles = SharedTiles.of(self.kernel, run.sizes, config, run.program.target)
        flags = run.new(tiles[:3], torch.int32, "zero")
        return {"flags": flags, "sums": run.new(tiles, torch.float32)}

    def ones(self, count: int, device: torch.device) -> Tensor:
        """The mask of a ragged axis, float32 [count]."""
        found = self.run.loaded(("ones", count, device), lambda: torch.ones(count, device=device))
        self.run.constant(found)
        return found

    def results(self, rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Matrices for the kernel's stores and partials for its sinks, by buffer name."""
        run = self.run
        stores: dict[str, Tensor] = {}
        for store in self.body.epilogue.stores:
            buffer = run.program.buffers[store.buffer]
            width = product(buffer.shape[1:]).size(run.sizes)
            fill = "" if store.is_column else "padded"
            stores[store.buffer] = run.room(store.buffer, rows, width, store.dtype.torch, fill)
        parts = self.kernel.kind.partials(run.program, self.kernel, run.sizes)
        sinks: dict[str, Tensor] = {}
        for sink in self.body.epilogue.sinks:
            match sink:
                case SumRows(buffer=name):
                    count = parts.of_rows if rows else 0
                    sinks[name] = run.new((count, self.problem[1]), torch.float32)
                case PickColumn(buffer=name):
                    sinks[name] = run.new((rows,), torch.float32, "nan")
                case ReduceColumns(buffer=name, monoid=monoid):
                    planes = len(MONOIDS[monoid].planes)
                    dtype = torch.int64 if planes == 2 else torch.float32
                    sinks[name] = run.new((rows, parts.of_columns), dtype)
                case _ as never:
                    assert_never(never)
        return stores, sinks

    def keep_partials(self, sinks: Tensors) -> None:
        """Register partials and picked values for the kernels that read them."""
        for sink in self.body.epilogue.sinks:
            found = sinks[sink.buffer]
            match sink:
                case SumRows(buffer=name):
                    self.run.raw[name] = self.run.summands(name, found)
                case PickColumn(buffer=name):
                    self.run.buffers[name] = found.reshape(-1, 1)
                case ReduceColumns(buffer=name):
                    self.run.raw[name] = found.view(torch.float32)
                case _ as never:
                    assert_never(never)

    def zeros(self, x: Tensor) -> Tensor:
        """16 columns of zeros in place of none, contiguous or transposed as `x`."""
        transposed = x.stride(0) == 1 and x.shape[0] * x.element_size() % 16 == 0
        shape = (16, x.shape[0]) if transposed else (x.shape[0], 16)
        made = self.run.new(shape, x.dtype, "zero")
        return made.T if transposed else made

    def indices(self) -> dict[str, Tensor]:
        """The index vectors [M] of sinks that pick a column, by emitted name."""
        found: dict[str, Tensor] = {}
        for sink in self.body.epilogue.sinks:
            if isinstance(sink, PickColumn):
                index = self.column(self.run.value(self.body.nodes[sink.index]))
                found[f"{self.gemm.source.operands.get(sink.index, sink.index)}_index"] = index
        return found

    def operands(self) -> dict[str, Tensor]:
        """Operands other than tables, in the layouts of their accesses, by name."""
        found: dict[str, Tensor] = {}
        accesses = {o.name: o.access for o in self.body.epilogue.operands}
        loads = self.batch.loads if self.batch else ()
        shared = dict(zip(shared_tiles(self.body), loads, strict=True))
        for name in self.body.nodes:
            if isinstance(accesses[name], Periodic):  # see `tables`
                continue
            if name in shared:
                x = in_bytes(self.run.value(self.body.nodes[name]))
                found[name] = self.of_batch(x, shared[name])
                continue
            x = in_bytes(self.run.operand(self.body, name))
            match accesses[name]:
                case OneElement():
                    found[name] = self.run.ready(x, _number)
                case ColumnVector():
                    found[name] = self.column(x)
                case Tile():
                    whole = self.run.ready(self.run.ready(x, matrix), aligned)
                    found[name] = self.by_matrix(whole)
                case Alternating():
                    found[name] = quack_target.words(self.run.ready(x, _rows))
                case access:
                    raise AssertionError(access)
        return found | {name: self.run.raw[name] for name in self.body.epilogue.partials}

    def column(self, x: Tensor) -> Tensor:
        """A column vector [M], or [L, M] of a batch."""
        if self.batch is None:
            return self.run.ready(x, _vector)
        return self.run.ready(x, partial(columns_by_matrix, matrices=self.matrices))

    def matrix(self) -> Tensor:
        """B [N, K], the siblings stacked along rows: an alias of the arguments if possible.

        B of a batch is [L, N, K].
        """
        run, kernel = self.run, self.kernel
        if self.batch is not None:
            return self.of_batch(run.value(self.contracts[0].rhs), self.batch.b)
        roots = [c.rhs for c in self.contracts]
        by_halves = halves(run.program, kernel) > 0

        def made(*values: Tensor) -> Tensor:
            whole = weight_matrix(kernel, dict(zip(roots, values, strict=True)))
            whole = whole if by_halves else paired_rows(kernel, whole)
            return aligned(whole, transposed=not by_halves)

        reads = run.loaded("weight reads", lambda: _weight_reads(run.program))
        read = reads.get(kernel.name)
        if read is None:  # B is an activation
            return run.ready(run.value(roots[0]), made)
        whole = None if read.why else one_below_another([run.value(n) for n in roots])
        if whole is None or aligned(whole, transposed=not by_halves) is not whole:
            make = lambda: made(*map(run.value, roots))  # noqa: E731
            return run.once(("matrix", kernel.name), roots, make)
        run.in_place([run.inputs[i] for i in read.together])
        return whole

    def tables(self) -> dict[str, Tensor]:
        """Packed tables of periodic operands, by emitted name."""
        found: dict[str, Tensor] = {}
        rows, body = self.problem[0], self.body
        for table in self.gemm.source.tables:
            nodes = {o: body.nodes[o] for o in table.operands}

            def make(run: LaunchRun, table: Table = table, nodes: Any = nodes) -> Tensor:
                flat = {o: run.repeated(body, o).reshape(rows, -1) for o in nodes}
                return quack_target.pack_table(table, flat)

            name = self.kernel.name, table.name, rows
            found[table.name] = self.run.each_call(name, nodes.values(), make)
        return found


class GemmCompilation(GemmBinding):
    """A GEMM that is compiled for empty tensors of the right layout, and not launched."""

    def start(self, a: Tensor, b: Tensor, d: Tensor | None, arguments: Mapping[str, Any]) -> None:
        self.gemm.plan(a, b, d, arguments)

    def matrix(self) -> Tensor:
        if self.batch is not None:
            return super().matrix()
        _, n, k = self.problem
        first = self.contracts[0].rhs
        if len(self.contracts) == 1 and not self.body.epilogue.split:
            return aligned(self.run.value(first), transposed=True)
        return padded(n, k, first.dtype.torch, torch.device("cpu"))

    def tables(self) -> dict[str, Tensor]:
        kinds = {o.name: o for o in self.body.epilogue.operands}
        found: dict[str, Tensor] = {}
        for table in self.gemm.source.tables:
            shape, dtype = (self.problem[0], table.columns), kinds[table.operands[0]].dtype
            found[table.name] = torch.empty(shape, dtype=dtype.torch)
        return found


def _vector(x: Tensor) -> Tensor:
    """A contiguous vector whose allocation ends at a multiple of the 4 bytes that GEMMs read."""
    x = x.reshape(-1).contiguous()
    if x.nbytes % 4 == 0:
        return x
    return x.new_empty(-(-len(x) // 4) * 4)[: len(x)].copy_(x)


def _number(x: Tensor) -> Tensor:
    """A scalar operand as float32 [1], as GEMMs read it."""
    return x.reshape(-1).float()


def _rows(x: Tensor) -> Tensor:
    """A matrix whose rows begin at multiples of 16 bytes."""
    return aligned(matrix(x))


def _transposed(x: Tensor) -> Tensor:
    return aligned(x, transposed=True)
