"""Chains of functions of a few numbers of each row -> row-wise kernels of one column.

Small reductions in a row of few numbers (the iterations of Sinkhorn on a matrix of 4 x 4 for each
token) are computed by a kernel that has the numbers apart (`numbers_apart.py`), with what follows
from them until something is wide. They are placed before what is wide, so that one kernel of the
wide rows can load all of them:

    mix = sinkhorn(z[:, 8:]); x = pre · s; y = mix · s     rows1: mix of z     rows2: x, y of s, mix
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence

from coda.ir.dims import ONE, product
from coda.ir.graph import Node, Reduce, walk
from coda.lowering.placement.columns import Space
from coda.lowering.placement.draft import Draft
from coda.lowering.placement.reach import Reach
from coda.lowering.placement.space_state import MOST_NUMBERS

MOST_REDUCED = 8  # numbers that are reduced together


class SmallRows(Reach, ABC):
    """The placement of functions of a few numbers of each row.

    Attributes:
        small: whether there are such kernels.
    """

    small: bool

    def small_first(self, nodes: Sequence[Node]) -> list[Node]:
        """The same order, but for small reductions and what they depend on, which come first."""
        small = [n for n in nodes if self.reduces_few(n)]
        early = set(walk(small))
        return [n for n in nodes if n in early] + [n for n in nodes if n not in early]

    def reduces_few(self, node: Node) -> bool:
        """Whether a node reduces a small axis of a few numbers of each row, in several groups."""
        possible = self.small and self.rows != ONE and node not in self.weights
        if not (possible and isinstance(node, Reduce)):
            return False
        shape = node.arg.shape
        leads = [i for i in range(len(shape)) if product(shape[:i]) == self.rows]
        if not leads or -node.axis > len(shape) - leads[-1]:
            return False
        columns = product(shape[leads[-1] :])
        if any(d.symbols - self.known.keys() for d in (columns, shape[node.axis])):
            return False
        count, size = columns.size(self.known), shape[node.axis].size(self.known)
        return 1 < size <= MOST_REDUCED and size < count <= MOST_NUMBERS

    def in_small_rows(self, node: Node) -> bool:
        """Place a function of a few numbers of each row in a kernel that has them apart.

        False if it is none, or if no kernel of that kind computes it.
        """
        if not (self.reduces_few(node) or any(map(self.is_apart, node.operands))):
            return False
        last = max((self.home[o].order for o in node.operands if o in self.home), default=(0, 0))
        for draft in self.behind.get(last[0], ()):
            fits = draft.space.apart and draft.rows == self.rows and draft.order >= last
            if fits and not self.absorb(node, draft):
                return True
        self.provide(node)
        space = Space(1, self.rows, self.known, whole_rows=True, apart=True)
        draft = self.open(self.rowwise, last[0], space)
        if not self.absorb(node, draft):
            return True
        self.drop(draft)
        return False

    def is_apart(self, node: Node) -> bool:
        """Whether a node is a few numbers of each row, apart in the kernel that computes them."""
        home: Draft | None = self.home.get(node)
        value = home.space.values.get(node) if home is not None and home.space.apart else None
        return value is not None and value.count > 1
