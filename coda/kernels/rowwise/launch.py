"""Emitted row-wise kernels -> compiled kernels and the arguments of launches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cutlass
import cutlass.cute as cute
from quack.cache import jit_cache
from torch import Tensor

from coda.kernels.modules import load_module
from coda.kernels.rowwise.source import CUT, RowSource

_TYPES = {
    "bf16": cutlass.BFloat16,
    "f16": cutlass.Float16,
    "f32": cutlass.Float32,
    "e4m3": cutlass.Float8E4M3FN,
    "e5m2": cutlass.Float8E5M2,
    "i32": cutlass.Int32,
    "i64": cutlass.Int64,
    "bool": cutlass.Uint8,
    "byte": cutlass.Uint8,
}


@jit_cache
def _compile(source: RowSource, shared: tuple[bool, ...], arch: str) -> Any:
    """Compile `launch` of an imported source, for any number of rows.

    The arguments are the key of quack's disk cache. They contain no path, so that shipped kernels
    are found in any directory.
    """
    module = sys.modules[source.name]
    rows = cute.sym_int()
    tensors = []
    for (_, name, columns, _), kind, once in zip(
        source.parameters, source.types, shared, strict=True
    ):
        axes = dict(source.axes).get(name)
        if axes is not None:
            tensors.append(_fake_by_axes(_TYPES[kind], axes, columns))
            continue
        lead = cute.sym_int() if name in source.partials else 1 if once else rows
        tensors.append(_fake(_TYPES[kind], lead, columns, name in source.padded))
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    counts = [cutlass.Int32(1) for _ in ("rows", *source.sizes)]
    return cute.compile(module.launch, *tensors, *counts, stream, options="--enable-tvm-ffi")


def _fake(dtype: Any, rows: Any, columns: int, padded: bool) -> Any:
    """A placeholder of the layout that the kernel reads.

    `columns` 0 is a transposed matrix [rows, any], -1 a matrix [rows, any], CUT one column of a
    wider matrix, with any distance between its rows. Any other matrix has a row stride of any
    multiple of 16 bytes if its rows are whole vectors of 16 bytes or `padded`, else contiguous
    rows.
    """
    size = dtype.width // 8
    if columns == 0:
        shape, stride = (rows, cute.sym_int()), (1, cute.sym_int64())
        return cute.runtime.make_fake_tensor(dtype, shape, stride=stride, assumed_align=size)
    if columns == -1:
        shape, stride = (rows, cute.sym_int()), (cute.sym_int64(), 1)
        return cute.runtime.make_fake_tensor(dtype, shape, stride=stride, assumed_align=size)
    if columns == CUT:
        shape, stride = (rows, 1), (cute.sym_int64(), 1)
        return cute.runtime.make_fake_tensor(dtype, shape, stride=stride, assumed_align=size)
    apart = (
        cute.sym_int64(divisibility=16 // size)
        if columns * size % 16 == 0 or (padded and columns > 1)
        else columns
    )
    align = max(size, 16 if columns > 1 else 1)
    shape = (rows, columns)
    return cute.runtime.make_fake_tensor(dtype, shape, stride=(apart, 1), assumed_align=align)


def _fake_by_axes(dtype: Any, axes: int, columns: int) -> Any:
    """A placeholder [*axes of rows, columns] with any strides of its rows.

    Rows of whole vectors of 16 bytes begin at multiples of 16 bytes.
    """
    size = dtype.width // 8
    whole = columns > 1 and columns * size % 16 == 0
    step = 16 // size if whole else 1
    shape = (*(cute.sym_int() for _ in range(axes)), columns)
    stride = (*(cute.sym_int64(divisibility=step) for _ in range(axes)), 1)
    align = 16 if whole else size
    return cute.runtime.make_fake_tensor(dtype, shape, stride=stride, assumed_align=align)


def _laid_out(x: Tensor, rows: int, columns: int, *, padded: bool = False) -> Tensor:
    """A tensor in the layout of `_fake`; a copy if it has another one."""
    if columns == 0:
        return x
    if columns == CUT:
        return x.reshape(rows, 1)
    if columns == -1:
        x = x.reshape(rows, -1)
        return x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous()
    x = x.reshape(rows, columns)
    whole = columns * x.element_size() % 16 == 0 or (padded and columns > 1)
    apart = x.stride(0) * x.element_size() % 16 == 0 if whole else x.stride(0) == columns
    if (x.stride(1) != 1 and columns > 1) or not (apart or rows == 1):
        x = x.contiguous()
    if whole and rows == 1:
        x = x.as_strided((1, columns), (columns, 1))
    return x.clone() if x.data_ptr() % 16 and columns > 1 else x


@dataclass(frozen=True)
class Module:
    """A row-wise kernel.

    Attributes:
        source: the emitted module.
        shared: for each parameter, whether it has one row for all rows of the kernel.
        arch: the architecture, such as "sm_90a".
        directory: where the module is written.
    """

    source: RowSource
    shared: tuple[bool, ...]
    arch: str
    directory: Path

    def compile(self) -> Any:
        """The compiled kernel, from the cache if possible."""
        load_module(self.source.text, self.source.name, self.directory)
        return _compile(self.source, self.shared, self.arch)

    def arguments(
        self,
        rows: int,
        tensors: Mapping[str, Tensor],
        ready: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor],
        sizes: Mapping[str, int],
    ) -> tuple[Any, ...]:
        """The arguments of the compiled kernel.

        Args:
            rows: the number of rows.
            tensors: operands and results by name.
            ready: ready(x, change) is `change(x)`, recorded for replays.
            sizes: the sizes of the call's symbols.
        """
        kept = {*self.source.partials, *dict(self.source.axes)}
        found = [
            tensors[source]
            if source in kept
            else ready(tensors[source], self.layout(source, 1 if once else rows, columns))
            for (_, source, columns, _), once in zip(
                self.source.parameters, self.shared, strict=True
            )
        ]
        return (*found, rows, *(d.size(sizes) for d in self.source.sizes))

    def layout(self, name: str, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        """The function that lays out a parameter of so many rows and columns."""
        return partial(_laid_out, rows=rows, columns=columns, padded=name in self.source.padded)
