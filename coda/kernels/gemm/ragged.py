"""Epilogue expressions -> whether they are 0 in the padding of edge tiles.

Tiles at the edges of the matrix are computed whole, and a sum over a tile includes its padding. The
sum needs a mask unless its expression is 0 there.

    acc · gain[column]    0 · 0 = 0     no mask
    exp(acc)              e^0 = 1       masked
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SCALARS
from coda.lowering.program.access import Access, Line, Partial
from coda.lowering.program.epilogue import (
    Acc,
    Call,
    Expr,
    Literal,
    Load,
    Operand,
    SinkExpr,
    SumRows,
    calls,
)

FINITE = (0.0, 1.0, -1.0, 1e4, -1e4)  # sample values of a finite number that is not known


def is_sum(sink: SinkExpr) -> bool:
    """Whether a sink is a sum, so that 0 is its identity."""
    return sink.monoid in MONOIDS and MONOIDS[sink.monoid].sums


def needs_mask(sink: SinkExpr, expr: Expr, kinds: Mapping[str, Operand]) -> bool:
    """Whether a sink's value needs a mask in padding columns (of a sum over rows: padding rows)."""
    return is_sum(sink) and not vanishes(expr, kinds, rows=isinstance(sink, SumRows))


def vanishes(expr: Expr, kinds: Mapping[str, Operand], *, rows: bool = False) -> bool:
    """Whether an expression is always 0 in padding columns, or with `rows` in padding rows.

    There the accumulator is 0, and so is every operand that varies with the column (the row).
    Row vectors (gains, biases) are assumed finite in padding rows: if a gain is infinite, the sum
    over its column is infinite or NaN in any case.
    """
    known = _Outside(kinds, rows)
    for call in calls([expr]):
        known.value(call)
    return known.value(expr) == (0.0,)


@dataclass
class _Outside:
    """The possible values of expressions in padding columns, or with `rows` in padding rows.

    A value is represented by sample numbers: one if it is known, `FINITE` if it is known to be
    finite, none if it may be infinite (then 0 times it may be NaN). Each expression is evaluated
    once, after its arguments.
    """

    kinds: Mapping[str, Operand]
    rows: bool
    known: dict[Call, tuple[float, ...]] = field(default_factory=dict)

    def value(self, expr: Expr) -> tuple[float, ...]:
        """The sample numbers, in float32, of an expression in the padding."""
        match expr:
            case Acc():
                return (0.0,)
            case Load(operand=name):
                return self.loaded(self.kinds[name].access)
            case Literal(value=value):
                return (value,)
            case Call():
                if expr not in self.known:
                    self.known[expr] = self.computed(expr)
                return self.known[expr]
        return ()  # also of a position, which is finite, but may be any number

    def loaded(self, access: Access) -> tuple[float, ...]:
        """The sample numbers of a load."""
        if isinstance(access, Line | Partial):
            return ()
        if access.varies_with_row if self.rows else access.varies_with_column:
            return (0.0,)
        return FINITE if self.rows and access.varies_with_column else ()

    def computed(self, call: Call) -> tuple[float, ...]:
        """The sample numbers of a call, from those of its arguments."""
        row, args = SCALARS[call.fn], [self.value(a) for a in call.args]
        if all(args):
            every = itertools.product(*(map(torch.tensor, a) for a in args))
            found = {float(row.evaluate(*numbers)) for numbers in every}
            if len(found) == 1:
                return tuple(found)
            return FINITE if all(map(math.isfinite, found)) else ()
        return args[1] if row.chooses and len(args[1]) == 1 and args[1] == args[2] else ()
