"""The table of scalar functions, one row each: reference, derivative, cost and device code.

A new function needs a row and nothing else: the reference backend, the text form, the cost model,
the derivative and the generated CuTe DSL read this table, and no pass matches on a name in it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coda.ir.types import DType, bf16, e4m3, e5m2, f16, f32


class Term(ABC):
    """A value in a derivative, with Python's operators: a cotangent, a result, an argument."""

    @abstractmethod
    def apply(self, fn: str, *args: Term | float) -> Term:
        """The function `fn` of this table, of `args`; one of them is this term."""

    def to(self, fn: str, *others: Term | float) -> Term:
        """The function `fn` of this term and `others`."""
        return self.apply(fn, self, *others)

    def __neg__(self) -> Term:
        return self.apply("neg", self)

    def __add__(self, other: Term | float) -> Term:
        return self.apply("add", self, other)

    def __radd__(self, other: float) -> Term:
        return self.apply("add", other, self)

    def __sub__(self, other: Term | float) -> Term:
        return self.apply("sub", self, other)

    def __rsub__(self, other: float) -> Term:
        return self.apply("sub", other, self)

    def __mul__(self, other: Term | float) -> Term:
        return self.apply("mul", self, other)

    def __rmul__(self, other: float) -> Term:
        return self.apply("mul", other, self)

    def __truediv__(self, other: Term | float) -> Term:
        return self.apply("div", self, other)


Cotangents = tuple[Term | None, ...]
# By arity: (d, y, *arguments) -> the cotangent of each argument.
Derivative = (
    Callable[[Term, Term, Term], Cotangents]
    | Callable[[Term, Term, Term, Term], Cotangents]
    | Callable[[Term, Term, Term, Term, Term], Cotangents]
)


@dataclass(frozen=True)
class Scalar:
    """A function of scalars.

    Attributes:
        name: its name in the text form.
        arity: number of arguments.
        evaluate: the reference, on torch tensors of any float dtype.
        flops: cost of one application, in units of one fused multiply-add.
        special: instructions of the special-function unit (MUFU) among them.
        result: "float" keeps the promoted type of the arguments, "bool" is a predicate.
        signs: if it is a sum of its arguments, the sign of each: (1, -1) for `a - b`.
        powers: if it is a product of powers of its arguments, the power of each: (1, -1) for
            `a / b`, (-0.5,) for `rsqrt`.
        device: its code in a kernel: an operator, or a function of kernels/device_math.py; "" for
            the function of the same name.
        commutes: whether the two arguments may be exchanged.
        selects: whether the result is always one of the arguments: it is not rounded, and literal
            arguments are rounded to the type of the others.
        exact: whether the result is computed without rounding, such as a negation or a predicate.
        rounds_to: the dtype to which it rounds; None for every other function.
        written: whether it is a rounding by a cast that the user wrote.
        chooses: whether the first argument selects one of the others as the result.
        derivative: (d, y, *arguments) -> the cotangent of each argument, from the cotangent d of
            the result y; None for an argument without a derivative.
    """

    name: str
    arity: int
    evaluate: Callable[..., Tensor]
    flops: int = 1
    special: int = 0
    result: str = "float"
    signs: tuple[int, ...] = ()
    powers: tuple[float, ...] = ()
    device: str = ""
    commutes: bool = False
    selects: bool = False
    exact: bool = False
    rounds_to: DType | None = None
    written: bool = False
    chooses: bool = False
    derivative: Derivative | None = None

    @property
    def is_negation(self) -> bool:
        """Whether it is the negation."""
        return self.signs == (-1,)

    @property
    def is_product(self) -> bool:
        """Whether it is the product of two or more arguments."""
        return len(self.powers) > 1 and set(self.powers) == {1}

    @property
    def diverges_at_zero(self) -> bool:
        """Whether it is infinite at 0 and nonzero everywhere: a negative power."""
        return bool(self.powers) and max(self.powers) < 0

    def is_linear_in(self, chosen: Sequence[bool]) -> bool:
        """Whether it is jointly linear in the `chosen` arguments, with the others held constant."""
        if self.signs:
            return all(chosen)
        powers = [p for p, one in zip(self.powers, chosen, strict=False) if one]
        return powers == [1]

    @property
    def unrounded(self) -> bool:
        """Whether the result is not rounded, and so is bitwise the same in every kernel."""
        return self.exact or self.selects


