"""The primitives as functions of symbolic tensors, in addition to the operators of `Tensor`.

Elementwise functions broadcast as in torch; all operands have one element type, which numbers
adopt. They raise DtypeError for other types, ShapeError for shapes that do not match, and
TraceError for operands of any other kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from coda.errors import DtypeError, ShapeError, TraceError
from coda.frontend.contractions import einsum_of
from coda.frontend.reductions import Axes, position_of, root, variance
from coda.frontend.refused import kind
from coda.frontend.tensor import Tensor, apply, reduce
from coda.frontend.views import steps
from coda.ir.dims import ONE, Dim, Shape, product, show_shape
from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Gather,
    Iota,
    Map,
    Node,
    Pick,
    Reshape,
    Scan,
    Slice,
)
from coda.ir.types import DType, f32, i32, promote


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """`a` where the condition holds, else `b`; elementwise."""
    return apply("where", condition, a, b)


def exp(x: Tensor) -> Tensor:
    """e to the x."""
    return apply("exp", x)


def expm1(x: Tensor) -> Tensor:
    """e to the x, minus 1, without cancellation near 0."""
    return apply("expm1", x)


def exp2(x: Tensor) -> Tensor:
    """2 to the x."""
    return apply("exp2", x)


def log(x: Tensor) -> Tensor:
    """The natural logarithm."""
    return apply("log", x)


def log1p(x: Tensor) -> Tensor:
    """The natural logarithm of 1 + x, without cancellation near 0."""
    return apply("log1p", x)


def sqrt(x: Tensor) -> Tensor:
    """The square root."""
    return apply("sqrt", x)


def rsqrt(x: Tensor) -> Tensor:
    """1 / sqrt(x)."""
    return apply("rsqrt", x)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return apply("tanh", x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return apply("sigmoid", x)


def erf(x: Tensor) -> Tensor:
    """The error function."""
    return apply("erf", x)


def erfc(x: Tensor) -> Tensor:
    """1 − erf(x), without cancellation above 0."""
    return apply("erfc", x)


def floor(x: Tensor) -> Tensor:
    """The largest whole number that is not above x; the derivative is 0."""
    return apply("floor", x)


def ceil(x: Tensor) -> Tensor:
    """The least whole number that is not below x; the derivative is 0."""
    return apply("ceil", x)


def trunc(x: Tensor) -> Tensor:
    """The whole number next to x, towards 0; the derivative is 0."""
    return apply("trunc", x)


def round(x: Tensor) -> Tensor:
    """The nearest whole number, of two the even one; the derivative is 0."""
    return apply("round", x)


def sign(x: Tensor) -> Tensor:
    """1 above 0, −1 below, 0 at 0 and for NaN; the derivative is 0."""
    (node,) = _nodes("sign", x)
    less, zero, more = (Const(v, node.dtype) for v in (-1.0, 0.0, 1.0))
    below = Map("where", (Map("lt", (node, zero)), less, zero))
    return Tensor(Map("where", (Map("gt", (node, zero)), more, below)))


def stop_gradient(x: Tensor) -> Tensor:
    """x, of which no gradient is taken: torch's `detach`."""
    return apply("stop_gradient", x)


def sin(x: Tensor) -> Tensor:
    """The sine of radians."""
    return apply("sin", x)


def cos(x: Tensor) -> Tensor:
    """The cosine of radians."""
    return apply("cos", x)


def atan2(y: Any, x: Any) -> Tensor:
    """The angle of the point (x, y) in radians, from −π to π."""
    return apply("atan2", y, x)


def abs(x: Tensor) -> Tensor:
    """The absolute value."""
    return apply("abs", x)


def square(x: Tensor) -> Tensor:
    """x · x."""
    return apply("square", x)


def maximum(a: Any, b: Any) -> Tensor:
    """The larger of two values; NaN if either is NaN. At a tie each has half the cotangent."""
    return apply("maximum", a, b)


