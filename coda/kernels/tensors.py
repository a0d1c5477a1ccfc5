"""Tensors -> aliases or copies in the layouts that kernels read and write."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from coda.ir.types import from_torch
from coda.lowering.program.epilogue import RowOrder


def matrix(x: Tensor) -> Tensor:
    """A tensor [..., N] as a matrix [rows, N]; there may be no rows."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def padded_length(count: int, dtype: torch.dtype) -> int:
    """The least number of elements ≥ `count` that fills a multiple of 16 bytes."""
    step = max(1, 16 // dtype.itemsize)
    return -(-count // step) * step


def by_axes(x: Tensor, rows: RowOrder, sizes: Mapping[str, int]) -> Tensor:
    """A buffer [rows, columns] as [*axes of the kernel's rows, columns], an alias."""
    axes = [d.size(sizes) for d in rows.axes]
    whole = x.unflatten(0, [axes[i] for i in rows.order])
    return whole.permute(*rows.inverse, len(axes))


def expanded(x: Tensor, lead: tuple[int, ...], columns: int) -> Tensor:
    """An operand that lacks some row axes, as [*lead from inner to outer, columns], an alias.

    Its strides are 0 along what it lacks. Rows that do not begin at multiples of 16 bytes, and are
    of whole vectors of 16 bytes, are copied first.

    Args:
        x: the operand; its axes before the columns broadcast to `lead`.
        lead: the sizes of the row axes, outer to inner.
        columns: the number of its trailing axes that are columns.
    """
    whole = x.reshape(*x.shape[: x.ndim - columns], math.prod(x.shape[x.ndim - columns :]))
    size = x.element_size()
    if whole.shape[-1] > 1 and whole.shape[-1] * size % 16 == 0:
        apart = [
            s * size % 16 for s, n in zip(whole.stride()[:-1], whole.shape, strict=False) if n > 1
        ]
        if whole.stride(-1) != 1 or whole.data_ptr() % 16 or any(apart):
            whole = whole.clone(memory_format=torch.contiguous_format)
    elif whole.stride(-1) != 1 and whole.shape[-1] > 1:
        whole = whole.contiguous()
    whole = whole.expand(*lead, whole.shape[-1])
    return whole.permute(*reversed(range(len(lead))), len(lead))


def padded(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix [rows, columns] whose row stride is a multiple of 16 bytes."""
    wide = padded_length(columns, dtype)
    return torch.empty((rows, wide), dtype=dtype, device=device).narrow(1, 0, columns)


def aligned(x: Tensor, *, transposed: bool = False) -> Tensor:
    """A matrix that TMA can read: contiguous rows, with a row stride of a multiple of 16 bytes.

    With `transposed`, its columns may be contiguous instead, as in the operands of a GEMM.
    Any other matrix is copied, such as an expanded one (stride 0).
    """
    size = x.element_size()
    apart = [s > 0 and s * size % 16 == 0 for s in x.stride()]
    along = (x.stride(-1) == 1 and apart[0]) or (transposed and x.stride(0) == 1 and apart[-1])
    if along and x.data_ptr() % 16 == 0:
        return x
    copy = padded(x.shape[0], x.shape[1], x.dtype, x.device)
    return copy.copy_(x)


def is_padded(x: Tensor) -> bool:
    """Whether rows are contiguous, do not overlap and begin at multiples of 16 bytes."""
    own = x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % 16 == 0
    return x.stride(1) == 1 and (own or x.shape[0] == 1) and x.data_ptr() % 16 == 0


def in_bytes(x: Tensor) -> Tensor:
    """View a bool tensor as uint8, since the DSL has no bool matrices; others are unchanged."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def written(x: Tensor) -> Tensor:
    """View a tensor as uint8 if kernels store its dtype as bytes; others are unchanged."""
    kind = from_torch(x.dtype)
    return x.view(torch.uint8) if kind is not None and kind.by_bytes else x
