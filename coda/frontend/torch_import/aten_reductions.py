"""ATen reductions, scans and what is taken along one axis -> primitives.

A reduction is over any axes; of a number (shape []) it is over one element, as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from coda.frontend import library, ops
from coda.frontend.reductions import root
from coda.frontend.tensor import Tensor
from coda.frontend.torch_import.aten import cast, condition, numbers, refuse, reshaped, wide
from coda.frontend.torch_import.rules import OperatorRules, Result, Rule
from coda.ir.dims import product

aten = torch.ops.aten
TABLE = OperatorRules()
rule = TABLE.enter
Axes = Sequence[int] | int | None


def axes_of(x: Tensor, dim: Axes) -> tuple[int, ...]:
    """Torch's axes as numbers from the left; None and [] are all."""
    given = (dim,) if isinstance(dim, int) else tuple(dim or range(x.ndim))
    return tuple(a % x.ndim for a in given)


def over(
    fn: Callable[..., Tensor], x: Tensor, dim: Axes, *, keepdim: bool = False, **more: Any
) -> Tensor:
    """A reduction of `ops` over some axes."""
    if not x.ndim:
        return fn(x.reshape(1), 0, **more).reshape()
    return fn(x, axes_of(x, dim), keepdims=keepdim, **more)


def operand(result: Result, x: Tensor, dtype: Any) -> Tensor:
    """The tensor that is reduced: if a dtype is asked for, cast to it first, as in torch."""
    (x,) = numbers(result, x)
    return x if dtype is None else x.cast(result.dtype)


def last(x: Tensor, dim: int) -> Tensor:
    """The tensor with an axis as its last: the others keep their order."""
    order = [i for i in range(x.ndim) if i != dim % x.ndim]
    return x.permute(*order, dim % x.ndim)


def back(x: Tensor, dim: int) -> Tensor:
    """The tensor with its last axis as another one: the inverse of `last`."""
    order = list(range(x.ndim - 1))
    order.insert(dim % x.ndim, x.ndim - 1)
    return x.permute(*order)


def along(fn: Callable[[Tensor], Tensor], x: Tensor, dim: int) -> Tensor:
    """A function of rows, which keeps their length, along any axis."""
    if not x.ndim:
        return fn(x.reshape(1)).reshape()
    return fn(x) if dim % x.ndim == x.ndim - 1 else back(fn(last(x, dim)), dim)


# Sums, means and extremes.


def _reduction(fn: Callable[..., Tensor]) -> Rule:
    def apply(
        result: Result, x: Tensor, dim: Axes = None, keepdim: bool = False, dtype: Any = None
    ) -> Tensor:
        return over(fn, operand(result, x, dtype), dim, keepdim=keepdim)

    return apply


def _whole(fn: Callable[..., Tensor]) -> Rule:
    def apply(result: Result, x: Tensor, dtype: Any = None) -> Tensor:
        return over(fn, operand(result, x, dtype), None)

    return apply


for _name, _fn in (("sum", ops.sum), ("mean", ops.mean)):
    rule(getattr(aten, _name).default)(_whole(_fn))
rule(aten.sum.dim_IntList)(_reduction(ops.sum))
rule(aten.mean.dim)(_reduction(ops.mean))
rule(aten.amax.default, aten.max.default)(_reduction(ops.max))
rule(aten.amin.default, aten.min.default)(_reduction(ops.min))


@rule(aten.prod.dim_int)
def _prod(result: Result, x: Tensor, dim: Axes, keepdim: bool = False, dtype: Any = None) -> Tensor:
    return cast(over(ops.prod, wide(operand(result, x, dtype)), dim, keepdim=keepdim), result.dtype)


@rule(aten.prod.default)
def _prod_all(result: Result, x: Tensor, dtype: Any = None) -> Tensor:
    return _prod(result, x, None, False, dtype)


@rule(aten.logsumexp.default)
def _logsumexp(result: Result, x: Tensor, dim: Axes, keepdim: bool = False) -> Tensor:
    (x,) = numbers(result, x)
    return cast(over(ops.logsumexp, wide(x), dim, keepdim=keepdim), result.dtype)


