"""The symbolic tensor that a block is traced with: torch's operators, writing nodes of the graph.

`Tensor["M D"]` is an annotation; inside a block, an argument is a `Tensor` around a node. Shapes
and element types are checked as the operators are written, with the user's line in the message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, NoReturn

from coda.errors import DimError, DtypeError, ShapeError, TraceError
from coda.frontend.shapes import parse_rearrangement, parse_shape
from coda.ir.dims import ONE, Dim, Shape, product, show_shape
from coda.ir.graph import (
    Cast,
    Const,
    Contract,
    Map,
    Node,
    Permute,
    Reduce,
    Reshape,
    Size,
    Slice,
)
from coda.ir.types import DType, f32

Operand = "Tensor | float | Dim"
Index = int | Dim | slice | EllipsisType | None


@dataclass(frozen=True)
class Spec:
    """What an argument is declared to be: axes, and an element type (None: the block's default)."""

    shape: Shape
    dtype: DType | None


class _Annotated(type):
    def __getitem__(cls, declared: str | tuple[str, DType]) -> Any:
        text, dtype = declared if isinstance(declared, tuple) else (declared, None)
        if not isinstance(text, str) or not isinstance(dtype, DType | None):
            raise TraceError(
                "a tensor is declared by a shape and an element type",
                found=repr(declared),
                help='write coda.Tensor["M D"] or coda.Tensor["M D", coda.f32]',
            )
        return Spec(parse_shape(text), dtype)


class Tensor(metaclass=_Annotated):
    """A value of a block while it is traced.

    As an annotation, `Tensor["M D"]` or `Tensor["M D", coda.f32]`. As a value it has torch's
    operators, `shape` (of dims), `dtype`, `.T`, slicing, `reshape` and `cast`.
    """

    __slots__ = ("node",)
    __array_priority__ = 1000

    def __init__(self, node: Node) -> None:
        self.node = node

    @property
    def shape(self) -> Shape:
        """The axes, as dims that can be computed with."""
        return self.node.shape

    @property
    def dtype(self) -> DType:
        """The element type."""
        return self.node.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.node.rank

    def __repr__(self) -> str:
        return f"coda.Tensor({show_shape(self.shape)}, {self.dtype})"

    # Arithmetic.

    def __add__(self, other: Any) -> Tensor:
        return apply("add", self, other)

    def __radd__(self, other: Any) -> Tensor:
        return apply("add", other, self)

    def __sub__(self, other: Any) -> Tensor:
        return apply("sub", self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return apply("sub", other, self)

    def __mul__(self, other: Any) -> Tensor:
        return apply("mul", self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return apply("mul", other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return apply("div", other, self)

    def __pow__(self, other: Any) -> Tensor:
        return apply("pow", self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return apply("pow", other, self)

    def __neg__(self) -> Tensor:
        return apply("neg", self)

    def __abs__(self) -> Tensor:
        return apply("abs", self)

    def __eq__(self, other: Any) -> Any:
        return apply("eq", self, other)

    def __ne__(self, other: Any) -> Any:
        return apply("ne", self, other)

    def __lt__(self, other: Any) -> Tensor:
        return apply("lt", self, other)

    def __le__(self, other: Any) -> Tensor:
        return apply("le", self, other)

    def __gt__(self, other: Any) -> Tensor:
        return apply("gt", self, other)

    def __ge__(self, other: Any) -> Tensor:
        return apply("ge", self, other)

    __hash__ = object.__hash__

    def __matmul__(self, other: Any) -> Tensor:
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> NoReturn:
        raise TraceError("`@` takes two tensors of the block", found=type(other).__name__)

    # Views.

    @property
    def T(self) -> Tensor:
        """The transpose of a matrix."""
        if self.ndim != 2:
            raise ShapeError("`.T` takes a matrix", found=show_shape(self.shape))
        if isinstance(self.node, Permute):
            return Tensor(self.node.arg)
        return Tensor(Permute(self.node, (1, 0)))

    def reshape(self, *shape: str | int | Dim) -> Tensor:
        """The same elements under other axes: "M (H d) -> M H d", or dims."""
        if len(shape) == 1 and isinstance(shape[0], str):
            return Tensor(Reshape(self.node, _rearranged(self, shape[0])))
        return Tensor(Reshape(self.node, tuple(Dim.of(d) for d in shape)))

    def cast(self, dtype: DType) -> Tensor:
        """The same values in another element type."""
        if not isinstance(dtype, DType):
            raise DtypeError(
                "a cast takes an element type of coda", found=repr(dtype), help="coda.f32"
            )
        return self if dtype == self.dtype else Tensor(Cast(self.node, dtype))

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Tensor:
        return _sliced(self, index if isinstance(index, tuple) else (index,))

    # Reductions, as methods.

    def sum(self, axis: int = -1, keepdims: bool = False) -> Tensor:
        """The sum over an axis."""
        return reduce("sum", self, axis, keepdims)

    def mean(self, axis: int = -1, keepdims: bool = False) -> Tensor:
        """The mean over an axis."""
        return reduce("mean", self, axis, keepdims)

    def max(self, axis: int = -1, keepdims: bool = False) -> Tensor:
        """The maximum over an axis."""
        return reduce("max", self, axis, keepdims)

    def min(self, axis: int = -1, keepdims: bool = False) -> Tensor:
        """The minimum over an axis."""
        return reduce("min", self, axis, keepdims)

    # What a block cannot mean.

    def __bool__(self) -> NoReturn:
        raise TraceError(
            "Python cannot branch on a value of the block: it is known only when the kernel runs",
            found=repr(self),
            help="coda.where(condition, a, b) chooses element by element",
        )

    def __iter__(self) -> NoReturn:
        raise TraceError(
            "a tensor of the block is not a sequence",
            found=repr(self),
            help="coda.split(x, parts, axis=) gives a tuple of tensors",
        )

    def __len__(self) -> NoReturn:
        raise TraceError("a tensor of the block has no length", help="x.shape[0] is a dim")

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TraceError(
            "a tensor of the block cannot be written in place",
            help="coda.where or coda.concat make a new one",
        )

    def _number(self) -> NoReturn:
        raise TraceError("a tensor of the block has no value while it is traced", found=repr(self))

    __float__ = __int__ = __index__ = item = _number

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TraceError(
            "numpy cannot compute with a tensor of the block", help="use coda's own functions"
        )

    __array_ufunc__ = __array__

    @classmethod
    def __torch_function__(cls, fn: Callable[..., Any], types: Any, args: Any = (), kw: Any = None):  # noqa: ANN206
        name = getattr(fn, "__name__", "this function")
        raise TraceError(
            f"torch.{name} cannot compute with a tensor of the block",
            help=f"use coda.{name} where it exists, or coda's primitives",
        )


# The primitives behind the operators.


def lift(value: Any, like: DType) -> Node:
    """A number as a node of the element type `like`; tensors as their nodes."""
    if isinstance(value, Tensor):
        return value.node
    if isinstance(value, Dim):
        return Size(value, like)
    if isinstance(value, bool | int | float):
        return Const(float(value), like)
    raise TraceError(
        "only tensors of the block and Python numbers can be computed with",
        found=type(value).__name__,
        help="pass other tensors to the block as arguments",
    )


def apply(fn: str, *args: Any) -> Tensor:
    """A scalar function, elementwise. Raises DtypeError where the operands' types differ."""
    values = args[1:] if fn == "where" else args
    tensors = [a for a in values if isinstance(a, Tensor)]
    if not tensors and fn == "where":
        tensors = [Tensor(Const(0.0, f32))]
    if not tensors:
        raise TraceError(f"coda.{fn} takes a tensor of the block", found=_kinds(args))
    like = tensors[0].dtype
    if any(t.dtype != like for t in tensors):
        raise DtypeError(
            f"`{fn}` takes operands of one element type",
            found=" and ".join(f"{show_shape(t.shape)} {t.dtype}" for t in tensors),
            help=f"x.cast(coda.{max((t.dtype for t in tensors), key=lambda d: d.size).name})",
        )
    if like.kind == "bool" and fn not in ("where", "eq", "ne"):
        raise DtypeError(f"`{fn}` takes numbers", found="bool", help="coda.where(condition, a, b)")
    nodes = [lift(a, like) for a in args]
    if fn == "where" and nodes[0].dtype.kind != "bool":
        raise DtypeError("`where` takes a condition", found=str(nodes[0].dtype), help="x > 0")
    return Tensor(Map(fn, tuple(nodes)))


def _kinds(values: Iterable[Any]) -> str:
    return ", ".join(type(v).__name__ for v in values)


def matmul(x: Any, w: Any) -> Tensor:
    """x [..., K] @ w [K, N]; `w.T` of an [N, K] weight is read as it lies."""
    if not isinstance(x, Tensor) or not isinstance(w, Tensor):
        raise TraceError("`@` takes two tensors of the block", found=_kinds((x, w)))
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        fits = w.ndim == 2 and x.ndim and x.shape[-1] == w.shape[1]
        raise ShapeError(
            "`@` takes [..., K] and [K, N]",
            found=f"{show_shape(x.shape)} and {show_shape(w.shape)}",
            help="the axes agree if the right one is transposed: `@ w.T`" if fits else "",
        )
    if x.dtype != w.dtype:
        raise DtypeError(
            "`@` takes operands of one element type",
            found=f"{x.dtype} and {w.dtype}",
            help=f"cast one of them, as in .cast(coda.{x.dtype.name})",
        )
    if x.dtype.kind != "float":
        raise DtypeError("`@` takes floats", found=str(x.dtype))
    return Tensor(Contract(x.node, w.T.node, x.dtype if x.dtype.size > 1 else f32))


def reduce(fn: str, x: Any, axis: int, keepdims: bool) -> Tensor:
    """A reduction over one axis."""
    if not isinstance(x, Tensor):
        raise TraceError(f"coda.{fn} takes a tensor of the block", found=type(x).__name__)
    if not isinstance(axis, int) or not -x.ndim <= axis < x.ndim:
        raise ShapeError(
            f"`{fn}` reduces an axis that is not there",
            found=f"axis {axis} of {show_shape(x.shape)}",
        )
    if x.dtype.kind != "float":
        raise DtypeError(f"`{fn}` takes floats", found=str(x.dtype), help="x.cast(coda.f32)")
    axis = axis if axis < 0 else axis - x.ndim
    node: Node = Reduce(fn, x.node, axis)
    if not keepdims:
        kept = [d for i, d in enumerate(x.shape) if i != axis + x.ndim]
        node = Reshape(node, tuple(kept))
    return Tensor(node)


def _rearranged(x: Tensor, text: str) -> Shape:
    left, right = parse_rearrangement(text)
    if left:
        found = tuple(product(a) for a in left)
        if found != x.shape:
            raise ShapeError(
                f'"{text}" does not begin with the shape of the tensor', found=show_shape(x.shape)
            )
    shape = tuple(product(axis) for axis in right)
    known = {s for d in x.shape for s in d.symbols}
    unknown = sorted({s for d in shape for s in d.symbols} - known)
    if unknown:
        raise DimError(
            f"dim `{unknown[0]}` is unknown here",
            found=show_shape(x.shape),
            help="use the dims of the tensor's own shape",
        )
    return shape


def _sliced(x: Tensor, index: tuple[Index, ...]) -> Tensor:
    """torch's basic indexing: ints, dims, slices with positive steps, `...` and None."""
    given = sum(i is not None and i is not ... for i in index)
    if given > x.ndim:
        raise ShapeError(f"{given} indices into {x.ndim} axes", found=show_shape(x.shape))
    if ... not in [i for i in index if not isinstance(i, Dim)]:
        index = (*index, ...)
    node, shape, axis = x.node, [], -x.ndim
    for item in index:
        if item is ...:
            skip = x.ndim - given
            shape += x.shape[axis + x.ndim : axis + x.ndim + skip]
            axis += skip
        elif item is None:
            shape.append(ONE)
        else:
            node = _take(node, axis, item)
            if isinstance(item, slice):
                shape.append(node.shape[axis])
            axis += 1
    return Tensor(node if node.shape == tuple(shape) else Reshape(node, tuple(shape)))


def _take(node: Node, axis: int, item: Any) -> Node:
    size = node.shape[axis]
    if isinstance(item, int | Dim) and not isinstance(item, bool):
        return Slice(node, axis, _inside(item, size), ONE, 1)
    if not isinstance(item, slice):
        raise TraceError(
            "an index is an int, a dim, a slice, `...` or None",
            found=type(item).__name__,
            help="coda.take(table, index) takes rows at an integer tensor",
        )
    if item == slice(None):
        return node
    step = 1 if item.step is None else item.step
    if not isinstance(step, int) or step < 1:
        raise TraceError("a slice goes forward by whole steps", found=f"step {step!r}")
    start = _inside(0 if item.start is None else item.start, size)
    stop = _inside(size if item.stop is None else item.stop, size)
    span = stop - start
    if span.constant is not None and not span.constant > 0:
        raise ShapeError("a slice is empty", found=f"{start}:{stop} of {size}")
    count = span if step == 1 else _steps(span, step)
    return Slice(node, axis, start, count, step)


def _inside(at: Any, size: Dim) -> Dim:
    """A position that counts from the front."""
    if not isinstance(at, int | Dim) or isinstance(at, bool):
        raise TraceError("a position is an int or a dim", found=type(at).__name__)
    at = Dim.of(at)
    if at.constant is not None and at.constant < 0:
        at = size + at
    beyond = size - at
    if beyond.constant is not None and beyond.constant < 0:
        raise ShapeError("a position is outside its axis", found=f"{at} of {size}")
    return at


def _steps(span: Dim, step: int) -> Dim:
    """How many elements `step` apart lie in `span`, whose symbolic part `step` must divide."""
    constant = dict(span.terms).get((), 0)
    return (span - constant) // step + -(-constant // step)
