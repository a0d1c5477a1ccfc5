"""Placed nodes -> the Program: from the last kernel to the first, store what somebody loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from coda.errors import InternalError
from coda.ir.dims import ONE, Dim, Shape, product
from coda.ir.graph import (
    Concat,
    Const,
    Contract,
    Graph,
    Input,
    Map,
    Node,
    Pick,
    Reduce,
    Size,
    walk,
)
from coda.ir.monoids import MONOIDS
from coda.ir.types import DType, f32
from coda.lowering.algebra.chunk import Cut
from coda.lowering.algebra.policy import Terms
from coda.lowering.algebra.rewrite import Step, substituted
from coda.lowering.placement.columns import Space
from coda.lowering.placement.draft import Draft
from coda.lowering.placement.layout import Sink, Store, assemble
from coda.lowering.placement.place import Partition
from coda.lowering.placement.values import Refused, Value
from coda.lowering.program.access import Scalar
from coda.lowering.program.body import Body
from coda.lowering.program.epilogue import Acc, Operand
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Buffer, ColumnSlice, Program
from coda.lowering.program.target import Target


class Banned(Exception):
    """Kernels whose columns cannot be laid out for one of their nodes, which has to go elsewhere.

    `places` are (place, node): the place is the GEMM's first contraction, or where in a pass over
    rows: "shared" or "alone", or as a statistic of "groups" of its columns.
    """

    def __init__(self, places: Iterable[tuple[Node | str, Node]], why: str) -> None:
        super().__init__(why)
        self.places = frozenset(places)


def build(
    partition: Partition,
    source: Graph,
    *,
    target: Target,
    frozen: bool,
    terms: Terms,
    steps: Sequence[Step],
    cuts: Sequence[Cut],
) -> Program:
    """The Program of a partition. Raises Banned where a kernel cannot be laid out.

    Args:
        partition: of the graph in normal form: where each node is computed.
        source: the block as it was written.
        target: as in `Program`; so are `frozen`, `terms`, `steps` and `cuts`.
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
        terms=terms,
        cuts=tuple(cuts),
    )


