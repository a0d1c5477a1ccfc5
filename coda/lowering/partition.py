"""A graph in normal form -> kernels: where is each node computed, and what is stored?

Nodes are taken in order, operands first. Contractions of one activation open a GEMM; every other
node goes to the latest kernel that its operands come from, if its elements can be computed at that
kernel's points (`columns`), else into a pass over rows after it, else to torch. A reduction over
the columns of a GEMM becomes a sink, whose partials the row pass after it folds. Then, from the
last kernel to the first, what somebody loads is stored, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from coda.ir.dims import ONE, Dim, product
from coda.ir.graph import (
    Cast,
    Const,
    Contract,
    Graph,
    Input,
    Map,
    Node,
    Permute,
    Pick,
    Reduce,
    Reshape,
    Size,
    Slice,
    users,
    walk,
)
from coda.lowering.columns import Refused, Space, Value
from coda.lowering.program import Unfused

Order = tuple[int, int]  # the GEMM that came last, running number


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
        why: why a torch kernel's node is there.
    """

    kind: str
    order: Order
    space: Space
    contracts: tuple[Contract, ...] = ()
    homed: list[Node] = field(default_factory=list)
    sinks: dict[Node, Value] = field(default_factory=dict)
    why: str = ""


@dataclass
class Partition:
    """The state of one run over the nodes of a graph.

    Attributes:
        graph: in the normal form of the laws.
        sizes: the size of every symbol.
        banned: (contraction, node): nodes that a GEMM's layout of columns cannot take.
        home: where each node is computed first.
        drafts: the kernels, in no order.
        loadable: nodes that will be in memory if somebody loads them.
    """

    graph: Graph
    sizes: Mapping[str, int]
    banned: frozenset[tuple[Node, Node]] = frozenset()
    home: dict[Node, Draft] = field(default_factory=dict)
    drafts: list[Draft] = field(default_factory=list)
    loadable: set[Node] = field(default_factory=set)
    names: dict[Node, str] = field(default_factory=dict)
    unfused: list[Unfused] = field(default_factory=list)
    weights: set[Node] = field(default_factory=set)
    siblings: dict[Node, tuple[Contract, ...]] = field(default_factory=dict)
    users: dict[Node, list[Node]] = field(default_factory=dict)
    rows: Dim = ONE

    def run(self) -> Partition:
        """Place every node."""
        nodes = list(walk(self.graph.roots))
        self.users = users(self.graph.roots)
        self.weights = weight_nodes(nodes)
        contracts = [n for n in nodes if isinstance(n, Contract) and n not in self.weights]
        if contracts:
            self.rows = product(contracts[0].lhs.shape[:-1])
        self.siblings = group_siblings(contracts, nodes)
        forced = [*self.graph.roots, *(o for c in contracts for o in c.operands)]
        self.loadable = {self.storage(n) for n in forced}
        for node in nodes:
            if not isinstance(node, Input | Const | Size) and node not in self.weights:
                self.place(node)
        for root in self.graph.roots:
            self.materialise(root)
        return self

    # Placing.

    def place(self, node: Node) -> None:
        """Decide where a node is computed."""
        if node in self.home:
            return
        if isinstance(node, Contract):
            self.contract(node)
            return
        homes = [self.home[o] for o in node.operands if o in self.home]
        if not homes:
            if not is_pointwise(node):
                self.in_rows(node, 0)
            return
        last = max(homes, key=lambda d: d.order)
        if last.kind == "gemm":
            if isinstance(node, Reduce | Pick) and self.sink(node, last):
                return
            why = self.absorb(node, last)
            if not why:
                return
            if self.only_returned(node):
                return
            self.unfused.append(Unfused(node, why))
        self.in_rows(node, last.order[0])

    def only_returned(self, node: Node) -> bool:
        """Whether a view is only returned: then it is a view of what is stored."""
        return is_view(node) and all(self.only_returned(u) for u in self.users[node])

    def contract(self, node: Contract) -> None:
        """Open the GEMM of a contraction and its siblings."""
        group = self.siblings[node]
        for operand in (o for one in group for o in one.operands):
            self.materialise(operand)
        index = 1 + max((d.order[0] for d in self.drafts), default=0)
        starts = np.cumsum([0] + [c.shape[-1].size(self.sizes) for c in group])
        first: dict[Node, int] = {c: int(s) for c, s in zip(group, starts, strict=False)}
        rows = product(node.lhs.shape[:-1])
        space = Space(int(starts[-1]), rows, self.sizes, accumulators=first)
        draft = self.open("gemm", index, space, group)
        for one in group:
            self.home[one] = draft
            draft.homed.append(one)

    def open(
        self, kind: str, index: int, space: Space, contracts: tuple[Contract, ...] = ()
    ) -> Draft:
        """A new kernel, after all others behind the same GEMM."""
        draft = Draft(kind, (index, len(self.drafts)), space, contracts)
        space.leaf = lambda n: self.leaf(n, draft)
        self.drafts.append(draft)
        return draft

    def absorb(self, node: Node, draft: Draft) -> str:
        """Compute a node in a kernel; the reason if it cannot be."""
        if draft.contracts and (draft.contracts[0], node) in self.banned:
            return "the columns of the kernel cannot be laid out for it"
        before = set(draft.space.values)
        try:
            for operand in node.operands:
                self.reach(operand, draft)
            draft.space.compute(node)
        except Refused as refusal:
            for one in set(draft.space.values) - before:
                del draft.space.values[one]
            return str(refusal)
        self.home[node] = draft
        draft.homed.append(node)
        if draft.kind == "row" and draft.space.values[node].narrow:
            self.loadable.add(node)
        return ""

    def reach(self, operand: Node, draft: Draft) -> None:
        """Make an operand available in a kernel: loaded, computed again, or else stored for it."""
        home = self.home.get(operand)
        if home is None or home is draft or self.leaf(operand, draft) is not None:
            return
        try:
            draft.space.compute(operand)
        except Refused:
            self.loadable.add(self.storage(operand))

    def sink(self, node: Reduce | Pick, draft: Draft) -> bool:
        """Take a reduction over all columns in a GEMM's epilogue; its fold comes after."""
        try:
            value = draft.space.compute(node.arg)
        except Refused:
            return False
        whole = value.count == value.shape[-1] and value.slots.shape[1] > 0
        along = not isinstance(node, Reduce) or node.axis == -1
        if not (whole and along and value.count in (draft.space.width, draft.space.width // 2)):
            return False
        if isinstance(node, Pick) and self.leaf(node.index, draft) is None:
            return False
        if (draft.contracts[0], node) in self.banned:
            return False
        draft.sinks[node] = value
        if isinstance(node, Pick):
            self.home[node] = draft
            self.loadable.add(node)
            return True
        draft.space.refused[node] = "its total is known only after this kernel"
        after = self.row_draft(draft.order[0], draft.space.rows, 1)
        self.home[node] = after
        after.space.fold(node)
        after.homed.append(node)
        self.loadable.add(node)
        return True

    def in_rows(self, node: Node, index: int) -> None:
        """Place a node in a pass over rows after the GEMM `index`, or give it to torch."""
        why = "no kernel computes it"
        for rows, width in self.row_shapes(node):
            for draft in [*self.row_drafts(index, rows, width), None]:
                fresh = draft is None
                if draft is None:
                    space = Space(width, rows, self.sizes, whole_rows=True)
                    draft = self.open("row", index, space)
                old, draft.space.width = draft.space.width, max(width, draft.space.width)
                why = self.absorb(node, draft)
                if not why:
                    return
                draft.space.width = old
                if fresh:
                    self.drafts.remove(draft)
        self.in_torch(node, index, why)

    def in_torch(self, node: Node, index: int, why: str) -> None:
        """One operation by torch."""
        for operand in node.operands:
            self.materialise(operand)
        draft = self.open("torch", index, Space(0, ONE, self.sizes))
        draft.why = why
        draft.homed.append(node)
        self.home[node] = draft
        self.loadable.add(node)
        self.unfused.append(Unfused(node, why))

    def row_shapes(self, node: Node) -> list[tuple[Dim, int]]:
        """Ways to see a node as rows and columns, the rows of the program first."""
        shape = node.operands[0].shape if isinstance(node, Reduce) else node.shape
        found: list[tuple[Dim, int]] = []
        for i in range(len(shape) + 1):
            rows, width = product(shape[:i]), product(shape[i:]).size(self.sizes)
            whole = not isinstance(node, Reduce) or i == len(shape) + node.axis
            if whole and rows == self.rows:
                found.insert(0, (rows, width))
            elif whole and i == len(shape) - 1:
                found.append((rows, width))
        return found

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

    def row_draft(self, index: int, rows: Dim, width: int) -> Draft:
        """A pass over rows behind a GEMM."""
        for draft in self.row_drafts(index, rows, width):
            return draft
        return self.open("row", index, Space(width, rows, self.sizes, whole_rows=True))

    # Memory.

    def leaf(self, node: Node, draft: Draft) -> str | None:
        """The name under which a kernel loads a node, or None."""
        if isinstance(node, Const | Size):
            return None
        if isinstance(node, Input):
            return self.name(node)
        if node in self.weights:
            return self.name(node) if is_heavy(node) else None
        if self.in_memory(node, draft):
            return self.name(node)
        under = self.storage(node)
        if under is node or not (isinstance(under, Input) or self.in_memory(under, draft)):
            return None
        elements = product(under.shape).size(self.sizes)
        if elements == draft.space.width * draft.space.rows.size(self.sizes):
            return None
        return self.name(node)

    def in_memory(self, node: Node, draft: Draft) -> bool:
        """Whether a node is (or can be) stored by an earlier kernel."""
        home = self.home.get(node)
        return node in self.loadable and home is not None and home.order < draft.order

    def storage(self, node: Node) -> Node:
        """The node in memory that a view looks at; itself where it has to be stored as it is."""
        while is_view(node):
            under = base(node)
            free = isinstance(under, Input) or isinstance(node, Reshape)
            if not free and not (isinstance(node, Slice) and node.arg in self.loadable):
                return node
            node = node.operands[0]
        return node

    def name(self, node: Node) -> str:
        """A name for a node in memory."""
        if node not in self.names:
            self.names[node] = node.name if isinstance(node, Input) else f"t{len(self.names)}"
        return self.names[node]

    def materialise(self, node: Node) -> None:
        """See to it that a node will be in memory."""
        under = self.storage(node)
        if under in self.weights or isinstance(under, Input):
            return
        if under not in self.home:
            self.in_rows(under, 0)
        self.loadable.add(under)


def is_view(node: Node) -> bool:
    """Whether a node is a view of its operand in memory."""
    return isinstance(node, Reshape | Slice | Permute)


def base(node: Node) -> Node:
    """What a view looks at."""
    while is_view(node):
        node = node.operands[0]
    return node


def is_pointwise(node: Node) -> bool:
    """Whether a node may be computed again wherever it is needed."""
    return isinstance(node, Map | Cast | Reshape | Slice | Permute | Const | Size | Input)


def is_heavy(node: Node) -> bool:
    """Whether a node of weights holds a sum, which is taken once and not in every kernel."""
    return any(isinstance(n, Reduce | Contract) for n in walk([node]))


def row_symbols(nodes: Iterable[Node]) -> frozenset[str]:
    """Symbols that are rows of a contraction and never its columns: tokens."""
    rows: set[str] = set()
    columns: set[str] = set()
    for node in nodes:
        if isinstance(node, Contract):
            rows |= {s for d in node.lhs.shape[:-1] for s in d.symbols}
            columns |= {s for d in node.rhs.shape for s in d.symbols}
    return frozenset(rows - columns)


def weight_nodes(nodes: list[Node]) -> set[Node]:
    """Nodes that no token reaches: they change only when a weight does."""
    tokens = row_symbols(nodes)
    if tokens:
        free = {
            n
            for n in nodes
            if isinstance(n, Input) and not tokens & {s for d in n.shape for s in d.symbols}
        }
    else:
        right = [n.rhs for n in nodes if isinstance(n, Contract)]
        left = {i for n in nodes if isinstance(n, Contract) for i in walk([n.lhs])}
        free = {n for n in walk(right) if isinstance(n, Input) and n not in left}
    found: set[Node] = set(free)
    for node in nodes:
        known = [o in found for o in node.operands if not isinstance(o, Const | Size)]
        if known and all(known):
            found.add(node)
    return found


def group_siblings(
    contracts: list[Contract], nodes: list[Node]
) -> dict[Node, tuple[Contract, ...]]:
    """Contractions of one activation that share a GEMM.

    Those that an elementwise operation joins (gate and up) pair their columns and stay among
    themselves; the others of the activation go side by side.
    """
    by_input: dict[Node, list[Contract]] = {}
    for one in contracts:
        by_input.setdefault(one.lhs, []).append(one)
    reach: dict[Node, frozenset[Node]] = {}
    joined: set[tuple[Node, Node]] = set()
    for node in nodes:
        if isinstance(node, Contract):
            reach[node] = frozenset([node])
        elif is_pointwise(node):
            reach[node] = frozenset().union(*(reach.get(o, frozenset()) for o in node.operands))
            if isinstance(node, Map):
                joined |= {(a, b) for a in reach[node] for b in reach[node]}
    out: dict[Node, tuple[Contract, ...]] = {}
    for group in by_input.values():
        rest = list(group)
        while rest:
            coupled = _closure(rest[0], rest, joined)
            if len(coupled) == 1:
                coupled = [c for c in rest if len(_closure(c, rest, joined)) == 1]
            rest = [c for c in rest if c not in coupled]
            out |= dict.fromkeys(coupled, tuple(coupled))
    return out


def _closure(
    first: Contract, among: list[Contract], joined: set[tuple[Node, Node]]
) -> list[Contract]:
    """The contractions that elementwise operations tie to the first."""
    found = [first]
    for one in found:
        found += [c for c in among if c not in found and (one, c) in joined]
    return [c for c in among if c in found]
