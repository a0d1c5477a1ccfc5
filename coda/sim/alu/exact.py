"""f64 operations -> functions that round the exact rational result; slow, for rare operations.

numpy has neither a fused multiply-add nor directed roundings of f64, so these go lane by lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from coda.sim.alu.opcodes import Array, Run, f64

_EXACT: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "rcp": lambda a: 1 / a,
    "fma": lambda a, b, c: a * b + c,
}
_PLAIN: dict[str, Run] = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide},
    **{"rcp": lambda a: f64(1) / a, "sqrt": np.sqrt, "fma": lambda a, b, c: a * b + c},
}


def _nearest(x: Fraction) -> float:
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def _steer(near: float, gap: int, mode: str) -> float:
    """The neighbour of `near` in the rounding mode; `gap` has the sign of near - exact."""
    if mode == "rn" or gap == 0:
        return near
    if mode == "rz":
        mode = "rp" if math.copysign(1, near) < 0 else "rm"
    if mode == "rm":
        return math.nextafter(near, -math.inf) if gap > 0 else near
    return math.nextafter(near, math.inf) if gap < 0 else near


def _sign(x: Fraction) -> int:
    return (x > 0) - (x < 0)


def _root(x: float, mode: str) -> float:
    near = math.sqrt(x)
    return _steer(near, _sign(Fraction(near) ** 2 - Fraction(x)), mode)


def _lane(name: str, mode: str, plain: float, xs: tuple[float, ...]) -> float:
    """The result for one lane; `plain` is numpy's, correct where no rounding is needed."""
    if not all(map(math.isfinite, xs)) or math.isnan(plain):
        # a product that only overflows because it is rounded must not meet an infinite addend
        return xs[2] if name == "fma" and all(map(math.isfinite, xs[:2])) else plain
    if name == "sqrt":
        return _root(xs[0], mode)
    if name in ("div", "rcp") and xs[-1] == 0:
        return plain
    exact = _EXACT[name](*map(Fraction, xs))
    if exact == 0:
        return _zero(name, mode, plain, xs)
    near = _nearest(exact) or math.copysign(0.0, exact)
    gap = _sign(exact) if math.isinf(near) else _sign(Fraction(near) - exact)
    return _steer(near, gap, mode)


def _zero(name: str, mode: str, plain: float, xs: tuple[float, ...]) -> float:
    """An exact zero: sums that cancel are -0 when rounding down, else +0."""
    if name in ("mul", "div", "rcp"):
        return plain
    if name == "fma":
        terms = (math.copysign(1, xs[0]) * math.copysign(1, xs[1]), math.copysign(1, xs[2]))
        zeros = xs[2] == 0
    else:
        other = math.copysign(1, xs[1])
        terms = (math.copysign(1, xs[0]), other if name == "add" else -other)
        zeros = xs[0] == 0
    if zeros and terms[0] == terms[1]:
        return math.copysign(0.0, terms[0])
    return -0.0 if mode == "rm" else 0.0


def rounded(name: str, mode: str) -> Run:
    """The f64 operation `name`, rounded once by `mode`."""

    def run(*xs: Array) -> Array:
        plain = np.asarray(_PLAIN[name](*xs))
        wide = np.broadcast_arrays(plain, *xs)
        flat = zip(*(x.ravel().tolist() for x in wide), strict=True)
        out = [_lane(name, mode, first, tuple(rest)) for first, *rest in flat]
        return np.array(out, f64).reshape(plain.shape)

    return run
