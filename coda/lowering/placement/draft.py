"""`Draft`, a kernel builder, and `Drafts`, the state of a placement: nodes, builders and memory.

A builder's kernel is in the order (GEMM, number): row-wise kernels after the third GEMM are (3, 7),
(3, 9). A kernel can load a node if the node is loadable and its producer kernel has a lower order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
)
from coda.lowering.algebra.roles import (
    base,
    is_pointwise,
    is_transposed,
    is_view,
    is_window,
    joins_windows,
    leaves_of,
    pointwise_leaves,
    reads_strided,
    row_shapes,
    symbols_of,
)
from coda.lowering.algebra.whole_numbers import whole_numbers
from coda.lowering.placement.columns import Space
from coda.lowering.placement.layout import Layout
from coda.lowering.placement.siblings import Kernels
from coda.lowering.placement.space_state import Segment
from coda.lowering.placement.values import Value
from coda.lowering.program.kernel import Kind, kind_of
from coda.lowering.program.price import Price
from coda.lowering.program.program import Unfused
from coda.lowering.program.target import Target
from coda.lowering.program.time import Time, total

Order = tuple[int, int]  # the number of the last GEMM before the kernel, a running number
LAST = 1 << 30  # after all GEMMs: sums that are only returned are folded together


@dataclass(eq=False)
class Draft:
    """A kernel builder.

    Attributes:
        kind: the kind of kernel.
        order: its position among the kernels.
        space: its columns and the values computed there (width 0 for a kind that does not fuse).
        contracts: a GEMM's contractions, concatenated along the columns.
        homed: nodes of which this is the producer kernel.
        sinks: reductions and picks that it writes as sinks, with the values that they reduce.
        over_rows: those of them that sum over rows.
        kept: nodes that it is committed to store if another kernel loads them.
        hidden: nodes that it computes although it could load them.
        layout: the layout of all its commitments; None before the first, or if it must be redone.
        why: for a kernel of one operation, the reason that no kernel fuses it.
        bare: why nothing may be fused into a GEMM; "" if it may.
    """

    kind: Kind
    order: Order
    space: Space
    contracts: tuple[Contract, ...] = ()
    homed: list[Node] = field(default_factory=list[Node])
    sinks: dict[Reduce | Pick, Value] = field(default_factory=dict[Reduce | Pick, Value])
    over_rows: set[Node] = field(default_factory=set[Node])
    kept: set[Node] = field(default_factory=set[Node])
    hidden: set[Node] = field(default_factory=set[Node])
    layout: Layout | None = None
    why: str = ""
    bare: str = ""

    @property
    def rows(self) -> Dim:
        """The number of rows of the kernel."""
        return self.space.rows

    @property
    def width(self) -> int:
        """The number of columns of the kernel."""
        return self.space.width


NEAR = 4  # row-wise kernels before a node's operands that are tried
Room = tuple[Draft, Segment | None]  # a kernel builder, and the columns for a node; None: all


@dataclass
class Drafts:
    """The state of one placement, and questions about it.

    Attributes:
        graph: in normal form.
        sizes: the size of every symbol.
        kinds: all kinds of kernel, in order of preference.
        target: the GPU for which costs are estimated.
        per_call: names of arguments that are new in every call, and so are no weights.
        part_of: contraction of a chunked value -> number of its chunk.
        bare: contraction whose GEMM stores its accumulator alone -> why.
        home: node -> its producer kernel.
        drafts: all kernel builders, unordered.
        behind: number of a GEMM -> the builders after it and before the next GEMM.
        loadable: nodes that are materialised if some kernel loads them.
        joined: materialised concatenation -> the nodes whose producers write its parts.
        piece_of: each of those nodes -> its concatenation.
        stacked: those concatenations whose parts are rows.
        waiting: node of arguments alone, not placed yet -> its depth in operations.
        shared: reduction that is no sink, since its operand shares a GEMM -> why that is cheaper.
        inexact: elementwise nodes that no kernel computes, since float32 is too narrow -> why.
        deferred: rows of what other nodes are, which concatenations along the rows alone read.
        rows: the number of rows of the block.
        tokens: the token symbols. Calls determine their sizes, so no layout depends on them.
    """

    graph: Graph
    sizes: Mapping[str, int]
    kinds: Sequence[Kind]
    target: Target
    per_call: frozenset[str] = frozenset()
    part_of: Mapping[Node, int] = field(default_factory=dict[Node, int])
    bare: Mapping[Node, str] = field(default_factory=dict[Node, str])
    home: dict[Node, Draft] = field(default_factory=dict[Node, Draft])
    drafts: list[Draft] = field(default_factory=list[Draft])
    behind: dict[int, list[Draft]] = field(default_factory=dict[int, list[Draft]])
    loadable: set[Node] = field(default_factory=set[Node])
    names: dict[Node, str] = field(default_factory=dict[Node, str])
    named: dict[str, Node] = field(default_factory=dict[str, Node])
    unfused: list[Unfused] = field(default_factory=list[Unfused])
    joined: dict[Node, tuple[Node, ...]] = field(default_factory=dict[Node, tuple[Node, ...]])
    piece_of: dict[Node, Node] = field(default_factory=dict[Node, Node])
    stacked: set[Node] = field(default_factory=set[Node])
    weights: set[Node] = field(default_factory=set[Node])
    positions: set[Node] = field(default_factory=set[Node])
    inexact: dict[Node, str] = field(default_factory=dict[Node, str])
    siblings: dict[Node, tuple[Contract, ...]] = field(
        default_factory=dict[Node, tuple[Contract, ...]]
    )
    shared: dict[Node, str] = field(default_factory=dict[Node, str])
    users: dict[Node, list[Node]] = field(default_factory=dict[Node, list[Node]])
    deferred: set[Node] = field(default_factory=set[Node])
    waiting: dict[Node, int] = field(default_factory=dict[Node, int])
    rows: Dim = ONE
    tokens: frozenset[str] = frozenset()
    opened: int = 0

    @property
    def known(self) -> dict[str, int]:
        """The sizes on which layouts may depend: all but those of token symbols."""
        return {s: n for s, n in self.sizes.items() if s not in self.tokens}

    # Kernels.

    def opener(self, node: Node) -> Kind:
        """The first kind that can compute a node from memory."""
        return kind_of(self.kinds, node, self.known)

    def price(self, few: Kernels) -> Price:
        """The price of a GEMM that is not placed yet, and of the kernels that reduce its rows."""
        rates = self.target.rates
        time = self.opener(few.contracts[0]).sketched(few.gemm, self.target)
        rows = Time((few.launches - 1) * rates.ramp, memory=few.read / rates.bandwidth)
        return Price(total((time, rows)), few.moved, few.launches)

    @property
    def rowwise(self) -> Kind:
        """The row-wise kind."""
        return next(k for k in self.kinds if k.whole_rows)

    def space(self, width: int, rows: Dim) -> Space:
        """The empty space of a row-wise kernel."""
        return Space(width, rows, self.known, whole_rows=True)

    def open(
        self,
        kind: Kind,
        index: int,
        space: Space,
        contracts: tuple[Contract, ...] = (),
        *,
        why: str = "",
    ) -> Draft:
        """Open a kernel builder, ordered after all others behind the GEMM `index`."""
        self.opened += 1
        draft = Draft(kind, (index, self.opened), space, contracts, why=why)
        space.leaf = lambda n: self.leaf(n, draft)
        space.weights, space.positions = self.weights, self.positions
        space.refused |= self.inexact
        self.drafts.append(draft)
        self.behind.setdefault(index, []).append(draft)
        return draft

    def find_numbers(self, nodes: Sequence[Node]) -> None:
        """Which nodes of whole numbers kernels compute from positions, and which they refuse."""
        chunked = bool(self.part_of)
        found = whole_numbers(nodes, self.graph.roots, self.known, chunked=chunked)
        self.positions, self.inexact = found

    def open_gemm(self, group: tuple[Contract, ...]) -> None:
        """Open one GEMM for contractions of one activation, whose operands are in memory."""
        index = 1 + max((i for i in self.behind if i < LAST), default=0)
        starts = np.cumsum([0] + [c.shape[-1].size(self.sizes) for c in group])
        first: dict[Node, int] = {c: int(s) for c, s in zip(group, starts, strict=False)}
        rows, batched = product(group[0].shape[:-1]), group[0].batched
        space = Space(int(starts[-1]), rows, self.known, accumulators=first, batched=batched)
        draft = self.open(self.opener(group[0]), index, space, group)
        draft.bare = self.bare.get(group[0], "")
        for one in group:
            self.home[one] = draft
            draft.homed.append(one)
            if one in self.loadable:
                draft.kept.add(one)

    def drop(self, draft: Draft) -> bool:
        """Remove a kernel builder without nodes; False if it has some."""
        if draft.homed or draft.sinks:
            return False
        self.drafts.remove(draft)
        self.behind[draft.order[0]].remove(draft)
        return True

    def row_drafts(self, index: int, rows: Dim, width: int) -> list[Draft]:
        """The row-wise builders behind a GEMM that can have `width` columns, or widen to them."""
        return [
            d
            for d in self.behind.get(index, ())
            if d.kind.whole_rows
            and d.space.rows == rows
            and (width in d.space.widths or (d.space.width == 1 and not d.space.apart))
        ]

    def rooms(self, index: int, rows: Dim, width: int) -> list[Room]:
        """The row-wise builders behind a GEMM, with the segments, that allow `width` columns."""
        found: list[Room] = []
        found += [(d, None) for d in self.row_drafts(index, rows, width)]
        for draft in self.behind.get(index, ()):
            if draft.kind.whole_rows and draft.space.rows == rows:
                found += [(draft, s) for s in draft.space.segments if s[1] == width]
        return found

    def untried(self, node: Node, rooms: list[Room], tried: set[Room]) -> list[Room]:
        """The other row-wise kernels to try for a node: first those not before its producers.

        Then a few earlier ones that are wider than the producers, which recompute the operands; a
        concatenation of parts of one matrix is placed so.
        """
        homes = [self.home[o] for o in node.operands if o in self.home]
        last = max((h.order for h in homes), default=(0, 0))
        found = [r for r in rooms if r[0].order >= last]
        widest = max((h.space.width for h in homes), default=0)
        wider = [r for r in rooms if r[0].order < last and r[0].space.width > widest]
        found += sorted(wider, key=lambda r: r[0].order)[-NEAR:]
        return [r for r in found if r not in tried]

    def row_draft(
        self, index: int, rows: Dim, width: int, behind: Order, *, narrow: bool = False
    ) -> Draft:
        """A row-wise builder ordered after `behind`, opened if there is none.

        With `narrow`, only builders of exactly `width` columns are reused.
        """
        for draft in self.row_drafts(index, rows, width):
            if draft.order > behind and (draft.space.width == width or not narrow):
                return draft
        return self.open(self.rowwise, index, self.space(width, rows))

    def hosts(self, node: Node) -> list[Draft]:
        """The builders, last first, that have the elements of a node and load its arguments.

        For a reduction, or a cast of one, it is the elements of the reduction's operand.
        """
        under = node
        while isinstance(under, Cast | Reshape):
            under = under.arg
        node = under.arg if isinstance(under, Reduce) else node
        found: list[Draft] = []
        for draft in reversed(self.drafts):
            fits = draft.kind.fuses and draft.space.is_filled_by(product(node.shape))
            if fits and self.loads_all_of(node, draft):
                found.append(draft)
        return found

    def loads_all_of(self, node: Node, draft: Draft) -> bool:
        """Whether a kernel loads all arguments of a node that are at least as large as the node."""
        elements = product(node.shape).size(self.sizes)
        leaves = pointwise_leaves(node, self.weights)
        needed = {n for n in leaves if product(n.shape).size(self.sizes) >= elements}
        loaded = {o for n in draft.space.values for o in leaves_of(n, self.weights)}
        return bool(needed) and needed <= loaded

    # Rows.

    def counts_rows(self, dim: Dim) -> bool:
        """Whether a size depends on the number of tokens, which only the call determines."""
        return bool(dim.symbols & self.tokens)

    def joins(self, node: Node) -> bool:
        """Whether a node concatenates rows of other nodes, or functions of rows, along the rows."""
        if not isinstance(node, Concat) or not joins_windows(node):
            return False
        axis = node.rank + node.axis
        leads = (product(node.shape[:i]) for i in range(axis + 1, node.rank))
        return self.counts_rows(node.shape[axis]) or self.rows in leads

    def read_by(self, node: Node) -> list[Node]:
        """The operands of a node; of a concatenation of rows, the nodes of which these are rows."""
        if not isinstance(node, Concat) or not self.joins(node):
            return list(node.operands)
        found: dict[Node, None] = {}
        stack = list(node.operands)
        while stack:
            one = stack.pop()
            if is_window(one, node.axis) and not isinstance(one, Slice):
                stack.extend(one.operands)
            else:
                found[one.operands[0] if is_window(one, node.axis) else one] = None
        return list(found)

    def folds_rows(self, node: Reduce) -> bool:
        """Whether a reduction folds one number per row, over the rows."""
        axis = node.rank + node.axis
        return self.counts_rows(node.arg.shape[axis]) and product(node.shape[axis:]) == ONE

    def shapes(self, node: Node, *, groups: bool = False) -> list[tuple[Dim, Dim]]:
        """The (rows, columns) of a node as a matrix whose columns have no token symbol."""
        if isinstance(node, Reduce) and self.folds_rows(node):
            return [(product(node.shape), ONE)]
        found = row_shapes(node, self.rows, groups=groups)
        found = [(rows, columns) for rows, columns in found if not self.counts_rows(columns)]
        if not found and not symbols_of(node.shape) - self.tokens and not isinstance(node, Reduce):
            last = max((i for i, d in enumerate(node.shape) if d.symbols), default=-1)
            found.append((product(node.shape[: last + 1]), product(node.shape[last + 1 :])))
        return found

    def waiting_folds(self, node: Node) -> list[Reduce]:
        """The folds over rows that a node depends on and that are not placed yet."""
        found: list[Reduce] = []
        stack, seen = list(node.operands), set[Node]()
        while stack:
            one = stack.pop()
            if one in seen or one in self.home or one in self.weights:
                continue
            seen.add(one)
            if isinstance(one, Reduce) and self.folds_rows(one):
                found.append(one)
            else:
                stack.extend(one.operands)
        return found

    def comes_last(self, node: Node) -> bool:
        """Whether all users of a node, transitively, are elementwise and of its size."""
        stack = list(self.users[node])
        while stack:
            one = stack.pop()
            if product(one.shape) != product(node.shape) or not is_pointwise(one):
                return False
            stack.extend(self.users[one])
        return True

    # Memory.

    def leaf(self, node: Node, draft: Draft) -> str | None:
        """The name under which a kernel loads a node; None if it cannot load it."""
        if isinstance(node, Const) or (isinstance(node, Size) and not self.counts_rows(node.dim)):
            return None
        if isinstance(node, Input | Size):
            return self.name(node)
        if node in self.weights:
            return self.name(node)
        if node in draft.hidden:
            return None
        if self.in_memory(node, draft):
            return self.name(node)
        under = self.storage(node)
        if under is node or not (isinstance(under, Input) or self.in_memory(under, draft)):
            return None
        space = draft.space
        fills = space.matches(product(under.shape)) and space.has_rows(under)
        return None if fills else self.name(node)

    def in_memory(self, node: Node, draft: Draft) -> bool:
        """Whether a node is, or can be, stored by an earlier kernel."""
        home = self.home.get(node)
        return node in self.loadable and home is not None and home.order < draft.order

    def storage(self, node: Node) -> Node:
        """The node whose memory a view aliases; the view itself if it needs its own memory."""
        while is_view(node) and node not in self.piece_of:
            under = base(node)
            free = isinstance(under, Input) or isinstance(node, Reshape) or is_transposed(node)
            free = free or self.only_in_batches(node)
            if not free and not (isinstance(node, Slice) and self.known_before(node.arg, node)):
                return node
            node = node.operands[0]
        return node

    def only_in_batches(self, node: Node) -> bool:
        """Whether all readers of a view, such as batched contractions, accept any strides."""
        above = self.users.get(node, []) if is_view(node) else []
        return bool(above) and all(reads_strided(u) or self.only_in_batches(u) for u in above)

    def known_before(self, node: Node, view: Slice) -> bool:
        """Whether a node is materialised, and not later than a stored view of it."""
        node = self.storage(node)
        if node not in self.loadable:
            return False
        home, early = self.home.get(node), self.home.get(view)
        late = home is not None and early is not None and home.order > early.order
        return not (late and view in self.loadable)

    def only_returned(self, node: Node) -> bool:
        """Whether a view is only returned, so that it can alias its operand's memory."""
        return is_view(node) and all(self.only_returned(u) for u in self.users[node])

    def is_returned_view(self, node: Node) -> bool:
        """Whether a node is only returned, as a view of what is in memory."""
        return self.only_returned(node) and self.storage(node) is not node

    def name(self, node: Node) -> str:
        """The name of a materialised node, given at the first call."""
        if node not in self.names:
            self.names[node] = node.name if isinstance(node, Input) else self.new_name(node)
            self.named[self.names[node]] = node
        return self.names[node]

    def new_name(self, node: Node) -> str:
        """The output's name for an output, otherwise t1, t2 and so on."""
        for name, root in self.graph.outputs:
            if root is node:
                return f"{name}_out" if name in self.named else name
        return next(n for i in count(len(self.names)) if (n := f"t{i}") not in self.named)
