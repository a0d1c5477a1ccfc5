"""Graph in normal form -> placement: the producer kernel of each node, and the loadable nodes.

Nodes are placed greedily, operands first. Contractions of one activation open a GEMM. Any other
node goes to the last producer of its operands if that kernel can compute it (`columns`), otherwise
to a row-wise kernel after it, otherwise to torch. A reduction over a GEMM's columns becomes a sink,
whose partials a row-wise kernel folds. Kernel builders decide at once what they can store
(`admit`), so a node is placed a second time only if its first kernel cannot store it.

    z = x wᵀ, y = silu(z / rms z)    gemm0: store z, sink z²    rows1: fold, scale, silu, store y
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from coda.ir.attend import Attend, AttendGradient
from coda.ir.dims import ONE, product
from coda.ir.graph import (
    Concat,
    Const,
    Contract,
    Input,
    Map,
    Node,
    Pick,
    Reduce,
    Size,
    users,
    walk,
)
from coda.ir.monoids import MONOIDS
from coda.lowering.algebra.compared import compared, sources
from coda.lowering.algebra.roles import (
    fewer_rows_first,
    gemms,
    in_order,
    is_pointwise,
    reduced,
    row_axes,
    row_symbols,
    sequence_of,
    stacks,
    summand,
    weight_nodes,
    windows,
)
from coda.lowering.placement.columns import Space
from coda.lowering.placement.draft import LAST, Draft, Room
from coda.lowering.placement.siblings import Uses, apart_by_types, group_siblings, own_gemms
from coda.lowering.placement.small_rows import SmallRows
from coda.lowering.placement.space_state import Segment
from coda.lowering.placement.values import LONGEST, Refused, Value
from coda.lowering.program.cost import seconds_of
from coda.lowering.program.program import Unfused

Give = Callable[[Node], list[Node]]  # makes nodes loadable, and returns some of them


@dataclass
class Partition(SmallRows):
    """The placement of a graph: `run` places all nodes."""

    small: bool = True

    def run(self) -> Partition:
        """Place every node, and make outputs and operands of contractions loadable."""
        nodes = fewer_rows_first(in_order(self.graph.roots))
        self.users = users(self.graph.roots)
        self.named = {i.name: i for i in self.graph.inputs}
        self.weights = weight_nodes(nodes, self.per_call)
        contracts = [n for n in gemms(nodes) if n not in self.weights]
        self.tokens, self.rows = row_symbols(nodes), row_axes(contracts, self.graph.inputs)
        self.find_numbers(nodes)
        uses = Uses.of(contracts, nodes, self.graph.roots, self.weights, self.part_of)
        groups = group_siblings(contracts, uses)
        groups = apart_by_types(groups, uses, self.sizes, partial(seconds_of, self.target))
        self.siblings, self.shared = own_gemms(groups, uses, self.sizes, self.price)
        forced = [*self.graph.roots, *(o for c in contracts for o in c.operands)]
        self.loadable = {self.storage(n) for n in forced}
        joins = [n for n in nodes if isinstance(n, Concat) and self.joins(n)]
        self.deferred = windows(joins, self.users) - set(self.graph.roots)
        asked = compared(self.graph.roots)
        for node in self.small_first(nodes):
            if not isinstance(node, Input | Const | Size) and node not in self.weights:
                if node in asked:
                    self.store_first(node)
                self.place(node)
        for root in self.graph.roots:
            self.materialise(root, host=True)
        return self

    # Placing.

    def place(self, node: Node) -> None:
        """Choose the producer kernel of a node."""
        if node in self.home or node in self.deferred or self.only_in_batches(node):
            return
        if isinstance(node, Contract | Attend | AttendGradient):
            self.contract(node)
            return
        if self.in_small_rows(node):
            return
        homes = [self.home[o] for o in self.read_by(node) if o in self.home]
        if not homes:  # of inputs alone: placed when a kernel needs it, or at half of LONGEST
            self.waiting[node] = 1 + max((self.waiting.get(o, 0) for o in node.operands), default=0)
            if self.waiting[node] == LONGEST // 2:
                self.materialise(node)
            return
        last = max(homes, key=lambda d: d.order)
        if isinstance(node, Reduce) and self.folds_rows(node):
            self.in_rows(node, last.order[0])
            return
        if isinstance(node, Reduce) and not last.kind.tiled and self.sunk(node, last):
            return
        if isinstance(node, Concat) and not self.joins(node) and self.joined_by(node, last):
            return
        if last.kind.tiled:
            if isinstance(node, Reduce | Pick) and self.sink(node, last):
                return
            why = self.absorb(node, last)
            if not why:
                return
            if self.only_returned(node):
                return
            self.unfused.append(Unfused(node, self.shared.get(node, why)))
        view = last.kind.whole_rows and self.is_returned_view(node)
        moved = last.kind.whole_rows and not view and self.reorder(node, last)
        if not (view or moved or self.in_own_rows(node, [last])):
            self.in_rows(node, last.order[0])

    def store_first(self, node: Node) -> None:
        """Materialise the values whose maximum is compared with them, before the maximum."""
        for source in sources([node]) - self.weights:
            self.materialise(source)
            home = self.home.get(self.storage(source))
            if home is not None:
                home.space.refused[node] = "its values are compared with it as they are in memory"

    def joined_by(self, node: Concat, draft: Draft) -> bool:
        """Let several kernels write one buffer, if a concatenation is too wide or of rows."""
        if self.too_wide(node, draft) and self.join(node):
            return True
        return stacks(node) and self.join(node, stacked=True)

    def too_wide(self, node: Concat, draft: Draft) -> bool:
        """Whether a concatenation along the columns is wider than a kernel."""
        width = node.shape[-1].size(self.sizes)
        return draft.kind.fuses and node.axis == -1 and width > draft.space.width

    def contract(self, node: Contract | Attend | AttendGradient) -> None:
        """Open the GEMM of a contraction and its siblings, or a kernel of one node."""
        if not isinstance(node, Contract) or not self.opener(node).fuses:
            why = [k.refuses(node, self.known) for k in self.kinds if k.tiled]
            self.by_itself(node, 0, ", ".join(why))
            return
        group = self.siblings.get(node, (node,))
        for operand in (o for one in group for o in one.operands):
            self.materialise(operand, host=True)
        self.open_gemm(group)

    def absorb(self, node: Node, draft: Draft) -> str:
        """Place a node in a kernel; the reason if the kernel refuses, otherwise ""."""
        why, space = "", draft.space
        if draft.bare:
            return draft.bare
        if space.batched and self.reorder(node, draft):
            return ""
        for segmented in (True, False) if draft.kind.whole_rows else (False,):
            space.segmented = segmented
            try:
                with space.attempt(lambda n: self.home.get(n) is draft):
                    before = len(space.groups), len(space.statistics)
                    if isinstance(node, Map):
                        space.columns(node)  # before its operands are placed for it
                    self.reach_all(node, draft)
                    value = space.compute(node)
                    if draft.kind.tiled and value.count > 2 * space.width:
                        raise Refused("each column of the kernel would be written several times")
                    asked = node in self.loadable or (value.narrow and space.whole_rows)
                    if asked or before != (len(space.groups), len(space.statistics)):
                        self.check(draft, node if asked else None)
                break
            except Refused as refusal:
                why = why or str(refusal)
        else:
            return why
        self.home[node] = draft
        draft.homed.append(node)
        if draft.kind.whole_rows and space.values[node].narrow:
            self.loadable.add(node)
        if node in self.loadable:
            draft.kept.add(node)
        return ""

    def sunk(self, node: Reduce, last: Draft) -> bool:
        """Make a sum over rows a sink of some kernel; False if all refuse."""
        return self.sunk_late(node) or self.summed_in_pass(node, last.order[0])

    def sunk_late(self, node: Reduce) -> bool:
        """Make a sum over a weight's rows a sink of the GEMM of the weight's gradient."""
        homes = [self.home[o] for o in walk([node.arg]) if o in self.home]
        for draft in self.hosts(node.arg):
            known = all(h.order < draft.order for h in homes)
            if draft.kind.tiled and known and self.sums_rows(node, draft):
                return self.sink(node, draft)
        return False

    def sink(self, node: Reduce | Pick, draft: Draft) -> bool:
        """Make a reduction over all columns, or a pick, a sink of a GEMM; False if it cannot be.

        A row-wise kernel after it folds the partials. Sums over rows go to `sink_rows`.
        """
        if isinstance(node, Reduce) and not MONOIDS[node.fn].tiled:
            return False
        if isinstance(node, Reduce) and self.sums_rows(node, draft):
            return self.sink_rows(node, draft)
        if not draft.kind.tiled or draft.bare:
            return False
        moments = self.moments(node, draft) if isinstance(node, Reduce) else []
        node = moments[-1] if moments else node
        try:
            self.reach_all(reduced(node), draft)
            value = draft.space.compute(reduced(node))
            if isinstance(node, Pick):
                self.index_of(node, draft)
        except Refused:
            return False
        whole = value.shape[-1:] == (value.count,) and value.slots.shape[1] > 0
        along = not isinstance(node, Reduce) or node.axis == -1
        if not (whole and along and value.count in (draft.space.width, draft.space.width // 2)):
            return False
        halved = value.count < draft.space.width
        row = MONOIDS[node.fn] if isinstance(node, Reduce) else None
        if halved and not (row and (row.sums or row.chosen)):
            return False  # one value per pair: the second lane would count it twice
        if not self.admits_sink(draft, node, value):
            return False
        if isinstance(node, Pick):
            draft.sinks[node] = value
            self.home[node] = draft
            self.loadable.add(node)
            return True
        after = self.row_draft(draft.order[0], draft.space.rows, 1, draft.order)
        for one in moments or [node]:
            draft.space.refused[one] = "its total is known only after this kernel"
            self.fold(one, after)
        draft.sinks[node] = value
        after.space.fold(node, moments[0] if moments else None)
        return True

    def fold(self, node: Reduce, after: Draft) -> None:
        """Place a reduction in the row-wise kernel that folds its partials."""
        self.home[node] = after
        after.homed.append(node)
        after.kept.add(node)
        self.loadable.add(node)

    def sink_rows(self, node: Reduce, draft: Draft) -> bool:
        """Make a sum over rows a sink of a kernel; a later kernel folds it. False if refused."""
        if draft.bare:
            return False
        under, space = summand(node), draft.space
        count = product(under.shape).size(self.sizes) // max(1, space.rows.size(self.sizes))
        spans = [None, *(s for s in space.segments if s[1] == count)]
        for segment in spans[: 1 if draft.kind.tiled else None]:
            try:
                with space.inside(segment), space.attempt(lambda n: self.home.get(n) is draft):
                    (self.reach_all if is_pointwise(under) else self.reach)(under, draft)
                    value = space.compute(under)
                    if draft.kind.tiled and value.count != space.width:
                        raise Refused("it does not have all columns of the kernel")
                    space.place_of(value)
                    sums = [n for n in (*draft.over_rows, node) if isinstance(n, Reduce)]
                    if len({sequence_of(n) for n in sums} - {None}) > 1:
                        raise Refused("its kernel sums the rows of sequences of other lengths")
                    self.check(draft, sink=(node, value))
            except Refused:
                continue
            self.fold_rows(node, draft, value)
            return True
        return False

    def fold_rows(self, node: Reduce, draft: Draft, value: Value) -> None:
        """Record a sum over rows as a sink, and the kernel that folds its partials."""
        end = all(self.only_returned(u) for u in self.users[node])
        index = LAST if end else draft.order[0]
        after = self.row_draft(index, product(node.shape), 1, draft.order, narrow=True)
        draft.space.refused[node] = "its total is known only after this kernel"
        self.fold(node, after)
        draft.sinks[node] = value
        draft.space.sunk.append(value)
        draft.over_rows.add(node)
        after.space.fold(node)

    def summed_in_pass(self, node: Reduce, index: int) -> bool:
        """Make a sum over rows a sink of a kernel that has its values, or of a new row-wise one."""
        under = summand(node)
        homes = [self.home[o] for o in walk([under]) if o in self.home]
        passes = [d for d in self.drafts if d.kind.whole_rows]
        order = [d for d in passes if self.loads_all_of(under, d)]
        order += [d for d in self.hosts(under) if d.kind.tiled]
        order += [d for d in passes if d not in order]
        for draft in order:
            known = all(h is draft or h.order < draft.order for h in homes)
            if known and self.sums_rows(node, draft) and self.sink_rows(node, draft):
                return True
        for rows, columns in self.shapes(under):
            width = columns.size(self.sizes)
            draft = self.open(self.rowwise, index, self.space(width, rows))
            if width > 1 and self.sums_rows(node, draft) and self.sink_rows(node, draft):
                return True
            self.drop(draft)
        return False

    def moments(self, node: Reduce, draft: Draft) -> list[Reduce]:
        """Two reductions of one value that one sink computes (mean and variance), or []."""
        same = [u for u in self.users[node.arg] if isinstance(u, Reduce) and u.axis == node.axis]
        same = [u for u in same if u not in self.home and u.arg is node.arg]
        both = [[u, v] for v in same for u in same if u.fn == MONOIDS[v.fn].also]
        both = [b for b in both if node in b and self.precede(b[-1].operands, draft)]
        return next(iter(both), list[Reduce]())

    def after_rows(self, node: Reduce, index: int) -> int:
        """Materialise the operand of a fold over rows; the number of the GEMM before the fold."""
        self.materialise(node.arg, host=True)
        if self.comes_last(node):
            return LAST
        home = self.home.get(self.storage(node.arg))
        return max(index, home.order[0] if home else 0)

    def in_rows(self, node: Node, index: int) -> None:
        """Place a node in a row-wise kernel after the GEMM `index`, or in a kernel of its own."""
        for one in self.waiting_folds(node):
            if one not in self.home:  # placed with another
                self.in_rows(one, index)
        if isinstance(node, Reduce) and self.folds_rows(node):
            index = self.after_rows(node, index)
        elif isinstance(node, Reduce) and self.summed_in_pass(node, index):
            return
        # First recompute the operands; then load the operands' operands; last, the operands.
        why = self.in_some_rows(node, index, (self.provide, self.keep_operands, None))
        if not why:
            return
        for operand in node.operands:
            self.materialise(operand)
        if isinstance(node, Concat) and self.join_either(node):
            return
        self.loadable.add(node)
        if self.in_some_rows(node, self.after_operands(node, index), (None,)):
            self.by_itself(node, index, why)

    def in_some_rows(self, node: Node, index: int, gives: Sequence[Give | None]) -> str:
        """Place a node in a row-wise kernel, an open one or a new one.

        Args:
            node: the node.
            index: the number of a GEMM before the kernel.
            gives: each makes more nodes loadable, and is called where all kernels refuse.

        Returns:
            The reason if all kernels refuse; otherwise "".
        """
        why, kept = "no kernel computes it", list[Node]()
        for rows, columns in self.shapes(node, groups=True):
            width, tried = columns.size(self.sizes), set[Room]()
            for give in gives:
                while new := self.untried(node, self.rooms(index, rows, width), tried):
                    tried.add(new[0])
                    draft, segment = new[0]
                    why = self.absorb_wide(node, draft, width, segment)
                    if not why:
                        self.take_back(kept, draft)
                        return ""
                draft = self.open(self.rowwise, index, self.space(width, rows))
                why = self.absorb(node, draft)
                if not why:
                    self.take_back(kept, draft)
                    return ""
                dropped = self.drop(draft)
                below = walk([node], until=Reduce) if is_pointwise(node) else ()
                if self.in_own_rows(node, {self.home[n]: 0 for n in below if n in self.home}):
                    self.take_back(kept, self.home[node])
                    return ""
                given = give(node) if dropped and give is not None else []
                if not given and give != self.provide:
                    break
                tried.clear()
                kept += given
                index = self.after_operands(node, index)
        return why

    def in_own_rows(self, node: Node, drafts: Iterable[Draft]) -> bool:
        """Place a node in a row-wise kernel with its elements in rows other than the block's.

        So what follows a statistic of groups of columns, each a row, is computed where it is.
        """
        elements = product(node.shape)
        for draft in drafts if is_pointwise(node) else ():
            space = draft.space
            other = draft.kind.whole_rows and space.width > 1 and space.rows != self.rows
            fits = elements == space.rows or space.is_filled_by(elements)
            if other and fits and not self.absorb(node, draft):
                return True
        return False

    def after_operands(self, node: Node, index: int) -> int:
        """The number of the last GEMM before the kernels of a node's operands; at least `index`."""
        homes = [self.home.get(self.storage(o)) for o in node.operands]
        return max([index, *(h.order[0] for h in homes if h is not None)])

    def absorb_wide(self, node: Node, draft: Draft, width: int, segment: Segment | None) -> str:
        """Place a node in a row-wise kernel, which widens to the node's width if it is narrower."""
        homed = len(draft.homed)
        old, draft.space.width = draft.space.width, max(width, draft.space.width)
        with draft.space.inside(segment):
            why = self.absorb(node, draft)
        if why and len(draft.homed) == homed:  # no operand was placed here meanwhile
            draft.space.width = old
        return why

    def by_itself(self, node: Node, index: int, why: str) -> None:
        """Place a node after the GEMM `index` in its own kernel, or that of its other parts."""
        draft = next((self.home[p] for p in node.parts if p in self.home), None)
        if draft is None:
            for operand in node.operands:
                self.materialise(operand)
            last = self.after_operands(node, index)
            draft = self.open(self.opener(node), last, Space(0, ONE, self.known), why=why)
        draft.homed.append(node)
        self.home[node] = draft
        self.loadable.add(node)
        if draft.kind.code is None:
            self.unfused.append(Unfused(node, why))
