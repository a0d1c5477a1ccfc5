"""One table: an ATen operator -> its definition in primitives, as a function of symbolic tensors.

A rule gets the operator's arguments, with tensors as `coda.Tensor`, and the result's shape and
dtype as inferred by torch. If torch computes in float32 internally and stores 16 bits (norms,
softmax, activations), so does the rule; a kernel rounds only where it stores. An operator without
a rule, or with arguments that its rule refuses, is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from coda.errors import UnsupportedError
from coda.frontend import library, ops
from coda.frontend.tensor import Tensor, matmul
from coda.frontend.torch_import.rules import OperatorRules, Result, Rule
from coda.ir.dims import ONE, Shape, product
from coda.ir.graph import Cast, Contract, Input, walk
from coda.ir.types import DType, bool_, f32, has_reciprocal
from coda.ir.views import shaped

aten = torch.ops.aten
REDUCTIONS = ("none", "mean", "sum")  # of losses, by torch's enum value


TABLE = OperatorRules()
rule = TABLE.enter


def refuse(why: str) -> UnsupportedError:
    """The error of a rule that does not support its arguments."""
    return UnsupportedError(why)


def cast(x: Tensor, dtype: DType) -> Tensor:
    """Cast a tensor; a predicate becomes 1 or 0."""
    return x if x.dtype == dtype else Tensor(Cast(x.node, dtype))


def numbers(result: Result, *values: Any) -> list[Any]:
    """Operands cast to the dtype in which torch computes: the widest of operands and result."""
    if any(isinstance(v, torch.SymInt | torch.SymFloat | complex) for v in values):
        raise refuse("a number that is known only in the call")
    tensors = [v for v in values if isinstance(v, Tensor)]
    wide = [t for t in tensors if t.ndim and t.dtype.kind == "float"]
    kind = max([*(t.dtype for t in wide), result.dtype], key=lambda d: d.size * (d.kind == "float"))
    if kind.kind != "float":
        raise refuse("arithmetic on integers")
    return [cast(v, kind) if isinstance(v, Tensor) else v for v in values]


def wide(x: Tensor) -> Tensor:
    """Cast a 16-bit float to float32; other dtypes are unchanged."""
    return cast(x, f32) if x.dtype.size < f32.size else x


def condition(x: Tensor) -> Tensor:
    """Whether a value is not 0."""
    return x if x.dtype == bool_ else x != (0 if x.dtype.kind == "int" else 0.0)


# Arithmetic.


def _binary(fn: str) -> Rule:
    def apply(result: Result, a: Any, b: Any, alpha: Any = 1) -> Tensor:
        a, b = numbers(result, a, b)
        if alpha != 1:
            b = b * alpha
        if not isinstance(a, Tensor):
            return getattr(b, f"__r{fn}__")(a)
        if fn == "truediv" and not isinstance(b, Tensor) and has_reciprocal(b):
            return a * (1.0 / b)
        return getattr(a, f"__{fn}__")(b)

    return apply


for _fn, _name in (("add", "add"), ("sub", "sub"), ("mul", "mul"), ("truediv", "div")):
    _packet = getattr(aten, _name)
    rule(_packet.Tensor, _packet.Scalar)(_binary(_fn))
rule(aten.true_divide.Tensor)(_binary("truediv"))


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(result: Result, a: Any, b: Any, alpha: Any = 1) -> Tensor:
    a, b = numbers(result, a, b)
    return b - (a if alpha == 1 else a * alpha)


@rule(aten.pow.Tensor_Scalar)
def _pow(result: Result, x: Tensor, n: Any) -> Tensor:
    (x, n) = numbers(result, x, n)
    if n == 2:
        return ops.square(x)
    if n == 0.5:
        return ops.sqrt(x)
    if n == -0.5:
        return ops.rsqrt(x)
    if n == 3:
        return x * ops.square(x)
    return x**n


@rule(aten.addcmul.default)
def _addcmul(result: Result, x: Any, a: Any, b: Any, value: Any = 1) -> Tensor:
    x, a, b = numbers(result, x, a, b)
    return x + (a * b if value == 1 else a * b * value)


def _unary(fn: Callable[[Tensor], Tensor]) -> Rule:
    def apply(result: Result, x: Any) -> Tensor:
        return fn(numbers(result, x)[0])

    return apply


for _operator, _one in (
    (aten.neg.default, lambda x: -x),
    (aten.abs.default, ops.abs),
    (aten.exp.default, ops.exp),
    (aten.exp2.default, ops.exp2),
    (aten.expm1.default, ops.expm1),
    (aten.log.default, ops.log),
    (aten.log1p.default, ops.log1p),
    (aten.sqrt.default, ops.sqrt),
    (aten.rsqrt.default, ops.rsqrt),
    (aten.reciprocal.default, lambda x: 1.0 / x),
    (aten.square.default, ops.square),
    (aten.tanh.default, ops.tanh),
    (aten.sigmoid.default, ops.sigmoid),
    (aten.erf.default, ops.erf),
    (aten.sin.default, ops.sin),
    (aten.cos.default, ops.cos),
    (aten.relu.default, library.relu),
):
    rule(_operator)(_unary(_one))


# Choices.


@rule(aten.maximum.default)
def _maximum(result: Result, a: Any, b: Any) -> Tensor:
    return ops.maximum(*numbers(result, a, b))


@rule(aten.minimum.default)
def _minimum(result: Result, a: Any, b: Any) -> Tensor:
    return ops.minimum(*numbers(result, a, b))


def _comparison(fn: str) -> Rule:
    def apply(result: Result, a: Tensor, b: Any) -> Tensor:
        if (isinstance(b, Tensor) and b.dtype != a.dtype) or a.dtype == bool_:
            raise refuse("a comparison of different types")
        a = cast(a, f32) if a.dtype.kind == "int" and isinstance(b, float) else a
        return getattr(a, f"__{fn}__")(b)

    return apply


for _fn in ("eq", "ne", "lt", "le", "gt", "ge"):
    _packet = getattr(aten, _fn)
    rule(_packet.Tensor, _packet.Scalar)(_comparison(_fn))


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(result: Result, condition: Tensor, a: Any, b: Any) -> Tensor:
    a, b = numbers(result, a, b)
    return ops.where(condition, a, b)


@rule(aten.masked_fill.Scalar)
def _masked_fill(result: Result, x: Tensor, mask: Tensor, value: Any) -> Tensor:
    x, value = numbers(result, x, value)
    return ops.where(mask, value, x)


# Element types.


@rule(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default)
def _to(result: Result, x: Tensor, *where: Any, **options: Any) -> Tensor:
    if x.dtype.kind != result.dtype.kind and x.dtype.kind != "bool":
        raise refuse(f"a cast from {x.dtype} to {result.dtype}")
    return x.cast(result.dtype)


# Norms and losses: torch's own formulas, in float32.


def _as_rows(shape: Sequence[Any], *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors in float32 with the last axes, those of the shape, as one."""
    lead = -len(shape)

    def row(x: Tensor) -> Tensor:
        joined = (*x.shape[: x.ndim + lead], product(x.shape[x.ndim + lead :]))
        return reshaped(wide(x), joined)

    return [None if x is None else row(x) for x in tensors]


