"""More ATen functions of elements -> primitives: roundings, powers, choices, conditions.

At a kink or a pole each has torch's derivative, which may differ from that of a shorter formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from coda.frontend import ops
from coda.frontend.tensor import Tensor, apply
from coda.frontend.torch_import.aten import cast, condition, numbers, refuse, wide
from coda.frontend.torch_import.rules import OperatorRules, Result, Rule
from coda.ir.dims import ONE, product
from coda.ir.types import bool_

aten = torch.ops.aten
TABLE = OperatorRules()
rule = TABLE.enter


def _unary(fn: Callable[..., Tensor]) -> Rule:
    def apply(result: Result, x: Any, *more: Any) -> Tensor:
        return fn(numbers(result, x)[0], *more)

    return apply


def _in_float32(fn: Callable[..., Tensor]) -> Rule:
    """A function that torch computes in float32 for 16-bit types."""

    def apply(result: Result, *args: Any, **options: Any) -> Tensor:
        args = tuple(wide(a) if isinstance(a, Tensor) else a for a in numbers(result, *args))
        return cast(fn(*args, **options), result.dtype)

    return apply


def _nan_to_num(x: Tensor, nan: Any = None, above: Any = None, below: Any = None) -> Tensor:
    info = torch.finfo(x.dtype.torch)
    bounded = ops.where(x == math.inf, info.max if above is None else above, x)
    bounded = ops.where(x == -math.inf, info.min if below is None else below, bounded)
    return ops.where(x == x, bounded, 0.0 if nan is None else nan)


# Signs, and what is left of a division.


def _is_negative(x: Any) -> Tensor:
    """Whether a number has a sign, as -0 has."""
    if not isinstance(x, Tensor):
        raise refuse("a sign of a number")
    return ops.where(x == 0.0, 1.0 / x, x) < 0.0


def _copysign(x: Any, y: Any) -> Tensor:
    size = ops.abs(x) if isinstance(x, Tensor) else abs(x)
    if not isinstance(y, Tensor):
        return -size if math.copysign(1.0, y) < 0 else size
    return ops.where(_is_negative(y), -size, size)


def _sinc(x: Tensor) -> Tensor:
    """sin(π x) / (π x), near 0 by its series: in the derivative the two terms cancel there."""
    near = ops.abs(x) < 1e-3
    angle = ops.where(near, 1.0, x) * math.pi
    series = 1.0 - ops.square(ops.where(near, x, 0.0)) * (math.pi**2 / 6.0)
    return ops.where(near, series, ops.sin(angle) / angle)


def _logaddexp(x: Tensor, y: Tensor) -> Tensor:
    alike = (x == y) & (ops.abs(x) == math.inf)
    most, least = ops.maximum(x, y), ops.minimum(x, y)
    return ops.where(alike, x, most + ops.log1p(ops.exp(least - most)))


def _xlogy(x: Tensor, y: Tensor, log: Callable[[Tensor], Tensor], pole: float) -> Tensor:
    """x · log y, 0 where x is 0 and log y is no number."""
    nowhere = (x == 0.0) & ((y <= pole) | (y == math.inf))
    return x * log(ops.where(nowhere, pole + 1.0, y))


def _remainder(x: Any, y: Any) -> Tensor:
    """The remainder of x / y, with the sign of y."""
    left = apply("fmod", x, y)
    if isinstance(y, Tensor):
        other = (left < 0.0) ^ (y < 0.0)
    else:
        other = left > 0.0 if y < 0 else left < 0.0
    return ops.where((left != 0.0) & other, left + y, left)


def _floor_divide(x: Any, y: Any) -> Tensor:
    """The floor of x / y as torch has it: of the exact quotient, but of x / 0."""
    left = apply("fmod", x, y)
    quotient = (x - left) / y
    quotient = ops.where(_remainder(x, y) != left, quotient - 1.0, quotient)
    whole = ops.floor(quotient)
    whole = ops.where(quotient - whole > 0.5, whole + 1.0, whole)
    whole = ops.where(quotient == 0.0, _copysign(0.0, x / y), whole)
    is_zero = y == 0.0
    if isinstance(is_zero, bool):
        return x / y if is_zero else whole
    return ops.where(is_zero, x / y, whole)


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(result: Result, x: Any, y: Any, *, rounding_mode: str | None = None) -> Tensor:
    x, y = (wide(v) if isinstance(v, Tensor) else v for v in numbers(result, x, y))
    if rounding_mode is None:
        return cast(x / y, result.dtype)
    found = ops.trunc(x / y) if rounding_mode == "trunc" else _floor_divide(x, y)
    return cast(ops.stop_gradient(found), result.dtype)


@rule(aten.heaviside.default)
def _heaviside(result: Result, x: Tensor, at_zero: Tensor) -> Tensor:
    x, at_zero = numbers(result, x, at_zero)
    above = cast(ops.where(x > 0.0, 1.0, 0.0), x.dtype)
    return ops.stop_gradient(ops.where(x == 0.0, at_zero, above))


for _operator, _one in (
    (aten.floor.default, ops.floor),
    (aten.ceil.default, ops.ceil),
    (aten.trunc.default, ops.trunc),
    (aten.round.default, ops.round),
    (aten.sign.default, ops.sign),
    (aten.sgn.default, ops.sign),
    (aten.frac.default, lambda x: x - ops.trunc(x)),
    (aten.nan_to_num.default, _nan_to_num),
    (aten.isnan.default, lambda x: x != x),
    (aten.isinf.default, lambda x: ops.abs(x) == math.inf),
    (aten.isfinite.default, lambda x: ops.abs(x) < math.inf),
):
    rule(_operator)(_unary(_one))

for _operator, _one in (
    (aten.erfc.default, ops.erfc),
    (aten.log2.default, lambda x: ops.log(x) * (1.0 / math.log(2.0))),
    (aten.log10.default, lambda x: ops.log(x) * (1.0 / math.log(10.0))),
    (aten.tan.default, lambda x: ops.sin(x) / ops.cos(x)),
    (aten.atan.default, lambda x: ops.atan2(x, 1.0)),
    (aten.atan2.default, ops.atan2),
    (aten.hypot.default, partial(apply, "hypot")),
    (aten.fmod.Tensor, partial(apply, "fmod")),
    (aten.fmod.Scalar, partial(apply, "fmod")),
    (aten.remainder.Tensor, _remainder),
    (aten.remainder.Scalar, _remainder),
    (aten.remainder.Scalar_Tensor, _remainder),
    (aten.floor_divide.default, lambda x, y: ops.stop_gradient(_floor_divide(x, y))),
    (aten.floor_divide.Scalar, lambda x, y: ops.stop_gradient(_floor_divide(x, y))),
    (aten.copysign.Tensor, _copysign),
    (aten.copysign.Scalar, _copysign),
    (aten.sinc.default, _sinc),
    (aten.logaddexp.default, _logaddexp),
    (aten.xlogy.Tensor, lambda x, y: _xlogy(x, y, ops.log, 0.0)),
    (aten.special_xlog1py.default, lambda x, y: _xlogy(x, y, ops.log1p, -1.0)),
):
    rule(_operator)(_in_float32(_one))


@rule(aten.signbit.default)
def _signbit(result: Result, x: Tensor) -> Tensor:
    if x.dtype.kind != "float":
        raise refuse("the sign of whole numbers")
    return _is_negative(wide(x))


for _name in ("asin", "acos", "sinh", "cosh", "asinh", "acosh", "atanh"):
    rule(getattr(aten, _name).default)(_in_float32(partial(apply, _name)))


@rule(aten.detach.default, view=True)
def _detach(result: Result, x: Tensor) -> Tensor:
    return ops.stop_gradient(x)


# Powers and products.


@rule(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _pow(result: Result, x: Any, n: Any) -> Tensor:
    (x, n) = numbers(result, x, n)
    return x**n


@rule(aten.lerp.Scalar)
def _lerp(result: Result, a: Any, b: Any, weight: Any) -> Tensor:
    a, b = numbers(result, a, b)
    return a + (b - a) * weight if abs(weight) < 0.5 else b - (b - a) * (1 - weight)


@rule(aten.logit.default)
def _logit(result: Result, x: Tensor, eps: float | None = None) -> Tensor:
    (x,) = numbers(result, x)
    x = wide(x)
    if eps is not None:
        x = ops.where(x < eps, eps, ops.where(x > 1.0 - eps, 1.0 - eps, x))
    return cast(ops.log(x) - ops.log1p(-x), result.dtype)


# Choices.


@rule(aten.prelu.default)
def _prelu(result: Result, x: Tensor, w: Tensor) -> Tensor:
    x, w = numbers(result, x, w)
    after = max(x.ndim - 2, 0)  # the axes after that of the channels
    gain = w if product(w.shape) == ONE else w.reshape(*w.shape, *[1] * after)
    return ops.where(x > 0.0, x, gain * ops.where(x > 0.0, 0.0, x))


def _bent_loss(
    result: Result, x: Tensor, y: Tensor, reduction: int, bend: float, scale: float
) -> Tensor:
    """scale · d² / 2 for a difference d below the bend, scale · bend · (|d| − bend / 2) above."""
    if reduction != 0 or bend == 0:
        raise refuse("a reduction over other axes than the last")
    x, y = numbers(result, x, y)
    away = x - y
    size = ops.abs(away)
    near = ops.where(size < bend, size, 0.0)
    far = (size - 0.5 * bend) * (scale * bend)
    nowhere = ops.stop_gradient(ops.where(size >= bend, 0.0, away))
    far = ops.where(size >= bend, far, away * nowhere)  # NaN, as its derivative
    return ops.where(size < bend, ops.square(near) * (0.5 * scale), far)


@rule(aten.smooth_l1_loss.default)
def _smooth_l1(
    result: Result, x: Tensor, y: Tensor, reduction: int = 1, beta: float = 1.0
) -> Tensor:
    return _bent_loss(result, x, y, reduction, beta, 1.0 / beta if beta else 0.0)


@rule(aten.huber_loss.default)
def _huber(result: Result, x: Tensor, y: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    return _bent_loss(result, x, y, reduction, delta, 1.0)


@rule(aten.clamp.Tensor)
def _clamp(result: Result, x: Any, low: Any = None, high: Any = None) -> Tensor:
    (x, low, high) = numbers(result, x, low, high)
    return ops.clamp(x, -math.inf if low is None else low, math.inf if high is None else high)


@rule(aten.clamp_min.Tensor)
def _clamp_min(result: Result, x: Any, low: Any) -> Tensor:
    x, low = numbers(result, x, low)
    return ops.where(x >= low, x, ops.where(x < low, low, ops.stop_gradient(x + low)))


@rule(aten.clamp_max.Tensor)
def _clamp_max(result: Result, x: Any, high: Any) -> Tensor:
    x, high = numbers(result, x, high)
    return ops.where(x <= high, x, ops.where(x > high, high, ops.stop_gradient(x + high)))


@rule(aten.fmax.default)
def _fmax(result: Result, a: Any, b: Any) -> Tensor:
    a, b = numbers(result, a, b)
    return ops.where((a >= b) | (b != b), a, b)


@rule(aten.fmin.default)
def _fmin(result: Result, a: Any, b: Any) -> Tensor:
    a, b = numbers(result, a, b)
    return ops.where((a <= b) | (b != b), a, b)


@rule(aten.masked_fill.Tensor)
def _masked_fill(result: Result, x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    x, value = numbers(result, x, value)
    return ops.where(mask, value, x)


@rule(aten.tril.default)
def _tril(result: Result, x: Tensor, diagonal: int = 0) -> Tensor:
    row, column = (ops.iota(d) for d in x.shape[-2:])
    return ops.where(row[:, None] + diagonal >= column, x, 0.0)


@rule(aten.triu.default)
def _triu(result: Result, x: Tensor, diagonal: int = 0) -> Tensor:
    row, column = (ops.iota(d) for d in x.shape[-2:])
    return ops.where(row[:, None] + diagonal <= column, x, 0.0)


# Conditions.


def _logical(fn: Callable[..., Tensor]) -> Rule:
    def apply(result: Result, *args: Tensor) -> Tensor:
        return fn(*map(condition, args))

    return apply


def _bitwise(fn: Callable[..., Tensor]) -> Rule:
    def apply(result: Result, *args: Tensor) -> Tensor:
        if any(a.dtype != bool_ for a in args):
            raise refuse("the bits of whole numbers")
        return fn(*args)

    return apply


for _name, _one in (
    ("and", lambda a, b: a & b),
    ("or", lambda a, b: a | b),
    ("xor", lambda a, b: a ^ b),
    ("not", lambda a: ~a),
):
    rule(getattr(aten, f"logical_{_name}").default)(_logical(_one))
    _packet = getattr(aten, f"bitwise_{_name}")
    rule(_packet.default if _name == "not" else _packet.Tensor)(_bitwise(_one))
