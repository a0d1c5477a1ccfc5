"""Operand of a node -> available in the kernel of the node: loaded, recomputed, or stored first.

A node of arguments alone has no producer until a kernel asks for it: it is recomputed there, or
gets a row-wise kernel of its own.

    rows1 computes y = silu(a) · b, a made by gemm0  ->  gemm0 stores a, rows1 computes silu again
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress

from coda.ir.dims import ONE, broadcast, product
from coda.ir.graph import Cast, Const, Contract, Input, Map, Node, Reduce, Size, walk
from coda.ir.scalars import SCALARS
from coda.lowering.algebra.roles import base, is_pointwise
from coda.lowering.placement.draft import Draft
from coda.lowering.placement.joined_rows import under_views
from coda.lowering.placement.materialise import Materialisation
from coda.lowering.placement.values import Refused


class Reach(Materialisation, ABC):
    """What makes operands available in a kernel."""

    @abstractmethod
    def place(self, node: Node) -> None:
        """Choose the producer kernel of a node."""

    def reach_all(self, node: Node, draft: Draft, *, whole: bool = False) -> None:
        """Make the operands of a node available in a kernel, each at its columns."""
        if self.joins(node):
            for operand in self.read_by(node):
                self.reach_rows(operand, draft)
            return
        with suppress(Refused):  # an operand of [B, 1] is asked for by a node of rows [B, S]
            draft.space.split(node)
        for operand, segment in draft.space.parts(node):
            with draft.space.inside(segment):
                self.reach(operand, draft, whole=whole)

    def reach(self, operand: Node, draft: Draft, *, whole: bool = False) -> None:
        """Make an operand available in a kernel: loaded, recomputed, or stored by its producer.

        A node without a producer that cannot be recomputed here gets a row-wise kernel, `whole`:
        with all operations below it. Raises Refused.
        """
        self.settle(operand, draft)
        home = self.home.get(operand)
        known = home is draft or isinstance(operand, Const | Size) or operand in self.positions
        known = known or operand in draft.space.values
        if known or self.leaf(operand, draft) is not None:
            return
        again = is_pointwise(operand)
        if home is None and self.has_fewer_rows(operand, draft):
            self.materialise(operand)
            home = self.home.get(operand)
            if self.leaf(operand, draft) is not None:
                return
        try:
            if home is None:
                self.reach_all(operand, draft, whole=whole or not again)
            draft.space.compute(operand)
        except Refused:
            if home is None and (again or whole):
                raise
            if home is None:
                self.in_rows(operand, 0)
            self.offer_narrow(operand, draft)

    def precede(self, nodes: Iterable[Node], draft: Draft) -> bool:
        """Whether a kernel, or kernels before it, compute all contractions that nodes depend on."""
        needed = [n for n in walk(nodes) if isinstance(n, Contract) and n not in self.weights]
        return all(n in self.home and self.home[n].order <= draft.order for n in needed)

    def offer_narrow(self, operand: Node, draft: Draft) -> None:
        """Let a kernel load a node; a GEMM, what it is a simple function of, if that is narrower.

        A row-wise kernel chooses later what it loads. Raises Refused.
        """
        source = _narrower(operand) if draft.kind.tiled else operand
        if source is not operand and self.home.get(source, draft) is not draft:
            with suppress(Refused):
                self.offer(self.storage(source))
                draft.space.compute(operand)
                return
        self.offer(self.storage(operand))

    def reach_rows(self, operand: Node, draft: Draft) -> None:
        """Make other rows of an operand available: in memory, or functions of what is.

        Raises Refused if they are known in this kernel alone.
        """
        free = isinstance(operand, Const | Size) or operand in self.weights
        if free or any(self.leaf(n, draft) is not None for n in under_views(operand)):
            return
        if is_pointwise(operand):
            for one in self.read_by(operand):
                self.reach_rows(one, draft)
            return
        if operand not in self.home:
            self.in_rows(operand, 0)
        if self.home[operand].order >= draft.order:
            raise Refused("other rows of it are not known in the kernel that computes it")
        self.offer(self.storage(operand))

    def has_fewer_rows(self, operand: Node, draft: Draft) -> bool:
        """Whether an operand is equal in some rows of a kernel, and is computed in the call.

        As [B, 1, D] is in a kernel of rows [B, S]: a kernel of B rows computes it.
        """
        if isinstance(base(operand), Input) or operand in self.weights:
            return False
        leads = [lead for lead in draft.space.leads if len(lead) <= operand.rank]
        return any(
            product(axes) not in (ONE, draft.rows) and broadcast(axes, lead) == lead
            for lead in leads
            if (axes := operand.shape[: len(lead)])
        )

    def settle(self, operand: Node, draft: Draft) -> None:
        """Place a row factor made of sums of arguments in the row-wise kernel of those sums.

        Otherwise the epilogue of the GEMM that reads the factor would recompute it from the sums.
        """
        factor = operand.rank and product(operand.shape) == draft.rows and draft.kind.tiled
        if operand in self.home or not factor or isinstance(operand, Reduce):
            return
        above = [n for n in walk([operand], until=Reduce) if n not in self.weights]
        sums = [n for n in above if isinstance(n, Reduce)]
        if not sums or any(n in self.home for n in above):
            return
        for node in sums:
            self.in_rows(node, 0)
        for node in above:
            if not isinstance(node, Reduce | Input | Const | Size):
                self.place(node)


def _narrower(node: Node) -> Node:
    """The narrowest source of which a value is a simple function, with numbers; or itself."""
    least = node
    while isinstance(node, Map | Cast):
        if isinstance(node, Map) and SCALARS[node.fn].special:
            break
        wide = [o for o in node.operands if not isinstance(o, Const | Size)]
        if len(wide) != 1 or wide[0].shape != node.shape:
            break
        (node,) = wide
        least = node if node.dtype.size < least.dtype.size else least
    return least
