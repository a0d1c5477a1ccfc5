"""The operand of a batched contraction -> a tensor [L, R, C] that a GEMM reads: an alias or a copy.

The batch index of the tensor has one stride; `BatchStrides` says which strides its outer and inner
part have. q [b, s, h, d] read as [b, h, s, d] is NESTED: the tensor is [b · h, s, d] with strides
(d, h · d, 1), and the kernel steps s · h · d from one b to the next.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor

from coda.kernels.gemm.batches import ALIGNED, BatchStrides
from coda.kernels.tensors import padded, padded_length

Strides = tuple[int, int, int]  # of the batch index, rows and columns


def laid_out(x: Tensor, lead: tuple[int, ...], inner: int, step: BatchStrides) -> Tensor:
    """An operand [*b, R, C], b broadcast to `lead`, as [L, R, C]: an alias if its strides fit.

    Args:
        x: the operand.
        lead: the sizes of all batch axes; none is 0.
        inner: the size of the inner batch index.
        step: how the kernel reads the operand.
    """
    count = math.prod(lead)
    whole = x.expand(*lead, *x.shape[-2:])
    parts = whole.reshape(count // inner, inner, *x.shape[-2:])  # a copy if axes do not merge
    strides = _strides(parts, step)
    if strides is None:
        parts = _copied(parts, step)
        strides = _strides(parts, step)
        assert strides is not None
    return parts.as_strided((count, *x.shape[-2:]), strides)


def _strides(x: Tensor, step: BatchStrides) -> Strides | None:
    """The strides of [outer, inner, R, C] as [L, R, C]; None if a kernel cannot read it by `step`.

    Axes of size 1 take any stride.
    """
    outer, inner, rows, columns = x.shape
    o, i, r, c = x.stride()
    if 1 not in (r, c) or (c != 1 and columns == 1):
        return None
    pitch = padded_length(columns, x.dtype)
    if rows == 1 and c == 1:
        r = o if outer > 1 and step in (BatchStrides.NESTED, BatchStrides.SHARED_INSIDE) else pitch
        r = i if inner > 1 and step is BatchStrides.SHARED_OUTSIDE else r
    every = rows * r if c == 1 else columns * c
    own, outside, inside = 0, outer == 1, inner == 1  # an index of one value has any stride
    match step:
        case BatchStrides.PLAIN:
            fits = outside or inside or o == inner * i
            own = pitch if outside and inside else o if inside else i
        case BatchStrides.NESTED:
            fits = outside or o == every >= inner * i
            own = pitch if inside else i
        case BatchStrides.SHARED:
            fits = (outside or o == 0) and (inside or i == 0)
        case BatchStrides.SHARED_INSIDE:
            fits = (outside or o == every) and (inside or i == 0)
        case BatchStrides.SHARED_OUTSIDE:
            fits = (outside or o == 0) and (inside or i == every)
        case _ as never:
            assert_never(never)
    steps = [s * x.element_size() % ALIGNED for s in (own, r if c == 1 else c)]
    return (own, r, c) if fits and not any(steps) and x.data_ptr() % ALIGNED == 0 else None


def _copied(x: Tensor, step: BatchStrides) -> Tensor:
    """A copy of [outer, inner, R, C] that a kernel can read by `step`."""
    outer, inner, rows, columns = x.shape
    if step in (BatchStrides.SHARED, BatchStrides.SHARED_OUTSIDE):
        x = x[:1]
    if step in (BatchStrides.SHARED, BatchStrides.SHARED_INSIDE):
        x = x[:, :1]
    kept = x.transpose(1, 2) if step is BatchStrides.NESTED else x
    shape = (*kept.shape[:-1], padded_length(columns, x.dtype))
    copy = torch.empty(shape, dtype=x.dtype, device=x.device)[..., :columns].copy_(kept)
    made = copy.transpose(1, 2) if step is BatchStrides.NESTED else copy
    return made.expand(outer, inner, rows, columns)


def by_matrix(x: Tensor, matrices: int) -> Tensor:
    """[L · R, ...] as [L, R, ...], an alias."""
    return x.unflatten(0, (matrices, x.shape[0] // matrices))


def columns_by_matrix(x: Tensor, matrices: int) -> Tensor:
    """One number for each row, [L · M], as [L, M] with a stride of L of whole 16 bytes."""
    x = by_matrix(x.reshape(-1), matrices)
    rows = x.shape[1]
    if x.is_contiguous() and rows == padded_length(rows, x.dtype):
        return x
    return padded(matrices, rows, x.dtype, x.device).copy_(x)
