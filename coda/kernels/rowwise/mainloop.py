"""The mainloop of a row-wise kernel: an index space of rows × columns, without an accumulator."""

from __future__ import annotations

from dataclasses import dataclass

from coda.ir.dims import Dim
from coda.ir.graph import Node
from coda.lowering.program.kernel import Kernel, Sizes


@dataclass(frozen=True)
class Rows:
    """The index space of a row-wise kernel.

    Attributes:
        rows: the number of rows, which is known in a call.
        width: the number of columns.
    """

    rows: Dim
    width: int

    @property
    def operands(self) -> tuple[Node, ...]:
        """(): all operands are the body's."""
        return ()

    @property
    def results(self) -> tuple[str, ...]:
        """(): all results are the body's."""
        return ()

    def points(self, sizes: Sizes) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows.size(sizes), self.width


Rowwise = Kernel[Rows]
