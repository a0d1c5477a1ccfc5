"""Reductions over one or several axes -> Reduce nodes, and the position of an extreme.

    sum(x, axis=(0, 1))    x [M, N, D]: reshape to [M*N, D], sum over axis -2, reshape to [D]

Adjacent axes are reduced as one, so that a sum over all rows is a single reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coda.errors import DtypeError, ShapeError
from coda.ir.dims import ONE, Dim, Shape, product, show_shape
from coda.ir.graph import Const, Iota, Map, Node, Permute, Reduce, Reshape, Size
from coda.ir.monoids import MONOIDS
from coda.ir.types import i64
from coda.ir.views import shaped

Axes = int | Sequence[int] | None
MOST = 2**24  # numbers up to it are exact in float32


def reduced(fn: str, x: Node, axis: Axes, *, keepdims: bool) -> Node:
    """The reduction `fn` of floats over an axis, several, or all (None).

    Raises ShapeError for axes that are not there, DtypeError for other types than floats.
    """
    axes = axes_of(fn, x.shape, axis)
    if x.dtype.kind != "float":
        raise DtypeError(f"`{fn}` takes floats", found=str(x.dtype), help="x.cast(coda.f32)")
    node, runs = x, _runs(axes)
    if MONOIDS[fn].chosen and len(runs) > 1:  # at once: equal extremes share a cotangent equally
        kept = [i for i in range(x.rank) if i not in axes]
        node = _over(fn, Permute(x, (*kept, *axes)), len(kept), x.rank - 1)
        runs = []
    for first, last in reversed(runs):
        node = _over(fn, node, first, last)
    node = shaped(node, tuple(ONE if i in axes else d for i, d in enumerate(x.shape)))
    return node if keepdims else without(node, axes)


def axes_of(fn: str, shape: Shape, axis: Axes) -> tuple[int, ...]:
    """Axes as numbers from the left, in order. Raises ShapeError."""
    rank = len(shape)
    given: Any = range(rank) if axis is None else axis
    given = tuple(given) if isinstance(given, list | tuple | range) else (given,)
    whole = all(isinstance(a, int) and -rank <= a < rank for a in given)
    found = sorted({a % rank for a in given}) if whole and rank else []
    if not found or len(found) != len(given):
        raise ShapeError(
            f"`{fn}` reduces an axis that is not there"
            if not whole or not rank
            else f"`{fn}` reduces each of some axes once",
            found=f"axis {axis} of {show_shape(shape)}",
            help="axis=-1, axis=(0, 1), or None for all axes",
        )
    return tuple(found)


def _runs(axes: Sequence[int]) -> list[tuple[int, int]]:
    """Adjacent axes as (first, last)."""
    found: list[tuple[int, int]] = []
    for a in axes:
        if found and found[-1][1] == a - 1:
            found[-1] = found[-1][0], a
        else:
            found.append((a, a))
    return found


def _over(fn: str, x: Node, first: int, last: int) -> Node:
    """The reduction over adjacent axes, which are kept with size 1."""
    shape, rank = x.shape, x.rank
    if first == last:
        return Reduce(fn, x, first - rank)
    together = (*shape[:first], product(shape[first : last + 1]), *shape[last + 1 :])
    node = Reduce(fn, Reshape(x, together), last - rank)
    return Reshape(node, (*shape[:first], *[ONE] * (last - first + 1), *shape[last + 1 :]))


def without(node: Node, axes: Sequence[int]) -> Node:
    """A node without some axes, which have size 1."""
    return Reshape(node, tuple(d for i, d in enumerate(node.shape) if i not in axes))


def position_of(fn: str, x: Node, axis: Any, *, keepdims: bool) -> Node:
    """The number, i64, of the first element along an axis that is its `max` or `min`, or is NaN.

    It is the least of the numbers of the elements that are equal to the extreme. Raises ShapeError
    and DtypeError.
    """
    name = f"arg{fn}"
    if not isinstance(axis, int):
        raise ShapeError(f"`{name}` is taken along one axis", found=f"axis {axis}", help="axis=-1")
    (at,) = axes_of(name, x.shape, axis)
    if x.dtype.kind != "float":
        raise DtypeError(f"`{name}` takes floats", found=str(x.dtype), help="x.cast(coda.f32)")
    count = x.shape[at]
    if count.constant is not None and count.constant > MOST:
        raise ShapeError(f"`{name}` takes up to 2**24 elements", found=str(count))
    numbers: Node = Reshape(Iota(count, i64), (count, *[ONE] * (x.rank - 1 - at)))
    absent = Size(count, i64)
    unequal = Map("where", (Map("ne", (x, x)), numbers, absent))
    is_extreme = Map("eq", (x, Reduce(fn, x, at - x.rank)))
    first = Reduce("min", Map("where", (is_extreme, numbers, unequal)), at - x.rank)
    return first if keepdims else without(first, (at,))


def variance(x: Node, axis: Axes, correction: float, *, keepdims: bool) -> Node:
    """Σ (x − mean x)² / (n − correction) over some axes of n elements; torch's correction is 1."""
    axes = axes_of("var", x.shape, axis)
    away = Map("sub", (x, reduced("mean", x, axes, keepdims=True)))
    found = reduced("mean", Map("square", (away,)), axes, keepdims=keepdims)
    if correction == 0:
        return found
    count = Size(_count(x.shape, axes), found.dtype)
    less = Map("sub", (count, Const(float(correction), found.dtype)))
    return Map("mul", (found, Map("div", (count, less))))


def root(x: Node) -> Node:
    """√x, with the derivative 0 at 0, as norms and deviations have it in torch."""
    zero, one = Const(0.0, x.dtype), Const(1.0, x.dtype)
    vanishes = Map("eq", (x, zero))
    return Map("where", (vanishes, zero, Map("sqrt", (Map("where", (vanishes, one, x)),))))


def _count(shape: Shape, axes: Sequence[int]) -> Dim:
    return product(shape[a] for a in axes)
