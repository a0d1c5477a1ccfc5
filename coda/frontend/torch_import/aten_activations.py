"""ATen activations -> definitions in primitives, computed in float32 as torch does.

At a kink each has torch's subgradient: a selection by a comparison has the selected side's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from coda.frontend import library, ops
from coda.frontend.tensor import Tensor
from coda.frontend.torch_import.aten import cast, numbers, refuse, wide
from coda.frontend.torch_import.rules import OperatorRules, Result, Rule

aten = torch.ops.aten
TABLE = OperatorRules()
rule = TABLE.enter
# Klambauer, Unterthiner, Mayr and Hochreiter (2017), with the digits of torch's source.
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def _activation(fn: Callable[..., Tensor]) -> Rule:
    def apply(result: Result, x: Tensor, *more: Any, **options: Any) -> Tensor:
        if x.dtype.kind != "float":
            raise refuse("an activation of integers")
        return cast(fn(wide(x), *more, **options), result.dtype)

    return apply


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    z = x if beta == 1 else x * beta
    y = library.softplus(z)
    return ops.where(z > threshold, x, y if beta == 1 else y / beta)


def _hardsigmoid(x: Tensor) -> Tensor:
    """(x + 3) / 6 clamped to [0, 1]; NaN propagates, with derivative 0."""
    above = ops.where(x < 3.0, (x + 3.0) * (1.0 / 6.0), 1.0)
    return ops.where(x > -3.0, above, ops.where(x <= -3.0, 0.0, math.nan))


def _hardswish(x: Tensor) -> Tensor:
    """x (x + 3) / 6 in [-3, 3], 0 below (NaN for -inf) and x above."""
    inside = ops.where(x > -3.0, (x + 3.0) * (1.0 / 6.0), 0.0)
    return x * ops.where(x < 3.0, inside, 1.0)


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """scale · x above 0, scale · alpha · (exp(input_scale · x) - 1) at 0 and below."""
    below = ops.where(x <= 0.0, x, 0.0)
    below = below if input_scale == 1 else below * input_scale
    return ops.where(x <= 0.0, ops.expm1(below) * (alpha * scale), x if scale == 1 else x * scale)


for _operator, _one in (
    (aten.silu.default, library.silu),
    (aten.gelu.default, library.gelu),
    (aten.softplus.default, _softplus),
    (aten.log_sigmoid.default, library.log_sigmoid),
    (aten.mish.default, lambda x: x * ops.tanh(library.softplus(x))),
    (aten.hardsigmoid.default, _hardsigmoid),
    (aten.hardswish.default, _hardswish),
    (aten.leaky_relu.default, lambda x, slope=0.01: ops.where(x > 0.0, x, x * slope)),
    (aten.elu.default, _elu),
    (aten.celu.default, lambda x, alpha=1.0: _elu(x, alpha, 1.0, 1.0 / alpha)),
    (aten.selu.default, lambda x: _elu(x, SELU_ALPHA, SELU_SCALE)),
):
    rule(_operator)(_activation(_one))


# Bounds.


@rule(aten.hardtanh.default)
def _hardtanh(result: Result, x: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Compares with the bounds in float32; the results have the tensor's own dtype."""
    if x.dtype.kind != "float":
        raise refuse("an activation of integers")
    least, most = (result.dtype.nearest(b) for b in (low, high))
    x = wide(x)
    return cast(ops.where(x <= low, least, ops.where(x >= high, most, x)), result.dtype)


rule(aten.relu6.default)(lambda result, x: _hardtanh(result, x, 0.0, 6.0))


@rule(aten.clamp.default)
def _clamp(result: Result, x: Any, low: Any = None, high: Any = None) -> Tensor:
    (x, low, high) = numbers(result, x, low, high)
    return ops.clamp(x, -math.inf if low is None else low, math.inf if high is None else high)


rule(aten.clamp_min.default)(lambda result, x, low: _clamp(result, x, low))
rule(aten.clamp_max.default)(lambda result, x, high: _clamp(result, x, None, high))
