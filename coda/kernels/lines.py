"""Scalar expressions -> lines of Python: single assignments, each value computed once."""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from coda.ir.types import DType
from coda.lowering.program.epilogue import Call, Expr, Literal, calls

INFIX = {"add": "+", "sub": "-", "mul": "*"}
RENAMED = {"abs": "absolute", "pow": "power"}
RESERVED = {"acc", "c", "D", "epilogue", "pause", "prepass", "KERNEL"}


@dataclass
class Lines:
    """Assignments for expressions, in order.

    Attributes:
        leaf: what an accumulator, load or statistic is called.
        imported: names of the functions that the lines call.
    """

    leaf: Callable[[Expr], str]
    lines: list[str] = field(default_factory=list)
    imported: set[str] = field(default_factory=set)
    names: dict[Expr, str] = field(default_factory=dict)
    prefix: str = "v"

    def assign(self, exprs: Iterable[Expr]) -> list[str]:
        """Write what is missing for `exprs`; the names of their values."""
        exprs = list(exprs)
        for call in calls(exprs):
            if call not in self.names:
                text = self.call(call)
                self.names[call] = f"{self.prefix}{len(self.names)}"
                self.lines.append(f"{self.names[call]} = {text}")
        return [self.name(e) for e in exprs]

    def name(self, expr: Expr) -> str:
        """What the value of an expression is called."""
        if isinstance(expr, Literal):
            return number(expr.value)
        return self.names[expr] if isinstance(expr, Call) else self.leaf(expr)

    def call(self, call: Call) -> str:
        """The right side of one assignment."""
        args = [self.name(a) for a in call.args]
        if call.fn in INFIX:
            if isinstance(call.args[0], Literal) and not isinstance(call.args[1], Literal):
                return self.reversed(call.fn, args)
            return f"{args[0]} {INFIX[call.fn]} {args[1]}"
        if call.fn == "neg":
            return f"-{args[0]}"
        name = RENAMED.get(call.fn, call.fn)
        self.imported.add(name)
        return f"{name}({', '.join(args)})"

    def reversed(self, fn: str, args: list[str]) -> str:
        """A number on the left: on the right where the operation commutes."""
        if fn == "sub":
            return f"{args[0]} - {args[1]}"
        return f"{args[1]} {INFIX[fn]} {args[0]}"


def stored(value: str, dtype: DType, imported: set[str]) -> str:
    """A value as a kernel stores it: as the number of its byte, where it stores the type so."""
    if not dtype.by_bytes or dtype.kind != "float":
        return value
    imported.add(f"byte_{dtype.name}")
    return f"byte_{dtype.name}({value})"


def number(value: float) -> str:
    """A number as Python writes it."""
    if math.isfinite(value):
        return repr(float(value))
    return f'float("{value}")'


def safe(name: str) -> str:
    """A name that an emitted function may use."""
    return name + "_" if name in RESERVED or keyword.iskeyword(name) else name
