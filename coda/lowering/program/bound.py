"""Graph in normal form -> a lower bound of the price of its Programs, without placing it.

Whichever kernel computes which node, operands of contractions are read from memory; those of them
that are computed are written, as outputs are; and functions of weights among them are prepacked.
All else that a Program reads or writes depends on its kernels, and is left out:

    y = (x · g) wᵀ    reads x · g and w, writes x · g and y; 1 launch
    y = x (g · w)ᵀ    reads x and g · w, writes y, prepacks g · w; 1 launch

A contraction takes at least the time of its FLOPs on all SMs, or that of its operands' bytes; all
kernels together at least that of all bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from coda.ir.dims import ONE, product
from coda.ir.graph import (
    Concat,
    Const,
    Contract,
    Graph,
    Input,
    Iota,
    Node,
    Permute,
    Reshape,
    Size,
    Slice,
    walk,
)
from coda.lowering.algebra.roles import as_stored, base, is_view, stacked, weight_nodes
from coda.lowering.program.price import CALLS, HELD, Price, rent
from coda.lowering.program.target import Target
from coda.lowering.program.time import Time, total


def least_price(
    graph: Graph,
    sizes: Mapping[str, int],
    target: Target,
    *,
    frozen: bool,
    per_call: Collection[str] = (),
) -> Price:
    """A lower bound of `price` for all Programs of a graph: of the seconds, bytes and launches.

    Args:
        graph: in normal form.
        sizes: the size of every symbol.
        target: the GPU.
        frozen: whether weights keep their values.
        per_call: names of arguments that are new in every call, and so are no weights.
    """
    nodes = list(walk(graph.roots))
    weights = weight_nodes(nodes, per_call)
    contracts = [n for n in needed(graph.roots) if isinstance(n, Contract) and n not in weights]
    operands = dict.fromkeys(o for c in contracts for o in c.operands)
    written = {_in_memory(n) for n in (*graph.roots, *operands)} - weights
    moved = sum(n.nbytes(sizes) for n in operands)
    moved += sum(n.nbytes(sizes) for n in written if not _is_unwritten(n))
    groups: dict[Node, list[Contract]] = {}  # contractions of one activation may share a GEMM
    for one in contracts:
        groups.setdefault(one.lhs, []).append(one)
    busy = sum(_seconds(group, sizes, target) for group in groups.values())
    memory = max(0.0, moved / target.rates.bandwidth - busy)
    time = Time(len(groups) * min(target.rates.start, target.rates.ramp), busy, memory=memory)
    found = Price(time, moved, len(groups))
    if not frozen:
        for node in {as_stored(o) for o in operands} & weights:
            found += _prepacked(node, sizes, target)
    return found


def _seconds(group: list[Contract], sizes: Mapping[str, int], target: Target) -> float:
    """The least seconds of the contractions of one activation, in any number of kernels."""
    rates, lhs = target.rates, group[0].lhs
    points = sum(product(c.shape).size(sizes) for c in group)
    flops = 2 * points * lhs.shape[-1].size(sizes)
    read = lhs.nbytes(sizes) + sum(n.nbytes(sizes) for n in {c.rhs for c in group})
    tensor = flops / (rates.tensor_of(lhs.dtype.bits) * target.multiprocessors)
    return max(tensor, read / rates.bandwidth)


def needed(roots: Iterable[Node]) -> list[Node]:
    """The nodes that are surely computed: a slice of a concatenation may need only some parts."""
    found: dict[Node, None] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            part = isinstance(node, Slice) and isinstance(base(node), Concat)
            stack.extend(() if part else node.operands)
    return list(found)


def _in_memory(node: Node) -> Node:
    """The node as large as a view whose memory it has, or of which it is a copy."""
    while isinstance(node, Reshape | Permute):
        node = node.arg
    return node


def _is_unwritten(node: Node) -> bool:
    """Whether no kernel may write a node of its own: slices and parts are written with others."""
    return isinstance(node, Input | Const | Size | Iota | Slice | Concat)


def _prepacked(node: Node, sizes: Mapping[str, int], target: Target) -> Price:
    """What the price counts for an operand which is a function of weights alone."""
    if is_view(node) or stacked(node):
        return Price(Time(0.0), 0, 0)
    own, matrix = node.nbytes(sizes), product(node.shape[:-1]) != ONE
    made = own + sum(n.nbytes(sizes) for n in walk([node]) if isinstance(n, Input))
    copied = Time(target.rates.ramp, memory=made / target.rates.bandwidth).scaled(1 / CALLS)
    kept = rent(own * matrix, target)
    return Price(total((copied, kept)), made // CALLS + HELD * own * matrix, 0)
