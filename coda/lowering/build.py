"""Placed nodes -> the Program: from the last kernel to the first, store what somebody loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from coda.errors import InternalError
from coda.ir.dims import ONE, Dim, Shape, product
from coda.ir.graph import Graph, Input, Node, Pick, Reduce
from coda.ir.monoids import MONOIDS
from coda.ir.types import DType, f32
from coda.lowering.assemble import Assembled, Sink, Store, assemble
from coda.lowering.columns import Refused, Space, Value
from coda.lowering.epilogue import Acc
from coda.lowering.partition import Draft, Partition
from coda.lowering.program import (
    Buffer,
    Config,
    GemmKernel,
    Kernel,
    Place,
    Program,
    RowwiseKernel,
    TorchKernel,
)


class Banned(Exception):
    """A GEMM's columns cannot be laid out for one of its nodes, which has to go elsewhere."""

    def __init__(self, contract: Node, node: Node, why: str) -> None:
        super().__init__(why)
        self.contract, self.node = contract, node


def build(partition: Partition, source: Graph, arch: str) -> Program:
    """The Program of a partition. Raises Banned where a kernel cannot be laid out."""
    return _Build(partition, Program(source, dict(partition.sizes), arch)).run()


@dataclass
class _Build:
    partition: Partition
    program: Program
    needed: set[Node] = field(default_factory=set)
    folded: set[Node] = field(default_factory=set)

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.partition.sizes

    def run(self) -> Program:
        partition, program = self.partition, self.program
        program.outputs = tuple(
            (name, root)
            for (name, _), root in zip(program.graph.outputs, partition.graph.roots, strict=True)
        )
        for _, root in program.outputs:
            self.need(root)
        kernels: list[Kernel] = []
        for draft in sorted(partition.drafts, key=lambda d: d.order, reverse=True):
            kernel = self.kernel(draft)
            if kernel is not None:
                kernels.append(kernel)
        program.kernels = tuple(_number(kernels[::-1]))
        returned = {partition.storage(root) for _, root in program.outputs}
        for node in returned & program.places.keys():
            buffer = program.buffers[program.places[node].buffer]
            if buffer.kind == "temp":
                program.buffers[buffer.name] = Buffer(
                    buffer.name, "output", buffer.shape, buffer.dtype
                )
        program.unfused = [u for u in partition.unfused if u.node in partition.home]
        return program

    def need(self, node: Node) -> None:
        """Record that a node is loaded."""
        under = self.partition.storage(node)
        name = self.partition.name(under)
        buffers = self.program.buffers
        if isinstance(under, Input):
            buffers.setdefault(name, Buffer(name, "input", under.shape, under.dtype))
        elif under in self.partition.weights:
            buffers.setdefault(name, Buffer(name, "prepared", under.shape, under.dtype))
            self.program.prepared.setdefault(name, under)
        elif under not in self.partition.home:
            raise InternalError(f"nobody computes {under}")
        else:
            self.needed.add(under)

    def kernel(self, draft: Draft) -> Kernel | None:
        """The kernel of a draft, or None where nobody needs it."""
        stored = [n for n in draft.homed if n in self.needed]
        sunk = [n for n in draft.sinks if n in self.folded or n in self.needed]
        if not stored and not sunk:
            return None
        if draft.kind == "torch":
            (node,) = draft.homed
            self.buffer(self.partition.name(node), node.shape, node.dtype)
            self.program.places[node] = Place(self.partition.name(node), 0, -1)
            for operand in node.operands:
                self.need(operand)
            return TorchKernel("", node, draft.why)
        groups = self.stores(draft, stored)
        assembled = self.assemble(draft, groups, sunk)
        for node in (*assembled.nodes.values(), *assembled.sources.values()):
            self.need(node)
        self.folded |= set(assembled.folded)
        names = tuple(tuple(n for n, _ in g) for g in groups)
        if draft.kind == "row":
            space = draft.space
            return RowwiseKernel(
                "", assembled, names, assembled.folded, tuple(draft.homed), space.rows, space.width
            )
        for contract in draft.contracts:
            self.need(contract.lhs)
            self.need(contract.rhs)
        nodes = (*draft.homed, *sunk)
        return GemmKernel(
            "", draft.contracts, assembled, names, tuple(sunk), nodes, Config(128, 128)
        )

    # Stores.

    def stores(self, draft: Draft, stored: list[Node]) -> list[list[tuple[Node, Value]]]:
        """Nodes grouped into buffers: those that lie side by side in the columns share one."""
        groups: list[tuple[list[tuple[Node, Value]], int]] = []
        space = draft.space
        starts = {n: self.first_column(draft, n) for n in stored}
        for node in sorted(stored, key=lambda n: (starts[n], stored.index(n))):
            value = space.values[node]
            at = starts[node]
            for i, (group, end) in enumerate(groups):
                same = group[0][0].dtype == node.dtype and at >= 0
                if same and end == at and draft.kind == "gemm":
                    group.append((node, value))
                    groups[i] = (group, at + value.count)
                    break
            else:
                groups.append(([(node, value)], at + value.count if at >= 0 else -1))
        for group, end in groups:
            self.place(draft, group, starts[group[0][0]], end)
        return [g for g, _ in groups]

    def first_column(self, draft: Draft, node: Node) -> int:
        """The column of the accumulator at which a stored node's columns begin, -1 for all pairs."""
        value = draft.space.values[node]
        if draft.kind != "gemm" or value.slots.shape[1] == 0 or value.count == 0:
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
            self.program.places[node] = Place(name, at, value.count)
            at += value.count
        width = draft.space.width if first >= 0 else at
        if any(v.narrow for _, v in group):
            returned = {self.partition.storage(r) for r in self.partition.graph.roots}
            dtype = dtype if group[0][0] in returned or dtype.kind != "float" else f32
        self.buffer(name, (draft.space.rows, Dim.of(width)), dtype)

    def buffer(self, name: str, shape: Shape, dtype: DType) -> None:
        self.program.buffers[name] = Buffer(name, "temp", shape, dtype)

    def assemble(
        self, draft: Draft, groups: list[list[tuple[Node, Value]]], sunk: list[Node]
    ) -> Assembled:
        """The epilogue of a draft; on refusal, the node that it is refused for is banned."""
        stores = [self.store(draft, g) for g in groups]
        sinks = [self.sink(draft, n) for n in sunk]
        try:
            return assemble(draft.space, stores, sinks, self.operand_of, self.partial)
        except Refused as refusal:
            if draft.kind != "gemm":
                raise InternalError(f"a row kernel cannot be laid out: {refusal}") from refusal
            raise Banned(draft.contracts[0], self.culprit(draft, groups, sunk), str(refusal)) from (
                refusal
            )

    def store(self, draft: Draft, group: list[tuple[Node, Value]]) -> Store:
        """One store; columns of the accumulator that nobody asked for are written as they are."""
        place = self.program.places[group[0][0]]
        buffer = self.program.buffers[place.buffer]
        values = [v for _, v in group]
        width = buffer.shape[1].size(self.sizes)
        covered = sum(v.count for v in values)
        if draft.kind == "gemm" and width == draft.space.width and covered < width:
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
            self.program.places[node] = Place(name, 0, 1)
            self.program.buffers[name] = Buffer(name, "temp", (rows, ONE), f32)
            index = self.partition.leaf(node.index, draft)
            return Sink(name, "pick", draft.sinks[node], index)
        assert isinstance(node, Reduce)
        planes = Dim.of(len(MONOIDS[node.fn].planes))
        self.program.buffers[name] = Buffer(name, "partial", (rows, ONE, planes), f32)
        return Sink(name, node.fn, draft.sinks[node])

    def partial(self, node: Node) -> str:
        """The buffer of a reduction's partials (of a pick: of its result)."""
        name = self.partition.name(node)
        return name if isinstance(node, Pick) else name + "_parts"

    def operand_of(self, name: str) -> tuple[Node, DType]:
        """The node that an operand's name stands for, and the type it has in memory."""
        for node, known in self.partition.names.items():
            if known == name:
                narrow = product(node.shape[-1:]) == ONE and node in self.partition.home
                return node, f32 if narrow and node.dtype.kind == "float" else node.dtype
        raise InternalError(f"there is no operand {name}")

    def culprit(
        self, draft: Draft, groups: list[list[tuple[Node, Value]]], sunk: list[Node]
    ) -> Node:
        """The last node without which the kernel could be laid out."""
        space = draft.space
        chosen: list[tuple[Node, list[Store], list[Sink]]] = []
        for group in groups:
            chosen.append((group[-1][0], [self.store(draft, group)], []))
        for node in sunk:
            chosen.append((node, [], [self.sink(draft, node)]))
        stores: list[Store] = []
        sinks: list[Sink] = []
        for node, more_stores, more_sinks in chosen:
            stores, sinks = stores + more_stores, sinks + more_sinks
            if not _fits(space, stores, sinks, self):
                return node
        return chosen[-1][0]


def _fits(space: Space, stores: list[Store], sinks: list[Sink], build: _Build) -> bool:
    try:
        assemble(space, stores, sinks, build.operand_of, build.partial)
    except Refused:
        return False
    return True


def _number(kernels: list[Kernel]) -> list[Kernel]:
    """Names in the order of launches: gemm0, rows1, torch2."""
    from dataclasses import replace

    prefix = {GemmKernel: "gemm", RowwiseKernel: "rows", TorchKernel: "torch"}
    return [replace(k, name=f"{prefix[type(k)]}{i}") for i, k in enumerate(kernels)]