def _where(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


def _pow(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b)


def _half_at_ties(d: Term, other: Term, a: Term, b: Term) -> Term:
    """The cotangent of `a` in a maximum or minimum, by torch's rule.

    It is 0 where `other` says that b was selected, d / 2 at a tie, else d; if either argument is
    NaN, both have d.
    """
    return other.to("where", 0.0, a.to("eq", b).to("where", d * 0.5, d))


def _clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)


def _clamp_derivative(d: Term, y: Term, x: Term, low: Term, high: Term) -> Cotangents:
    """Torch's rule: x has d on the bounds, 0 if NaN; if low > high, the result is high."""
    inside = x.to("ge", low).to("where", x.to("le", high).to("where", d, 0.0), 0.0)
    crossed = high.to("lt", low)
    below = low.to("lt", high).to("where", x.to("lt", low).to("where", d, 0.0), 0.0)
    return inside, below, crossed.to("where", d, x.to("gt", high).to("where", d, 0.0))


_ROWS = (
    Scalar(
        "add",
        2,
        torch.add,
        signs=(1, 1),
        device="+",
        commutes=True,
        derivative=lambda d, y, a, b: (d, d),
    ),
    Scalar("sub", 2, torch.sub, signs=(1, -1), device="-", derivative=lambda d, y, a, b: (d, -d)),
    Scalar(
        "mul",
        2,
        torch.mul,
        powers=(1, 1),
        device="*",
        commutes=True,
        derivative=lambda d, y, a, b: (d * b, d * a),
    ),
    Scalar(
        "div",
        2,
        torch.div,
        powers=(1, -1),
        flops=2,
        special=1,
        derivative=lambda d, y, a, b: (d / b, -(d * y / b)),
    ),
    Scalar(
        "pow",
        2,
        _pow,
        device="power",
        flops=4,
        special=2,
        derivative=lambda d, y, a, b: (
            b.to("eq", 0.0).to("where", 0.0, d * (b * a.to("pow", b - 1.0))),
            (a.to("eq", 0.0).to("where", b, -1.0).to("ge", 0.0)).to(
                "where", 0.0, d * y * a.to("log")
            ),
        ),
    ),
    Scalar(
        "neg",
        1,
        torch.neg,
        signs=(-1,),
        device="-",
        exact=True,
        derivative=lambda d, y, a: (-d,),
    ),
    Scalar(
        "abs",
        1,
        torch.abs,
        device="absolute",
        exact=True,
        derivative=lambda d, y, a: (
            a.to("gt", 0.0).to("where", d, a.to("lt", 0.0).to("where", -d, d * 0.0)),
        ),
    ),
    Scalar("square", 1, torch.square, powers=(2,), derivative=lambda d, y, a: (d * a * 2.0,)),
    Scalar(
        "recip",
        1,
        torch.reciprocal,
        powers=(-1,),
        flops=2,
        special=1,
        derivative=lambda d, y, a: (-(d * y.to("square")),),
    ),
    Scalar("exp", 1, torch.exp, flops=2, special=1, derivative=lambda d, y, a: (d * y,)),
    Scalar(
        "exp2",
        1,
        torch.exp2,
        flops=1,
        special=1,
        derivative=lambda d, y, a: (d * y * math.log(2.0),),
    ),
    Scalar(
        "expm1",
        1,
        torch.expm1,
        flops=12,
        special=1,
        derivative=lambda d, y, a: (d * a.to("exp"),),
    ),
    Scalar("log", 1, torch.log, flops=2, special=1, derivative=lambda d, y, a: (d / a,)),
    Scalar(
        "log1p",
        1,
        torch.log1p,
        flops=16,
        special=2,
        derivative=lambda d, y, a: (d / (a + 1.0),),
    ),
    Scalar(
        "sqrt",
        1,
        torch.sqrt,
        powers=(0.5,),
        flops=2,
        special=1,
        derivative=lambda d, y, a: (d * 0.5 / y,),
    ),
    Scalar(
        "rsqrt",
        1,
        torch.rsqrt,
        powers=(-0.5,),
        flops=2,
        special=1,
        derivative=lambda d, y, a: (d * (y * y.to("square")) * -0.5,),
    ),
    Scalar(
        "tanh",
        1,
        torch.tanh,
        flops=2,
        special=1,
        derivative=lambda d, y, a: (d * (1.0 - y.to("square")),),
    ),
    Scalar(
        "sigmoid",
        1,
        torch.sigmoid,
        flops=3,
        special=2,
        derivative=lambda d, y, a: (d * (y * (1.0 - y)),),
    ),
    Scalar(
        "erf",
        1,
        torch.erf,
        flops=10,
        special=1,
        derivative=lambda d, y, a: (
            d * ((-a.to("square")).to("exp") * (2.0 / math.sqrt(math.pi))),
        ),
    ),
    Scalar(
        "sin",
        1,
        torch.sin,
        flops=4,
        special=1,
        derivative=lambda d, y, a: (d * a.to("cos"),),
    ),
    Scalar(
        "cos",
        1,
        torch.cos,
        flops=4,
        special=1,
        derivative=lambda d, y, a: (-(d * a.to("sin")),),
    ),
    Scalar(
        "maximum",
        2,
        torch.maximum,
        commutes=True,
        selects=True,
        derivative=lambda d, y, a, b: (
            _half_at_ties(d, a.to("lt", b), a, b),
            _half_at_ties(d, b.to("lt", a), b, a),
        ),
    ),
    Scalar(
        "minimum",
        2,
        torch.minimum,
        commutes=True,
        selects=True,
        derivative=lambda d, y, a, b: (
            _half_at_ties(d, a.to("gt", b), a, b),
            _half_at_ties(d, b.to("gt", a), b, a),
        ),
    ),
    Scalar("clamp", 3, _clamp, flops=2, selects=True, derivative=_clamp_derivative),
    Scalar("eq", 2, torch.eq, result="bool", exact=True, commutes=True),
    Scalar("ne", 2, torch.ne, result="bool", exact=True, commutes=True),
    Scalar("lt", 2, torch.lt, result="bool", exact=True),
    Scalar("le", 2, torch.le, result="bool", exact=True),
    Scalar("gt", 2, torch.gt, result="bool", exact=True),
    Scalar("ge", 2, torch.ge, result="bool", exact=True),
    Scalar(
        "where",
        3,
        _where,
        selects=True,
        chooses=True,
        derivative=lambda d, y, c, a, b: (None, c.to("where", d, 0.0), c.to("where", 0.0, d)),
    ),
)


