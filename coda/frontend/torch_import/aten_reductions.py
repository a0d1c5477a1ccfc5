"""ATen products, norms, deviations and positions of extremes over the last axis -> primitives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from coda.frontend import ops
from coda.frontend.reductions import root
from coda.frontend.tensor import Tensor
from coda.frontend.torch_import.aten import cast, numbers, refuse, wide
from coda.frontend.torch_import.rules import OperatorRules, Result

aten = torch.ops.aten
TABLE = OperatorRules()
rule = TABLE.enter


def _last_alone(x: Tensor, axes: Sequence[int] | int | None) -> None:
    """Refuse a reduction over other axes than the last, which leave no row to a kernel."""
    given = range(x.ndim) if axes is None else [axes] if isinstance(axes, int) else axes
    if not x.ndim or [a % x.ndim for a in given] != [x.ndim - 1]:
        raise refuse("a reduction over other axes than the last")


@rule(aten.prod.dim_int)
def _prod(result: Result, x: Tensor, dim: int, keepdim: bool = False, dtype: Any = None) -> Tensor:
    (x,) = numbers(result, x)
    _last_alone(x, dim)
    return cast(ops.prod(wide(x), keepdims=keepdim), result.dtype)


@rule(aten.argmax.default)
def _argmax(result: Result, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    _last_alone(x, dim)
    return ops.argmax(x, keepdims=keepdim)


@rule(aten.argmin.default)
def _argmin(result: Result, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    _last_alone(x, dim)
    return ops.argmin(x, keepdims=keepdim)


@rule(aten.std.correction)
def _std(
    result: Result,
    x: Tensor,
    dim: Sequence[int] | None = None,
    correction: Any = 1,
    keepdim: bool = False,
) -> Tensor:
    (x,) = numbers(result, x)
    _last_alone(x, dim)
    found = ops.std(wide(x), correction=1 if correction is None else correction, keepdims=keepdim)
    return cast(found, result.dtype)


@rule(aten.std.dim)
def _std_dim(
    result: Result, x: Tensor, dim: Sequence[int], unbiased: bool = True, keepdim: bool = False
) -> Tensor:
    return _std(result, x, dim, int(unbiased), keepdim)


@rule(aten.linalg_vector_norm.default)
def _vector_norm(
    result: Result,
    x: Tensor,
    order: Any = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: Any = None,
) -> Tensor:
    (x,) = numbers(result, x)
    _last_alone(x, dim)
    x = wide(x)
    if order == 2:
        found = Tensor(root(ops.sum(ops.square(x), keepdims=keepdim).node))
    elif order == 1:
        found = ops.sum(ops.abs(x), keepdims=keepdim)
    elif order == float("inf"):
        found = ops.max(ops.abs(x), keepdims=keepdim)
    else:
        raise refuse(f"a norm of order {order}")
    return cast(found, result.dtype)


@rule(aten.norm.ScalarOpt_dim)
def _norm(
    result: Result, x: Tensor, order: Any, dim: Sequence[int], keepdim: bool = False
) -> Tensor:
    return _vector_norm(result, x, 2 if order is None else order, dim, keepdim)
