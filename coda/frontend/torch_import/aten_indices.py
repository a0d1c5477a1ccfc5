"""ATen operators that take elements at computed places -> Gather and Pick, and constants.

flip(x, 0)         ->    i = iota n;  take(x, n - 1 - i)
gather(x, -1, i)   ->    i [.., 1]: pick(x, i); else take(flat x, row * n + i)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from coda.frontend import ops
from coda.frontend.tensor import Tensor
from coda.frontend.torch_import.aten import cast, refuse, reshaped
from coda.frontend.torch_import.aten_reductions import back, last
from coda.frontend.torch_import.aten_views import part_of
from coda.frontend.torch_import.rules import OperatorRules, Result
from coda.ir.dims import ONE, Dim, product
from coda.ir.graph import Const, Expand
from coda.ir.types import DType, i64

aten = torch.ops.aten
TABLE = OperatorRules()
rule = TABLE.enter


def _known(x: Tensor, axis: int) -> int:
    size = x.shape[axis].constant
    if size is None:
        raise refuse("places along an axis whose size is known only at run time")
    return size


def _taken(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Slices of an axis at an index, whose axes take the place of that axis."""
    at = axis % x.ndim
    if any(d == Dim.of(0) for d in (*x.shape, *index.shape)):
        raise refuse("a tensor without elements")
    front = ops.take(x.permute(at, *(i for i in range(x.ndim) if i != at)), index)
    order = [*range(index.ndim, index.ndim + at), *range(index.ndim)]
    return front.permute(*order, *range(index.ndim + at, front.ndim))


@rule(aten.flip.default)
def _flip(result: Result, x: Tensor, dims: Sequence[int]) -> Tensor:
    for axis in dims if x.ndim else ():
        size = _known(x, axis)
        x = _taken(x, axis, size - 1 - ops.iota(size))
    return x


@rule(aten.index_select.default)
def _index_select(result: Result, x: Tensor, dim: int, index: Tensor) -> Tensor:
    if not x.ndim:
        raise refuse("places in a number")
    return _taken(x, dim, index.reshape(1) if not index.ndim else index)


@rule(aten.index.Tensor)
def _index(result: Result, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Integer tensors for neighbouring axes, which are joined to one; negative ones wrap."""
    places = [i for i, index in enumerate(indices) if index is not None]
    if not places or places != list(range(places[0], places[-1] + 1)):
        raise refuse("indices of axes that are no neighbours")
    flat: Any = 0
    for axis in places:
        index, size = indices[axis], _known(x, axis)
        assert index is not None
        if index.dtype.kind != "int":
            raise refuse("an index of booleans: the size of its result depends on values")
        wide = cast(index, i64)
        flat = flat * size + ops.where(wide < 0, wide + size, wide)
    joined = product(x.shape[a] for a in places)
    shape = (*x.shape[: places[0]], joined, *x.shape[places[-1] + 1 :])
    return _taken(x.reshape(*shape), places[0], flat)


@rule(aten.gather.default)
def _gather(
    result: Result, x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False
) -> Tensor:
    if not x.ndim or not index.ndim:
        raise refuse("places in a number")
    at = dim % x.ndim
    for axis in range(x.ndim):
        if axis != at and x.shape[axis] != index.shape[axis]:
            x = part_of(x, axis, slice(0, _known(index, axis)))
    rows, places = last(x, at), last(index, at)
    if places.shape[-1] == ONE:
        found = ops.pick(rows, places.reshape(*places.shape[:-1]))
    else:
        width, count = _known(rows, -1), product(rows.shape[:-1])
        wide = cast(places, i64)
        if count != ONE:
            wide = ops.iota(count, i64).reshape(*rows.shape[:-1], 1) * width + wide
        found = ops.take(rows.reshape(count * width), wide)
    return back(found, at)


# Constants.


def _filled(result: Result, value: Any) -> Tensor:
    if not isinstance(value, bool | int | float) or result.dtype.kind == "bool":
        raise refuse("a constant that is no number")
    return Tensor(Expand(Const(_held(result.dtype, value), result.dtype), result.shape))


def _held(dtype: DType, value: float) -> float:
    return dtype.nearest(float(value)) if dtype.kind == "float" else int(value)


@rule(aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default)
def _zeros(result: Result, *_: Any, **__: Any) -> Tensor:
    return _filled(result, 0)


@rule(aten.ones_like.default, aten.new_ones.default, aten.ones.default)
def _ones(result: Result, *_: Any, **__: Any) -> Tensor:
    return _filled(result, 1)


@rule(aten.full.default, aten.full_like.default, aten.new_full.default, aten.fill.Scalar)
def _full(result: Result, *given: Any, **_: Any) -> Tensor:
    return _filled(result, given[-1])


@rule(aten.fill.Tensor)
def _fill(result: Result, x: Tensor, value: Tensor) -> Tensor:
    return Tensor(Expand(value.cast(result.dtype).node, result.shape))


# Repetitions and margins.


@rule(aten.repeat.default)
def _repeat(result: Result, x: Tensor, repeats: Sequence[Any]) -> Tensor:
    if not all(isinstance(r, int) and r > 0 for r in repeats):
        raise refuse("repetitions whose number is known only at run time")
    shape = (*[ONE] * (len(repeats) - x.ndim), *x.shape)
    apart = [d for size in shape for d in (ONE, size)]
    wide = [d for count, size in zip(repeats, shape, strict=True) for d in (count, size)]
    found = Tensor(Expand(x.reshape(*apart).node, tuple(map(Dim.of, wide))))
    return reshaped(found, result.shape)


@rule(aten.constant_pad_nd.default)
def _pad(result: Result, x: Tensor, margins: Sequence[Any], value: Any = 0) -> Tensor:
    """Margins of one value, from the last axis on; negative ones cut."""
    if not all(isinstance(m, int) for m in margins) or x.dtype.kind == "bool":
        raise refuse("margins whose width is known only at run time")
    for i, (before, after) in enumerate(zip(margins[::2], margins[1::2], strict=True)):
        axis = x.ndim - 1 - i
        size = _known(x, axis) if before < 0 or after < 0 else 0
        if before < 0 or after < 0:
            x = part_of(x, axis, slice(max(-before, 0), size + min(after, 0)))
        parts = [_margin(x, axis, before, value), x, _margin(x, axis, after, value)]
        kept = [p for p in parts if p is not None]
        x = kept[0] if len(kept) == 1 else ops.concat(kept, axis)
    return x


def _margin(x: Tensor, axis: int, width: int, value: Any) -> Tensor | None:
    if width <= 0:
        return None
    shape = list(x.shape)
    shape[axis] = ONE * width
    return _filled(Result(tuple(shape), x.dtype), value)
