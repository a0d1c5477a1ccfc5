"""Placement -> Program, by a backward walk over the kernel builders.

Each kernel stores exactly the values that a later kernel loads or that are returned; a kernel of
which nothing is needed is dropped. The walk creates buffers, bodies and mainloops.

    builders gemm0 (a, b), rows1 (c reads a); c returned:  rows1 stores c, gemm0 stores a, not b
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from coda.errors import InternalError
from coda.ir.dims import ONE, Dim, Shape, product
from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Contract,
    Expand,
    Graph,
    Input,
    Map,
    Node,
    Permute,
    Pick,
    Reduce,
    Reshape,
    Size,
    walk,
)
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SCALARS
from coda.ir.types import DType, f32
from coda.lowering.algebra.chunk import ChunkedValue
from coda.lowering.algebra.compared import compared, sources
from coda.lowering.algebra.policy import MemoryPolicy
from coda.lowering.algebra.rewrite import LawApplication, substituted
from coda.lowering.algebra.roles import reduced, summand
from coda.lowering.placement.draft import Draft, Order
from coda.lowering.placement.layout import assemble
from coda.lowering.placement.loads import Loads
from coda.lowering.placement.place import Partition
from coda.lowering.placement.stores import Group, Sink, Store, grouped
from coda.lowering.placement.values import Refused, Value
from coda.lowering.program.access import OneElement, Tile
from coda.lowering.program.body import Body, Spread
from coda.lowering.program.epilogue import Operand
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Buffer, ColumnSlice, Program
from coda.lowering.program.target import Target


def build(
    partition: Partition,
    source: Graph,
    *,
    target: Target,
    frozen: bool,
    policy: MemoryPolicy,
    steps: Sequence[LawApplication],
    cuts: Sequence[ChunkedValue],
) -> Program:
    """Build the Program of a placement.

    Args:
        partition: the placement of the graph in normal form.
        source: the block as the user wrote it.
        target, frozen, policy, steps, cuts: as in `Program`.

    Raises:
        InternalError: if a value is needed that no kernel computes.
    """
    names = [name for name, _ in source.outputs]
    built = _Build(partition, tuple(zip(names, partition.graph.roots, strict=True)))
    kernels = built.run()
    return Program(
        graph=source,
        normal=partition.graph,
        sizes=dict(partition.sizes),
        target=target,
        kernels=kernels,
        buffers=built.buffers,
        places=built.places,
        outputs=built.outputs,
        joined=built.joined,
        stacked=frozenset(built.stacked),
        weights=frozenset(partition.weights),
        prepared=built.prepared,
        steps=tuple(steps),
        unfused=tuple(u for u in partition.unfused if u.node in partition.home),
        fixed=frozenset(source.symbols) - partition.tokens,
        frozen=frozen,
        policy=policy,
        cuts=tuple(cuts),
    )


@dataclass
class _Build:
    partition: Partition
    outputs: tuple[tuple[str, Node], ...]
    buffers: dict[str, Buffer] = field(default_factory=dict[str, Buffer])
    places: dict[Node, ColumnSlice] = field(default_factory=dict[Node, ColumnSlice])
    prepared: dict[str, Node] = field(default_factory=dict[str, Node])
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    stacked: set[str] = field(default_factory=set[str])
    needed: set[Node] = field(default_factory=set[Node])
    loaded: set[Node] = field(default_factory=set[Node])
    folded: set[Node] = field(default_factory=set[Node])

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.partition.sizes

    @property
    def roots(self) -> tuple[Node, ...]:
        """The nodes of the outputs."""
        return self.partition.graph.roots

    def run(self) -> tuple[Kernel[Any], ...]:
        for _, root in self.outputs:
            self.need(root)
        kernels: list[Kernel[Any]] = []
        for draft in sorted(self.partition.drafts, key=lambda d: d.order, reverse=True):
            kernel = self.kernel(draft)
            if kernel is not None:
                kernels.append(kernel)
        returned = {self.partition.storage(root) for _, root in self.outputs}
        found = tuple(self.typed(k) for k in numbered(kernels[::-1]))
        for node in returned & self.places.keys():
            buffer = self.buffers[self.places[node].buffer]
            if buffer.kind == "temp":
                self.buffers[buffer.name] = replace(buffer, kind="output")
        return found

    def typed(self, kernel: Kernel[Any]) -> Kernel[Any]:
        """A kernel whose operands have the dtypes that earlier kernels store."""
        body = kernel.body
        operands: list[Operand] = []
        for operand in body.epilogue.operands:
            node = body.nodes.get(operand.name)
            place = node and self.places.get(self.partition.storage(node))
            if place:
                operand = replace(operand, dtype=self.buffers[place.buffer].dtype)
            elif node is not None and self.is_unrounded(node):
                operand = replace(operand, dtype=f32)
            if isinstance(operand.access, OneElement) and kernel.kind.scalars is not None:
                operand = replace(operand, dtype=kernel.kind.scalars)
            operands.append(operand)
        epilogue = replace(body.epilogue, operands=tuple(operands))
        return replace(kernel, body=replace(body, epilogue=epilogue))

    def is_unrounded(self, node: Node) -> bool:
        """Whether a node is prepacked in float32: all floats but operands of contractions."""
        under = self.partition.storage(node)
        prepared = under in self.partition.weights and not isinstance(under, Input)
        return prepared and under not in self.factors and node.dtype.kind == "float"

    @cached_property
    def exact(self) -> set[Node]:
        """The nodes that are compared with their maximum as they are in memory."""
        return sources(compared(self.roots))

    @cached_property
    def factors(self) -> set[Node]:
        """The operands of contractions, as they are stored."""
        contracts = [c for d in self.partition.drafts for c in d.contracts]
        return {self.partition.storage(o) for c in contracts for o in c.operands}

    def need(self, node: Node) -> None:
        """Record that a node is loaded or returned, and create the buffers of arguments."""
        under = self.partition.storage(node)
        if isinstance(under, Size):  # known from the call
            return
        name = self.partition.name(under)
        if isinstance(under, Concat) and under in self.partition.joined:
            self.join(under)
        elif isinstance(under, Input):
            self.buffers.setdefault(name, Buffer(name, "input", under.shape, under.dtype))
        elif under in self.partition.weights:
            self.buffers.setdefault(name, Buffer(name, "prepared", under.shape, under.dtype))
            self.prepared.setdefault(name, under)
        elif under not in self.partition.home:
            raise InternalError(f"nobody computes {under}")
        else:
            self.needed.add(under)

    def join(self, node: Concat) -> None:
        """Create the buffer of a concatenation, of which each part's producer writes a slice."""
        if node in self.places:
            return
        name = self.partition.name(node)
        parts = self.partition.joined[node]
        columns = node.rank - 1
        if node in self.partition.stacked:
            self.stacked.add(name)
            columns = node.rank + node.axis + 1
        rows, width = product(node.shape[:columns]), product(node.shape[columns:])
        self.places[node] = ColumnSlice(name, 0, width.size(self.sizes))
        self.buffer(name, (rows, width), node.dtype)
        self.joined[name] = tuple(self.partition.name(p) for p in parts)
        for part in parts:
            self.needed.add(part)

    def kernel(self, draft: Draft) -> Kernel[Any] | None:
        """The kernel of a builder; None if no later kernel and no output needs it."""
        stored = [n for n in draft.homed if n in self.needed]
        sunk = [n for n in draft.sinks if n in self.folded or n in self.needed]
        if not stored and not sunk:
            return None
        written = draft if draft.kind.fuses else replace(draft, homed=stored)
        mainloop = draft.kind.mainloop(written, self.partition.name)
        if not draft.kind.fuses:
            for node in stored:
                self.result(node)
            for operand in mainloop.operands:
                self.need(operand)
            return Kernel("", draft.kind, mainloop, nodes=tuple(stored))
        if draft.kind.whole_rows:
            self.choose_loads(draft, stored, sunk)
        try:
            groups, body = self.assemble(draft, stored, sunk)
        except Refused:  # the layout exists for all commitments together, but not for this subset
            for node in stored:
                self.buffers.pop(self.places.pop(node).buffer, None)
            stored, sunk = [n for n in draft.homed if n in draft.kept], list(draft.sinks)
            groups, body = self.assemble(draft, stored, sunk)
        body = replace(body, spread=self.shared(draft, body))
        for node in (*body.nodes.values(), *body.sources.values()):
            self.need(node)
            self.loaded.add(self.partition.storage(node))
        self.folded |= set(body.folded)
        for operand in mainloop.operands:
            self.need(operand)
        names = tuple(tuple(g.nodes) for g in groups)
        nodes = self.computed(draft, [*stored, *sunk])
        return Kernel("", draft.kind, mainloop, body, names, tuple(sunk), nodes)

    def choose_loads(self, draft: Draft, stored: list[Node], sunk: list[Reduce | Pick]) -> None:
        """Let a kernel load what costs the fewest bytes; what an earlier one loads is needed."""

        def is_needed(node: Node) -> bool:
            earlier = self.first_reader.get(node, draft.order) < draft.order
            return earlier or node in self.needed or node in self.multiplied

        Loads(self.partition, draft, stored, sunk, is_needed, self.exact).reduce_bytes()

    @cached_property
    def first_reader(self) -> dict[Node, Order]:
        """Materialised node -> the order of the first kernel that loads it, as placed.

        Of a kernel, only what it may store or reduces counts: the rest is computed elsewhere.
        """
        found: dict[Node, Order] = {}
        for draft in sorted(self.partition.drafts, key=lambda d: d.order, reverse=True):
            wanted = [*draft.sinks, *(n for n in draft.homed if n in draft.kept)]
            computed = self.computed(draft, wanted) if draft.kind.fuses else draft.homed
            own = set(computed) - draft.space.folded
            for node in {self.partition.storage(o) for n in own for o in n.operands}:
                home = self.partition.home.get(node)
                if home is not None and home.order < draft.order:
                    found[node] = draft.order
        return {n: order for n, order in found.items() if n in self.partition.loadable}

    def result(self, node: Node) -> None:
        """Create the buffer of a kernel without a body, in the node's shape."""
        name = self.partition.name(node)
        total = isinstance(node, Reduce) and node.dtype.kind == "float"
        wide = total and node.dtype.size < f32.size
        self.buffer(name, node.shape, f32 if wide else node.dtype)
        self.places[node] = ColumnSlice(name, 0, -1)

    def computed(self, draft: Draft, roots: list[Node]) -> tuple[Node, ...]:
        """The nodes that a kernel computes in order to write `roots`, operands first."""
        found: dict[Node, None] = {}

        def visit(node: Node) -> None:
            space = draft.space
            known = node in space.values or node in space.reordered or node in draft.sinks
            if node in found or not known or self.partition.leaf(node, draft) is not None:
                return
            if node not in draft.space.folds.values():
                for operand in node.operands:
                    visit(operand)
            found[node] = None

        for root in roots:
            visit(root)
        return tuple(n for n in found if not isinstance(n, Const | Size))

    # Stores.

    def shared(self, draft: Draft, body: Body) -> dict[str, Spread]:
        """The expansions of operands; in place where a kernel can read them with a stride of 0."""
        found, shared = dict(body.spread), list[Node]()
        whole = draft.kind.whole_rows
        operands = [o for o in body.epilogue.operands if o.name in body.spread]
        for name in [o.name for o in operands if whole or isinstance(o.access, Tile)]:
            more = [*shared, body.nodes[name]]
            if not draft.kind.shares(draft, body, more, self.partition.known):
                shared, found[name] = more, replace(found[name], in_place=True)
        return found

    def place(self, draft: Draft, group: Group) -> Store:
        """Create the buffer of a group, record its nodes' column slices, and return its Store."""
        name, dtype = self.partition.name(group.nodes[0]), group.nodes[0].dtype
        at = max(group.first, 0)
        for node, value in zip(group.nodes, group.values, strict=True):
            self.places[node] = ColumnSlice(name, at, value.count)
            at += value.count
        if group.narrow and group.nodes[0] not in self.multiplied:
            dtype = self.partition.stored_type(group)
        self.buffer(name, (draft.space.rows, Dim.of(group.width(draft.space))), dtype)
        return group.store(draft.space, name, dtype)

    @cached_property
    def multiplied(self) -> set[Node]:
        """Outputs and operands of contractions: they are stored in their own dtype."""
        contracts = [c for d in self.partition.drafts for c in d.contracts]
        typed = [*self.partition.graph.roots, *(o for c in contracts for o in c.operands)]
        found = {self.partition.storage(n) for n in typed}
        return found.union(*(p for n, p in self.partition.joined.items() if n in found))

    def buffer(self, name: str, shape: Shape, dtype: DType) -> None:
        self.buffers[name] = Buffer(name, "temp", shape, dtype)

    def assemble(
        self, draft: Draft, stored: list[Node], sunk: list[Reduce | Pick]
    ) -> tuple[list[Group], Body]:
        """A kernel's groups of stores, and its body. Raises Refused if there is no layout."""
        groups = grouped(draft.space, stored, self.partition.piece_of)
        stores = [self.place(draft, g) for g in groups]
        sinks = [self.sink(draft, n) for n in sunk]
        operand_of = self.partition.operand_of
        return groups, assemble(draft.space, stores, sinks, operand_of, self.partial)

    def sink(self, draft: Draft, node: Reduce | Pick) -> Sink:
        """Create the buffer of a sink's partials (of a pick: its result), and return the Sink."""
        name = self.partial(node)
        rows = draft.space.rows
        if isinstance(node, Pick):
            self.places[node] = ColumnSlice(name, 0, 1)
            self.buffers[name] = Buffer(name, "temp", (rows, ONE), f32)
            return self.partition.sink_of(draft, node, self.as_stored(node, draft), name)
        if node in draft.over_rows:
            shape = (ONE, product(node.shape), ONE)
            self.buffers[name] = Buffer(name, "partial", shape, f32)
            return self.partition.sink_of(draft, node, self.as_stored(node, draft), name)
        planes = Dim.of(len(MONOIDS[node.fn].planes))
        self.buffers[name] = Buffer(name, "partial", (rows, ONE, planes), f32)
        return self.partition.sink_of(draft, node, self.as_stored(node, draft), name)

    def as_stored(self, node: Reduce | Pick, draft: Draft) -> Value:
        """The value that a sink reduces, computed from rounded values where those are stored.

        A maximum that equals no stored value, or a logsumexp of other values than those that it
        normalises, would be wrong by more than a rounding; so would a total that is added to the
        values that it sums. Other sinks of the same values are combined with it, so they read the
        same values. Returned values count as read: a backward may read them. A sum over rows that
        corrects a contraction reads what that one reads.
        """
        together = [n for n in draft.sinks if n.arg == node.arg]
        returned = {self.partition.storage(r) for r in self.roots}
        read: Set[Node] = set()
        if node not in draft.over_rows:
            read = self.met(node, self.loaded | returned)
        elif isinstance(node, Reduce) and self.corrects(summand(node)):
            read = self.needed
        if any(isinstance(n, Pick) or MONOIDS[n.fn].held for n in together):
            read = read | self.loaded | returned
        computed = read & draft.space.values.keys() & set(walk([reduced(node)]))
        narrow = [n for n in computed if n.dtype.kind == "float" and n.dtype.size < f32.size]
        rounded = {
            n: Map(f"rounded_{n.dtype.name}", (n,)) for n in narrow if n in self.partition.home
        }
        (arg,) = substituted([reduced(node)], rounded)
        return draft.space.compute(arg) if rounded else draft.sinks[node]

    def met(self, node: Reduce | Pick, loaded: Set[Node]) -> set[Node]:
        """The nodes that are read as stored for what the totals of a value are added to.

        In dP − Σ P dP, a softmax's derivative, it is dP; in y w − (mean y) Σ w, a norm, it is y.
        Where one value makes up the sum, or all are equal, the values cancel; not their roundings.
        """
        users = self.partition.users
        stack: list[Node] = [u for u in users[node.arg] if isinstance(u, Reduce) and u.axis == -1]
        added: list[Node] = []
        seen: set[Node] = set()
        while stack:
            known = stack.pop()
            for user in users[known]:
                if isinstance(user, Map):
                    scalar = SCALARS[user.fn]
                    added += [a for a in user.args if scalar.signs and a is not known]
                    passes = scalar.signs or scalar.is_linear_in([a is known for a in user.args])
                else:
                    passes = isinstance(user, Cast | Expand | Reshape | Permute)
                if passes and user not in seen:
                    seen.add(user)
                    stack.append(user)
        behind = list(walk(added))
        factors = [o for n in behind if isinstance(n, Contract) for o in n.operands]
        return {n for n in behind if n in loaded} | {self.partition.storage(o) for o in factors}

    def corrects(self, summed: Node) -> bool:
        """Whether a sum of values over rows is what a mean adds to a contraction over the rows.

        It is Σ_l u m with a number m of each row, less than Σ_l u x by the deviations from m alone;
        so u is in both as it is stored. A mean of 100 deviations else loses all bits of bf16.
        """
        product = _positive(summed)
        if not isinstance(product, Map) or not SCALARS[product.fn].is_product:
            return False
        wide = [_positive(a) for a in product.args if a.shape[-1:] != (ONE,)]
        return len(wide) == 1 and self.partition.storage(wide[0]) in self.needed

    def partial(self, node: Node) -> str:
        """The name of the buffer of a reduction's partials (of a pick: of its result)."""
        name = self.partition.name(node)
        return name if isinstance(node, Pick) else name + "_parts"


def _positive(node: Node) -> Node:
    """A node without negations."""
    while isinstance(node, Map) and SCALARS[node.fn].is_negation:
        (node,) = node.args
    return node


def numbered(kernels: Iterable[Kernel[Any]]) -> list[Kernel[Any]]:
    """Rename kernels by kind and launch order: gemm0, rows1, torch2."""
    return [replace(k, name=f"{k.kind.name}{i}") for i, k in enumerate(kernels)]
