"""Rows at a distance, and tests of a row's index -> lines of source that a row begins with.

A token shift reads the row before, of the same sequence of S tokens. S is passed by the launch:

    number_of_inside0 = row % number_of_size0 >= 1
    number_of_row0 = cutlass.select_(number_of_inside0, row - 1, row)

Where there is no such row, the row itself is read, and 0 is used in its place.
"""

from __future__ import annotations

from coda.ir.dims import Dim
from coda.kernels.lines import NUMBER
from coda.kernels.rowwise.plan import TALL_ROWS, RowPlan, summed_within, sums_whole
from coda.lowering.program.access import RowStep, Shifted
from coda.lowering.program.epilogue import Between, Epilogue

SEQUENCE = NUMBER + "sequence"


class OtherRows:
    """The source of what a row knows of its place among the rows.

    Attributes:
        epilogue, plan: the kernel's.
        tests: the tests of the row, in the order of their variables.
        sizes: dim that only a call knows -> the parameter of the kernel that has its size.
        chunks: the CTAs that share the columns of a sequence, in a kernel that sums whole ones.
    """

    epilogue: Epilogue
    plan: RowPlan
    tests: list[Between]
    sizes: dict[Dim, str]
    chunks: int

    @property
    def distances(self) -> list[tuple[RowStep, ...]]:
        """The distinct distances at which rows are read, in the order of their variables."""
        return list(dict.fromkeys(a.steps for a in self.epilogue.shifted.values()))

    def other_row(self, access: Shifted) -> tuple[str, str]:
        """The variables of the row that is read, and of whether it is there."""
        number = self.distances.index(access.steps)
        return f"{NUMBER}row{number}", f"{NUMBER}inside{number}"

    def rows_lines(self) -> list[str]:
        """Lines that compute the rows that are read, and the tests of the row."""
        lines: list[str] = []
        for i, steps in enumerate(self.distances):
            inside = " & ".join(self.is_there(step) for step in steps)
            away = "".join(f" - {self.distance(step)}" for step in steps)
            lines += [
                f"{NUMBER}inside{i} = {inside}",
                f"{NUMBER}row{i} = cutlass.select_({NUMBER}inside{i}, row{away}, row)",
            ]
        for i, test in enumerate(self.tests):
            index = self.index_along(test.size, test.inner)
            first, end = self.size_of(test.first), self.size_of(test.end)
            lines.append(f"{NUMBER}test{i} = ({index} >= {first}) & ({index} < {end})")
        return lines

    def is_there(self, step: RowStep) -> str:
        """The test whether there is a row at a distance along an axis."""
        index, by = self.index_along(step.size, step.inner), self.size_of(step.by)
        return f"({index} >= {by}) & ({index} - {by} < {self.size_of(step.size)})"

    def index_along(self, size: Dim, inner: Dim) -> str:
        """The text of the row's index along an axis."""
        row = "row" if inner.constant == 1 else f"row // {self.size_of(inner)}"
        return f"{row} % {self.size_of(size)}"

    def distance(self, step: RowStep) -> str:
        """The text of the distance of a step in rows."""
        by = self.size_of(step.by)
        return by if step.inner.constant == 1 else f"{by} * {self.size_of(step.inner)}"

    # Blocks of rows that are summed: of each sequence alone, if a sum is of one.

    def blocks_of(self, rows: int) -> str:
        """The text of the number of CTAs of so many rows."""
        within = summed_within(self.epilogue)
        if within is None:
            return f"cute.ceil_div(rows, {rows})"
        if sums_whole(self.epilogue):
            return f"rows // {self.size_of(within)} * {self.chunks}"
        return f"rows // {self.size_of(within)} * cute.ceil_div({self.size_of(within)}, {rows})"

    def sequence_lines(self) -> list[str]:
        """Lines that find the sequence of a block, and its place there."""
        within = summed_within(self.epilogue)
        if within is None:
            return []
        if sums_whole(self.epilogue):
            return [
                f"{SEQUENCE} = block // {self.chunks}",
                f"{SEQUENCE}_end = ({SEQUENCE} + 1) * {self.size_of(within)}",
            ]
        blocks = f"cute.ceil_div({self.size_of(within)}, {TALL_ROWS})"
        return [
            f"{SEQUENCE} = block // {blocks}",
            f"{SEQUENCE}_block = block % {blocks}",
            f"{SEQUENCE}_end = ({SEQUENCE} + 1) * {self.size_of(within)}",
        ]

    @property
    def first(self) -> str:
        """The text of the first row of a block."""
        within = summed_within(self.epilogue)
        if within is None:
            return f"block * {TALL_ROWS}"
        if sums_whole(self.epilogue):
            return f"{SEQUENCE} * {self.size_of(within)}"
        return f"{SEQUENCE} * {self.size_of(within)} + {SEQUENCE}_block * {TALL_ROWS}"

    @property
    def end(self) -> str:
        """The text of the row after the last one of which a block may have rows."""
        return "rows" if summed_within(self.epilogue) is None else f"{SEQUENCE}_end"

    def part(self, side: str) -> str:
        """The line that numbers the partial of a block: those of one sequence are far apart."""
        within, sides = summed_within(self.epilogue), self.plan.rows
        if within is None:
            return f"part = block * {sides} + {side}"
        number = f"({SEQUENCE}_block * {sides} + {side})"
        return f"part = {number} * (rows // {self.size_of(within)}) + {SEQUENCE}"

    def size_of(self, dim: Dim) -> str:
        """The text of a size: a number, or a parameter of the kernel."""
        number = dim.constant
        if number is None:
            return self.sizes.setdefault(dim, f"{NUMBER}size{len(self.sizes)}")
        return str(number) if number >= 0 else f"({number})"
