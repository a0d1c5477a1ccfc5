"""A backward -> one whose gradients are added to what is there already.

Adding is an operation of the graph like any other: the epilogue of the GEMM that makes a weight's
gradient loads what is there, adds, and stores over it. No pass of its own reads the gradient again.
"""

from __future__ import annotations

from collections.abc import Mapping

from coda.ir.dims import Dim
from coda.ir.graph import Cast, Concat, Contract, Graph, Input, Map, Node, Permute, Slice
from coda.ir.types import DType
from coda.lowering.derive import Training
from coda.lowering.roles import is_turned


def accumulating(
    training: Training, targets: Mapping[str, DType]
) -> tuple[Graph, tuple[tuple[str, str], ...]]:
    """The backward of a training that adds, and its outputs that are written over an argument.

    Args:
        training: of a block.
        targets: names of arguments whose gradients are added to a tensor of the argument's shape,
            with the element type of that tensor.
    """
    graph = training.backward
    taken = {i.name for i in graph.inputs} | set(graph.symbols)
    inputs, outputs, updates = list(graph.inputs), list(graph.outputs), []
    for place, (name, node) in enumerate(graph.outputs):
        dtype = targets.get(training.wanted[place])
        if dtype is None:
            continue
        held = f"sum_{name}"
        while held in taken:
            held += "_"
        inputs.append(Input(held, node.shape, dtype))
        gradient = _apart(node)
        typed = gradient if gradient.dtype == dtype else Cast(gradient, dtype)
        outputs[place] = name, Map("add", (inputs[-1], typed))
        updates.append((name, held))
    return Graph(graph.name, tuple(inputs), tuple(outputs)), tuple(updates)


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
