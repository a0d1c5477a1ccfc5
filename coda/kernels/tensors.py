"""Tensors -> the layouts in which kernels read and write them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coda.ir.types import from_torch


def matrix(x: Tensor) -> Tensor:
    """A tensor as rows of its last axis, of which there may be none."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def padded(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty matrix whose rows begin at multiples of 16 bytes."""
    step = max(1, 16 // dtype.itemsize)
    wide = -(-columns // step) * step
    return torch.empty((rows, wide), dtype=dtype, device=device).narrow(1, 0, columns)


def aligned(x: Tensor, turned: bool = False) -> Tensor:
    """A matrix that TMA can read: unit stride along the columns, rows 16 bytes apart.

    With `turned`, the unit stride may be along the rows: what a GEMM multiplies. A matrix that
    is expanded (one row for all, stride 0) is copied, as any other is that TMA cannot read.
    """
    size = x.element_size()
    apart = [s > 0 and s * size % 16 == 0 for s in x.stride()]
    along = (x.stride(-1) == 1 and apart[0]) or (turned and x.stride(0) == 1 and apart[-1])
    if along and x.data_ptr() % 16 == 0:
        return x
    copy = padded(x.shape[0], x.shape[1], x.dtype, x.device)
    return copy.copy_(x)


def is_padded(x: Tensor) -> bool:
    """Whether the rows of a matrix begin at multiples of 16 bytes, each in memory of its own."""
    own = x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % 16 == 0
    return x.stride(1) == 1 and (own or x.shape[0] == 1) and x.data_ptr() % 16 == 0


def in_bytes(x: Tensor) -> Tensor:
    """A tensor as kernels read it: the DSL has no matrices of conditions, but of bytes."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def written(x: Tensor) -> Tensor:
    """A tensor as kernels write it."""
    kind = from_torch(x.dtype)
    return x.view(torch.uint8) if kind is not None and kind.by_bytes else x
