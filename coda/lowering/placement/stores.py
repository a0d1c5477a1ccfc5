"""Nodes that a kernel stores -> the matrices (buffers) that hold them.

Values that are adjacent in a GEMM's columns share one matrix. It is as wide as the GEMM; the other
columns are stored as in the accumulator (acc). In a GEMM with the columns of q, k and v:

    store q, k  ->  [q k acc]             store q, v  ->  [q acc acc], [acc acc v]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from coda.ir.graph import Node, Pick, Reduce
from coda.ir.types import DType
from coda.lowering.placement.columns import Space
from coda.lowering.placement.values import Value
from coda.lowering.program.epilogue import Acc, RowOrder


@dataclass(frozen=True)
class Store:
    """The values of some nodes, to be stored into one buffer, concatenated along the columns.

    `rows` is the order of the buffer's rows; None for the kernel's own.
    """

    buffer: str
    dtype: DType
    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    rows: RowOrder | None = None


@dataclass(frozen=True)
class Reduced:
    """A value to be reduced over its columns; `buffer` is the name of the partials."""

    node: Reduce
    buffer: str
    value: Value


@dataclass(frozen=True)
class Picked:
    """A value of which each row's element at the operand named `index` is to be written."""

    node: Pick
    buffer: str
    value: Value
    index: str


@dataclass(frozen=True)
class Summed:
    """A value to be summed over the rows; `buffer` is the name of the partials."""

    node: Reduce
    buffer: str
    value: Value


Sink = Reduced | Picked | Summed


@dataclass
class Group:
    """The nodes of one stored matrix, in column order.

    Attributes:
        nodes, values: the nodes and their values, concatenated along the columns.
        first: the accumulator column of the first; -1 for one value per column pair, and in a
            row-wise kernel.
        end: the column after the last, or -1.
    """

    nodes: list[Node]
    values: list[Value]
    first: int
    end: int

    @property
    def count(self) -> int:
        """The total number of columns of the values."""
        return sum(v.count for v in self.values)

    @property
    def narrow(self) -> bool:
        """Whether some value is constant along the columns."""
        return any(v.narrow for v in self.values)

    def width(self, space: Space) -> int:
        """The number of columns of the matrix: the accumulator's, or that of the values."""
        return space.width if self.first >= 0 else self.count

    def store(self, space: Space, buffer: str, dtype: DType) -> Store:
        """The Store into `buffer`, filled up with accumulator columns to the matrix's width."""
        values, width, first = list(self.values), self.width(space), max(self.first, 0)
        if not space.whole_rows and width == space.width and self.count < width:
            rest = first + self.count
            if first:
                values.insert(0, space.at((first,), Acc(0), np.arange(first)))
            if rest < width:
                values.append(space.at((width - rest,), Acc(0), np.arange(rest, width)))
        return Store(buffer, dtype, tuple(self.nodes), tuple(values), space.order_of(self.nodes[0]))


def grouped(space: Space, stored: Sequence[Node], alone: Collection[Node]) -> list[Group]:
    """The matrices for `stored` nodes; each node of `alone` has a matrix of its own.

    Raises Refused for a node that the kernel cannot compute.
    """
    groups: list[Group] = []
    values = {
        n: space.compute(space.reordered[n][0] if n in space.reordered else n) for n in stored
    }
    alone = {*alone, *space.reordered}
    starts = {n: -1 if space.whole_rows else v.accumulator_column for n, v in values.items()}
    for node in sorted(stored, key=lambda n: starts[n]):
        value, start = values[node], starts[node]
        for group in groups:
            first = group.nodes[0]
            same = first.dtype == node.dtype and first not in alone and node not in alone
            if same and start >= 0 and group.end == start:
                group.nodes.append(node)
                group.values.append(value)
                group.end += value.count
                break
        else:
            end = start + value.count if start >= 0 else -1
            groups.append(Group([node], [value], start, end))
    return groups