@rule(aten.cumsum.default)
def _cumsum(result: Result, x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    x = wide(operand(result, x, dtype))
    return cast(along(ops.cumsum, x, dim), result.dtype)


# Conditions.


@rule(aten.any.default, aten.any.dim, aten.any.dims)
def _any(result: Result, x: Tensor, dim: Axes = None, keepdim: bool = False) -> Tensor:
    return over(ops.sum, ops.where(condition(x), 1.0, 0.0), dim, keepdim=keepdim) > 0.0


@rule(aten.all.default, aten.all.dim, aten.all.dims)
def _all(result: Result, x: Tensor, dim: Axes = None, keepdim: bool = False) -> Tensor:
    return over(ops.sum, ops.where(condition(x), 0.0, 1.0), dim, keepdim=keepdim) == 0.0


# Positions of extremes.


def _position(fn: Callable[..., Tensor]) -> Rule:
    def apply(result: Result, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        if dim is None or not x.ndim:
            return reshaped(fn(x.reshape(product(x.shape))), result.shape)
        return fn(x, dim, keepdims=keepdim)

    return apply


rule(aten.argmax.default)(_position(ops.argmax))
rule(aten.argmin.default)(_position(ops.argmin))


def _extreme_and_place(fn: Callable[..., Tensor]) -> Rule:
    def apply(result: Result, x: Tensor, dim: int, keepdim: bool = False) -> list[Tensor]:
        """The extreme at its first place, which has all of its gradient."""
        rows = last(x, dim) if x.ndim else x.reshape(1)
        place = fn(rows)
        return [reshaped(found, result.shape) for found in (ops.pick(rows, place), place)]

    return apply


rule(aten.max.dim)(_extreme_and_place(ops.argmax))
rule(aten.min.dim)(_extreme_and_place(ops.argmin))


@rule(aten.aminmax.default)
def _aminmax(
    result: Result, x: Tensor, *, dim: int | None = None, keepdim: bool = False
) -> list[Tensor]:
    (x,) = numbers(result, x)
    return [over(fn, x, dim, keepdim=keepdim) for fn in (ops.min, ops.max)]


# Variances.


def _deviation(fn: Callable[..., Tensor], also_mean: bool) -> tuple[Rule, Rule, Rule]:
    """The overloads `correction`, `dim` and `default` of a variance or its square root."""

    def correction(
        result: Result, x: Tensor, dim: Axes = None, correction: Any = 1, keepdim: bool = False
    ) -> Any:
        (x,) = numbers(result, x)
        x = wide(x)
        less = 1 if correction is None else correction
        count = product(x.shape[a] for a in axes_of(x, dim)).constant if x.ndim else 1
        if less > 1 and (count is None or less > count):
            raise refuse("a variance whose divisor may be negative")
        found = cast(over(fn, x, dim, keepdim=keepdim, correction=less), result.dtype)
        if not also_mean:
            return found
        return [found, cast(over(ops.mean, x, dim, keepdim=keepdim), result.dtype)]

    def dims(
        result: Result, x: Tensor, dim: Axes, unbiased: bool = True, keepdim: bool = False
    ) -> Any:
        return correction(result, x, dim, int(unbiased), keepdim)

    def default(result: Result, x: Tensor, unbiased: bool = True) -> Any:
        return correction(result, x, None, int(unbiased))

    return correction, dims, default


for _name, _fn, _both in (
    ("var", ops.var, False),
    ("std", ops.std, False),
    ("var_mean", ops.var, True),
    ("std_mean", ops.std, True),
):
    _packet = getattr(aten, _name)
    for _overload, _rule in zip(
        ("correction", "dim", "default"), _deviation(_fn, _both), strict=True
    ):
        rule(getattr(_packet, _overload))(_rule)


# Norms.


@rule(aten.linalg_vector_norm.default)
def _vector_norm(
    result: Result,
    x: Tensor,
    order: Any = 2,
    dim: Axes = None,
    keepdim: bool = False,
    dtype: Any = None,
) -> Tensor:
    x = wide(operand(result, x, dtype))
    if order == 2:
        found = Tensor(root(over(ops.sum, ops.square(x), dim, keepdim=keepdim).node))
    elif order == 1:
        found = over(ops.sum, ops.abs(x), dim, keepdim=keepdim)
    elif abs(order) == math.inf:
        found = over(ops.max if order > 0 else ops.min, ops.abs(x), dim, keepdim=keepdim)
    elif order == 0:
        found = over(ops.sum, ops.where(x != 0.0, 1.0, 0.0), dim, keepdim=keepdim)
    else:
        raise refuse(f"a norm of order {order}")
    return cast(found, result.dtype)


@rule(aten.norm.ScalarOpt_dim)
def _norm(result: Result, x: Tensor, order: Any, dim: Axes = None, keepdim: bool = False) -> Tensor:
    return _vector_norm(result, x, 2 if order is None else order, dim, keepdim)


@rule(aten.norm.Scalar)
def _norm_all(result: Result, x: Tensor, order: Any = 2) -> Tensor:
    return _vector_norm(result, x, order)


# Rows.


@rule(aten.softmax.int, aten._softmax.default)
def _softmax(result: Result, x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return _row_function(library.softmax, result, x, dim, dtype)


@rule(aten.log_softmax.int, aten._log_softmax.default)
def _log_softmax(result: Result, x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return _row_function(library.log_softmax, result, x, dim, dtype)


def _row_function(
    fn: Callable[[Tensor], Tensor], result: Result, x: Tensor, dim: int, dtype: Any
) -> Tensor:
    """A softmax; `dtype` is a type to cast to first, or the last argument of `_softmax`, a bool."""
    (x,) = numbers(result, x)
    x = x.cast(result.dtype) if isinstance(dtype, torch.dtype) else x
    return cast(along(fn, wide(x), dim), result.dtype)


@rule(aten.glu.default)
def _glu(result: Result, x: Tensor, dim: int = -1) -> Tensor:
    (x,) = numbers(result, x)
    a, b = ops.split(wide(x), 2, dim)
    return cast(a * ops.sigmoid(b), result.dtype)
