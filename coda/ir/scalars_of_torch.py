"""Scalar functions that only imported operators use: rows of the table in `scalars.py`.

Derivatives are torch's formulas, also at poles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coda.ir.scalar import Scalar, Term

_OF_ONE: tuple[tuple[Callable[[Tensor], Tensor], Callable[[Term, Term], Term]], ...] = (
    (torch.asin, lambda d, a: d * (1.0 - a.to("square")).to("rsqrt")),
    (torch.acos, lambda d, a: -(d * (1.0 - a.to("square")).to("rsqrt"))),
    (torch.sinh, lambda d, a: d * a.to("cosh")),
    (torch.cosh, lambda d, a: d * a.to("sinh")),
    (torch.asinh, lambda d, a: d * (a.to("square") + 1.0).to("rsqrt")),
    (torch.acosh, lambda d, a: d * (a.to("square") - 1.0).to("rsqrt")),
    (torch.atanh, lambda d, a: d / (1.0 - a.to("square"))),
)


def _of_one(fn: Callable[[Tensor], Tensor], slope: Callable[[Term, Term], Term]) -> Scalar:
    return Scalar(
        fn.__name__,
        1,
        fn,
        flops=16,
        special=2,
        derivative=lambda d, y, a: (slope(d, a),),
    )


def _fmod(a: Tensor, b: Tensor) -> Tensor:
    """In float64: torch's vectors of float32 give NaN for a subnormal b, its scalars do not."""
    return torch.fmod(a.double(), b.double()).to(torch.promote_types(a.dtype, b.dtype))


def _whole(y: Term, a: Term, b: Term) -> Term:
    """How many times b was subtracted of a: a quotient alone may round up to a whole number."""
    exact = ((a - y) / b).to("round")
    return y.to("eq", y).to("where", exact, (a / b).to("trunc"))


ROWS: tuple[Scalar, ...] = (
    *(_of_one(fn, slope) for fn, slope in _OF_ONE),
    Scalar(
        "hypot",
        2,
        torch.hypot,
        flops=12,
        special=2,
        commutes=True,
        derivative=lambda d, y, a, b: (d * (a / y), d * (b / y)),
    ),
    Scalar(
        "fmod",
        2,
        _fmod,
        flops=40,
        special=1,
        exact=True,
        derivative=lambda d, y, a, b: (d, -(d * _whole(y, a, b))),
    ),
)
