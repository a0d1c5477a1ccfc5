"""The mainloop of a row-wise kernel: whole rows of matrices, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from coda.ir.dims import Dim
from coda.ir.graph import Node
from coda.lowering.program.kernel import Kernel, Sizes


@dataclass(frozen=True)
class Rows:
    """The points of one fused pass over rows.

    Attributes:
        rows: how many there are; a call tells their number.
        width: the columns of each.
    """

    rows: Dim
    width: int

    @property
    def operands(self) -> tuple[Node, ...]:
        """Nothing: all that is loaded is the body's."""
        return ()

    @property
    def results(self) -> tuple[str, ...]:
        """Nothing: all that is stored is the body's."""
        return ()

    def points(self, sizes: Sizes) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.size(sizes), self.width


Rowwise = Kernel[Rows]
