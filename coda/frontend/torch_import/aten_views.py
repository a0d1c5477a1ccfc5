"""ATen views, slices and concatenations -> primitives: operators that move elements only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from coda.frontend import ops
from coda.frontend.tensor import Tensor
from coda.frontend.torch_import.aten import cast, refuse
from coda.frontend.torch_import.rules import OperatorRules, Result
from coda.ir.dims import Dim
from coda.ir.graph import Expand, Permute, Reshape

aten = torch.ops.aten
TABLE = OperatorRules()
rule = TABLE.enter


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.view_as.default,
    aten.reshape_as.default,
    view=True,
)
def _reshape(result: Result, x: Tensor, *_: Any) -> Tensor:
    return x if x.shape == result.shape else Tensor(Reshape(x.node, result.shape))


@rule(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    view=True,
)
def _same(result: Result, x: Tensor, **_: Any) -> Tensor:
    return x


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default, view=True)
def _expand(result: Result, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x if x.shape == result.shape else Tensor(Expand(x.node, result.shape))


@rule(aten.permute.default, view=True)
def _permute(result: Result, x: Tensor, order: Sequence[int]) -> Tensor:
    return Tensor(Permute(x.node, tuple(i % x.ndim for i in order)))


@rule(aten.transpose.int, aten.swapaxes.default, view=True)
def _transpose(result: Result, x: Tensor, a: int, b: int) -> Tensor:
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return Tensor(Permute(x.node, tuple(order)))


@rule(aten.mT.default, view=True)
def _mt(result: Result, x: Tensor) -> Tensor:
    return x.mT


@rule(aten.movedim.int, view=True)
def _movedim(result: Result, x: Tensor, source: int, to: int) -> Tensor:
    order = [i for i in range(x.ndim) if i != source % x.ndim]
    order.insert(to % x.ndim, source % x.ndim)
    return Tensor(Permute(x.node, tuple(order)))


@rule(aten.t.default, aten.numpy_T.default, view=True)
def _t(result: Result, x: Tensor) -> Tensor:
    return x.T if x.ndim == 2 else x


@rule(aten.dropout.default)
def _dropout(result: Result, x: Tensor, p: float, train: bool) -> Tensor:
    if train and p:
        raise refuse("dropout draws random numbers")
    return x


# Parts and wholes.


def _index(x: Tensor, dim: int, item: Any) -> Tensor:
    where: list[Any] = [slice(None)] * x.ndim
    where[dim] = item
    return x[tuple(where)]


def _position(value: Any) -> Any:
    if isinstance(value, int | None):
        return value
    raise refuse("a position known only at run time")


@rule(aten.slice.Tensor)
def _slice(
    result: Result, x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Tensor:
    if x.shape == result.shape:
        return x
    start, end = _position(start), _position(end)
    size = x.shape[dim].constant
    if size is None:
        raise refuse("a part of an axis whose size is known only at run time")
    first, last, every = slice(start, end, _position(step)).indices(size)
    if last <= first:
        raise refuse("an empty slice")
    return _index(x, dim, slice(first, last, every))


@rule(aten.select.int)
def _select(result: Result, x: Tensor, dim: int, at: Any) -> Tensor:
    return _index(x, dim, _position(at))


@rule(aten.narrow.default)
def _narrow(result: Result, x: Tensor, dim: int, start: Any, length: Any) -> Tensor:
    first = _position(start)
    return _index(x, dim, slice(first, first + _position(length)))


@rule(aten.split.Tensor, aten.unsafe_split.Tensor)
def _split(result: Result, x: Tensor, size: Any, dim: int = 0) -> list[Tensor]:
    whole = x.shape[dim].constant
    if whole is None:
        raise refuse("a part of an axis whose size is known only at run time")
    step = _position(size)
    return [_index(x, dim, slice(i, min(i + step, whole))) for i in range(0, whole, step)]


@rule(aten.split_with_sizes.default)
def _split_sizes(result: Result, x: Tensor, sizes: Sequence[Any], dim: int = 0) -> list[Tensor]:
    return list(ops.split(x, [Dim.of(_position(s)) for s in sizes], dim))


@rule(aten.chunk.default, aten.unsafe_chunk.default)
def _chunk(result: Result, x: Tensor, parts: int, dim: int = 0) -> list[Tensor]:
    whole = x.shape[dim].constant
    if whole is None:
        raise refuse("a part of an axis whose size is known only at run time")
    return _split(result, x, math.ceil(whole / parts), dim)


@rule(aten.unbind.int)
def _unbind(result: Result, x: Tensor, dim: int = 0) -> list[Tensor]:
    whole = x.shape[dim].constant
    if whole is None:
        raise refuse("a part of an axis whose size is known only at run time")
    return [_index(x, dim, i) for i in range(whole)]


def _columns(x: Tensor, dim: int) -> None:
    if not x.ndim or dim % x.ndim != x.ndim - 1:
        raise refuse("tensors joined along another axis than the last")


@rule(aten.cat.default)
def _cat(result: Result, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    filled = [t for t in tensors if t.ndim and t.shape[dim] != 0]
    if not filled:
        raise refuse("tensors without elements")
    _columns(filled[0], dim)
    return ops.concat([cast(t, result.dtype) for t in filled], -1)


@rule(aten.stack.default)
def _stack(result: Result, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return ops.stack(
        [cast(t, result.dtype) for t in tensors], dim if dim < 0 else dim - tensors[0].ndim - 1
    )


@rule(aten.roll.default)
def _roll(result: Result, x: Tensor, shifts: Sequence[Any], dims: Sequence[int] = ()) -> Tensor:
    if len(dims) != 1 or len(shifts) != 1:
        raise refuse("a roll along several axes")
    _columns(x, dims[0])
    width = x.shape[-1].constant
    if not width:
        raise refuse("a roll of an axis without a known size")
    first = -_position(shifts[0]) % width
    return x if not first else ops.concat([x[..., first:], x[..., :first]])


@rule(aten.diff.default)
def _diff(result: Result, x: Tensor, n: int = 1, dim: int = -1, *more: Any) -> Tensor:
    if n != 1 or any(m is not None for m in more):
        raise refuse("a difference of more than neighbours")
    _columns(x, dim)
    return x[..., 1:] - x[..., :-1]
