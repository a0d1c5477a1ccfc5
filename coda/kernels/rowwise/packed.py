"""Expressions of two neighbouring elements -> lines of source, for packed float32 arithmetic.

One instruction of a Blackwell GPU adds or multiplies two pairs of float32. So a value is a pair
(quack's `F2`), of elements 2j and 2j + 1 of a vector; what is the same for both is computed once:

    v0 = s0 + 1e-05
    v1 = rsqrt(v0)
    v2 = two(x_v, 2 * j, 1) * both(v1)
    put(out_v, 2 * j, 1, v2)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coda.kernels.lines import Lines
from coda.lowering.program.epilogue import Call, Expr, Literal


@dataclass
class LinesOfTwo(Lines):
    """Assignments that compute expressions of two elements.

    Attributes:
        varies: whether the two elements have different values of a leaf.
        known: the same of an expression.
        paired: whether values are pairs, in the expression that is being written.
    """

    varies: Callable[[Expr], bool] = lambda leaf: True
    known: dict[Expr, bool] = field(default_factory=dict)
    paired: bool = True

    def differ(self, expr: Expr) -> bool:
        """Whether the two elements have different values of an expression."""
        if expr not in self.known:
            called = isinstance(expr, Call)
            found = any(map(self.differ, expr.args)) if called else self.varies(expr)
            self.known[expr] = found
        return self.known[expr]

    def name(self, expr: Expr) -> str:
        """The text of an expression's value: a pair, but in what is the same for both elements."""
        text = super().name(expr)
        same = isinstance(expr, Literal) or self.differ(expr) or not self.paired
        return text if same else f"both({text})"

    def call(self, call: Call) -> str:
        """The right side of one assignment."""
        self.paired = self.differ(call)
        found = super().call(call)
        self.paired = True
        return found


class Elements:
    """Reads and writes of the elements of a vector in registers, one or two at once.

    Attributes:
        each: the elements at once.
        rows: the functions of kernels/rowwise/math.py that are called.
    """

    each: int
    rows: set[str]

    def element(self, registers: str, lane: int = 0, lanes: int = 1) -> str:
        """The text of value `j` of registers with `lanes` values at a point; or 2j and 2j + 1."""
        if self.each == 1:
            return f"{registers}[{place_of(lane, lanes)}]"
        self.rows.add("two")
        return f"two({registers}, {place_of(lane, lanes, 2)}, {lanes})"

    def assign(
        self, registers: str, value: str, lane: int = 0, lanes: int = 1, *, start: str = ""
    ) -> str:
        """The line that assigns what `element` reads, `start` after it."""
        if self.each == 1:
            return f"{registers}[{start}{place_of(lane, lanes)}] = {value}"
        self.rows.add("put")
        return f"put({registers}, {start}{place_of(lane, lanes, 2)}, {lanes}, {value})"

    def added(self, registers: str, value: str, lane: int, lanes: int) -> str:
        """The line that adds to what `element` reads."""
        if self.each == 1:
            self.rows.add("add_to")
            return f"add_to({registers}, {place_of(lane, lanes)}, {value})"
        self.rows.add("add_two")
        return f"add_two({registers}, {place_of(lane, lanes, 2)}, {lanes}, {value})"


def place_of(lane: int, lanes: int, each: int = 1) -> str:
    """The text of the place of point `j`, or of point 2j if `each` is 2, of `lanes` values each."""
    found = f"{each * lanes} * j" if each * lanes > 1 else "j"
    return f"{found} + {lane}" if lane else found
