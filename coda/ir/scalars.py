"""Scalar functions: one row each, with every fact that coda knows of it.

A row is all that a new function needs: the reference backend, the text form, the cost model, the
derivative's source and the generated CuTe DSL all read this table, and no pass knows a name in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scalar:
    """A function of scalars.

    Attributes:
        name: how it is written in the text form.
        arity: number of arguments.
        evaluate: its meaning on torch tensors of any float dtype.
        flops: cost of one application, in units of one fused multiply-add.
        special: applications of the special-function unit (MUFU) among them.
        result: "float" keeps the promoted type of the arguments, "bool" is a predicate.
        zero: whether f(0, ..., 0) = 0, which makes padding lanes harmless in a sum.
        commutes: whether the two arguments may be exchanged.
    """

    name: str
    arity: int
    evaluate: Callable[..., Tensor]
    flops: int = 1
    special: int = 0
    result: str = "float"
    zero: bool = False
    commutes: bool = False


def _where(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


def _pow(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b)


_ROWS = (
    Scalar("add", 2, torch.add, zero=True, commutes=True),
    Scalar("sub", 2, torch.sub, zero=True),
    Scalar("mul", 2, torch.mul, zero=True, commutes=True),
    Scalar("div", 2, torch.div, flops=2, special=1),
    Scalar("pow", 2, _pow, flops=4, special=2),
    Scalar("neg", 1, torch.neg, zero=True),
    Scalar("abs", 1, torch.abs, zero=True),
    Scalar("square", 1, torch.square, zero=True),
    Scalar("recip", 1, torch.reciprocal, flops=2, special=1),
    Scalar("exp", 1, torch.exp, flops=2, special=1),
    Scalar("exp2", 1, torch.exp2, flops=1, special=1),
    Scalar("log", 1, torch.log, flops=2, special=1),
    Scalar("sqrt", 1, torch.sqrt, flops=2, special=1, zero=True),
    Scalar("rsqrt", 1, torch.rsqrt, flops=2, special=1),
    Scalar("tanh", 1, torch.tanh, flops=2, special=1, zero=True),
    Scalar("sigmoid", 1, torch.sigmoid, flops=3, special=2),
    Scalar("erf", 1, torch.erf, flops=10, special=1, zero=True),
    Scalar("sin", 1, torch.sin, flops=4, special=1, zero=True),
    Scalar("cos", 1, torch.cos, flops=4, special=1),
    Scalar("maximum", 2, torch.maximum, zero=True, commutes=True),
    Scalar("minimum", 2, torch.minimum, zero=True, commutes=True),
    Scalar("eq", 2, torch.eq, result="bool", commutes=True),
    Scalar("ne", 2, torch.ne, result="bool", commutes=True),
    Scalar("lt", 2, torch.lt, result="bool"),
    Scalar("le", 2, torch.le, result="bool"),
    Scalar("gt", 2, torch.gt, result="bool"),
    Scalar("ge", 2, torch.ge, result="bool"),
    Scalar("where", 3, _where, zero=True),
)

SCALARS: dict[str, Scalar] = {row.name: row for row in _ROWS}
