"""A block's graph -> the graph under `torch.autocast`, with the dtypes that torch would choose.

Dtypes that a block states itself (a declared argument, a cast) do not change. Those that follow
from the arguments are chosen as torch chooses them op by op:

- the operands and the result of a contraction have autocast's dtype;
- reductions that compute (sums, means) are float32, as inside torch's losses, norms and softmaxes;
  a maximum selects a value and keeps its dtype;
- an elementwise operation computes in the widest dtype of its operands.

Outputs of the block have the dtypes of torch's own modules: those of the operands with all axes of
the result. So a loss is float32, a residual stream stays float32, and a norm or a softmax returns
the dtype of its input; statistics, biases and gains widen nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Contract,
    Expand,
    Graph,
    Input,
    Iota,
    Map,
    Node,
    Permute,
    Pick,
    Reduce,
    Reshape,
    Scan,
    Size,
    Slice,
    users,
    walk,
)
from coda.ir.monoids import MONOIDS
from coda.ir.node import origin
from coda.ir.types import DType, f32, promote


def autocast_graph(
    traced: Callable[[DType], Graph], types: Sequence[DType | None], narrow: DType
) -> Graph:
    """Trace a block and give its graph the dtypes of autocast.

    Args:
        traced: traces the block with a given dtype for arguments that are declared without one.
        types: for each argument declared without a dtype, its float type of 16 or 32 bits; None for
            the others.
        narrow: autocast's dtype.
    """
    wide = promote(*(t for t in types if t is not None))
    free = replace(wide, name=f"any {wide.name}")  # differs from any dtype of a block
    graph = traced(free)
    inputs = tuple(
        i if t is None else Input(i.name, i.declared, t)
        for i, t in zip(graph.inputs, types, strict=True)
    )
    retyped = _Retyped(free, wide, narrow, dict(zip(graph.inputs, inputs, strict=True)))
    retyped.nominal = {i: t or i.dtype for i, t in zip(graph.inputs, types, strict=True)}
    for node in walk([*graph.inputs, *graph.roots]):
        with origin(node.where):
            retyped.visit(node)
    outputs = tuple(
        (name, _cast(retyped.new[node], retyped.nominal[node])) for name, node in graph.outputs
    )
    return Graph(graph.name, inputs, outputs, graph.constants)


def only_multiplied(graph: Graph) -> list[bool]:
    """For each argument, whether only contractions read it or its views."""
    readers = users([*graph.inputs, *graph.roots])
    found: dict[Node, bool] = {}
    for node in reversed(list(walk([*graph.inputs, *graph.roots]))):
        found[node] = node not in graph.roots and all(
            isinstance(r, Contract) or (isinstance(r, VIEWS) and found[r]) for r in readers[node]
        )
    return [found[i] for i in graph.inputs]


VIEWS = (Reshape, Permute, Slice, Concat, Expand)


def _cast(node: Node, dtype: DType) -> Node:
    return node if node.dtype == dtype else Cast(node, dtype)


@dataclass
class _Retyped:
    """Nodes of a graph with their new dtypes.

    Attributes:
        free: marker dtype of values whose dtype follows from the arguments.
        wide: the widest dtype of those arguments.
        narrow: autocast's dtype.
        new: old node -> the node that computes its values, in a dtype at least as wide as
            `nominal`.
        nominal: old node -> the dtype of its values in torch.
    """

    free: DType
    wide: DType
    narrow: DType
    new: dict[Node, Node]
    nominal: dict[Node, DType] = field(default_factory=dict)

    def visit(self, node: Node) -> None:
        """Retype a node whose operands are retyped."""
        if node in self.nominal:
            return
        operands = [self.new[o] for o in node.operands]
        nominal = [self.nominal[o] for o in node.operands]
        match node:
            case Const(element=element) | Size(element=element) | Iota(element=element):
                found = replace(node, element=self.open(element, self.wide))
            case Cast(to=to):
                found = _cast(operands[0], self.open(to, self.wide))
            case Contract(result=result):
                lhs, rhs = (
                    _cast(new, self.open(o.dtype, self.narrow))
                    for new, o in zip(operands, node.operands, strict=True)
                )
                found = Contract(lhs, rhs, self.open(result, self.narrow))
            case Reduce() | Scan() if node.dtype == self.free and not MONOIDS[node.fn].chosen:
                found = node.with_operands([_cast(operands[0], promote(f32, operands[0].dtype))])
            case Pick() if node.dtype == self.free:
                found = node.with_operands(operands)
                found = _cast(found, promote(f32, found.dtype))
            case Map() | Concat() if node.operands:
                self.joined(node, operands, nominal)
                return
            case _:
                self.new[node] = node.with_operands(operands)
                self.nominal[node] = nominal[0] if nominal else node.dtype
                return
        self.new[node], self.nominal[node] = found, found.dtype

    def open(self, stated: DType, otherwise: DType) -> DType:
        """The dtype that the block states, or `otherwise` if it states none."""
        return otherwise if stated == self.free else stated

    def joined(self, node: Map | Concat, operands: list[Node], nominal: list[DType]) -> None:
        """Retype a node that computes in one dtype, the widest of its operands'."""
        typed = [
            i
            for i, o in enumerate(node.operands)
            if o.dtype.kind != "bool" and not isinstance(o, Const | Size)
        ]
        if typed and any(node.operands[i].dtype == self.free for i in typed):
            computed = promote(*(operands[i].dtype for i in typed))
            whole = [i for i in typed if node.operands[i].shape == node.shape]
            stated = promote(*(nominal[i] for i in whole or typed))
        else:
            computed = stated = self.wide
        changed = [
            self.typed(new, computed) if o.dtype == self.free else new
            for new, o in zip(operands, node.operands, strict=True)
        ]
        self.new[node] = found = node.with_operands(changed)
        self.nominal[node] = stated if node.dtype == self.free else found.dtype

    @staticmethod
    def typed(node: Node, dtype: DType) -> Node:
        """Cast a value; a constant is rebuilt with the dtype instead."""
        if isinstance(node, Const | Size):
            return replace(node, element=dtype)
        return _cast(node, dtype)
