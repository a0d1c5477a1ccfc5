"""Kernels in the making: what is placed in them so far, and what each will find in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

from coda.ir.dims import ONE, Dim, product
from coda.ir.graph import (
    Cast,
    Const,
    Contract,
    Graph,
    Input,
    Node,
    Reduce,
    Reshape,
    Size,
    Slice,
)
from coda.lowering.columns import Segment, Space
from coda.lowering.program import Unfused
from coda.lowering.roles import base, is_turned, is_view, leaves_of, pointwise_leaves
from coda.lowering.values import Value

Order = tuple[int, int]  # the GEMM that came last, running number
LAST = 1 << 30  # behind all GEMMs: sums that are only returned are folded together


@dataclass(eq=False)
class Draft:
    """A kernel in the making.

    Attributes:
        kind: "gemm", "row" or "torch".
        order: its place among the kernels.
        space: its columns (a torch kernel has none).
        contracts: a GEMM's contractions.
        homed: nodes that are computed here first.
        sinks: reductions and picks that are taken in a GEMM's epilogue, with their values.
        over_rows: those of them that sum over the rows.
        why: why a torch kernel's node is there.
        symbols: those that the number of columns of a pass over rows depends on.
    """

    kind: str
    order: Order
    space: Space
    contracts: tuple[Contract, ...] = ()
    homed: list[Node] = field(default_factory=list)
    sinks: dict[Node, Value] = field(default_factory=dict)
    over_rows: set[Node] = field(default_factory=set)
    why: str = ""
    symbols: frozenset[str] = frozenset()


Room = tuple[Draft, Segment | None]  # a kernel, and the columns of it that a node would have


@dataclass
class Drafts:
    """The state of one run over the nodes of a graph, and what follows from it.

    Attributes:
        graph: in the normal form of the laws.
        sizes: the size of every symbol.
        banned: (place, node): nodes that a kernel's layout of columns cannot take. The place is a
            GEMM's first contraction, or a pass over rows that is "shared" or taken "alone", or
            one that has it as a statistic of "groups".
        apart: whether contractions whose rows are reduced have a GEMM of their own.
        passing: names of arguments that are new in every call.
        part_of: contractions of a value that is made in parts.
        home: where each node is computed first.
        drafts: the kernels, in no order.
        loadable: nodes that will be in memory if somebody loads them.
        joined: nodes that are concatenations in memory, with the nodes whose kernels write their
            parts.
        piece_of: those parts, with the concatenation.
        stacked: concatenations whose parts are rows.
        waiting: how many operations deep a node of arguments alone is that is not placed yet.
    """

    graph: Graph
    sizes: Mapping[str, int]
    banned: frozenset[tuple[Node | str, Node]] = frozenset()
    apart: bool = False
    passing: frozenset[str] = frozenset()
    part_of: Mapping[Node, int] = field(default_factory=dict)
    home: dict[Node, Draft] = field(default_factory=dict)
    drafts: list[Draft] = field(default_factory=list)
    loadable: set[Node] = field(default_factory=set)
    names: dict[Node, str] = field(default_factory=dict)
    named: dict[str, Node] = field(default_factory=dict)
    unfused: list[Unfused] = field(default_factory=list)
    joined: dict[Node, tuple[Node, ...]] = field(default_factory=dict)
    piece_of: dict[Node, Node] = field(default_factory=dict)
    stacked: set[Node] = field(default_factory=set)
    weights: set[Node] = field(default_factory=set)
    siblings: dict[Node, tuple[Contract, ...]] = field(default_factory=dict)
    users: dict[Node, list[Node]] = field(default_factory=dict)
    waiting: dict[Node, int] = field(default_factory=dict)
    rows: Dim = ONE
    opened: int = 0

    # Kernels.

    def open(
        self, kind: str, index: int, space: Space, contracts: tuple[Contract, ...] = ()
    ) -> Draft:
        """A new kernel, after all others behind the same GEMM."""
        self.opened += 1
        draft = Draft(kind, (index, self.opened), space, contracts)
        space.leaf = lambda n: self.leaf(n, draft)
        space.weights = self.weights
        self.drafts.append(draft)
        return draft

    def drop(self, draft: Draft) -> bool:
        """Forget a kernel that was opened in vain, unless something on the way stays in it."""
        if draft.homed or draft.sinks:
            return False
        self.drafts.remove(draft)
        return True

    def row_drafts(self, index: int, rows: Dim, width: int) -> list[Draft]:
        """The passes over rows behind a GEMM that could take `width` columns."""
        return [
            d
            for d in self.drafts
            if d.kind == "row"
            and d.order[0] == index
            and d.space.rows == rows
            and (width == d.space.width or 1 in (width, d.space.width))
        ]

    def rooms(self, index: int, rows: Dim, width: int) -> list[Room]:
        """Passes over rows behind a GEMM that could take `width` columns, and where in theirs."""
        found: list[Room] = []
        found += [(d, None) for d in self.row_drafts(index, rows, width)]
        for draft in self.drafts:
            if draft.kind == "row" and draft.order[0] == index and draft.space.rows == rows:
                found += [(draft, s) for s in draft.space.segments if s[1] == width]
        return found

    def row_draft(
        self, index: int, rows: Dim, width: int, behind: Order, narrow: bool = False
    ) -> Draft:
        """A pass over rows behind a kernel; `narrow` ones have so many columns now."""
        for draft in self.row_drafts(index, rows, width):
            if draft.order > behind and (draft.space.width == width or not narrow):
                return draft
        return self.open("row", index, Space(width, rows, self.sizes, whole_rows=True))

    def hosts(self, node: Node) -> list[Draft]:
        """Kernels with a point for each element of a node, which load the arguments it needs.

        Of what is made of one reduction, for each element that this reduces.
        """
        under = node
        while isinstance(under, Cast | Reshape):
            under = under.arg
        node = under.arg if isinstance(under, Reduce) else node
        elements = product(node.shape).size(self.sizes)
        found: list[Draft] = []
        for draft in reversed(self.drafts):
            space = draft.space
            fits = elements == space.width * space.rows.size(self.sizes)
            if draft.kind != "torch" and fits and self.loads_all_of(node, draft):
                found.append(draft)
        return found

    def loads_all_of(self, node: Node, draft: Draft) -> bool:
        """Whether a kernel loads the arguments that a node is made of, as large as the node."""
        elements = product(node.shape).size(self.sizes)
        leaves = pointwise_leaves(node, self.weights)
        needed = {n for n in leaves if product(n.shape).size(self.sizes) >= elements}
        loaded = {o for n in draft.space.values for o in leaves_of(n, self.weights)}
        return bool(needed) and needed <= loaded

    # Memory.

    def leaf(self, node: Node, draft: Draft) -> str | None:
        """The name under which a kernel loads a node, or None."""
        if isinstance(node, Const | Size):
            return None
        if isinstance(node, Input):
            return self.name(node)
        if node in self.weights:
            return self.name(node)
        if self.in_memory(node, draft):
            return self.name(node)
        under = self.storage(node)
        if under is node or not (isinstance(under, Input) or self.in_memory(under, draft)):
            return None
        space = draft.space
        fills = space.matches(product(under.shape).size(self.sizes)) and space.has_rows(under)
        return None if fills else self.name(node)

    def in_memory(self, node: Node, draft: Draft) -> bool:
        """Whether a node is (or can be) stored by an earlier kernel."""
        home = self.home.get(node)
        return node in self.loadable and home is not None and home.order < draft.order

    def storage(self, node: Node) -> Node:
        """The node in memory that a view looks at; itself where it has to be stored as it is."""
        while is_view(node):
            under = base(node)
            free = isinstance(under, Input) or isinstance(node, Reshape) or is_turned(node)
            if not free and not (isinstance(node, Slice) and self.known_before(node.arg, node)):
                return node
            node = node.operands[0]
        return node

    def known_before(self, node: Node, view: Slice) -> bool:
        """Whether a node is in memory, no later than a view of it that a kernel stores."""
        node = self.storage(node)
        if node not in self.loadable:
            return False
        home, early = self.home.get(node), self.home.get(view)
        late = home is not None and early is not None and home.order > early.order
        return not (late and view in self.loadable)

    def only_returned(self, node: Node) -> bool:
        """Whether a view is only returned: then it is a view of what is stored."""
        return is_view(node) and all(self.only_returned(u) for u in self.users[node])

    def name(self, node: Node) -> str:
        """A name for a node in memory."""
        if node not in self.names:
            self.names[node] = node.name if isinstance(node, Input) else self.new_name(node)
            self.named[self.names[node]] = node
        return self.names[node]

    def new_name(self, node: Node) -> str:
        """An output's own name, else t1, t2 and so on."""
        for name, root in self.graph.outputs:
            if root is node:
                return f"{name}_out" if name in self.named else name
        return next(n for i in count(len(self.names)) if (n := f"t{i}") not in self.named)
