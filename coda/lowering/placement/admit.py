"""Kernel builder and one more store or sink -> admitted, or refused with a reason.

A node that another kernel loads is stored by its producer kernel. All stores and sinks of a kernel
share one layout of columns (`layout.py`): pair distance, group width, table period, and the shared
memory for staged matrices. A builder decides at once whether the layout still exists: for outputs
and operands of contractions when they are placed, for other nodes when a consumer wants to load
them. If the store is refused, so is the consumer, and its node is placed elsewhere. As a last
resort the refused node gets a kernel of its own.

A GEMM of 128 columns computes a mean over heads of 32 columns, one number per head:

    commit(mean)  "it has 4 columns where the kernel has 128"
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from coda.errors import InternalError
from coda.ir.dims import ONE, product
from coda.ir.graph import Cast, Map, Node, Permute, Pick, Reduce, Size
from coda.ir.monoids import MONOIDS
from coda.ir.types import DType, f32
from coda.lowering.algebra.roles import keeps_columns, sequence_of, summand
from coda.lowering.placement.columns import Space
from coda.lowering.placement.draft import Draft, Drafts
from coda.lowering.placement.layout import Layout
from coda.lowering.placement.stores import Group, Picked, Reduced, Sink, Summed, grouped
from coda.lowering.placement.values import Refused, Value
from coda.lowering.program.access import SHIFTED
from coda.lowering.program.epilogue import RowOrder


class Admission(Drafts):
    """Kernel builders that decide whether they can store or reduce one more node."""

    def check(
        self,
        draft: Draft,
        stored: Node | None = None,
        sink: tuple[Reduce | Pick, Value] | None = None,
    ) -> Layout | None:
        """Lay out a kernel's commitments together with one more node.

        Args:
            draft: the kernel builder; it keeps the new layout.
            stored: a node that it computes, to be stored as well.
            sink: a reduction or a pick, with the value that it reduces.

        Returns:
            The layout; None for a kind that does not fuse.

        Raises:
            Refused: if there is no such layout. The commitments are unchanged.
        """
        if not draft.kind.fuses:
            return None
        nodes = [n for n in draft.homed if n in draft.kept]
        if stored is not None and stored not in draft.kept:
            nodes.append(stored)
        groups = grouped(draft.space, nodes, self.piece_of)
        for group in groups:
            _check_rows(group, draft.space)
        taken = [*draft.sinks.items(), *([sink] if sink is not None else [])]
        before, draft.layout = draft.layout, None
        with draft.space.scratch(), self.unnamed() as named:
            stores = [g.store(draft.space, "", self.stored_type(g)) for g in groups]
            sinks = [self.sink_of(draft, n, v) for n, v in taken]
            found = Layout.of(draft.space, stores, sinks, self.operand_of, before)
        draft.layout = None if named else found
        return found

    def sink_of(self, draft: Draft, node: Reduce | Pick, value: Value, buffer: str = "") -> Sink:
        """The sink of a pick, or of a reduction over columns or rows. Raises Refused."""
        if isinstance(node, Pick):
            return Picked(node, buffer, value, self.index_of(node, draft))
        if self.sums_rows(node, draft):
            return Summed(node, buffer, value)
        return Reduced(node, buffer, value)

    def index_of(self, node: Pick, draft: Draft) -> str:
        """The name under which a kernel loads the index of a pick. Raises Refused."""
        index = self.leaf(node.index, draft)
        if index is None:
            raise Refused("the index that it picks by is not in memory")
        return index

    def sums_rows(self, node: Reduce, draft: Draft) -> bool:
        """Whether a reduction is over all rows of a kernel, perhaps over column axes too.

        A GEMM has partials of any monoid with an op for rows, a row-wise kernel those of sums.
        """
        rows, columns = product(node.arg.shape[: node.axis + node.rank + 1]), product(node.shape)
        narrow = rows == ONE
        if sequence_of(node) is not None:  # row-wise kernels know where a sequence ends
            whole = draft.kind.whole_rows and rows == draft.space.rows
            narrow = not whole or product(node.shape[node.axis :]) == ONE
        row = MONOIDS[node.fn]
        split = bool(row.rows) if draft.kind.tiled else row.is_plain_sum
        if not split or narrow or not draft.kind.fuses or columns == ONE:
            return False
        mine, under = draft.space.rows, summand(node)
        leading = [product(under.shape[:i]) for i in range(1, under.rank)]
        return rows == mine or (mine in leading and rows in leading[leading.index(mine) :])

    def stored_type(self, group: Group) -> DType:
        """The dtype of a stored matrix: float32 for floats with one value per row."""
        dtype = group.nodes[0].dtype
        narrow = group.narrow and dtype.kind == "float" and dtype.size < f32.size
        return f32 if narrow else dtype

    def operand_of(self, name: str) -> tuple[Node, DType]:
        """Operand name -> its node, and its dtype in memory."""
        node = self.named.get(name.split(SHIFTED)[0])
        if node is None:
            raise InternalError(f"there is no operand {name}")
        return node, f32 if isinstance(node, Size) else node.dtype

    @contextmanager
    def unnamed(self) -> Generator[list[Node]]:
        """Discard the names that are given inside; yields the list of nodes that had them."""
        known, named, forgotten = len(self.names), len(self.named), list[Node]()
        try:
            yield forgotten
        finally:
            while len(self.names) > known:
                forgotten.append(self.names.popitem()[0])
            while len(self.named) > named:
                self.named.popitem()

    def commit(self, node: Node) -> str:
        """Commit a node's producer kernel to store it; the reason if it refuses, otherwise ""."""
        home = self.home.get(node)
        if home is None or node in home.kept or node in self.joined or node in home.sinks:
            return ""
        try:
            self.check(home, node)
        except Refused as refusal:
            return str(refusal)
        home.kept.add(node)
        return ""

    def reorder(self, node: Node, draft: Draft) -> bool:
        """Let a kernel store a node with its rows in another order than the kernel has them in.

        The node is a permutation of rows that nobody reads in the kernel's own order, or an
        elementwise function of such a node and of numbers and vectors that are equal in all rows.
        """
        space = draft.space
        found = self.permuted(node, draft) if isinstance(node, Permute) else _after(node, space)
        if found is None:
            return False
        space.reordered[node] = found
        try:
            with space.attempt(lambda n: self.home.get(n) is draft):
                self.check(draft, node)
        except Refused:
            del space.reordered[node]
            return False
        space.refused[node] = "its rows are stored in another order than the kernel has them in"
        self.home[node] = draft
        draft.homed.append(node)
        draft.kept.add(node)
        self.loadable.add(node)
        return True

    def permuted(self, node: Permute, draft: Draft) -> tuple[Node, RowOrder] | None:
        """The value that a kernel has of which a node is a permutation of rows; None if none."""
        source = node.arg
        first = draft.contracts[0] if draft.contracts else source
        fits = source.shape == first.shape and keeps_columns(node)
        fits = fits and self.home.get(source) is draft
        fits = fits and product(source.shape[:-1]) == draft.rows
        own = draft.kind.tiled and source in self.loadable  # it is stored in both orders
        alone = set(self.users[source]) == {node} and not own
        if not (fits and alone) or draft.kind.reorders(first, node.order, self.known):
            return None
        return source, RowOrder(source.shape[:-1], node.order[:-1])

    def admits_sink(self, draft: Draft, node: Reduce | Pick, value: Value) -> bool:
        """Whether a kernel can have a reduction or a pick of a value as a sink."""
        try:
            self.check(draft, sink=(node, value))
        except Refused:
            return False
        return True

    def offer(self, node: Node) -> None:
        """Let later kernels load a node. Raises Refused if its producer cannot store it."""
        if node in self.loadable:
            return
        why = self.commit(node)
        if why:
            raise Refused(why)
        self.loadable.add(node)


def _check_rows(group: Group, space: Space) -> None:
    """Refuse nodes that are one value for several rows, where a kernel has a value for each."""
    for node, value in zip(group.nodes, group.values, strict=True):
        if not space.is_filled_by(product(node.shape), value.count):
            raise Refused("it has fewer rows than the kernel")


def _after(node: Node, space: Space) -> tuple[Node, RowOrder] | None:
    """An elementwise function of reordered nodes, as the same function of their sources."""
    known = [space.reordered[o] for o in node.operands if o in space.reordered]
    rest = [o for o in node.operands if o not in space.reordered]
    if not known or any(product(o.shape[:-1]) != ONE for o in rest):
        return None
    order = known[0][1]
    if any(other != order for _, other in known):
        return None
    args = tuple(space.reordered[o][0] if o in space.reordered else o for o in node.operands)
    match node:
        case Map(fn=fn):
            return Map(fn, args), order
        case Cast(to=to):
            return Cast(args[0], to), order
        case _:
            return None
