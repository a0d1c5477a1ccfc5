"""The primitives as functions: what a block can say beside the operators of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coda.errors import DtypeError, ShapeError, TraceError
from coda.frontend.tensor import Tensor, apply, reduce
from coda.ir.dims import ONE, Dim, show_shape
from coda.ir.graph import Concat, Gather, Pick, Reshape, Slice
from coda.ir.types import DType


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """`a` where the condition holds, else `b`; elementwise."""
    return apply("where", condition, a, b)


def exp(x: Tensor) -> Tensor:
    """e to the x."""
    return apply("exp", x)


def exp2(x: Tensor) -> Tensor:
    """2 to the x."""
    return apply("exp2", x)


def log(x: Tensor) -> Tensor:
    """The natural logarithm."""
    return apply("log", x)


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


def sin(x: Tensor) -> Tensor:
    """The sine of radians."""
    return apply("sin", x)


def cos(x: Tensor) -> Tensor:
    """The cosine of radians."""
    return apply("cos", x)


def abs(x: Tensor) -> Tensor:
    """The absolute value."""
    return apply("abs", x)


def square(x: Tensor) -> Tensor:
    """x · x."""
    return apply("square", x)


def maximum(a: Any, b: Any) -> Tensor:
    """The larger of two values; NaN if either is."""
    return apply("maximum", a, b)


def minimum(a: Any, b: Any) -> Tensor:
    """The smaller of two values; NaN if either is."""
    return apply("minimum", a, b)


def sum(x: Tensor, axis: int = -1, keepdims: bool = False) -> Tensor:
    """The sum over an axis."""
    return reduce("sum", x, axis, keepdims)


def mean(x: Tensor, axis: int = -1, keepdims: bool = False) -> Tensor:
    """The mean over an axis."""
    return reduce("mean", x, axis, keepdims)


def max(x: Tensor, axis: int = -1, keepdims: bool = False) -> Tensor:
    """The maximum over an axis."""
    return reduce("max", x, axis, keepdims)


def min(x: Tensor, axis: int = -1, keepdims: bool = False) -> Tensor:
    """The minimum over an axis."""
    return reduce("min", x, axis, keepdims)


def logsumexp(x: Tensor, axis: int = -1, keepdims: bool = False) -> Tensor:
    """log Σ exp over an axis, without overflow."""
    return reduce("logsumexp", x, axis, keepdims)


def cast(x: Tensor, dtype: DType) -> Tensor:
    """The same values in another element type."""
    return x.cast(dtype)


def reshape(x: Tensor, *shape: str | int | Dim) -> Tensor:
    """The same elements under other axes: "M (H d) -> M H d", or dims."""
    return x.reshape(*shape)


def split(x: Tensor, parts: int | Sequence[int | Dim], axis: int = -1) -> tuple[Tensor, ...]:
    """Consecutive parts of an axis: so many equal ones, or of these sizes."""
    at = axis if axis < 0 else axis - x.ndim
    if not -x.ndim <= at < 0:
        raise ShapeError(
            "a split of an axis that is not there", found=f"{axis} of {show_shape(x.shape)}"
        )
    size = x.shape[at]
    sizes = [size // parts] * parts if isinstance(parts, int) else [Dim.of(p) for p in parts]
    total, found = Dim.of(0), []
    for one in sizes:
        found.append(Tensor(Slice(x.node, at, total, one, 1)))
        total = total + one
    if total != size:
        raise ShapeError("the parts of a split do not add up", found=f"{total} of {size}")
    return tuple(found)


def concat(tensors: Sequence[Tensor], axis: int = -1) -> Tensor:
    """Tensors one after the other along an axis."""
    _one_type("concat", tensors)
    at = axis if axis < 0 else axis - tensors[0].ndim
    return Tensor(Concat(tuple(t.node for t in tensors), at))


def stack(tensors: Sequence[Tensor], axis: int = -1) -> Tensor:
    """Tensors of one shape along a new axis."""
    _one_type("stack", tensors)
    shape = list(tensors[0].shape)
    at = axis if axis < 0 else axis - len(shape) - 1
    where = len(shape) + 1 + at
    new = (*shape[:where], ONE, *shape[where:])
    return Tensor(Concat(tuple(Reshape(t.node, new) for t in tensors), at))


def _one_type(name: str, tensors: Sequence[Tensor]) -> None:
    if not tensors or any(not isinstance(t, Tensor) for t in tensors):
        raise TraceError(f"coda.{name} takes a list of tensors of the block")
    if len({t.dtype for t in tensors}) > 1:
        raise DtypeError(
            f"`{name}` takes operands of one element type",
            found=", ".join(str(t.dtype) for t in tensors),
        )


def take(table: Tensor, index: Tensor) -> Tensor:
    """Rows of `table` [V, ...] at an integer tensor `index` [...]."""
    return Tensor(Gather(table.node, index.node))


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index[...]], one column for each row: [..., 1]; 0 where the index is outside."""
    return Tensor(Pick(x.node, index.node))
