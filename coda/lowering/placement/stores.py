"""Nodes that a kernel writes -> the matrices that it writes them into.

Values that lie side by side in the columns of a GEMM are one matrix; columns of it that nobody
asked for are written as the accumulator has them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from coda.ir.graph import Node
from coda.ir.types import DType
from coda.lowering.placement.columns import Space
from coda.lowering.placement.layout import Store
from coda.lowering.placement.values import Value
from coda.lowering.program.epilogue import Acc


@dataclass
class Group:
    """The nodes of one matrix, from the left to the right.

    Attributes:
        nodes, values: what it holds.
        first: the accumulator's column at which it begins; -1 where it has one value per pair, or
            is written by a row-wise kernel.
        end: the column after its last, or -1.
    """

    nodes: list[Node]
    values: list[Value]
    first: int
    end: int

    @property
    def count(self) -> int:
        """The number of columns of its values."""
        return sum(v.count for v in self.values)

    @property
    def narrow(self) -> bool:
        """Whether it has values that are the same for all columns."""
        return any(v.narrow for v in self.values)

    def width(self, space: Space) -> int:
        """The number of columns of its matrix: all of the accumulator's, or its own."""
        return space.width if self.first >= 0 else self.count

    def store(self, space: Space, buffer: str, dtype: DType) -> Store:
        """What is written into its buffer."""
        values, width, first = list(self.values), self.width(space), max(self.first, 0)
        if not space.whole_rows and width == space.width and self.count < width:
            rest = first + self.count
            if first:
                values.insert(0, space.at((first,), Acc(0), np.arange(first)))
            if rest < width:
                values.append(space.at((width - rest,), Acc(0), np.arange(rest, width)))
        return Store(buffer, dtype, tuple(self.nodes), tuple(values))


def grouped(space: Space, stored: Sequence[Node], alone: Collection[Node]) -> list[Group]:
    """The matrices that a kernel writes for `stored` nodes; those of `alone` have one each."""
    groups: list[Group] = []
    values = {n: space.compute(n) for n in stored}
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
