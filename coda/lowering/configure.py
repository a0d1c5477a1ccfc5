"""A Program -> the same with tile configs and, which follows from them, the sizes of partials."""

from __future__ import annotations

from dataclasses import replace

from coda.ir.dims import ONE, Dim, product
from coda.ir.monoids import MONOIDS
from coda.ir.types import f32
from coda.kernels.gemm.configs import choose, cta_rows
from coda.kernels.rowwise.pieces import row_parts
from coda.lowering.program.body import Body
from coda.lowering.program.epilogue import Epilogue, SinkExpr, Statistic
from coda.lowering.program.program import Buffer, GemmKernel, Kernel, Program, RowwiseKernel


def configure(program: Program) -> Program:
    """Choose a config for every GEMM and size the partials."""
    kernels: list[Kernel] = []
    for kernel in program.kernels:
        if isinstance(kernel, GemmKernel):
            kernel = replace(kernel, config=choose(program, kernel))
        kernels.append(kernel)
    program.kernels = tuple(kernels)
    return size_partials(program)


def size_partials(program: Program) -> Program:
    """Fill in how many partials each split reduction has, and of how many values."""
    makers: dict[str, GemmKernel] = {}
    for gemm in program.gemms():
        for sink in gemm.body.epilogue.sinks:
            if sink.monoid == "pick":
                continue
            old = program.buffers[sink.buffer]
            if sink.rows:
                m = gemm.problem(program.sizes)[0]
                parts = -(-m // cta_rows(gemm.config, program.target))
                size_sum(program, sink, max(parts, 1), gemm.problem(program.sizes)[1])
                continue
            makers[sink.buffer] = gemm
            planes = Dim.of(len(MONOIDS[sink.monoid].planes))
            parts = -(-gemm.problem(program.sizes)[1] // gemm.config.tile_n)
            shape = (planes, product(old.shape[:1]), Dim.of(parts))
            program.buffers[sink.buffer] = Buffer(sink.buffer, "partial", shape, f32)
    kernels: list[Kernel] = []
    for kernel in program.kernels:
        if isinstance(kernel, RowwiseKernel):
            kernel = replace(kernel, body=_counted(program, kernel.body, makers))
            for sink in kernel.body.epilogue.sinks:
                parts = row_parts(kernel.body, kernel.width, kernel.rows.size(program.sizes))
                size_sum(program, sink, parts, kernel.width)
        kernels.append(kernel)
    program.kernels = tuple(kernels)
    return program


def size_sum(program: Program, sink: SinkExpr, parts: int, width: int) -> None:
    """Size the partials of a sum over rows: a column may be a part of another's sum."""
    columns = program.buffers[sink.buffer].shape[1]
    parts *= (sink.span.width if sink.span else width) // columns.size(program.sizes)
    shape = (ONE, columns, Dim.of(parts))
    program.buffers[sink.buffer] = Buffer(sink.buffer, "partial", shape, f32)


def _counted(program: Program, body: Body, makers: dict[str, GemmKernel]) -> Body:
    """Folds with the number of values in each partial."""

    def count(statistic: Statistic) -> Statistic:
        gemm = makers.get(statistic.operand or "")
        if gemm is None:
            return statistic
        width = gemm.problem(program.sizes)[1]
        return replace(statistic, count=gemm.config.tile_n * statistic.width // width)

    epilogue: Epilogue = body.epilogue
    statistics = tuple(count(s) for s in epilogue.statistics)
    return replace(body, epilogue=replace(epilogue, statistics=statistics))
