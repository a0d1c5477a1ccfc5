"""Program -> FLOPs, global-memory bytes and modelled time, per kernel and in total.

Each tensor that a kernel reads or writes counts once, and so does what its CTAs pass to each other
(`Kind.scratch`). The time of a kernel is its kind's (`time`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coda.ir.dims import ONE, product
from coda.ir.graph import (
    Cast,
    Const,
    Contract,
    Gather,
    Graph,
    Input,
    Map,
    Node,
    Reduce,
    Size,
    walk,
)
from coda.ir.scalars import SCALARS
from coda.lowering.algebra.roles import stacked
from coda.lowering.program.access import Partial, Periodic, Shifted, Tile
from coda.lowering.program.epilogue import Operand, calls
from coda.lowering.program.groups import groups, is_free
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program
from coda.lowering.program.target import Target
from coda.lowering.program.time import Time, overlapped

PASSED = "passed sums"  # in a kernel's reads and writes: what its CTAs pass to each other


@dataclass(frozen=True)
class Traffic:
    """Global-memory traffic of a kernel: (tensor, bytes) of each read and write."""

    reads: tuple[tuple[str, int], ...]
    writes: tuple[tuple[str, int], ...]

    @property
    def read_bytes(self) -> int:
        """Bytes read."""
        return sum(n for _, n in self.reads)

    @property
    def write_bytes(self) -> int:
        """Bytes written."""
        return sum(n for _, n in self.writes)


def elements(node: Node, program: Program) -> int:
    """The number of elements of a node."""
    return product(node.shape).size(program.sizes)


def memory_bytes(node: Node, program: Program) -> int:
    """Bytes that a node takes in memory, in the dtype of its buffer."""
    place = program.places.get(node)
    dtype = node.dtype if place is None else program.buffers[place.buffer].dtype
    return dtype.nbytes(elements(node, program))


def operand_bytes(kernel: Kernel[Any], name: str, program: Program) -> int:
    """Bytes that a kernel reads of an operand, expanded over the rows if it has to be."""
    node, spread = kernel.body.nodes[name], kernel.body.spread.get(name)
    if spread is None or spread.in_place:
        return memory_bytes(node, program)
    columns = product(node.shape[node.rank - spread.columns :])
    return node.dtype.nbytes((product(spread.lead) * columns).size(program.sizes))


def traffic(program: Program, kernel: Kernel[Any]) -> Traffic:
    """The global-memory traffic of a kernel: its tensors', and what its CTAs pass to each other."""
    tensors, own = tensor_traffic(program, kernel), kernel.kind.scratch(program, kernel)
    read, written = (((PASSED, n),) if n else () for n in (own.read, own.written))
    return Traffic(tensors.reads + read, tensors.writes + written)


def tensor_traffic(program: Program, kernel: Kernel[Any]) -> Traffic:
    """The traffic of a kernel's tensors."""
    operands = kernel.mainloop.operands
    reads = [(label(o, program), memory_bytes(o, program)) for o in operands]
    seen: set[Node] = set()
    for operand in sorted(kernel.body.epilogue.operands, key=reads_elsewhere):
        node = kernel.body.nodes.get(operand.name)
        if node in seen and reads_elsewhere(operand):
            continue  # of one node, rows and columns at a distance are in the cache
        if node is not None:
            seen.add(node)
            reads.append((label(node, program), operand_bytes(kernel, operand.name, program)))
        elif isinstance(operand.access, Partial):
            reads.append((operand.name, program.buffers[operand.name].nbytes(program.sizes)))
    packed = [i for p in kernel.body.packed for i in (p.name, 4 * len(p.source))][1::2]
    reads += [("packed rows", int(n)) for n in packed]
    writes = [(b, program.buffers[b].nbytes(program.sizes)) for b in kernel.writes()]
    return Traffic(tuple(reads), tuple(writes))


def reads_elsewhere(operand: Operand) -> bool:
    """Whether an operand is read at other rows or columns than those that are computed."""
    match operand.access:
        case Tile(swaps=swaps):
            return bool(swaps)
        case Periodic(each=each, swaps=swaps):
            return each > 1 or bool(swaps)
        case access:
            return isinstance(access, Shifted)


def label(node: Node, program: Program) -> str:
    """A readable name of a tensor: the argument's, or its buffer's."""
    if isinstance(node, Input):
        return node.name
    place = program.places.get(node)
    if place is not None:
        return place.buffer
    for name, known in program.prepared.items():
        if known is node:
            return name
    return label(node.operands[0], program) if node.operands else "number"


def tensor_flops(program: Program, kernel: Kernel[Any]) -> int:
    """FLOPs on tensor cores."""
    return kernel.kind.flops(kernel, program.sizes).tensor


def scalar_flops(program: Program, kernel: Kernel[Any]) -> int:
    """FLOPs outside the tensor cores: the mainloop's, and the body's at all elements."""
    epilogue = kernel.body.epilogue
    rows, columns = kernel.mainloop.points(program.sizes)
    flops = sum(SCALARS[c.fn].flops for c in calls(epilogue.exprs))
    computed = rows * columns // epilogue.lanes * flops
    return kernel.kind.flops(kernel, program.sizes).scalar + computed


