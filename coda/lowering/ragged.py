"""What is 0 outside the matrix: tiles at its edges are computed whole, and sums take them whole."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from coda.ir.scalars import SCALARS
from coda.lowering.epilogue import Acc, Call, Expr, Literal, Load, Operand, calls

COLUMNS = ("row", "tile", "periodic")
ROWS = ("col", "tile", "periodic")


def vanishes(expr: Expr, kinds: dict[str, Operand], zero: tuple[str, ...] = COLUMNS) -> bool:
    """Whether an expression is surely 0 in columns outside the matrix (or in `ROWS` outside).

    There the accumulator and everything that varies along the columns is 0, but vectors along the
    rows are not. `zero` tells the kinds of operands that are 0.
    """
    known = _Outside(kinds, zero)
    for call in calls([expr]):
        known.value(call)
    return known.value(expr) == 0.0


@dataclass
class _Outside:
    """The numbers that expressions are where operands of some kinds are 0.

    An expression that also reads other operands has no such number: 0 times one of them is NaN
    where it is infinite. Each expression is looked at once, after its arguments.
    """

    kinds: dict[str, Operand]
    zero: tuple[str, ...]
    known: dict[Call, float | None] = field(default_factory=dict)

    def value(self, expr: Expr) -> float | None:
        """The number that an expression is there, in float32; None where it is not known."""
        match expr:
            case Acc():
                return 0.0
            case Load(operand=name):
                return 0.0 if self.kinds[name].kind in self.zero else None
            case Literal(value=value):
                return value
            case Call():
                if expr not in self.known:
                    self.known[expr] = self.computed(expr)
                return self.known[expr]
        return None

    def computed(self, call: Call) -> float | None:
        """The number that a function is of its arguments."""
        row, args = SCALARS[call.fn], [self.value(a) for a in call.args]
        numbers = [torch.tensor(a) for a in args if a is not None]
        if len(numbers) == len(args):
            return float(row.evaluate(*numbers))
        return args[1] if row.chooses and args[1] == args[2] else None
