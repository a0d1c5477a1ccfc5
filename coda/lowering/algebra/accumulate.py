"""A backward -> one whose gradients are added to what is there already.

Adding is an operation of the graph like any other: the epilogue of the GEMM that makes a weight's
gradient loads what is there, adds, and stores over it. No pass of its own reads the gradient again.

Siblings (q, k and v; gate and up) have their gradients from one contraction, each some of its
rows. Where they are added to rows of one matrix as well, that is one GEMM; where what they are
added to lies apart, each is a contraction of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from coda.ir.dims import Dim
from coda.ir.graph import Cast, Concat, Contract, Graph, Input, Map, Node, Permute, Slice
from coda.ir.types import DType
from coda.lowering.algebra.roles import is_turned
from coda.lowering.algebra.training import Training

Names = tuple[str, ...]


@dataclass(frozen=True)
class Accumulation:
    """A backward that adds.

    Attributes:
        graph: the backward's arguments are the training's, and after them what is added to.
        updates: its outputs that are written over an argument: a name, and the argument's.
        held: for each such argument, the arguments of the block whose gradients are added to its
            rows, one after the other.
    """

    graph: Graph
    updates: tuple[tuple[str, str], ...]
    held: tuple[Names, ...]


def siblings(training: Training) -> tuple[Names, ...]:
    """Arguments of a block whose gradients are all rows of one matrix, in their order."""
    parts: dict[Node, list[tuple[Slice, str]]] = {}
    for name, (_, node) in zip(training.wanted, training.backward.outputs, strict=True):
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
    """The backward of a training that adds.

    Args:
        training: of a block.
        targets: names of arguments whose gradients are added to a tensor of the argument's shape,
            with the element type of that tensor.
        beside: those of `siblings(training)` that are added to rows of one matrix.
    """
    graph = training.backward
    places = {name: i for i, name in enumerate(training.wanted)}
    together = {name: names for names in beside for name in names}
    taken = {i.name for i in graph.inputs} | set(graph.symbols)
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    updates: list[tuple[str, str]] = []
    held: list[Names] = []
    for name in training.wanted:
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
    """What gradients are added to: one, or the rows of a matrix of which each is some."""
    name = "sum_" + "_".join(names)
    while name in taken:
        name += "_"
    taken.add(name)
    whole = node.arg if isinstance(node, Slice) and len(names) > 1 else node
    return Input(name, whole.shape, dtype)


def _sums(gradients: Sequence[tuple[str, Node]], added: Input) -> list[tuple[str, Node]]:
    """Gradients added to an argument, or to its rows."""
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
    """A gradient that is some rows of a contraction over rows, as a contraction of its own.

    Several weights' gradients may be one contraction; what they are added to is not one matrix.
    """
    if not (isinstance(node, Slice) and node.axis == -2 and node.step == 1):
        return node
    whole = node.arg
    if not (isinstance(whole, Contract) and is_turned(whole.lhs)):
        return node
    lhs = _columns(whole.lhs.operands[0], node.start, node.size)
    return Contract(Permute(lhs, (1, 0)), whole.rhs, whole.result)


def _columns(node: Node, start: Dim, size: Dim) -> Node:
    """Some columns of a node: the operand of a concatenation where they are one."""
    first = Dim.of(0)
    for arg in node.args if isinstance(node, Concat) and node.axis == -1 else ():
        if (first, arg.shape[-1]) == (start, size):
            return arg
        first = first + arg.shape[-1]
    return Slice(node, -1, start, size, 1)
