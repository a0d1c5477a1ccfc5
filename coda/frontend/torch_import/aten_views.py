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
from coda.ir.dims import Dim, product
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


def part_of(x: Tensor, dim: int, item: Any) -> Tensor:
    """A tensor at an index or a slice of one axis, and whole along the others."""
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
    return part_of(x, dim, slice(first, last, every))


@rule(aten.select.int)
def _select(result: Result, x: Tensor, dim: int, at: Any) -> Tensor:
    return part_of(x, dim, _position(at))


@rule(aten.narrow.default)
def _narrow(result: Result, x: Tensor, dim: int, start: Any, length: Any) -> Tensor:
    first = _position(start)
    return part_of(x, dim, slice(first, first + _position(length)))


@rule(aten.split.Tensor, aten.unsafe_split.Tensor)
def _split(result: Result, x: Tensor, size: Any, dim: int = 0) -> list[Tensor]:
    whole = x.shape[dim].constant
    if whole is None:
        raise refuse("a part of an axis whose size is known only at run time")
    step = _position(size)
    return [part_of(x, dim, slice(i, min(i + step, whole))) for i in range(0, whole, step)]


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
    return [part_of(x, dim, i) for i in range(whole)]


@rule(aten.cat.default)
def _cat(result: Result, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    filled = [t for t in tensors if all(d != Dim.of(0) for d in t.shape)]
    if not filled:
        raise refuse("tensors without elements")
    return ops.concat([cast(t, result.dtype) for t in filled], dim % filled[0].ndim)


@rule(aten.slice_scatter.default)
def _slice_scatter(
    result: Result,
    x: Tensor,
    source: Tensor,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: Any = 1,
) -> Tensor:
    size = x.shape[dim].constant
    if size is None or step != 1:
        raise refuse("a part of an axis whose size is known only at run time")
    first, last, _ = slice(_position(start), _position(end)).indices(size)
    if last <= first:
        raise refuse("an empty slice")
    return _with_part(x, cast(source, result.dtype), dim, first, last)


@rule(aten.select_scatter.default)
def _select_scatter(result: Result, x: Tensor, source: Tensor, dim: int, at: Any) -> Tensor:
    size = x.shape[dim].constant
    if size is None:
        raise refuse("a part of an axis whose size is known only at run time")
    first = _position(at) % size
    where: list[Any] = [slice(None)] * x.ndim
    where[dim] = None
    part = cast(source, result.dtype)[tuple(where)]
    return _with_part(x, part, dim, first, first + 1)


def _with_part(x: Tensor, part: Tensor, dim: int, first: int, last: int) -> Tensor:
    """A tensor of which positions [first, last) of an axis are another's."""
    size = x.shape[dim].constant
    parts = [part_of(x, dim, slice(0, first))] if first else []
    parts.append(part)
    parts += [part_of(x, dim, slice(last, size))] if last != size else []
    return part if len(parts) == 1 else ops.concat(parts, dim)


@rule(aten.stack.default)
def _stack(result: Result, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return ops.stack(
        [cast(t, result.dtype) for t in tensors], dim if dim < 0 else dim - tensors[0].ndim - 1
    )


@rule(aten.roll.default)
def _roll(result: Result, x: Tensor, shifts: Sequence[Any], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        flat = x.reshape(product(x.shape))
        return _rolled(flat, shifts[0], 0).reshape(*x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        x = _rolled(x, shift, dim)
    return x


def _rolled(x: Tensor, shift: Any, dim: int) -> Tensor:
    size = x.shape[dim].constant
    if not size:
        raise refuse("a roll of an axis without a known size")
    first = -_position(shift) % size
    if not first:
        return x
    return ops.concat([part_of(x, dim, slice(first, size)), part_of(x, dim, slice(0, first))], dim)


for _name in ("view", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice",
              "select", "split", "split_with_sizes", "unbind", "alias"):  # fmt: skip
    _packet = getattr(aten, f"{_name}_copy", None)
    for _overload in _packet.overloads() if _packet else ():
        _like = getattr(getattr(aten, _name), _overload, None)
        if _like in TABLE.rules:
            rule(getattr(_packet, _overload))(TABLE.rules[_like])