def _rounding(dtype: DType) -> Scalar:
    """The rounding by a store and a load, as an explicit function of the stored value.

    float64 is not rounded, since the oracle compares a Program with its block in float64.
    """

    def evaluate(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(dtype.torch).to(x.dtype)

    name = f"rounded_{dtype.name}"
    return Scalar(name, 1, evaluate, exact=True, rounds_to=dtype, derivative=lambda d, y, a: (d,))


def cast_to(dtype: DType) -> str:
    """The name of the function that rounds as a cast to a float type does."""
    return f"cast_{dtype.name}"


def _cast(dtype: DType) -> Scalar:
    """The rounding by a cast that the user wrote, if the result is then read in a wider type.

    Its cotangent is rounded in the same way, as in torch.
    """

    def evaluate(x: Tensor) -> Tensor:
        return x.to(dtype.torch).to(x.dtype)

    name = cast_to(dtype)
    return Scalar(
        name,
        1,
        evaluate,
        exact=True,
        rounds_to=dtype,
        written=True,
        derivative=lambda d, y, a: (d.to(name),),
    )


_ROUNDINGS = tuple(_rounding(d) for d in (bf16, f16, e4m3, e5m2))
_CASTS = tuple(_cast(d) for d in (bf16, f16, f32, e4m3, e5m2))
SCALARS: dict[str, Scalar] = {row.name: row for row in (*_ROWS, *_ROUNDINGS, *_CASTS)}


def _named(is_it: Callable[[Scalar], bool]) -> str:
    """The name of the only row for which `is_it` holds."""
    (found,) = (row.name for row in _ROWS if is_it(row))
    return found


# The functions from which passes build expressions.
SUM = _named(lambda row: row.signs == (1, 1))
DIFFERENCE = _named(lambda row: row.signs == (1, -1))
NEGATION = _named(lambda row: row.is_negation)
PRODUCT = _named(lambda row: row.is_product)
SQUARE = _named(lambda row: row.powers == (2,))
CHOICE = _named(lambda row: row.chooses)
AT_MOST = _named(lambda row: row.evaluate is torch.le)
