"""What a row-wise kernel stores and reduces -> what it loads for it, of the fewest bytes.

Placement lets a kernel load an operand as soon as it asks for one. Several of them may be functions
of one value that their producer can store as well. So the loads are chosen anew when all that the
kernel writes is known, by a minimum cut between its arguments and its results: a load costs the
bytes that are read, and those that are written if no other kernel needs them. What is between the
cut and the results is computed in the kernel. The cut never moves work to an earlier kernel.

    gemm0 stores silu z, silu' z; rows1 loads both  ->  gemm0 stores z; rows1 computes both
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

from coda.ir.dims import product
from coda.ir.graph import Concat, Const, Input, Node, Pick, Reduce, Size
from coda.lowering.algebra.min_cut import minimum_cut
from coda.lowering.algebra.roles import is_pointwise, is_view, summand
from coda.lowering.placement.draft import Draft
from coda.lowering.placement.place import Partition
from coda.lowering.placement.values import Refused


@dataclass(frozen=True)
class Loads:
    """The choice of what one row-wise kernel loads.

    Attributes:
        partition: the placement.
        draft: the kernel's builder.
        stored, sunk: what it writes; `draft.sinks` has the value of each sink.
        is_needed: whether a materialised node is stored whatever this kernel loads.
        exact: nodes that are never recomputed, since they are compared with their maximum.
    """

    partition: Partition
    draft: Draft
    stored: Sequence[Node]
    sunk: Sequence[Reduce | Pick]
    is_needed: Callable[[Node], bool]
    exact: Set[Node]

    def reduce_bytes(self) -> None:
        """Load other nodes than before if these are fewer bytes and no kernel refuses."""
        if self.draft.space.lines:  # folds over rows read their operands from memory alone
            return
        roots = [*self.stored, *map(self.reduced, self.sunk)]
        present = self.behind(roots, self.is_loaded)
        loads = [n for n in present if self.is_loaded(n)]
        own = set(present) - set(loads)
        nodes = self.behind(roots, self.is_source)
        before = [self.bytes_of(n) or 0 for n in loads]

        def cost(node: Node) -> int | None:
            new_view = is_view(node) and node not in loads
            return None if node in own or new_view else self.bytes_of(node)

        free = set(filter(self.is_free, nodes))
        cut = minimum_cut(roots, free, set(filter(self.is_source, nodes)), cost, nodes=nodes)
        after = [cost(n) for n in cut]
        if all(c is not None for c in after) and sum(c or 0 for c in after) < sum(before):
            self.load(cut, [n for n in nodes if n not in cut and not self.is_given(n)])

    def reduced(self, sink: Reduce | Pick) -> Node:
        """The node that a sink reduces."""
        if isinstance(sink, Reduce) and sink in self.draft.over_rows:
            return summand(sink)
        return sink.arg

    def behind(self, roots: Iterable[Node], ends: Callable[[Node], bool]) -> list[Node]:
        """The nodes on which `roots` depend, operands first; none beyond one that `ends`."""
        found: list[Node] = []
        seen: set[Node] = set()
        stack = [(r, False) for r in roots]
        while stack:
            node, ready = stack.pop()
            if ready:
                found.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                if not self.is_free(node) and not ends(node):
                    stack += [(o, False) for o in node.operands]
        return found

    def is_free(self, node: Node) -> bool:
        """Whether a node costs no load: a number, or what the kernel folds from partials."""
        return isinstance(node, Const | Size) or node in self.draft.space.folded

    def is_given(self, node: Node) -> bool:
        """Whether a node is in memory before the call's first kernel."""
        return isinstance(node, Input) or node in self.partition.weights

    def is_loaded(self, node: Node) -> bool:
        """Whether the kernel loads a node that it needs, as placement decided."""
        return not self.is_free(node) and self.partition.leaf(node, self.draft) is not None

    def is_source(self, node: Node) -> bool:
        """Whether the kernel cannot compute a node from its operands, or must not."""
        if self.is_given(node) or node in self.exact or node in self.draft.space.refused:
            return True
        own = node in self.draft.space.values and self.partition.leaf(node, self.draft) is None
        return not (own or is_pointwise(node) or isinstance(node, Concat))

    def bytes_of(self, node: Node) -> int | None:
        """The bytes that loading a node costs; None if no earlier kernel has it."""
        under = self.partition.storage(node)
        size = product(node.shape).size(self.partition.sizes) * node.dtype.size
        if self.is_given(under):
            return size
        home = self.partition.home.get(under)
        if home is None or home.order >= self.draft.order:
            return None
        return size if self.is_needed(under) else 2 * size

    def load(self, cut: Sequence[Node], computed: Sequence[Node]) -> None:
        """Load the nodes of a cut and compute what follows; no change if a kernel refuses."""
        under = [n for n in map(self.partition.storage, cut) if not self.is_given(n)]
        left = {self.partition.storage(n) for n in computed}
        given = [n for n in under if n not in self.partition.loadable]
        homes = {self.partition.home[n] for n in given}
        kept = {d: set(d.kept) for d in homes}
        draft = self.draft
        before = draft.space, draft.sinks, draft.kept, draft.hidden
        try:
            for home in homes:
                home.kept -= {n for n in left if not self.is_needed(n)}
                home.layout = None
            for node in given:
                self.partition.offer(node)
            draft.hidden = set(computed)
            self.compute_anew()
        except Refused:
            draft.space, draft.sinks, draft.kept, draft.hidden = before
            self.partition.loadable.difference_update(given)
            for home, nodes in kept.items():
                home.kept, home.layout = nodes, None

    def compute_anew(self) -> None:
        """Compute all that the kernel writes from its new loads, and lay it out."""
        draft = self.draft
        draft.space, draft.kept, draft.layout = draft.space.emptied(), set(self.stored), None
        values = {s: draft.space.compute(self.reduced(s)) for s in self.sunk}
        draft.sinks = draft.sinks | values
        draft.space.sunk += [v for s, v in values.items() if s in draft.over_rows]
        self.partition.check(draft)
