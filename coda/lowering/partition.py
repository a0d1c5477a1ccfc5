"""A graph in normal form -> kernels: where is each node computed, and what is stored?

Nodes are taken in order, operands first. Contractions of one activation open a GEMM; every other
node goes to the latest kernel that its operands come from, if its elements can be computed at that
kernel's points (`columns`), else into a pass over rows after it, else to torch. A reduction over
the columns of a GEMM becomes a sink, whose partials the row pass after it folds. Then, from the
last kernel to the first, what somebody loads is stored, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from coda.ir.dims import ONE, Dim, product
from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Contract,
    Graph,
    Input,
    Node,
    Pick,
    Reduce,
    Reshape,
    Size,
    Slice,
    users,
    walk,
)
from coda.ir.monoids import MONOIDS
from coda.lowering.columns import Segment, Space
from coda.lowering.draft import LAST, Draft, Order
from coda.lowering.program import Unfused
from coda.lowering.roles import (
    base,
    flat,
    group_siblings,
    in_order,
    is_pointwise,
    is_turned,
    is_view,
    leaves_of,
    over_rows,
    pointwise_leaves,
    row_shapes,
    stacks,
    summand,
    weight_nodes,
)
from coda.lowering.values import LONGEST, Refused, Value


@dataclass
class Partition:
    """The state of one run over the nodes of a graph.

    Attributes:
        graph: in the normal form of the laws.
        sizes: the size of every symbol.
        banned: (place, node): nodes that a kernel's layout of columns cannot take. The place is a
            GEMM's first contraction, or a pass over rows that is "shared" or taken "alone".
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

    def run(self) -> Partition:
        """Place every node."""
        nodes = in_order(self.graph.roots)
        self.users = users(self.graph.roots)
        self.named = {i.name: i for i in self.graph.inputs}
        self.weights = weight_nodes(nodes, self.passing)
        contracts = [n for n in nodes if isinstance(n, Contract) and n not in self.weights]
        matrices = [c.lhs for c in contracts if not over_rows(c)]
        matrices += [c.lhs.operands[0] for c in contracts if over_rows(c)]
        matrices += [i for i in self.graph.inputs if i.rank > 1]
        if matrices:
            self.rows = product(matrices[0].shape[:-1])
        self.siblings = group_siblings(contracts, nodes, self.weights, self.apart, self.part_of)
        forced = [*self.graph.roots, *(o for c in contracts for o in c.operands)]
        self.loadable = {self.storage(n) for n in forced}
        for node in nodes:
            if not isinstance(node, Input | Const | Size) and node not in self.weights:
                self.place(node)
        for root in self.graph.roots:
            self.materialise(root, host=True)
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
        if not homes:  # of inputs alone: placed when somebody asks for it, or when it grows long
            self.waiting[node] = 1 + max((self.waiting.get(o, 0) for o in node.operands), default=0)
            if self.waiting[node] == LONGEST // 2:
                self.materialise(node)
            return
        last = max(homes, key=lambda d: d.order)
        if isinstance(node, Reduce) and last.kind != "gemm" and self.sunk(node, last):
            return
        if isinstance(node, Concat) and self.too_wide(node, last) and self.join(node):
            return
        if isinstance(node, Concat) and stacks(node) and self.join(node, stacked=True):
            return
        if last.kind == "gemm":
            if isinstance(node, Reduce | Pick) and self.sink(node, last):
                return
            why = self.absorb(node, last)
            if not why:
                return
            if self.only_returned(node):
                return
            self.unfused.append(Unfused(node, why))
        if last.kind == "row" and self.only_returned(node) and self.storage(node) is not node:
            return
        self.in_rows(node, last.order[0])

    def only_returned(self, node: Node) -> bool:
        """Whether a view is only returned: then it is a view of what is stored."""
        return is_view(node) and all(self.only_returned(u) for u in self.users[node])

    def too_wide(self, node: Concat, draft: Draft) -> bool:
        """Whether a concatenation along the columns has more of them than a kernel."""
        width = node.shape[-1].size(self.sizes)
        return draft.kind != "torch" and node.axis == -1 and width > draft.space.width

    def join(self, node: Concat, stacked: bool = False) -> bool:
        """Make a concatenation in memory, whose parts are written where they are computed.

        Parts are columns, or `stacked` rows.
        """
        parts = [self.storage(a) for a in flat(node)]
        whole = [
            product(p.shape) == product(a.shape) for p, a in zip(parts, flat(node), strict=True)
        ]
        taken = any(p in self.piece_of or p in self.joined for p in parts)
        known = any(isinstance(p, Input | Const) or p in self.weights for p in parts)
        if not all(whole) or taken or known or len(set(parts)) < len(parts):
            return False
        for part in parts:
            self.materialise(part)
        rows = [a.shape[node.axis] if stacked else product(node.shape[:-1]) for a in flat(node)]
        spaces = [self.home[p].space for p in parts]
        fits = [s.rows == r for s, r in zip(spaces, rows, strict=True)]
        if not all(fits) or not all(map(self.fills, parts)):
            return False
        self.joined[node] = tuple(parts)
        self.stacked |= {node} if stacked else set()
        self.piece_of |= dict.fromkeys(parts, node)
        self.home[node] = max((self.home[p] for p in parts), key=lambda d: d.order)
        self.loadable.add(node)
        return True

    def fills(self, node: Node) -> bool:
        """Whether a node has all columns of the GEMM that computes it, or one for each pair."""
        space = self.home[node].space
        if self.home[node].kind != "gemm":
            return self.home[node].kind == "row"
        value = space.compute(node)
        return value.count == space.width or (
            value.slots.shape[1] == 2 and 2 * value.count == space.width
        )

    def contract(self, node: Contract) -> None:
        """Open the GEMM of a contraction and its siblings."""
        group = self.siblings[node]
        for operand in (o for one in group for o in one.operands):
            self.materialise(operand, host=True)
        index = 1 + max((d.order[0] for d in self.drafts if d.order[0] < LAST), default=0)
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
        self.opened += 1
        draft = Draft(kind, (index, self.opened), space, contracts)
        space.leaf = lambda n: self.leaf(n, draft)
        space.weights = self.weights
        self.drafts.append(draft)
        return draft

    def absorb(self, node: Node, draft: Draft) -> str:
        """Compute a node in a kernel; the reason if it cannot be."""
        if draft.contracts and (draft.contracts[0], node) in self.banned:
            return "the columns of the kernel cannot be laid out for it"
        why = ""
        for segmented in (True, False) if draft.kind == "row" else (False,):
            draft.space.segmented = segmented
            try:
                with draft.space.attempt(lambda n: self.home.get(n) is draft):
                    self.reach_all(node, draft)
                    draft.space.compute(node)
                break
            except Refused as refusal:
                why = why or str(refusal)
        else:
            return why
        self.home[node] = draft
        draft.homed.append(node)
        if draft.kind == "row" and draft.space.values[node].narrow:
            self.loadable.add(node)
        return ""

    def reach_all(self, node: Node, draft: Draft, whole: bool = False) -> None:
        """Make the operands of a node available in a kernel, each in its columns."""
        for operand, segment in draft.space.parts(node):
            with draft.space.inside(segment):
                self.reach(operand, draft, whole)

    def reach(self, operand: Node, draft: Draft, whole: bool = False) -> None:
        """Make an operand available in a kernel: loaded, computed again, or else stored for it.

        What cannot be computed again goes to a pass over rows `whole`, with all that it is made of.
        """
        home = self.home.get(operand)
        known = home is draft or isinstance(operand, Const | Size)
        if known or self.leaf(operand, draft) is not None:
            return
        if operand in draft.space.values:
            return
        again = is_pointwise(operand)
        try:
            if home is None:
                self.reach_all(operand, draft, whole or not again)
            draft.space.compute(operand)
        except Refused:
            if home is None and (again or whole):
                raise
            if home is None:
                self.in_rows(operand, 0)
            self.loadable.add(self.storage(operand))

    def sink(self, node: Reduce | Pick, draft: Draft) -> bool:
        """Take a reduction over all columns in a GEMM's epilogue; its fold comes after."""
        if isinstance(node, Reduce) and not MONOIDS[node.fn].tiled:
            return False
        if isinstance(node, Reduce) and self.sums_rows(node, draft):
            return self.sink_rows(node, draft)
        if draft.kind != "gemm":
            return False
        try:
            self.reach_all(node.arg, draft)
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
        halved = value.count < draft.space.width
        if halved and not (isinstance(node, Reduce) and node.fn in ("sum", "mean", "max", "min")):
            return False  # one value for each pair: a second lane would count it again
        if isinstance(node, Pick):
            draft.sinks[node] = value
            self.home[node] = draft
            self.loadable.add(node)
            return True
        after = self.row_draft(draft.order[0], draft.space.rows, 1, draft.order)
        moments = self.moments(node)
        for one in moments or [node]:
            draft.space.refused[one] = "its total is known only after this kernel"
            self.home[one] = after
            after.homed.append(one)
            self.loadable.add(one)
        draft.sinks[moments[-1] if moments else node] = value
        after.space.fold(moments[-1] if moments else node, moments[0] if moments else None)
        return True

    def sums_rows(self, node: Reduce, draft: Draft) -> bool:
        """Whether a reduction sums over all rows of a kernel (and over column axes after them)."""
        rows, columns = product(node.arg.shape[: node.axis + node.rank + 1]), product(node.shape)
        narrow = rows == ONE or any(d != ONE for d in node.shape[: node.axis])
        if node.fn != "sum" or narrow or draft.kind == "torch" or columns == ONE:
            return False
        mine, under = draft.space.rows, summand(node)
        return rows == mine or any(
            product(under.shape[:i]) == mine and product(node.shape[:i]) == ONE
            for i in range(1, under.rank)
        )

    def sink_rows(self, node: Reduce, draft: Draft) -> bool:
        """Sum over the rows in a kernel that has the values; a pass over the columns folds it."""
        place = draft.contracts[0] if draft.contracts else "shared"
        if (place, node) in self.banned and draft.homed:
            return False
        under, space = summand(node), draft.space
        count = product(under.shape).size(self.sizes) // max(1, space.rows.size(self.sizes))
        spans = [None, *(s for s in space.segments if s[1] == count)]
        for segment in spans[: 1 if draft.kind == "gemm" else None]:
            try:
                kept = lambda n: self.home.get(n) is draft  # noqa: E731
                with space.inside(segment), space.attempt(kept):
                    self.reach_all(under, draft)
                    value = space.compute(under)
                    first = space.place_of(value)
            except Refused:
                continue
            if draft.kind == "gemm" and (first, value.count) != (0, space.width):
                continue
            self.fold_rows(node, draft, value)
            return True
        return False

    def fold_rows(self, node: Reduce, draft: Draft, value: Value) -> None:
        """Record a sum over the rows, and the pass that folds its partials."""
        end = all(self.only_returned(u) for u in self.users[node])
        index = LAST if end else draft.order[0]
        after = self.row_draft(index, product(node.shape), 1, draft.order, narrow=True)
        draft.space.refused[node] = "its total is known only after this kernel"
        self.home[node] = after
        after.homed.append(node)
        self.loadable.add(node)
        draft.sinks[node] = value
        draft.over_rows.add(node)
        after.space.fold(node)

    def summed_in_pass(self, node: Reduce, index: int) -> bool:
        """Sum over the rows of values that a pass over rows, or a GEMM's epilogue, has at hand."""
        under = summand(node)
        homes = [self.home[o] for o in walk([under]) if o in self.home]
        passes = [d for d in self.drafts if d.kind == "row"]
        order = [d for d in passes if self.loads_all_of(under, d)]
        order += [d for d in self.hosts(under) if d.kind == "gemm"]
        order += [d for d in passes if d not in order]
        for draft in [] if ("shared", node) in self.banned else order:
            known = all(h is draft or h.order < draft.order for h in homes)
            if known and self.sums_rows(node, draft) and self.sink_rows(node, draft):
                return True
        for rows, columns in [] if ("alone", node) in self.banned else row_shapes(under, self.rows):
            width = columns.size(self.sizes)
            draft = self.open("row", index, Space(width, rows, self.sizes, whole_rows=True))
            if width > 1 and self.sums_rows(node, draft) and self.sink_rows(node, draft):
                return True
            self.drafts.remove(draft)
        return False

    def moments(self, node: Reduce) -> list[Reduce]:
        """The mean and the variance of one value, if both are wanted: one sink gives both."""
        same = [u for u in self.users[node.arg] if isinstance(u, Reduce) and u.axis == node.axis]
        found = [u for fn in ("mean", "variance") for u in same if u.fn == fn]
        return found if node in found and len(found) == 2 else []

    def in_rows(self, node: Node, index: int) -> None:
        """Place a node in a pass over rows after the GEMM `index`, or give it to torch."""
        why = "no kernel computes it"
        if isinstance(node, Reduce) and self.summed_in_pass(node, index):
            return
        last = max((self.home[o].order for o in node.operands if o in self.home), default=(0, 0))
        for rows, columns in row_shapes(node, self.rows):
            width = columns.size(self.sizes)
            if ("alone", node) in self.banned:
                why = "the columns of a pass over rows cannot be laid out for it"
                break
            shared = [] if ("shared", node) in self.banned else self.rooms(index, rows, width)
            shared = [room for room in shared if room[0].order >= last]
            alone = [(None, None)] * 2  # computing the operands again, or loading them
            for draft, segment in [*shared, *alone]:
                fresh = draft is None
                if draft is None:
                    space = Space(width, rows, self.sizes, whole_rows=True)
                    draft = self.open("row", index, space)
                old, draft.space.width = draft.space.width, max(width, draft.space.width)
                with draft.space.inside(segment):
                    why = self.absorb(node, draft)
                if not why:
                    draft.symbols |= columns.symbols
                    return
                draft.space.width = old
                if fresh and not draft.homed:
                    self.drafts.remove(draft)
                    self.loadable |= {self.storage(o) for o in node.operands if o in self.home}
        self.in_torch(node, index, why)

    def in_torch(self, node: Node, index: int, why: str) -> None:
        """One operation by torch, behind the GEMM `index` and what stores its operands."""
        for operand in node.operands:
            self.materialise(operand)
        homes = [self.home.get(self.storage(o)) for o in node.operands]
        index = max([index, *(h.order[0] for h in homes if h is not None)])
        draft = self.open("torch", index, Space(0, ONE, self.sizes))
        draft.why = why
        draft.homed.append(node)
        self.home[node] = draft
        self.loadable.add(node)
        self.unfused.append(Unfused(node, why))

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

    def rooms(self, index: int, rows: Dim, width: int) -> list[tuple[Draft, Segment | None]]:
        """Passes over rows behind a GEMM that could take `width` columns, and where in theirs."""
        found: list[tuple[Draft, Segment | None]] = []
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
        fills = draft.space.matches(product(under.shape).size(self.sizes))
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
        if node not in self.loadable:
            return False
        home, early = self.home.get(node), self.home.get(view)
        late = home is not None and early is not None and home.order > early.order
        return not (late and view in self.loadable)

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

    def materialise(self, node: Node, host: bool = False) -> None:
        """See to it that a node will be in memory; with `host`, behind all kernels so far."""
        under = self.storage(node)
        if under in self.weights or isinstance(under, Input):
            return
        if isinstance(under, Concat) and under not in self.home and not self.in_pass(under):
            self.join(under)
        if under not in self.home and not (host and self.hosted(under)):
            below = [self.home[n].order[0] for n in walk([under]) if n in self.home]
            self.in_rows(under, max(below, default=0))
        self.loadable.add(under)

    def in_pass(self, node: Node) -> bool:
        """Compute a node of arguments alone in one pass over rows."""
        if any(n in self.home for n in walk([node]) if n not in self.weights):
            return False
        shapes = [] if ("alone", node) in self.banned else row_shapes(node, self.rows)[:1]
        for rows, columns in shapes:
            space = Space(columns.size(self.sizes), rows, self.sizes, whole_rows=True)
            draft = self.open("row", 0, space)
            if not self.absorb(node, draft):
                return True
            self.drafts.remove(draft)
        return False

    def hosted(self, node: Node) -> bool:
        """Compute a node of arguments alone in a kernel that loads all that it needs anyway."""
        for draft in self.hosts(node):
            shared = draft.kind == "gemm" or ("shared", node) not in self.banned
            if shared and not self.absorb(node, draft):
                return True
        return False

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

    def sunk(self, node: Reduce, last: Draft) -> bool:
        """Take a sum over the rows as a sink of a kernel."""
        return self.sunk_late(node) or self.summed_in_pass(node, last.order[0])

    def sunk_late(self, node: Reduce) -> bool:
        """Take a sum over a weight's rows in the GEMM that gives the weight's gradient."""
        homes = [self.home[o] for o in walk([node.arg]) if o in self.home]
        for draft in self.hosts(node.arg):
            known = all(h.order < draft.order for h in homes)
            if draft.kind == "gemm" and known and self.sums_rows(node, draft):
                return self.sink(node, draft)
        return False