@dataclass
class _Build:
    partition: Partition
    outputs: tuple[tuple[str, Node], ...]
    buffers: dict[str, Buffer] = field(default_factory=dict)
    places: dict[Node, ColumnSlice] = field(default_factory=dict)
    prepared: dict[str, Node] = field(default_factory=dict)
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)
    needed: set[Node] = field(default_factory=set)
    loaded: set[Node] = field(default_factory=set)
    folded: set[Node] = field(default_factory=set)

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.partition.sizes

    @property
    def roots(self) -> tuple[Node, ...]:
        """The outputs' nodes."""
        return self.partition.graph.roots

    def run(self) -> tuple[Kernel[Any], ...]:
        for _, root in self.outputs:
            self.need(root)
        kernels: list[Kernel[Any]] = []
        refusals: list[Banned] = []
        for draft in sorted(self.partition.drafts, key=lambda d: d.order, reverse=True):
            try:
                kernel = self.kernel(draft)
            except Banned as refusal:
                refusals.append(refusal)
                continue
            if kernel is not None:
                kernels.append(kernel)
        if refusals:  # all at once: each is a partition to make anew
            raise Banned((p for r in refusals for p in r.places), str(refusals[0]))
        returned = {self.partition.storage(root) for _, root in self.outputs}
        found = tuple(self.typed(k) for k in numbered(kernels[::-1]))
        for node in returned & self.places.keys():
            buffer = self.buffers[self.places[node].buffer]
            if buffer.kind == "temp":
                self.buffers[buffer.name] = replace(buffer, kind="output")
        return found

    def typed(self, kernel: Kernel[Any]) -> Kernel[Any]:
        """A kernel whose operands have the types that the kernels before it store."""
        body = kernel.body
        operands: list[Operand] = []
        for operand in body.epilogue.operands:
            node = body.nodes.get(operand.name)
            place = node and self.places.get(self.partition.storage(node))
            if place:
                operand = replace(operand, dtype=self.buffers[place.buffer].dtype)
            elif node is not None and self.is_unrounded(node):
                operand = replace(operand, dtype=f32)
            if isinstance(operand.access, Scalar) and kernel.kind.scalars is not None:
                operand = replace(operand, dtype=kernel.kind.scalars)
            operands.append(operand)
        epilogue = replace(body.epilogue, operands=tuple(operands))
        return replace(kernel, body=replace(body, epilogue=epilogue))

    def is_unrounded(self, node: Node) -> bool:
        """Whether a node is prepared in float32: all floats are but the weights of contractions."""
        under = self.partition.storage(node)
        multiplied = {c.rhs for d in self.partition.drafts for c in d.contracts}
        prepared = under in self.partition.weights and not isinstance(under, Input)
        return prepared and under not in multiplied and node.dtype.kind == "float"

    def need(self, node: Node) -> None:
        """Record that a node is loaded."""
        under = self.partition.storage(node)
        if isinstance(under, Size):  # the call tells it
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
        """A buffer that several kernels write, each its own columns or rows."""
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
        """The kernel of a draft, or None where nobody needs it."""
        stored = [n for n in draft.homed if n in self.needed]
        sunk = [n for n in draft.sinks if n in self.folded or n in self.needed]
        if not stored and not sunk:
            return None
        mainloop = draft.kind.mainloop(draft, self.partition.name)
        if not draft.kind.fuses:
            for node in stored:
                self.result(node)
            for operand in mainloop.operands:
                self.need(operand)
            return Kernel("", draft.kind, mainloop, nodes=tuple(stored))
        groups = self.stores(draft, stored)
        body = self.assemble(draft, groups, sunk)
        for node in (*body.nodes.values(), *body.sources.values()):
            self.need(node)
            self.loaded.add(self.partition.storage(node))
        self.folded |= set(body.folded)
        for operand in mainloop.operands:
            self.need(operand)
        names = tuple(tuple(n for n, _ in g) for g in groups)
        nodes = self.computed(draft, [*stored, *sunk])
        return Kernel("", draft.kind, mainloop, body, names, tuple(sunk), nodes)

    def result(self, node: Node) -> None:
        """A buffer for what a kernel without a body computes, in the node's own shape."""
        name = self.partition.name(node)
        total = isinstance(node, Reduce) and node.dtype.kind == "float"
        wide = total and node.dtype.size < f32.size
        self.buffer(name, node.shape, f32 if wide else node.dtype)
        self.places[node] = ColumnSlice(name, 0, -1)

    def computed(self, draft: Draft, roots: list[Node]) -> tuple[Node, ...]:
        """The nodes that a kernel computes for those that it writes, operands first."""
        found: dict[Node, None] = {}

        def visit(node: Node) -> None:
            known = node in draft.space.values or node in draft.sinks
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

    def stores(self, draft: Draft, stored: list[Node]) -> list[list[tuple[Node, Value]]]:
        """Nodes grouped into buffers: those that lie side by side in the columns share one."""
        groups: list[tuple[list[tuple[Node, Value]], int]] = []
        space = draft.space
        starts = {n: self.first_column(draft, n) for n in stored}
        for node in sorted(stored, key=lambda n: (starts[n], stored.index(n))):
            value = space.compute(node)
            at = starts[node]
            for i, (group, end) in enumerate(groups):
                alone = {group[0][0], node} & self.partition.piece_of.keys()
                same = group[0][0].dtype == node.dtype and at >= 0 and not alone
                if same and end == at and draft.kind.tiled:
                    group.append((node, value))
                    groups[i] = (group, at + value.count)
                    break
            else:
                groups.append(([(node, value)], at + value.count if at >= 0 else -1))
        for group, end in groups:
            self.place(draft, group, starts[group[0][0]], end)
        return [g for g, _ in groups]

    def first_column(self, draft: Draft, node: Node) -> int:
        """The accumulator's column at which a stored node begins; -1 if it is one per pair."""
        value = draft.space.compute(node)
        if not draft.kind.tiled or value.slots.shape[1] == 0 or value.count == 0:
            return -1
        pairs = value.slots[(value.slots >= 0).all(1)]
        if pairs.shape[1] == 2 and len(np.unique(pairs[:, 0])) == len(pairs) > 0:
            return -1
        for start in value.slots[0]:
            here = np.arange(value.count)[:, None] + start
            if start >= 0 and np.any(value.slots == here, 1).all():
                return int(start)
        return -1

    def place(self, draft: Draft, group: list[tuple[Node, Value]], first: int, end: int) -> None:
        """Name a buffer for values that are stored side by side."""
        name = self.partition.name(group[0][0])
        dtype = group[0][0].dtype
        at = max(first, 0)
        for node, value in group:
            self.places[node] = ColumnSlice(name, at, value.count)
            at += value.count
        width = draft.space.width if first >= 0 else at
        if any(v.narrow for _, v in group):
            contracts = [c for d in self.partition.drafts for c in d.contracts]
            kept = [*self.partition.graph.roots, *(o for c in contracts for o in c.operands)]
            narrow = dtype.kind == "float" and dtype.size < f32.size
            typed = group[0][0] in {self.partition.storage(n) for n in kept}
            dtype = f32 if narrow and not typed else dtype
        self.buffer(name, (draft.space.rows, Dim.of(width)), dtype)

    def buffer(self, name: str, shape: Shape, dtype: DType) -> None:
        self.buffers[name] = Buffer(name, "temp", shape, dtype)

    def assemble(
        self, draft: Draft, groups: list[list[tuple[Node, Value]]], sunk: list[Node]
    ) -> Body:
        """The epilogue of a draft; on refusal, the node that it is refused for is banned."""
        stores = [self.store(draft, g) for g in groups]
        sinks = [self.sink(draft, n) for n in sunk]
        try:
            return assemble(draft.space, stores, sinks, self.operand_of, self.partial)
        except Refused as refusal:
            node = self.culprit(draft, groups, sunk)
            raise Banned([(self.refused_at(draft, node), node)], str(refusal)) from refusal

    def refused_at(self, draft: Draft, node: Node) -> Node | str:
        """The place where a node cannot be: its GEMM, or the first that is left in a pass."""
        if draft.contracts:
            return draft.contracts[0]
        along = isinstance(node, Reduce) and node.axis == -1
        part = along and node.operands[0].shape[-1].size(self.sizes) < draft.space.width
        if part and ("groups", node) not in self.partition.banned:
            return "groups"
        return "alone" if ("shared", node) in self.partition.banned else "shared"

    def store(self, draft: Draft, group: list[tuple[Node, Value]]) -> Store:
        """One store; columns of the accumulator that nobody asked for are written as they are."""
        place = self.places[group[0][0]]
        buffer = self.buffers[place.buffer]
        values = [v for _, v in group]
        width = buffer.shape[1].size(self.sizes)
        covered = sum(v.count for v in values)
        if draft.kind.tiled and width == draft.space.width and covered < width:
            rest = place.first + covered
            if place.first:
                values.insert(0, draft.space.at((place.first,), Acc(0), np.arange(place.first)))
            if rest < width:
                values.append(draft.space.at((width - rest,), Acc(0), np.arange(rest, width)))
        return Store(buffer.name, buffer.dtype, tuple(values))

    def sink(self, draft: Draft, node: Node) -> Sink:
        """A sink and the buffer of its partials."""
        name = self.partial(node)
        rows = draft.space.rows
        if isinstance(node, Pick):
            self.places[node] = ColumnSlice(name, 0, 1)
            self.buffers[name] = Buffer(name, "temp", (rows, ONE), f32)
            index = self.partition.leaf(node.index, draft)
            return Sink(name, "pick", self.as_stored(node, draft), index)
        assert isinstance(node, Reduce)
        if node in draft.over_rows:
            shape = (ONE, product(node.shape), ONE)
            self.buffers[name] = Buffer(name, "partial", shape, f32)
            return Sink(name, node.fn, draft.sinks[node], rows=True)
        planes = Dim.of(len(MONOIDS[node.fn].planes))
        self.buffers[name] = Buffer(name, "partial", (rows, ONE, planes), f32)
        return Sink(name, node.fn, self.as_stored(node, draft))

    def as_stored(self, node: Reduce | Pick, draft: Draft) -> Value:
        """What a sink reduces: a function of values as they are stored, where somebody reads them.

        A maximum that no stored value equals, or a logsumexp of other values than those that it
        normalises, would be wrong by more than a rounding; what else is reduced of the same values
        will meet it. What is returned may be read later, as by a backward.
        """
        together = [n for n in draft.sinks if isinstance(n, Reduce | Pick) and n.arg == node.arg]
        if not any(isinstance(n, Pick) or MONOIDS[n.fn].held for n in together):
            return draft.sinks[node]
        read = self.loaded | {self.partition.storage(r) for r in self.roots}
        computed = read & draft.space.values.keys() & set(walk([node.arg]))
        narrow = [n for n in computed if n.dtype.kind == "float" and n.dtype.size < f32.size]
        rounded = {
            n: Map(f"rounded_{n.dtype.name}", (n,)) for n in narrow if n in self.partition.home
        }
        (arg,) = substituted([node.arg], rounded)
        return draft.space.compute(arg)

    def partial(self, node: Node) -> str:
        """The buffer of a reduction's partials (of a pick: of its result)."""
        name = self.partition.name(node)
        return name if isinstance(node, Pick) else name + "_parts"

    def operand_of(self, name: str) -> tuple[Node, DType]:
        """The node that an operand's name stands for, and the type it has in memory."""
        node = self.partition.named.get(name)
        if node is None:
            raise InternalError(f"there is no operand {name}")
        return node, f32 if isinstance(node, Size) else node.dtype

    def culprit(
        self, draft: Draft, groups: list[list[tuple[Node, Value]]], sunk: list[Node]
    ) -> Node:
        """The first node that the kernel cannot be laid out for and that may go elsewhere."""
        space = draft.space
        stores: list[Store] = []
        sinks: list[Sink] = []
        movable: list[Node] = []
        for group in groups:
            for i, (node, _) in enumerate(group):
                movable += [] if isinstance(node, Contract) else [node]
                part = self.store(draft, group[: i + 1])
                if not _fits(space, [*stores, part], sinks, self) and movable:
                    return movable[-1]
            stores.append(self.store(draft, group))
        for node in sunk:
            sinks.append(self.sink(draft, node))
            if not _fits(space, stores, sinks, self):
                return node
        return movable[-1]


def _fits(space: Space, stores: list[Store], sinks: list[Sink], build: _Build) -> bool:
    try:
        assemble(space, stores, sinks, build.operand_of, build.partial)
    except Refused:
        return False
    return True


def numbered(kernels: Iterable[Kernel[Any]]) -> list[Kernel[Any]]:
    """Names in the order of launches: gemm0, rows1, torch2."""
    return [replace(k, name=f"{k.kind.name}{i}") for i, k in enumerate(kernels)]