def minimum(a: Any, b: Any) -> Tensor:
    """The smaller of two values; NaN if either is NaN. At a tie each has half the cotangent."""
    return apply("minimum", a, b)


def clamp(x: Tensor, low: Any = -math.inf, high: Any = math.inf) -> Tensor:
    """min(max(x, low), high); NaN if any is NaN. The derivative by x is 1 on the bounds."""
    return apply("clamp", x, low, high)


def sum(x: Tensor, axis: Axes = -1, *, keepdims: bool = False) -> Tensor:
    """The sum over axes, which are dropped, or kept with size 1 by `keepdims`."""
    return reduce("sum", x, axis, keepdims=keepdims)


def mean(x: Tensor, axis: Axes = -1, *, keepdims: bool = False) -> Tensor:
    """The mean over axes, which are dropped, or kept with size 1 by `keepdims`."""
    return reduce("mean", x, axis, keepdims=keepdims)


def max(x: Tensor, axis: Axes = -1, *, keepdims: bool = False) -> Tensor:
    """The maximum over axes, which are dropped, or kept with size 1 by `keepdims`."""
    return reduce("max", x, axis, keepdims=keepdims)


def min(x: Tensor, axis: Axes = -1, *, keepdims: bool = False) -> Tensor:
    """The minimum over axes, which are dropped, or kept with size 1 by `keepdims`."""
    return reduce("min", x, axis, keepdims=keepdims)


def logsumexp(x: Tensor, axis: Axes = -1, *, keepdims: bool = False) -> Tensor:
    """log Σ exp(x) over axes, without overflow."""
    return reduce("logsumexp", x, axis, keepdims=keepdims)


def prod(x: Tensor, axis: Axes = -1, *, keepdims: bool = False) -> Tensor:
    """The product over axes, which are dropped, or kept with size 1 by `keepdims`."""
    return reduce("prod", x, axis, keepdims=keepdims)


def var(x: Tensor, axis: Axes = -1, *, correction: float = 1, keepdims: bool = False) -> Tensor:
    """Σ (x − mean)² / (n − correction) over axes of n elements; numpy's correction is 0."""
    (node,) = _nodes("var", x)
    return Tensor(variance(node, axis, correction, keepdims=keepdims))


def std(x: Tensor, axis: Axes = -1, *, correction: float = 1, keepdims: bool = False) -> Tensor:
    """The square root of `var`; where that is 0, so is the gradient, as torch's."""
    return Tensor(root(var(x, axis, correction=correction, keepdims=keepdims).node))


def argmax(x: Tensor, axis: int = -1, *, keepdims: bool = False) -> Tensor:
    """The number, i64, of the first maximum along an axis, or of the first NaN; no gradient."""
    (node,) = _nodes("argmax", x)
    return Tensor(position_of("max", node, axis, keepdims=keepdims))


def argmin(x: Tensor, axis: int = -1, *, keepdims: bool = False) -> Tensor:
    """The number, i64, of the first minimum along an axis, or of the first NaN; no gradient."""
    (node,) = _nodes("argmin", x)
    return Tensor(position_of("min", node, axis, keepdims=keepdims))


def cumsum(x: Tensor, axis: int = -1, *, reverse: bool = False) -> Tensor:
    """The inclusive cumulative sum along an axis; with `reverse`, from its end to its start."""
    (node,) = _nodes("cumsum", x)
    if node.dtype.kind == "bool":
        raise DtypeError("`cumsum` takes numbers", found="bool", help="x.cast(coda.f32)")
    return Tensor(Scan("sum", node, _axis("cumsum", node.shape, axis), reverse))


def iota(count: int | Dim, dtype: DType = i32) -> Tensor:
    """0, 1, … count - 1 as a tensor [count] of `dtype`."""
    if isinstance(count, bool) or not isinstance(count, int | Dim) or Dim.of(count) == Dim.of(0):
        raise ShapeError("an iota has a size", found=repr(count), help="coda.iota(x.shape[0])")
    if not isinstance(dtype, DType) or dtype.kind == "bool":
        raise DtypeError("an iota is of numbers", found=repr(dtype), help="coda.i32, coda.f32")
    return Tensor(Iota(Dim.of(count), dtype))


