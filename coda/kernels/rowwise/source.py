"""`RowSource`: the emitted module of a row-wise kernel, and the layouts of its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from coda.ir.dims import Dim

CUT = -2  # in place of a parameter's number of columns


@dataclass(frozen=True)
class RowSource:
    """An emitted module.

    Attributes:
        text: the Python source; `launch` is its host function.
        name: the module's name, with a hash of the text.
        parameters: (emitted name, operand or buffer, columns, whether it is written), in order.
            Columns are 0 for partial sums over rows, transposed, with any number of partials,
            -1 for lines of values of rows, contiguous, of any length, and CUT for one column of a
            wider matrix.
        types: coda's name of each parameter's dtype; "byte" for one that is stored as uint8.
        partials: the buffers of sums over rows, which have a row for each partial.
        padded: matrices whose rows begin at multiples of 16 bytes, whatever their width.
        axes: (operand or buffer, axes of its rows) of results whose rows are in another order, and
            of operands that are equal in some rows. They are passed with an axis for each, inner to
            outer, and strides of their own; those of what is equal along an axis are 0.
        sizes: the dims whose sizes a launch passes after the number of rows.
    """

    text: str
    name: str
    parameters: tuple[tuple[str, str, int, bool], ...]
    types: tuple[str, ...]
    partials: tuple[str, ...]
    padded: tuple[str, ...] = ()
    axes: tuple[tuple[str, int], ...] = ()
    sizes: tuple[Dim, ...] = ()
