"""Program -> Program with a tile config for each GEMM, and the sizes of partials that follow.

A row statistic of a GEMM of 4096 columns in tiles of 128: partials [planes, M, 32], count 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, assert_never

from coda.ir.dims import ONE, Dim, Shape, product
from coda.ir.monoids import MONOIDS
from coda.ir.types import f32
from coda.lowering.program.body import Body
from coda.lowering.program.epilogue import PickColumn, ReduceColumns, Statistic, SumRows
from coda.lowering.program.kernel import Kernel, Partials
from coda.lowering.program.program import Buffer, Program


def configure(program: Program) -> Program:
    """Give each kernel its kind's best config, if the kind has configs, and size the partials."""
    kernels: list[Kernel[Any]] = []
    for kernel in program.kernels:
        configs = kernel.kind.configs(program, kernel)
        kernels.append(replace(kernel, config=configs[0]) if configs else kernel)
    return size_partials(replace(program, kernels=tuple(kernels)))


def size_partials(program: Program) -> Program:
    """Set the shape of each buffer of partials, and the number of values per partial in folds."""
    kernels: list[Kernel[Any]] = []
    shapes: dict[str, Shape] = {}
    parts_of: dict[str, tuple[int, Partials]] = {}  # columns and partials of the producer kernel
    for kernel in program.kernels:
        kernel = replace(kernel, body=_counted(kernel.body, parts_of))
        kernels.append(kernel)
        if not kernel.body.epilogue.sinks:
            continue
        width = kernel.mainloop.points(program.sizes)[1]
        parts = kernel.kind.partials(program, kernel, program.sizes)
        for sink in kernel.body.epilogue.sinks:
            match sink:
                case PickColumn() | SumRows(whole=True):
                    pass
                case SumRows(buffer=name):
                    shapes[name] = _of_rows(program, sink, parts, width)
                case ReduceColumns(buffer=name, monoid=monoid):
                    parts_of[name] = width, parts
                    planes = Dim.of(len(MONOIDS[monoid].planes))
                    rows = product(program.buffers[name].shape[:1])
                    shapes[name] = planes, rows, Dim.of(parts.of_columns)
                case _ as never:
                    assert_never(never)
    sized = {name: Buffer(name, "partial", shape, f32) for name, shape in shapes.items()}
    return replace(program, kernels=tuple(kernels), buffers={**program.buffers, **sized})


def _of_rows(program: Program, sink: SumRows, parts: Partials, width: int) -> Shape:
    """The shape [1, columns, parts] of the partials of a sum over rows.

    If the sum also runs over column axes, several columns of the kernel are parts of one sum. If
    each sequence is summed alone, partials are of one of them each.
    """
    columns = program.buffers[sink.buffer].shape[1]
    summed = parts.of_rows * (sink.span.width if sink.span else width)
    return ONE, columns, Dim.of(summed // max(1, columns.size(program.sizes)))


def _counted(body: Body, parts_of: Mapping[str, tuple[int, Partials]]) -> Body:
    """A body whose folds have the number of values per partial."""

    def count(statistic: Statistic) -> Statistic:
        made = parts_of.get(statistic.operand or "")
        if made is None:
            return statistic
        width, parts = made
        return replace(statistic, count=parts.columns * statistic.width // width)

    statistics = tuple(map(count, body.epilogue.statistics))
    return replace(body, epilogue=replace(body.epilogue, statistics=statistics))