def arange(start: int | Dim, stop: int | Dim | None = None, step: int = 1) -> Tensor:
    """start, start + step, … below stop, i32; `arange(stop)` begins with 0, as torch's does.

    Raises ShapeError for no elements, or a number of them that is no dim.
    """
    first, last = (0, start) if stop is None else (start, stop)
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise ShapeError("a range goes forward by whole steps", found=f"step {step!r}")
    ends = [Dim.of(n) for n in (first, last) if isinstance(n, int | Dim)]
    if len(ends) < 2:
        raise ShapeError("a range is between whole numbers or dims", found=f"{first!r}, {last!r}")
    count = steps(ends[1] - ends[0], step)
    if count.constant is not None and count.constant < 1:
        raise ShapeError("a range is empty", found=f"from {ends[0]} to {ends[1]}")
    numbers = iota(count)
    numbers = numbers if step == 1 else numbers * step
    return numbers if ends[0] == Dim.of(0) else numbers + ends[0]


def uniform(shape: Sequence[int | Dim], seed: int | Tensor) -> Tensor:
    """Random numbers in [0, 1), float32 multiples of 2⁻²⁴, that follow from seed and position.

    They are computed where they are used, again in the backward, and never stored: pcg3d of
    Jarzynski and Olano (2020) of the seed, the row (of all axes but the last) and the column. They
    are the same in every kernel and on every backend.

    Args:
        shape: dims; all but the last are up to 2²⁴ rows.
        seed: a whole number, or a tensor of one, i32 or i64. It is rounded to float32: seeds up to
            2²⁴ give different numbers.

    Raises:
        TraceError, DtypeError: for a seed of another kind, type or shape.
    """
    dims = tuple(Dim.of(d) for d in shape)
    rows, columns = product(dims[:-1]), dims[-1] if dims else ONE
    along = Reshape(Iota(rows, f32), (rows, ONE)), Iota(columns, f32)
    return Tensor(Reshape(Map("random", (_seed(seed), *along)), dims))