def kernel_time(program: Program, kernel: Kernel[Any]) -> Time:
    """The modelled time of a kernel."""
    return kernel.kind.time(program, kernel)


def launch_count(program: Program, kernels: Iterable[Kernel[Any]] | None = None) -> int:
    """The number of launches of some kernels of a Program, or of all."""
    few = program.kernels if kernels is None else kernels
    return sum(k.kind.launches(program, k) for k in few)


def streamed(program: Program, kernel: Kernel[Any]) -> Time:
    """The modelled time of a kernel that reads and writes each tensor once, and contracts none."""
    moved, rates = traffic(program, kernel), program.target.rates
    memory = (moved.read_bytes + moved.write_bytes) / rates.bandwidth
    return Time(launch=rates.ramp, memory=memory, bound="memory")


def at_rates(program: Program, kernel: Kernel[Any]) -> Time:
    """The modelled time of a kernel of one node: bytes and FLOPs at achieved rates."""
    time, target = streamed(program, kernel), program.target
    flops = kernel.kind.flops(kernel, program.sizes)
    tensor = flops.tensor / (target.rates.tensor_of(flops.dtype.bits) * target.multiprocessors)
    memory = overlapped(time.memory, tensor) - tensor
    bound = "tensor cores" if tensor > time.memory else "memory"
    return replace(time, mainloop=tensor, memory=memory, bound=bound)


def prepared_apart(program: Program) -> list[Node]:
    """The prepacked functions of weights that have memory of their own.

    Weights that are only stacked along rows cost nothing: they alias one matrix.
    """
    return [n for n in program.prepared.values() if not stacked(n)]


def prepare_bytes(program: Program) -> int:
    """Bytes moved to prepack functions of weights, once for each version of the weights."""
    known = set(program.prepared.values())
    total = 0
    for node in prepared_apart(program):
        inputs = [n for n in walk([node]) if isinstance(n, Input) or (n in known and n is not node)]
        total += sum(memory_bytes(n, program) for n in inputs) + memory_bytes(node, program)
    return total


def prepare_time(program: Program) -> Time:
    """The modelled time to prepack functions of weights, once for each version of the weights.

    Each is taken as one kernel that reads and writes each tensor once.
    """
    rates, count = program.target.rates, len(prepared_apart(program))
    return Time(launch=count * rates.ramp, memory=prepare_bytes(program) / rates.bandwidth)


def held_bytes(program: Program) -> int:
    """Bytes of prepacked matrices that stay resident in addition to the weights."""
    made = prepared_apart(program)
    return sum(memory_bytes(n, program) for n in made if product(n.shape[:-1]) != ONE)


def hbm_bytes(program: Program) -> int:
    """Global-memory bytes of one call, with weights prepacked."""
    moved = [traffic(program, k) for k in program.kernels]
    return sum(t.read_bytes + t.write_bytes for t in moved)


def seconds_of(target: Target, moved: int, launches: int) -> float:
    """The estimated time of launches that move so many bytes, without FLOPs."""
    return moved / target.bandwidth + target.launch * launches


@dataclass(frozen=True)
class Baseline:
    """Launches and global-memory bytes of the same block, executed in another way."""

    launches: int
    hbm_bytes: int


def eager(graph: Graph, sizes: Mapping[str, int]) -> Baseline:
    """The baseline of torch in eager mode: one launch per operation."""
    launches = total = 0
    for node in walk(graph.roots):
        if is_free(node):
            continue
        launches += 1
        total += _eager_bytes(node, sizes)
    return Baseline(launches, total)


def _eager_bytes(node: Node, sizes: Mapping[str, int]) -> int:
    reads = [o for o in dict.fromkeys(node.operands) if not isinstance(o, Const | Size)]
    total = sum(o.nbytes(sizes) for o in reads) + node.nbytes(sizes)
    if isinstance(node, Gather):
        total += node.nbytes(sizes) - node.table.nbytes(sizes)
    return total


def pointwise_fused(graph: Graph, sizes: Mapping[str, int]) -> Baseline:
    """The baseline of perfect elementwise fusion without GEMM epilogues.

    Each contraction is one kernel, and all else are the kernels of `groups`.
    """
    contracts = [n for n in walk(graph.roots) if isinstance(n, Contract)]
    rest = groups(graph, sizes)
    total = sum(_eager_bytes(n, sizes) for n in contracts)
    total += sum(n.nbytes(sizes) for g in rest for n in (*g.reads, *g.writes))
    return Baseline(len(contracts) + len(rest), total)


def rest_of(fused: Baseline, graph: Graph, sizes: Mapping[str, int]) -> Baseline:
    """What remains of `pointwise_fused` without its contractions."""
    contracts = [n for n in walk(graph.roots) if isinstance(n, Contract)]
    moved = sum(_eager_bytes(n, sizes) for n in contracts)
    return Baseline(fused.launches - len(contracts), fused.hbm_bytes - moved)


def describe(node: Node) -> str:
    """A short readable name of a node's operation."""
    match node:
        case Map(fn=fn) | Reduce(fn=fn):
            return fn
        case Contract():
            return "@"
        case Cast(to=to):
            return f"cast to {to}"
        case _:
            return type(node).__name__.lower()
