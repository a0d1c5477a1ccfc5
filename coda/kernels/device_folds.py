"""States of reductions, and their merges, called by emitted kernels: DSL values of float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32

_MOST = 3.4028234663852886e38  # the largest finite float32


def moments_merge(a: tuple[Any, Any, Any], b: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """Merge (count, mean, Σ(x − mean)²) of two parts, by Chan, Golub and LeVeque (1983).

    If the difference of the means is not finite, since one of them is infinite, the mean is their
    weighted sum.
    """
    total = a[0] + b[0]
    share = b[0] * cute.arch.rcp_approx(cute.arch.fmax(total, Float32(1.0)))
    delta = b[1] - a[1]
    weighed = a[1] * (Float32(1.0) - share) + b[1] * share
    mean = cutlass.select_(cute.math.abs(delta) < Float32(math.inf), a[1] + delta * share, weighed)
    return total, mean, a[2] + b[2] + delta * (a[0] * share) * delta


def weighted(scores: Sequence[Any], values: Sequence[Any]) -> tuple[Any, Any, Any]:
    """(top, Σ e, Σ e v / Σ e) of pairs with e = exp(s − top); Σ 0 v for the mean if all e are 0.

    `top` is the largest score as a finite float32, as in `lse_merge`. The mean is corrected by that
    of what it leaves, so that it has the rounding of its own size.
    """
    top = scores[0]
    for s in scores[1:]:
        top = cute.arch.fmax(top, s)
    top = cute.arch.fmax(cute.arch.fmin(top, Float32(_MOST)), Float32(-_MOST))
    weights = [cute.math.exp(s - top, fastmath=True) for s in scores]
    total = Float32(0.0)
    for weight in weights:
        total = total + weight
    return top, total, _mean_of(weights, values, total)


def weighted_merge(a: tuple[Any, Any, Any], b: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """Merge (top, Σ e, Σ e v / Σ e) of two parts, as `lse_merge`."""
    top = cute.arch.fmax(a[0], b[0])
    mine = a[1] * cute.math.exp(a[0] - top, fastmath=True)
    other = b[1] * cute.math.exp(b[0] - top, fastmath=True)
    total = mine + other
    return top, total, _mean_of((mine, other), (a[2], b[2]), total)


def _mean_of(weights: Sequence[Any], values: Sequence[Any], total: Any) -> Any:
    """Σ w v / Σ w, and that of what it leaves; Σ w v if Σ w is 0."""
    share = Float32(1.0) / cutlass.select_(total == Float32(0.0), Float32(1.0), total)
    mean = Float32(0.0)
    for _ in range(2):
        near, rest = pivot(mean, 1), Float32(0.0)
        for w, v in zip(weights, values, strict=True):
            rest = rest + w * (v - near)
        mean = near + rest * share
    return mean


def pivot(first: Any, count: int) -> Any:
    """The first value of a row, as an offset against cancellation; 0 if `count` of it overflow."""
    near = cute.math.abs(first) < Float32(2.0**127 / count)
    return cutlass.select_(near, first, Float32(0.0))
