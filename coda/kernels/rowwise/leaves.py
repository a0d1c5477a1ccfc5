"""Leaves of expressions -> their text at element `j` of a vector, and the lines of expressions.

Load("x")                x_v1[j]
Load("x") of a pair      x_v1[2 * j + 1]
Position("column")       number_of_column_v1[j]
Stat("s0")               s0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

from coda.kernels.lines import NUMBER, Lines, safe
from coda.kernels.rowwise.other_rows import OtherRows
from coda.kernels.rowwise.packed import Elements, LinesOfTwo
from coda.kernels.rowwise.pieces import COLUMN
from coda.lowering.program.access import (
    Alternating,
    ColumnVector,
    Grouped,
    Line,
    OneElement,
    Partial,
    Periodic,
    RowVector,
    Shifted,
    Tile,
)
from coda.lowering.program.epilogue import Between, Expr, Load, Operand, Position, Stat


class Leaves(OtherRows, Elements):
    """The source of expressions at the elements of a vector.

    Attributes:
        kinds: the kernel's operands by name.
        lanes: columns of a point.
        split: the distance of a pair's columns in the buffers; 0 if they are adjacent.
        tag: the number of the batch of vectors, at the end of names.
        vec: the columns (or pairs) of a vector.
        math: the functions of kernels/device_math.py that are called.
    """

    kinds: dict[str, Operand]
    lanes: int
    split: int
    tag: str
    vec: int
    math: set[str]

    def leaf(self, expr: Expr) -> str:
        match expr:
            case Load(operand=name, lane=lane):
                return self.load(self.kinds[name], lane)
            case Stat(name=name, plane=plane):
                return f"{name}_{plane}" if plane else name
            case Position(axis="column"):
                return self.element(f"{COLUMN}_v{self.tag}")
            case Position():
                return self.row_number(expr)
            case Between():
                return f"{NUMBER}test{self.tests.index(expr)}"
        raise AssertionError(expr)

    def row_number(self, at: Position) -> str:
        """The variable of a number of the row."""
        return f"{NUMBER}row_{at.inner}_{at.count}"

    def load(self, operand: Operand, lane: int) -> str:
        name, tag = safe(operand.name), self.tag
        match operand.access:
            case ColumnVector() | OneElement():
                return f"{name}_0"
            case Grouped():
                return f"{name}_v{tag}[0]"
            case Periodic(each=each, swaps=swaps) if each > 1 or swaps:
                return f"{name}_v{tag}[{self.moved(swaps)} // {each}]"
            case Tile(swaps=swaps) if swaps:
                return f"{name}_v{tag}[{self.moved(swaps)}]"
            case Periodic():
                return self.element(f"{name}_v{tag}")
            case Tile() if self.split:
                return self.element(f"{name}_{'ab'[lane]}{tag}")
            case RowVector() | Tile():
                return self.element(f"{name}_v{tag}", lane, self.lanes)
            case Shifted(of=of):
                return self.load(replace(operand, access=of), lane)
            case Alternating() | Line() | Partial():
                raise AssertionError(operand)
            case _ as never:
                assert_never(never)

    def moved(self, swaps: tuple[int, ...]) -> str:
        """The text of the place in its vector of what element `j` reads."""
        within = sum(d for d in swaps if d < self.vec)
        return f"(j ^ {within})" if within else "j"

    def assigned(self, exprs: Sequence[Expr], prefix: str) -> tuple[list[str], list[str]]:
        """Lines that compute expressions, and the texts of their values."""
        prefix = f"{prefix}{self.tag}_" if self.tag else prefix
        lines = Lines(self.leaf, prefix=prefix)
        if self.each == 2:
            self.rows.add("both")
            lines = LinesOfTwo(self.leaf, prefix=prefix, varies=self.varies)
        values = lines.assign(exprs)
        self.math |= lines.imported
        return lines.lines, values

    def varies(self, leaf: Expr) -> bool:
        """Whether neighbouring elements of a vector have different values of a leaf."""
        match leaf:
            case Load(operand=name):
                access = self.kinds[name].access
                access = access.of if isinstance(access, Shifted) else access
                return isinstance(access, Tile | RowVector | Periodic)
            case Position(axis=axis):
                return axis == "column"
            case _:
                return False