def _seed(seed: Any) -> Node:
    """A seed as a float32 number of shape []."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        return Const(float(seed), f32)
    (node,) = _nodes("uniform", seed)
    if node.dtype.kind != "int" or product(node.shape) != ONE:
        raise DtypeError(
            "a seed is one whole number",
            found=f"{show_shape(node.shape)} {node.dtype}",
            help='seed: coda.Tensor["1", coda.i64]',
        )
    return Reshape(Cast(node, f32), ())


def einsum(text: str, *tensors: Tensor) -> Tensor:
    """A contraction of two tensors, or sums and a permutation of one, by the names of their axes.

    Args:
        text: "b i h d, b j h d -> b h i j": names separated by spaces, or torch's single letters
            ("bihd,bjhd->bhij"). An axis of both operands and the result is a batch axis; an axis
            that the result does not have is summed over.
        tensors: one or two, of one float type.

    Raises:
        ShapeError: for a text that cannot be parsed or does not match the tensors.
        DtypeError: for operands of different types, or of a type that is not a float.
    """
    return Tensor(einsum_of(text, _nodes("einsum", *tensors)))


def permute(x: Tensor, *order: int) -> Tensor:
    """Permute axes as torch does: axis i of the result is axis order[i] of x."""
    _nodes("permute", x)
    return x.permute(*order)


def cast(x: Tensor, dtype: DType) -> Tensor:
    """The same values rounded to another element type."""
    _nodes("cast", x)
    return x.cast(dtype)


def reshape(x: Tensor, *shape: str | int | Dim) -> Tensor:
    """Reshape in row-major order: by "M (H d) -> M H d", or by dims, one of which may be -1."""
    _nodes("reshape", x)
    return x.reshape(*shape)


def split(x: Tensor, parts: int | Sequence[int | Dim], axis: int = -1) -> tuple[Tensor, ...]:
    """Split an axis into consecutive parts: `parts` equal ones, or parts of these sizes."""
    (node,) = _nodes("split", x)
    at = _axis("split", node.shape, axis)
    size = node.shape[at]
    if isinstance(parts, int) and parts > 0:
        sizes = [size // parts] * parts
    elif isinstance(parts, list | tuple) and all(isinstance(p, int | Dim) for p in parts):
        sizes = [Dim.of(p) for p in parts]
    else:
        raise ShapeError(
            "a split takes a number of equal parts, or a list of their sizes",
            found=repr(parts),
            help="coda.split(x, 2), coda.split(x, [d, x.shape[-1] - d])",
        )
    total, found = Dim.of(0), []
    for one in sizes:
        found.append(Tensor(Slice(node, at, total, one, 1)))
        total = total + one
    if total != size:
        raise ShapeError(
            "the parts of a split do not add up",
            found=f"{total} of {size}",
            help=f"their sizes add up to {size}",
        )
    return tuple(found)


def concat(tensors: Sequence[Tensor], axis: int = -1) -> Tensor:
    """Concatenate tensors of one element type along an existing axis."""
    nodes = _listed("concat", tensors)
    return Tensor(Concat(nodes, _axis("concat", nodes[0].shape, axis)))


def stack(tensors: Sequence[Tensor], axis: int = -1) -> Tensor:
    """Stack tensors of one shape along a new axis."""
    nodes = _listed("stack", tensors)
    if len({n.shape for n in nodes}) > 1:
        raise ShapeError(
            "`stack` takes tensors of one shape",
            found=" and ".join(show_shape(n.shape) for n in nodes),
            help="coda.concat puts them one after the other along an axis that is there",
        )
    shape = nodes[0].shape
    at = _axis("stack", (*shape, ONE), axis)
    where = len(shape) + 1 + at
    new = (*shape[:where], ONE, *shape[where:])
    return Tensor(Concat(tuple(Reshape(n, new) for n in nodes), at))


def _nodes(name: str, *values: Any) -> tuple[Node, ...]:
    """The nodes of tensors. Raises TraceError for any other value."""
    if not all(isinstance(v, Tensor) for v in values):
        raise TraceError(
            f"coda.{name} takes tensors of the block",
            found=", ".join(map(kind, values)),
        )
    return tuple(v.node for v in values)


def _axis(name: str, shape: Shape, axis: Any) -> int:
    """The axis as a negative index. Raises ShapeError if it is out of range."""
    if not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
        raise ShapeError(
            f"a {name} along an axis that is not there", found=f"axis {axis} of {show_shape(shape)}"
        )
    return axis if axis < 0 else axis - len(shape)


def _listed(name: str, tensors: Any) -> tuple[Node, ...]:
    """The nodes of a list of tensors. Raises DtypeError for different element types."""
    if not isinstance(tensors, list | tuple) or not tensors:
        raise TraceError(
            f"coda.{name} takes a list of tensors of the block",
            found=kind(tensors),
            help=f"coda.{name}([a, b])",
        )
    nodes = _nodes(name, *tensors)
    if len({n.dtype for n in nodes}) > 1:
        raise DtypeError(
            f"`{name}` takes operands of one element type",
            found=", ".join(str(n.dtype) for n in nodes),
            help=f"x.cast(coda.{promote(*(n.dtype for n in nodes)).name})",
        )
    return nodes


def take(table: Tensor, index: Tensor) -> Tensor:
    """Gather rows of `table` [V, ...] at an integer tensor `index` [*i]: [*i, ...]."""
    rows, at = _nodes("take", table, index)
    return Tensor(Gather(rows, (at,)))


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index[...]], one column for each row: [..., 1]; NaN if out of range."""
    return Tensor(Pick(*_nodes("pick", x, index)))