@rule(aten.layer_norm.default)
def _layer_norm(
    result: Result,
    x: Tensor,
    shape: Sequence[Any],
    w: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    rows, w, b = _as_rows(shape, x, w, b)
    assert rows is not None
    y = library.layer_norm(rows, w, b, eps)
    return cast(reshaped(y, x.shape), result.dtype)


@rule(aten.rms_norm.default)
def _rms_norm(
    result: Result,
    x: Tensor,
    shape: Sequence[Any],
    w: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    return _fused_rms_norm(result, x, shape, w, eps)[0]


@rule(aten._fused_rms_norm.default)
def _fused_rms_norm(
    result: Result,
    x: Tensor,
    shape: Sequence[Any],
    w: Tensor | None = None,
    eps: float | None = None,
) -> list[Tensor]:
    """[norm, 1 / rms]; the default eps is that of the dtype in which torch computes."""
    rows, w = _as_rows(shape, x, w)
    assert rows is not None
    least = torch.finfo(rows.dtype.torch).eps if eps is None else eps
    y = reshaped(library.rms_norm(rows, w, least), x.shape)
    inverse = library.inverse_rms(rows, least)
    kept = (*x.shape[: x.ndim - len(shape)], *[ONE] * len(shape))
    return [cast(y, result.dtype), reshaped(inverse, kept)]


def reshaped(x: Tensor, shape: Shape) -> Tensor:
    """A tensor in a shape of as many elements."""
    return Tensor(shaped(x.node, shape))


@rule(aten.cross_entropy_loss.default)
def _cross_entropy(
    result: Result,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    if weight is not None or target.dtype.kind != "int":
        raise refuse("a loss with weights of classes, or of probabilities")
    how = REDUCTIONS[reduction]
    x, labels = _classes_last(x, target)
    loss = library.cross_entropy(wide(x), labels, ignore_index, how, label_smoothing)
    return cast(reshaped(loss, result.shape), result.dtype)


def _classes_last(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """[C], [N, C] or [N, C, *d] and targets [], [N] or [N, *d] as [*, C] and [*]."""
    if x.ndim == 1:
        return x.reshape(1, x.shape[0]), target.reshape(1)
    return (x if x.ndim == 2 else x.permute(0, *range(2, x.ndim), 1)), target


@rule(aten.nll_loss_nd.default, aten.nll_loss.default)
def _nll_loss(
    result: Result,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
) -> Tensor:
    if weight is not None:
        raise refuse("a loss with weights of classes")
    x, labels = _classes_last(x, target)
    loss = library.nll_loss(wide(x), labels, ignore_index, REDUCTIONS[reduction])
    return cast(reshaped(loss, result.shape), result.dtype)


# Contractions.


@rule(aten.linear.default)
def _linear(result: Result, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return _multiply(result, x, w.T if w.ndim == 2 else w, b)


def _multiply(result: Result, x: Tensor, w: Tensor, b: Any = None, scale: Any = 1) -> Tensor:
    """x @ w (+ b), with operands in the dtype of the result, as under torch's autocast."""
    if w.ndim < 2 or x.ndim < 2:
        return _with_vector(result, x, w, b, scale)
    if w.ndim > 2:
        _columns_are_known(w)
    if result.dtype.kind != "float":
        raise refuse("a product of integers")
    y = matmul(cast(x, result.dtype), cast(w, result.dtype))
    y = y if scale == 1 else y * scale
    return y if b is None else y + cast(b, result.dtype)


def _with_vector(result: Result, x: Tensor, w: Tensor, b: Any, scale: Any) -> Tensor:
    """A product of which one operand is a vector: sums of products, in float32."""
    x, w = (wide(t) for t in numbers(result, x, w))
    if w.ndim == 1:
        y = ops.sum(x * w)
    else:
        y = ops.sum(x[:, None] * w, -2)
    y = y if scale == 1 else y * scale
    return cast(y if b is None else y + wide(b), result.dtype)


def _columns_are_known(*operands: Tensor) -> None:
    """Refuse a product of batches in which a call tells the sizes of columns.

    They are built into the kernels beside it, which would be compiled anew for each size.
    """
    if any(d.symbols for t in operands for d in t.shape[-2:]):
        raise refuse("a batched contraction whose number of columns is known only in the call")


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default)
def _matmul(result: Result, x: Tensor, w: Tensor) -> Tensor:
    return _multiply(result, x, w)


@rule(aten.addmm.default)
def _addmm(
    result: Result, b: Tensor, x: Tensor, w: Tensor, beta: Any = 1, alpha: Any = 1
) -> Tensor:
    return _multiply(result, x, w, b if beta == 1 else b * beta, alpha)


@rule(aten.baddbmm.default)
def _baddbmm(
    result: Result, b: Tensor, x: Tensor, w: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Tensor:
    if beta == 0:  # what torch says of b then: nothing of it is read, not even a NaN
        return _multiply(result, x, w, None, alpha)
    return _addmm(result, b, x, w, beta, alpha)


@rule(aten.einsum.default)
def _einsum(result: Result, text: str, tensors: Sequence[Tensor], **_: Any) -> Tensor:
    if result.dtype.kind != "float":
        raise refuse("a product of integers")
    if len(tensors) > 2:
        raise refuse("an einsum of more than two operands")
    y = ops.einsum(text, *(cast(t, result.dtype) for t in tensors))
    for node in walk([y.node], until=Input):
        if isinstance(node, Contract) and node.batched:
            _columns_are_known(*map(Tensor, node.operands))
    return y
