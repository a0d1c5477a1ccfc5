"""Scalar expressions -> lines of Python in single-assignment form; shared values appear once.

    silu(acc) · acc    ->    v0 = sigmoid(acc)
                             v1 = acc * v0
                             v2 = v1 * acc

The functions that lines call are those of `kernels/device_math.py`.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from coda.ir.scalars import CHOICE, PAIR, SCALARS
from coda.ir.types import DType
from coda.lowering.program.access import SHIFTED
from coda.lowering.program.epilogue import Call, Expr, Literal, calls

RESERVED = {"acc", "c", "D", "epilogue", "pause", "prepass", "KERNEL"}
NUMBER = "number_of_"  # how the variables of positions begin


@dataclass
class Lines:
    """Assignments that compute expressions.

    Attributes:
        leaf: the name of an accumulator, a load or a statistic.
        lines: the assignments, in order.
        imported: the names of the functions that the lines call.
        names: the variable of each expression that is assigned.
        prefix: how variable names begin.
    """

    leaf: Callable[[Expr], str]
    lines: list[str] = field(default_factory=list)
    imported: set[str] = field(default_factory=set)
    names: dict[Expr, str] = field(default_factory=dict)
    prefix: str = "v"

    def assign(self, exprs: Iterable[Expr]) -> list[str]:
        """Append the assignments that `exprs` still need; the text of each value."""
        exprs = list(exprs)
        for call in calls(exprs):
            if call not in self.names:
                text = self.call(call)
                self.names[call] = f"{self.prefix}{len(self.names)}"
                self.lines.append(f"{self.names[call]} = {text}")
        return [self.name(e) for e in exprs]

    def name(self, expr: Expr) -> str:
        """The text of an expression's value: a literal or a name."""
        if isinstance(expr, Literal):
            return number(expr.value)
        return self.names[expr] if isinstance(expr, Call) else self.leaf(expr)

    def call(self, call: Call) -> str:
        """The right side of one assignment."""
        row, args = SCALARS[call.fn], [self.name(a) for a in call.args]
        name = row.device or row.name
        if name.isidentifier():
            self.imported.add(name)
            return f"{name}({', '.join(args)})"
        numbers = [isinstance(a, Literal) for a in call.args]
        if row.commutes and numbers == [True, False]:  # a literal on the right
            args.reverse()
        return f"{args[0]} {name} {args[1]}" if len(args) > 1 else f"{name}{args[0]}"


def parts_of(expr: Expr) -> tuple[Expr, ...]:
    """The expressions of what a fold reads at an element: one, or two of a pair."""
    if not isinstance(expr, Call):
        return (expr,)
    if expr.fn == PAIR:
        return expr.args
    if expr.fn == CHOICE:
        test, *others = expr.args
        halves = zip(*map(parts_of, others), strict=True)
        return tuple(Call(CHOICE, (test, *both)) for both in halves)
    return (expr,)


def stored(value: str, dtype: DType, imported: set[str]) -> str:
    """The text of a value as it is stored: the number of its byte for a dtype stored as uint8."""
    if not dtype.by_bytes or dtype.kind != "float":
        return value
    imported.add(f"byte_{dtype.name}")
    return f"byte_{dtype.name}({value})"


def number(value: float) -> str:
    """The Python text of a float."""
    if math.isfinite(value):
        return repr(float(value))
    return f'float("{value}")'


def safe(name: str) -> str:
    """A name that is neither reserved in emitted functions nor a keyword of Python.

    That of a shifted operand, x@1, is one that no user's name becomes.
    """
    if SHIFTED in name:
        return NUMBER + name.replace(SHIFTED, "_shift")
    taken = name in RESERVED or name.startswith(NUMBER) or keyword.iskeyword(name)
    return name + "_" if taken else name
