"""What is 0 outside the matrix: tiles at its edges are computed whole, and sums take them whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from coda.ir.scalars import SCALARS
from coda.lowering.program.access import Access, Line, Partial
from coda.lowering.program.epilogue import Acc, Call, Expr, Literal, Load, Operand, calls

FINITE = (0.0, 1.0, -1.0, 1e4, -1e4)  # what stands for a number that is finite, else unknown


def vanishes(expr: Expr, kinds: Mapping[str, Operand], *, rows: bool = False) -> bool:
    """Whether an expression is surely 0 in columns outside the matrix, or with `rows` in rows.

    There the accumulator is 0, and so is every operand that varies with the column (the row).
    Vectors along the columns (gains, biases) are taken as finite in the rows outside: the sum over
    the rows of a column whose gain is infinite is infinite or NaN in any case.
    """
    known = _Outside(kinds, rows)
    for call in calls([expr]):
        known.value(call)
    return known.value(expr) == (0.0,)


@dataclass
class _Outside:
    """What expressions may be outside the matrix: in columns, or with `rows` in rows.

    A value is the numbers that stand for it: one number, `FINITE` ones, or none where nothing is
    known: 0 times such a value is NaN where it is infinite. Each expression is looked at once,
    after its arguments.
    """

    kinds: Mapping[str, Operand]
    rows: bool
    known: dict[Call, tuple[float, ...]] = field(default_factory=dict)

    def value(self, expr: Expr) -> tuple[float, ...]:
        """The numbers, in float32, that stand for an expression there."""
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
        return ()

    def loaded(self, access: Access) -> tuple[float, ...]:
        """The numbers that stand for a load."""
        if isinstance(access, Line | Partial):
            return ()
        if access.varies_with_row if self.rows else access.varies_with_column:
            return (0.0,)
        return FINITE if self.rows and access.varies_with_column else ()

    def computed(self, call: Call) -> tuple[float, ...]:
        """The numbers that stand for a function of its arguments."""
        row, args = SCALARS[call.fn], [self.value(a) for a in call.args]
        if all(args):
            every = itertools.product(*(map(torch.tensor, a) for a in args))
            found = {float(row.evaluate(*numbers)) for numbers in every}
            if len(found) == 1:
                return tuple(found)
            return FINITE if all(map(math.isfinite, found)) else ()
        return args[1] if row.chooses and len(args[1]) == 1 and args[1] == args[2] else ()
