"""Graph -> graph in which sibling contractions, and equal operations after them, are one.

    gelu(x aᵀ + b), gelu(x cᵀ + d)  ->  y = gelu(x [a; c]ᵀ + [b d]);  slices of columns of y

Siblings are contractions that read the same activation. The derivative of the merged contraction is
one contraction for the activation and one for all weights, and biases and other vectors along the
columns share one gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from coda.ir.attend import Attend
from coda.ir.dims import ONE, Dim, product
from coda.ir.graph import (
    Cast,
    Concat,
    Contract,
    Graph,
    Input,
    Map,
    Node,
    Permute,
    Reduce,
    Reshape,
    Slice,
    users,
    walk,
)
from coda.ir.node import Field, is_operand, origin
from coda.lowering.algebra.roles import weight_nodes

Lanes = tuple[Node, ...]  # nodes that are the same function, each of another sibling


def merge_siblings(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """Merge sibling contractions, and equal elementwise operations on them; read slices of both.

    Returns:
        The new graph, and for each of its nodes the value in terms of the old graph: a merged node
        is the concatenation of the nodes that it replaces.
    """
    merge = _Merge(graph)
    merge.run()
    return merge.rebuilt()


def join(nodes: Sequence[Node], axis: int, weights: Collection[Node]) -> Node | None:
    """The concatenation of values along an axis, as one function of concatenated weights.

    A value that all share is returned as it is if it does not have the axis. None if the values are
    not the same function of weights.
    """
    first = nodes[0]
    if all(n is first for n in nodes):
        narrow = -axis > first.rank or first.shape[axis] == ONE
        return first if narrow else None
    if any(type(n) is not type(first) for n in nodes) or -axis > min(n.rank for n in nodes):
        return None
    if isinstance(first, Input):
        known = len(set(nodes)) == len(nodes) and all(n in weights for n in nodes)
        return Concat(tuple(nodes), axis) if known else None
    if not isinstance(first, Map | Cast | Reduce | Permute | Contract | Reshape):
        return None
    if isinstance(first, Contract) and first.batched:
        return None
    if any(not same_operation(first, n) for n in nodes):
        return None
    if isinstance(first, Reshape) and not _last_axis_alone(nodes, axis):
        return None
    joined: list[Node] = []
    for i, operands in enumerate(zip(*(n.operands for n in nodes), strict=True)):
        at = _axis_of_operand(first, i, axis)
        one = join(operands, at, weights) if at is not None else operands[0]
        if one is None or (at is None and any(o is not operands[0] for o in operands)):
            return None
        joined.append(one)
    if isinstance(first, Reshape):
        return _reshaped(first, joined[0], axis)
    return first.with_operands(joined)


def _axis_of_operand(node: Node, number: int, axis: int) -> int | None:
    """The axis of operand `number` that becomes `axis` of the node; None if there is none."""
    match node:
        case Permute(order=order):
            return order[axis] - len(order)
        case Contract():
            if axis == -1:
                return -2 if number == 1 else None
            return None if number == 1 else axis
        case Reduce(axis=reduced):
            return axis if axis != reduced else None
        case _:
            return axis


def _last_axis_alone(nodes: Sequence[Node], axis: int) -> bool:
    """Whether reshapes only insert axes of size 1 before the last one."""
    rest = [product(n.shape) == n.shape[-1] == n.operands[0].shape[-1] for n in nodes]
    return axis == -1 and all(rest)


def _reshaped(like: Reshape, node: Node, axis: int) -> Node:
    shape = list(like.to)
    shape[axis] = node.shape[-1]
    return Reshape(node, tuple(shape))


def same_operation(a: Node, b: Node) -> bool:
    """Whether two nodes differ in their operands alone (reshapes: in their sizes, too)."""
    if type(a) is not type(b) or len(a.operands) != len(b.operands):
        return False
    if isinstance(a, Reshape):
        return a.rank == b.rank
    for name in a.identity:
        x: Field = getattr(a, name)
        if not is_operand(x) and x != getattr(b, name):
            return False
    return True


@dataclass
class _Merge:
    """One run over a graph.

    Attributes:
        wide: lanes -> the merged node that replaces them.
        lane_of: node -> the lanes that contain it.
        reach: node -> whether a contraction or an attention depends on it.
    """

    graph: Graph
    wide: dict[Lanes, Node] = field(default_factory=dict[Lanes, Node])
    lane_of: dict[Node, Lanes] = field(default_factory=dict[Node, Lanes])
    reach: dict[Node, bool] = field(default_factory=dict[Node, bool])

    def run(self) -> None:
        nodes = list(walk(self.graph.roots))
        self.weights = weight_nodes(nodes)
        self.users = users(self.graph.roots)
        for lanes in self.groups(nodes):
            rhs = join([c.rhs for c in lanes], -2, self.weights)
            assert rhs is not None
            self.add(lanes, Contract(lanes[0].lhs, rhs, lanes[0].result))

    def groups(self, nodes: list[Node]) -> list[tuple[Contract, ...]]:
        """Groups of contractions of one activation whose weights can be stacked along rows."""
        found: list[list[Contract]] = []
        for node in nodes:
            if not isinstance(node, Contract) or node.batched or node in self.weights:
                continue
            if node.rhs not in self.weights or node.lhs in self.weights:
                continue
            for group in found:
                one = group[0]
                same = (one.lhs, one.result, one.rhs.dtype) == (
                    node.lhs,
                    node.result,
                    node.rhs.dtype,
                )
                if same and join([*(c.rhs for c in group), node.rhs], -2, self.weights) is not None:
                    group.append(node)
                    break
            else:
                found.append([node])
        return [tuple(g) for g in found if len(g) > 1]

    def add(self, lanes: Lanes, wide: Node) -> None:
        """Record lanes and, recursively, equal elementwise operations on them.

        If a contraction depends on a lane, its kernel produces the lanes' cotangents one by one and
        handles each there; then the operations are not merged.
        """
        self.wide[lanes] = wide
        self.lane_of |= dict.fromkeys(lanes, lanes)
        if any(self.multiplied(n) for n in lanes):
            return
        for first in self.users[lanes[0]]:
            if not isinstance(first, Map | Cast) or first in self.lane_of:
                continue
            rest = [self.alike(first, u) for u in lanes[1:]]
            if all(rest):
                following = (first, *(r for r in rest if r is not None))
                made = self.lifted(following)
                if made is not None and len(set(following)) == len(lanes):
                    self.add(following, made)

    def multiplied(self, node: Node) -> bool:
        """Whether a contraction or an attention depends on a node."""
        if node not in self.reach:
            above = self.users[node]
            self.reach[node] = any(
                isinstance(u, Contract | Attend) or self.multiplied(u) for u in above
            )
        return self.reach[node]

    def alike(self, first: Node, lane: Node) -> Node | None:
        """The user of `lane` that is the same operation as `first` is of the first lane."""
        for node in self.users[lane]:
            if node not in self.lane_of and same_operation(first, node):
                pairs = zip(first.operands, node.operands, strict=True)
                if all(self.parallel(a, b) for a, b in pairs):
                    return node
        return None

    def parallel(self, a: Node, b: Node) -> bool:
        """Whether two operands can be merged as operands of two lanes."""
        if a in self.lane_of:
            return self.lane_of[a] == self.lane_of.get(b)
        return join((a, b), -1, self.weights) is not None

    def lifted(self, lanes: Lanes) -> Node | None:
        """The lanes' operation on their merged operands; None if some cannot be merged."""
        operands: list[Node] = []
        for each in zip(*(n.operands for n in lanes), strict=True):
            one = self.wide.get(each)
            if one is None:
                one = join(each, -1, self.weights)
            if one is None:
                return None
            operands.append(one)
        with origin(lanes[0].where):
            return lanes[0].with_operands(operands)

    def rebuilt(self) -> tuple[Graph, dict[Node, Node]]:
        """The results of `merge_siblings`."""
        new: dict[Node, Node] = {}
        stands: dict[Node, Node] = {}
        widened: dict[Node, Node] = {}
        for node in walk(self.graph.roots):
            operands = tuple(new[o] for o in node.operands)
            with origin(node.where):
                lanes = self.lane_of.get(node)
                if lanes is None:
                    same = all(a is b for a, b in zip(operands, node.operands, strict=True))
                    new[node] = node if same else node.with_operands(operands)
                else:
                    wide = self.renewed(self.wide[lanes], new, widened)
                    stands[wide] = Concat(lanes, -1)
                    start = Dim.of(0)
                    for one in lanes[: lanes.index(node)]:
                        start = start + one.shape[-1]
                    new[node] = Slice(wide, -1, start, node.shape[-1], 1)
        stands |= {m: n for n, m in new.items()}
        return self.graph.with_roots(new[r] for r in self.graph.roots), stands

    def renewed(self, wide: Node, new: Mapping[Node, Node], done: dict[Node, Node]) -> Node:
        """A merged node, rebuilt on nodes of the new graph."""
        if wide in done:
            return done[wide]
        if wide in new:
            return new[wide]
        operands = tuple(self.renewed(o, new, done) for o in wide.operands)
        same = all(a is b for a, b in zip(operands, wide.operands, strict=True))
        done[wide] = wide if same else wide.with_operands(operands)
        return done[wide]
