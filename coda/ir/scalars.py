"""The table of scalar functions, one row each: reference, derivative, cost and device code.

A new function needs a row and nothing else: the reference backend, the text form, the cost model,
the derivative and the generated CuTe DSL read this table, and no pass matches on a name in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from coda.ir.scalar import Cotangents, Scalar, Term
from coda.ir.scalars_of_torch import ROWS
from coda.ir.types import DType, bf16, e4m3, e5m2, f16, f32


def _floordiv(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="floor")


def _where(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


def _pow(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b)


def _pair(a: Tensor, b: Tensor) -> Tensor:
    """Two numbers at each element, which a fold reads together; in torch as one complex number."""
    kind = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.complex(a.to(kind), b.to(kind))


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


def _over_squares(a: Term, b: Term) -> Term:
    """1 / (a² + b²), 0 where both are 0."""
    squares = a.to("square") + b.to("square")
    return squares.to("eq", 0.0).to("where", 0.0, squares.to("recip"))


_WORD = 0xFFFFFFFF


def _random(seed: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """A number in [0, 1), a multiple of 2⁻²⁴, for each row and column: a hash of the three.

    It is pcg3d of Jarzynski and Olano, "Hash Functions for GPU Rendering", JCGT 9 (3), 2020, on
    words of 32 bits: the bits of the seed in float32, and row and column as whole numbers. The
    upper 24 bits of the third word are the result. Numbers are first rounded to float32, as a
    kernel has them; row and column saturate, and NaN is 0.
    """
    bits = seed.float().nan_to_num(0.0, math.inf, -math.inf).view(torch.int32).long()
    numbers = [n.float().double().nan_to_num(0.0).clamp(0, _WORD).long() for n in (row, column)]
    x, y, z = (_word(w * 1664525 + 1013904223) for w in (bits, *numbers))
    for shift in (16, 32):  # the last words are not shifted
        x = _word(x + y * z)
        y = _word(y + z * x)
        z = _word(z + x * y)
        x, y, z = (torch.bitwise_xor(w, w >> shift) for w in (x, y, z))
    return (z >> 8).to(seed.dtype) * 2.0**-24


def _word(x: Tensor) -> Tensor:
    """The low 32 bits."""
    return torch.bitwise_and(x, _WORD)


_ROWS = (
    Scalar(
        "add",
        2,
        torch.add,
        of_ints=True,
        signs=(1, 1),
        device="+",
        commutes=True,
        derivative=lambda d, y, a, b: (d, d),
    ),
    Scalar(
        "sub",
        2,
        torch.sub,
        of_ints=True,
        signs=(1, -1),
        device="-",
        derivative=lambda d, y, a, b: (d, -d),
    ),
    Scalar(
        "mul",
        2,
        torch.mul,
        of_ints=True,
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
        "floordiv",
        2,
        _floordiv,
        of_ints=True,
        of_floats=False,
        quotient=True,
        flops=3,
        special=1,
        exact=True,
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
        of_ints=True,
        signs=(-1,),
        device="-",
        exact=True,
        derivative=lambda d, y, a: (-d,),
    ),
    Scalar(
        "abs",
        1,
        torch.abs,
        of_ints=True,
        device="absolute",
        exact=True,
        derivative=lambda d, y, a: (
            a.to("gt", 0.0).to("where", d, a.to("lt", 0.0).to("where", -d, d * 0.0)),
        ),
    ),
    Scalar(
        "square",
        1,
        torch.square,
        of_ints=True,
        powers=(2,),
        derivative=lambda d, y, a: (d * a * 2.0,),
    ),
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
        "erfc",
        1,
        torch.erfc,
        flops=16,
        special=2,
        derivative=lambda d, y, a: (
            d * ((-a.to("square")).to("exp") * (-2.0 / math.sqrt(math.pi))),
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
        "atan2",
        2,
        torch.atan2,
        flops=16,
        special=2,
        derivative=lambda d, y, a, b: (d * b * _over_squares(a, b), -(d * a * _over_squares(a, b))),
    ),
    *(
        Scalar(name, 1, evaluate, device=device, exact=True, derivative=lambda d, y, a: (None,))
        for name, evaluate, device in (
            ("floor", torch.floor, ""),
            ("ceil", torch.ceil, ""),
            ("trunc", torch.trunc, "truncated"),
            ("round", torch.round, "nearest"),
        )
    ),
    Scalar(
        "random",
        3,
        _random,
        flops=24,
        exact=True,
        derivative=lambda d, y, seed, row, column: (None, None, None),
    ),
    Scalar(
        "stop_gradient",
        1,
        torch.Tensor.detach,
        flops=0,
        of_ints=True,
        exact=True,
        stops=True,
        derivative=lambda d, y, a: (None,),
    ),
    Scalar(
        "maximum",
        2,
        torch.maximum,
        of_ints=True,
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
        of_ints=True,
        commutes=True,
        selects=True,
        derivative=lambda d, y, a, b: (
            _half_at_ties(d, a.to("gt", b), a, b),
            _half_at_ties(d, b.to("gt", a), b, a),
        ),
    ),
    Scalar("clamp", 3, _clamp, of_ints=True, flops=2, selects=True, derivative=_clamp_derivative),
    Scalar("eq", 2, torch.eq, of_ints=True, result="bool", exact=True, commutes=True),
    Scalar("ne", 2, torch.ne, of_ints=True, result="bool", exact=True, commutes=True),
    Scalar("lt", 2, torch.lt, of_ints=True, result="bool", exact=True),
    Scalar("le", 2, torch.le, of_ints=True, result="bool", exact=True),
    Scalar("gt", 2, torch.gt, of_ints=True, result="bool", exact=True),
    Scalar("ge", 2, torch.ge, of_ints=True, result="bool", exact=True),
    Scalar(
        "where",
        3,
        _where,
        of_ints=True,
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
_PAIR = Scalar("pair", 2, _pair, flops=0, result="pair", exact=True)
SCALARS: dict[str, Scalar] = {row.name: row for row in (*_ROWS, *ROWS, *_ROUNDINGS, *_CASTS, _PAIR)}


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
PAIR = _PAIR.name
