"""Backward graph -> backward graph whose gradients accumulate into existing tensors, in place.

The addition is an ordinary operation of the graph: the epilogue of a weight gradient's GEMM loads
the accumulator, adds, and stores in place. No further kernel reads the gradient.

Siblings (q, k and v; gate and up) get their gradients from one contraction, each a range of its
rows. If their accumulators are the rows of one matrix too, that stays one GEMM; if the accumulators
are separate tensors, each gradient becomes a contraction of its own.

    dq, dk, dv = rows of (dyᵀ x)    one matrix:        sum_q_k_v + dyᵀ x
                                    separate tensors:  sum_q + dy[:, q]ᵀ x, and so for k and v
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from coda.ir.dims import Dim
from coda.ir.graph import Cast, Concat, Contract, Graph, Input, Map, Node, Permute, Slice
from coda.ir.types import DType
from coda.lowering.algebra.roles import is_transposed
from coda.lowering.algebra.training import Training

Names = tuple[str, ...]


@dataclass(frozen=True)
class Accumulation:
    """A backward graph that accumulates.

    Attributes:
        graph: its inputs are those of the training's backward, followed by the accumulators.
        updates: (output, input) names: outputs that are written in place over an accumulator.
        held: for each accumulator, the block's arguments whose gradients are added to its rows, in
            row order.
    """

    graph: Graph
    updates: tuple[tuple[str, str], ...]
    held: tuple[Names, ...]


def siblings(training: Training) -> tuple[Names, ...]:
    """Groups of arguments whose gradients together are all rows of one matrix, in row order."""
    parts: dict[Node, list[tuple[Slice, str]]] = {}
    for name, (_, node) in zip(training.requires_grad, training.backward.outputs, strict=True):
        if isinstance(node, Slice) and node.axis == -2 and node.step == 1:
            parts.setdefault(node.arg, []).append((node, name))
    found: list[Names] = []
    for whole, some in parts.items():
        rest, names, first = list(some), list[str](), Dim.of(0)
        while (one := next((p for p in rest if p[0].start == first), None)) is not None:
            rest.remove(one)
            names.append(one[1])
            first = first + one[0].size
        if not rest and first == whole.shape[-2] and len(names) > 1:
            found.append(tuple(names))
    return tuple(found)


def accumulating(
    training: Training, targets: Mapping[str, DType], beside: Iterable[Names] = ()
) -> Accumulation:
    """The backward of a training, with gradients added to accumulators.

    Args:
        training: a block's forward and backward.
        targets: argument name -> dtype of the accumulator, which has the argument's shape.
        beside: the groups of `siblings(training)` whose accumulators are the rows of one matrix.
    """
    graph = training.backward
    places = {name: i for i, name in enumerate(training.requires_grad)}
    together = {name: names for names in beside for name in names}
    taken = {i.name for i in graph.inputs} | set(graph.symbols)
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    updates: list[tuple[str, str]] = []
    held: list[Names] = []
    for name in training.requires_grad:
        names = together.get(name, (name,))
        if name not in targets or name != names[0]:
            continue
        mine = [outputs[places[n]] for n in names]
        added = _argument([n for n, _ in mine], mine[0][1], targets[name], taken)
        inputs.append(added)
        held.append(names)
        for one, (output, node) in zip(names, _sums(mine, added), strict=True):
            outputs[places[one]] = output, node
            updates.append((output, added.name))
    total = Graph(graph.name, tuple(inputs), tuple(outputs))
    return Accumulation(total, tuple(updates), tuple(held))


def _argument(names: Sequence[str], node: Node, dtype: DType, taken: set[str]) -> Input:
    """The accumulator of one gradient, or of all gradients that are rows of one matrix."""
    name = "sum_" + "_".join(names)
    while name in taken:
        name += "_"
    taken.add(name)
    whole = node.arg if isinstance(node, Slice) and len(names) > 1 else node
    return Input(name, whole.shape, dtype)


def _sums(gradients: Sequence[tuple[str, Node]], added: Input) -> list[tuple[str, Node]]:
    """(output, value) of gradients after the addition to an accumulator, or to its rows."""
    (name, first), *rest = gradients
    if not rest:
        return [(name, _sum(added, _apart(first)))]
    parts = [(n, node) for n, node in gradients if isinstance(node, Slice)]
    total = _sum(added, parts[0][1].arg)
    return [(n, Slice(total, p.axis, p.start, p.size, p.step)) for n, p in parts]


def _sum(added: Input, gradient: Node) -> Node:
    typed = gradient if gradient.dtype == added.dtype else Cast(gradient, added.dtype)
    return Map("add", (added, typed))


def _apart(node: Node) -> Node:
    """(dᵀ x)[start : start + size] = (d[:, start : start + size])ᵀ x; other nodes as they are.

    Used where several gradients share a contraction but their accumulators share no matrix.
    """
    if not (isinstance(node, Slice) and node.axis == -2 and node.step == 1):
        return node
    whole = node.arg
    if not (isinstance(whole, Contract) and is_transposed(whole.lhs)):
        return node
    lhs = _columns(whole.lhs.operands[0], node.start, node.size)
    return Contract(Permute(lhs, (1, 0)), whole.rhs, whole.result)


def _columns(node: Node, start: Dim, size: Dim) -> Node:
    """Columns [start, start + size): an operand of a concatenation if it has exactly these."""
    first = Dim.of(0)
    for arg in node.args if isinstance(node, Concat) and node.axis == -1 else ():
        if (first, arg.shape[-1]) == (start, size):
            return arg
        first = first + arg.shape[-1]
    return Slice(node, -1, start, size, 1)
