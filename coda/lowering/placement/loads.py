"""What a row-wise kernel stores and reduces -> what it loads for it, of the fewest bytes.

Placement lets a kernel load an operand as soon as it asks for one. Several of them may be functions
of one value that their producer can store as well. So the loads are chosen anew when all that the
kernel writes is known, by a minimum cut between its arguments and its results: a load costs the
bytes that are read, and those that are written if no other kernel needs them. What is between the
cut and the results is computed in the kernel. If a kernel refuses the cut, the least part of the
present loads is tried. The cut never moves work to an earlier kernel.

    gemm0 stores silu z, silu' z; rows1 loads both  ->  gemm0 stores z; rows1 computes both
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from math import inf

from coda.ir.dims import product
from coda.ir.graph import Concat, Const, Input, Node, Pick, Reduce, Size
from coda.lowering.algebra.min_cut import minimum_cut
from coda.lowering.algebra.roles import is_pointwise, is_view, reduced, summand
from coda.lowering.placement.draft import Draft
from coda.lowering.placement.place import Partition
from coda.lowering.placement.values import Refused
from coda.lowering.program.epilogue import held

# Values of a GEMM's epilogue at a point (loaded, stored and reduced ones), beside an accumulator in
# registers, at which their number does not say whether ptxas 13 spills: of 8 to 10 both occur.
CROWDED = 8


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
        for among in (nodes, loads):
            cut = self.least(roots, nodes, {n for n in among if n in loads or self.is_new(n, own)})
            less = self.total(cut) < self.total(loads)
            if less and self.load(cut, [n for n in nodes if n not in cut and not self.is_given(n)]):
                return

    def is_new(self, node: Node, own: Set[Node]) -> bool:
        """Whether a kernel that computes its `own` nodes may load a node that it does not load."""
        return node not in own and not is_view(node)

    def least(self, roots: Iterable[Node], nodes: list[Node], among: Set[Node]) -> list[Node]:
        """The nodes `among` all that cost the fewest bytes to load, and suffice for the roots."""
        free, sources = set(filter(self.is_free, nodes)), set(filter(self.is_source, nodes))

        def cost(node: Node) -> int | None:
            return self.bytes_of(node) if node in among else None

        return minimum_cut(roots, free, sources, cost, nodes=nodes)

    def total(self, loads: Iterable[Node]) -> float:
        """The bytes that some loads cost together; infinite if one cannot be loaded."""
        found = [self.bytes_of(n) for n in loads]
        return inf if None in found else sum(f or 0 for f in found)

    def reduced(self, sink: Reduce | Pick) -> Node:
        """The node that a sink reduces."""
        if isinstance(sink, Reduce) and sink in self.draft.over_rows:
            return summand(sink)
        return reduced(sink)

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

    def load(self, cut: Sequence[Node], computed: Sequence[Node]) -> bool:
        """Load the nodes of a cut and compute what follows; False if a kernel refuses."""
        partition, draft = self.partition, self.draft
        under = [n for n in map(partition.storage, cut) if not self.is_given(n)]
        left = {partition.storage(n) for n in computed}
        left = {n for n in left & partition.loadable if not self.is_needed(n)}
        given = [n for n in under if n not in partition.loadable]
        homes = {h for n in (*given, *left) if (h := partition.home[n]).order < draft.order}
        kept = {d: set(d.kept) for d in homes}
        before = draft.space, draft.sinks, draft.kept, draft.hidden
        try:
            for home in homes:
                home.kept -= left
                home.layout = None
            for node in given:
                partition.offer(node)
            for home in homes:
                self.check_registers(home, under)
            draft.hidden = set(computed)
            self.compute_anew()
            return True
        except Refused:
            draft.space, draft.sinks, draft.kept, draft.hidden = before
            partition.loadable.difference_update(given)
            for home, nodes in kept.items():
                home.kept, home.layout = nodes, None
            return False

    def check_registers(self, home: Draft, under: Sequence[Node]) -> None:
        """Raise Refused if a GEMM would hold as many values at once as registers beside a tile.

        At that limit ptxas spills in one kernel and not in another of as many values, so what such
        a GEMM stores stays as it was placed. What it stores for this kernel (`under`) and for
        others counts, not all that it could. An accumulator in tensor memory leaves the registers
        to the epilogue.
        """
        if not home.kind.tiled or self.partition.target.tensor_memory:
            return
        kept = set(home.kept)
        home.kept = {n for n in kept if n in under or self.is_needed(n)}
        try:
            found = self.partition.check(home)
        finally:
            home.kept, home.layout = kept, None
        if found is not None and held(found.epilogue) >= CROWDED:
            raise Refused("registers do not hold the values of the epilogue that would store it")

    def compute_anew(self) -> None:
        """Compute all that the kernel writes from its new loads, and lay it out."""
        draft = self.draft
        draft.space, draft.kept, draft.layout = draft.space.emptied(), set(self.stored), None
        values = {s: draft.space.compute(self.reduced(s)) for s in self.sunk}
        draft.sinks = draft.sinks | values
        draft.space.sunk += [v for s, v in values.items() if s in draft.over_rows]
        self.partition.check(draft)
