"""Torch-like operators on symbolic tensors -> nodes of the graph.

`Tensor["M D"]` is an annotation; inside a block, an argument is a `Tensor` that wraps a node. Each
operator checks shapes and element types when it is called; errors have the user's line.

    x: Tensor["M D"], w: Tensor["N D"]    x @ w.T  ->  contract %x, %w    [M, N]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from coda.errors import DimError, DtypeError, TraceError
from coda.frontend.casts import written
from coda.frontend.contractions import multiplied
from coda.frontend.instead import instead_of
from coda.frontend.numbers import is_number, lift, rounded
from coda.frontend.reductions import Axes, reduced
from coda.frontend.refused import Valueless, kind, kinds
from coda.frontend.shapes import parse_shape
from coda.frontend.views import Index, permuted, reshaped, sliced, transposed
from coda.ir.dims import Dim, Shape, product, show_shape
from coda.ir.graph import Map, Node
from coda.ir.scalars import SCALARS
from coda.ir.types import DType, f32, promote

Operand = "Tensor | float | Dim"


@dataclass(frozen=True)
class Spec:
    """The declaration of an argument.

    Attributes:
        shape: one dim for each axis.
        dtype: the element type; None for the block's default.
        constant: whether it has no gradient.
    """

    shape: Shape
    dtype: DType | None
    constant: bool = False


class _Annotated(type):
    def __getitem__(cls, declared: str | tuple[str, DType]) -> Any:
        text, *rest = declared if isinstance(declared, tuple) else (declared,)
        dtype = rest[0] if rest else None
        if not isinstance(text, str) or not isinstance(dtype, DType | None) or len(rest) > 1:
            raise TraceError(
                "a tensor is declared by a shape and an element type",
                found=repr(declared),
                help='write coda.Tensor["M D"] or coda.Tensor["M D", coda.f32]',
            )
        shape = parse_shape(text)
        if any(d.constant is not None and d.constant < 1 for d in shape):
            raise DimError("an axis has at least one element", found=f'"{text}"')
        return Spec(shape, dtype, issubclass(cls, Constant))


class Tensor(Valueless, metaclass=_Annotated):
    """A symbolic value of a block that is being traced.

    As an annotation: `Tensor["M D"]` or `Tensor["M D", coda.f32]`. As a value it has torch's
    operators, `shape` (of dims), `dtype`, `.T`, slicing, `reshape` and `cast`. It holds no data.
    """

    __slots__ = ("node",)
    __array_priority__ = 1000

    def __init__(self, node: Node) -> None:
        if not isinstance(node, Node):
            raise TraceError(
                "a tensor of a block is declared, not made",
                found=f"coda.Tensor({node!r})",
                help='x: coda.Tensor["M D"]',
            )
        self.node = node

    @property
    def shape(self) -> Shape:
        """The size of each axis, as a dim; dims support arithmetic."""
        return tuple(Extent(d.terms) for d in self.node.shape)

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
        root = _ROOTS.get(other) if isinstance(other, float) else None
        return apply(root, self) if root else apply("pow", self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return apply("pow", other, self)

    def __floordiv__(self, other: Any) -> Tensor:
        return apply("floordiv", self, _divisor("//", other))

    def __mod__(self, other: Any) -> Tensor:
        return self - self // _divisor("%", other) * other

    def __rfloordiv__(self, other: Any) -> Tensor:
        return apply("floordiv", other, _divisor("//", self))

    def __rmod__(self, other: Any) -> Tensor:
        return apply("floordiv", other, _divisor("%", self))

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

    # Logical operators on conditions, which are computed as the numbers 0 and 1.

    def __and__(self, other: Any) -> Tensor:
        return _conditions("&", "minimum", self, other)

    def __or__(self, other: Any) -> Tensor:
        return _conditions("|", "maximum", self, other)

    def __xor__(self, other: Any) -> Tensor:
        return _conditions("^", "sub", self, other)

    def __invert__(self) -> Tensor:
        return _conditions("~", "sub", self, 1.0)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __matmul__(self, other: Any) -> Tensor:
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> NoReturn:
        raise TraceError("`@` takes two tensors of the block", found=kind(other))

    # Views.

    @property
    def T(self) -> Tensor:
        """A matrix [M, N] transposed: [N, M]. Raises ShapeError for any other rank."""
        return Tensor(transposed(self.node))

    @property
    def mT(self) -> Tensor:
        """Each matrix of a batch [..., M, N] transposed: [..., N, M]."""
        return Tensor(transposed(self.node, batches=True))

    def permute(self, *order: int) -> Tensor:
        """Permute axes as torch does: axis i of the result is axis order[i]. Raises ShapeError."""
        return Tensor(permuted(self.node, order))

    def reshape(self, *shape: str | int | Dim) -> Tensor:
        """Reshape in row-major order: by "M (H d) -> M H d", or by dims, one of which may be -1."""
        return Tensor(reshaped(self.node, shape))

    def cast(self, dtype: DType) -> Tensor:
        """The same values rounded to another element type."""
        if not isinstance(dtype, DType):
            raise DtypeError(
                "a cast takes an element type of coda", found=repr(dtype), help="coda.f32"
            )
        return self if dtype == self.dtype else Tensor(written(self.node, dtype))

    def __getitem__(self, index: Index | Tensor | tuple[Index | Tensor, ...]) -> Tensor:
        items = index if isinstance(index, tuple) else (index,)
        return Tensor(sliced(self.node, tuple(map(_index, items))))

    # Reductions, as methods.

    def sum(self, axis: Axes = -1, *, keepdims: bool = False) -> Tensor:
        """The sum over axes, which are dropped, or kept with size 1 by `keepdims`."""
        return reduce("sum", self, axis, keepdims=keepdims)

    def mean(self, axis: Axes = -1, *, keepdims: bool = False) -> Tensor:
        """The mean over axes, which are dropped, or kept with size 1 by `keepdims`."""
        return reduce("mean", self, axis, keepdims=keepdims)

    def max(self, axis: Axes = -1, *, keepdims: bool = False) -> Tensor:
        """The maximum over axes, which are dropped, or kept with size 1 by `keepdims`."""
        return reduce("max", self, axis, keepdims=keepdims)

    def min(self, axis: Axes = -1, *, keepdims: bool = False) -> Tensor:
        """The minimum over axes, which are dropped, or kept with size 1 by `keepdims`."""
        return reduce("min", self, axis, keepdims=keepdims)

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Tensor:
        """Take a numpy scalar as a left operand; raise TraceError for any other ufunc call."""
        name = {"multiply": "mul", "subtract": "sub", "divide": "div", "power": "pow"}.get(
            ufunc.__name__, ufunc.__name__
        )
        if method == "__call__" and name in ("add", "mul", "sub", "div", "pow"):
            return apply(name, *args)
        raise TraceError(
            f"numpy.{ufunc.__name__} cannot compute with a tensor of the block",
            help=instead_of(ufunc.__name__),
        )


# The primitives behind the operators.


_ROOTS = {0.5: "sqrt", -0.5: "rsqrt"}  # powers that torch computes by these functions


def apply(fn: str, *args: Any) -> Tensor:
    """Apply the scalar function `fn` elementwise; tensors and numbers broadcast.

    Raises DtypeError for operands of different types, TraceError for anything but tensors, numbers
    and dims, ShapeError for shapes that do not broadcast.
    """
    values = args[1:] if fn == "where" else args
    if fn == "where" and not _is_condition(args[0]):
        raise DtypeError("`where` takes a condition", found=_described(args[0]), help="x > 0")
    tensors = [a for a in values if isinstance(a, Tensor)]
    typed = [t for t in tensors if not is_number(t.node)]
    if not tensors and fn != "where" and not any(isinstance(a, Dim | float | int) for a in args):
        raise TraceError(f"coda.{fn} takes a tensor of the block", found=kinds(args))
    like = typed[0].dtype if typed else f32
    if any(t.dtype != like for t in typed):
        wide = promote(*(t.dtype for t in typed))
        raise DtypeError(
            f"`{fn}` takes operands of one element type",
            found=" and ".join(_described(t) for t in typed),
            help=f"x.cast(coda.{'bool_' if wide.kind == 'bool' else wide.name})",
        )
    if like.kind == "bool" and fn not in ("where", "eq", "ne"):
        raise DtypeError(f"`{fn}` takes numbers", found="bool", help="coda.where(condition, a, b)")
    if like.kind == "int" and not SCALARS[fn].of_ints:
        raise DtypeError(f"`{fn}` takes floats", found=str(like), help="x.cast(coda.f32)")
    if like.kind == "float" and not SCALARS[fn].of_floats:
        raise DtypeError(f"`{fn}` takes ints", found=str(like), help="coda.floor(x / n)")
    nodes = [lift(a.node if isinstance(a, Tensor) else a, like) for a in args]
    if SCALARS[fn].selects or SCALARS[fn].result == "bool":
        nodes = [rounded(n) if is_number(n) else n for n in nodes]
    return Tensor(Map(fn, tuple(nodes)))


def _divisor(sign: str, value: Any) -> Any:
    """A divisor of whole numbers: a number or a dim. Raises TraceError for any other value."""
    whole = isinstance(value, int | np.integer | Dim) and not isinstance(value, bool)
    if not whole or (not isinstance(value, Dim) and value < 1):
        raise TraceError(
            f"`{sign}` divides a tensor of ints by a whole number from 1 on, or by a dim",
            found=kind(value) if isinstance(value, Tensor) else repr(value),
            help="coda.floor(x / y) of floats",
        )
    return value


def _index(item: Index | Tensor) -> Index:
    """An item of an index; a tensor of ints as its node. Raises DtypeError for other tensors."""
    if not isinstance(item, Tensor):
        return item
    if item.dtype.kind != "int":
        raise DtypeError(
            "an index is a tensor of ints",
            found=_described(item),
            help="coda.where(condition, a, b) chooses by a condition, x.cast(coda.i64) rounds",
        )
    return item.node


def _is_condition(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.kind == "bool"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{show_shape(value.shape)} {value.dtype}"
    return kind(value)


def _conditions(sign: str, fn: str, *args: Any) -> Tensor:
    """A logical operation on conditions as 0 and 1: true where `fn` of them is not 0."""
    if not all(_is_condition(a) or isinstance(a, float) for a in args):
        raise DtypeError(
            f"`{sign}` takes conditions",
            found=" and ".join(map(_described, args)),
            help="(x > 0) & (x < 1), in brackets",
        )
    numbers = [a.cast(f32) if isinstance(a, Tensor) else a for a in args]
    return apply("ne", apply(fn, *numbers), 0.0)


def matmul(x: Any, w: Any) -> Tensor:
    """x [..., M, K] @ w [..., K, N] -> [..., M, N]; leading axes broadcast.

    A transposed operand (`w.T`, `w.mT`) is read in its stored layout, without a copy. Raises
    ShapeError and DtypeError.
    """
    if not isinstance(x, Tensor) or not isinstance(w, Tensor):
        raise TraceError("`@` takes two tensors of the block", found=kinds((x, w)))
    return Tensor(multiplied(x.node, w.node))


def reduce(fn: str, x: Any, axis: Axes, *, keepdims: bool) -> Tensor:
    """The reduction `fn` over some axes; floats only. Raises ShapeError and DtypeError."""
    if not isinstance(x, Tensor):
        raise TraceError(f"coda.{fn} takes a tensor of the block", found=kind(x))
    return Tensor(reduced(fn, x.node, axis, keepdims=keepdims))


class Extent(Dim):
    """A dim of a tensor's shape: it gives dims, or numbers where the result is no size.

    n + 1, 2 * n, n / 2 and n ** 2 are dims; 1 / n, n ** -0.5 and 0.5 * n are numbers.
    """

    def _with(self, fn: str, exact: Callable[[Any], Dim], other: Any) -> Any:
        """A dim by `exact`, of dims and whole numbers; with any other number, a number."""
        if isinstance(other, float | np.floating):
            return apply(fn, self, other)
        if isinstance(other, Tensor):
            return NotImplemented
        return Extent(exact(other).terms)

    def __add__(self, other: Any) -> Any:
        return self._with("add", super().__add__, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._with("sub", super().__sub__, other)

    def __rsub__(self, other: Any) -> Any:
        return apply("sub", other, self) if isinstance(other, float) else (-self) + other

    def __neg__(self) -> Extent:
        return Extent(super().__neg__().terms)

    def __mul__(self, other: Any) -> Any:
        return self._with("mul", super().__mul__, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return Extent(super().__floordiv__(other).terms)

    def __truediv__(self, other: Any) -> Any:
        return self._with("div", super().__floordiv__, other)

    def __rtruediv__(self, other: Any) -> Any:
        if isinstance(other, Dim):
            return Extent((Dim(other.terms) // self).terms)
        return apply("div", other, self)

    def __pow__(self, other: Any) -> Any:
        if isinstance(other, int) and other > 0:
            return Extent(product([self] * other).terms)
        root = _ROOTS.get(other) if isinstance(other, float) else None
        return apply(root, self) if root else apply("pow", self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return apply("pow", other, self)


class Constant(Tensor):
    """An argument without a gradient, such as a RoPE table: `Constant["M d/2"]`.

    It is declared as a `Tensor` is. A call is refused if the argument has requires_grad set.
    """

    __slots__ = ()
