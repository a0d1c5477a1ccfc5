"""Graph -> graph in which the largest intermediate is computed in chunks of its columns.

A sum over an axis is the sum over its chunks: Σ_n y w = Σ_n₁ y₁ w₁ + Σ_n₂ y₂ w₂ (the law
`contractions_together` from right to left). A value that keeps the axis is the concatenation of its
chunks. Slices move down to the arguments: columns of x wᵀ are x times rows of w, and columns of an
elementwise function are that function of the columns. So the logits' gradient d of a language model
is never materialised whole:

    dw = dᵀ x = rows [d₁ᵀ x; d₂ᵀ x]     dx = d w = d₁ w₁ + d₂ w₂     dᵢ: one chunk of the vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from coda.ir.dims import ONE, Dim, Shape, product
from coda.ir.graph import (
    Cast,
    Concat,
    Contract,
    Expand,
    Graph,
    Input,
    Map,
    Node,
    Permute,
    Reduce,
    Reshape,
    Slice,
    walk,
)
from coda.ir.monoids import MONOIDS
from coda.ir.node import origin
from coda.ir.scalars import SUM
from coda.ir.types import f32
from coda.lowering.algebra.roles import base, weight_nodes

MOST = 8  # chunks at most: each reads and writes the accumulated sums once more
SHARE = 4  # an intermediate may take 1 / SHARE of the bytes of all arguments and outputs
STEP = 256  # columns of a chunk are a multiple of it: whole tiles


@dataclass(frozen=True)
class ChunkedValue:
    """A value that is computed in chunks.

    Attributes:
        node: the value.
        columns: the number of columns of each chunk.
        nbytes: bytes of the whole value.
        bound: bytes that an intermediate may take.
    """

    node: Node
    columns: tuple[int, ...]
    nbytes: int
    bound: int

    def __str__(self) -> str:
        each = self.nbytes * self.columns[0] // sum(self.columns)
        return (
            f"{len(self.columns)} parts of {self.columns[0]} of its {sum(self.columns)} columns: "
            f"{each / 1e6:.1f} MB at a time, not {self.nbytes / 1e6:.1f}, which is more than a "
            f"quarter of all arguments and outputs ({self.bound / 1e6:.1f})"
        )


@dataclass(frozen=True)
class Parted:
    """A chunked graph, its cuts, and contraction -> number of the chunk that it belongs to."""

    graph: Graph
    cuts: tuple[ChunkedValue, ...] = ()
    part_of: Mapping[Node, int] = field(default_factory=dict[Node, int])


class _AllOf(Exception):
    """A node cannot be computed in chunks."""


def chunk(graph: Graph, sizes: Mapping[str, int], per_call: frozenset[str]) -> Parted:
    """The graph with its largest intermediate in chunks, if that takes more bytes than the bound.

    Args:
        graph: in normal form.
        sizes: the size of every symbol.
        per_call: names of arguments that are new in every call, and so are no weights.
    """
    bound = sum(n.nbytes(sizes) for n in (*graph.inputs, *graph.roots)) // SHARE
    between = _between(graph, per_call)
    for node in sorted(between, key=lambda n: -n.nbytes(sizes)):
        nbytes = node.nbytes(sizes)
        if nbytes <= bound:
            continue
        columns = part_columns(node.shape[-1].size(sizes), -(-nbytes // max(bound, 1)))
        if len(columns) < 2:
            continue
        for seeds in (_sources(node), [node]):
            try:
                roots, part_of = _Parts(seeds, columns).run(graph)
            except _AllOf:
                continue
            parted = graph.with_roots(roots)
            most = max((n.nbytes(sizes) for n in _between(parted, per_call)), default=0)
            if most < nbytes:
                return Parted(parted, (ChunkedValue(node, columns, nbytes, bound),), part_of)
    return Parted(graph)


def _sources(node: Node) -> list[Node]:
    """The contractions that a node is an elementwise function of, or else the node itself."""
    found: dict[Node, None] = {}
    stack = [node]
    while stack:
        match stack.pop():
            case Contract() as one if one.shape[-1] == node.shape[-1]:
                found[one] = None
            case (Map() | Cast() | Expand()) as one:
                stack += [o for o in one.operands if o.rank and o.shape[-1] == node.shape[-1]]
            case _:
                pass
    return list(found) or [node]


def part_columns(columns: int, count: int) -> tuple[int, ...]:
    """Divide columns into at most `count` chunks; all but the last are multiples of STEP."""
    count = min(count, MOST)
    each = -(-columns // (count * STEP)) * STEP
    whole, rest = divmod(columns, each)
    if rest and (rest >= STEP or not whole):
        return (each,) * whole + (rest,)
    return (each,) * (whole - 1) + (each + rest,)


def _between(graph: Graph, per_call: frozenset[str]) -> list[Node]:
    """Intermediates that a contraction reads from memory, in graph order: no inputs, no weights."""
    nodes = list(walk(graph.roots))
    weights = weight_nodes(nodes, per_call)
    factors = [base(o) for n in nodes if isinstance(n, Contract) for o in n.operands]
    return [
        n
        for n in dict.fromkeys(factors)
        if not isinstance(n, Input) and n not in weights and n.rank
    ]


class _Parts:
    """One cut of the last axis of the seeds, and of every node that has this axis.

    Attributes:
        spans: (start, size) of each chunk along the axis.
        axes: the axis of each node that is cut, counted from the end.
        stands: a node of the graph -> its replacement.
        memo: (node, axis, chunk) -> that chunk of the node.
        part_of: contraction -> the chunk that it belongs to.
    """

    def __init__(self, seeds: list[Node], columns: tuple[int, ...]) -> None:
        starts = [sum(columns[:i]) for i in range(len(columns))]
        self.spans = [(Dim.of(a), Dim.of(n)) for a, n in zip(starts, columns, strict=True)]
        self.axes: dict[Node, int] = dict.fromkeys(seeds, -1)
        self.stands: dict[Node, Node] = {}
        self.memo: dict[tuple[Node, int, int], Node] = {}
        self.part_of: dict[Node, int] = {}

    def run(self, graph: Graph) -> tuple[tuple[Node, ...], dict[Node, int]]:
        """The new roots, and the chunk of each contraction. Raises _AllOf."""
        for node in walk(graph.roots):
            if node not in self.axes and any(o in self.axes for o in node.operands):
                axis = self.carried(node)
                if axis is None:
                    with origin(node.where):
                        self.stands[node] = self.summed(node)
                else:
                    self.axes[node] = axis
        for root in graph.roots:
            if root in self.axes:
                with origin(root.where):
                    self.stands[root] = self.beside(root)
        return self.resolved(graph.roots), self.part_of

    def resolved(self, roots: tuple[Node, ...]) -> tuple[Node, ...]:
        """The roots, rebuilt on the replacements of `stands`."""
        new: dict[Node, Node] = {}
        stack = list(roots)
        while stack:
            node = stack[-1]
            stands = self.stands.get(node)
            needed = node.operands if stands is None else (stands,)
            missing = [] if node in new else [n for n in needed if n not in new]
            if missing:
                stack += missing
                continue
            stack.pop()
            if node not in new:
                new[node] = (
                    new[stands] if stands is not None else _on(node, [new[n] for n in needed])
                )
                if node in self.part_of:
                    self.part_of[new[node]] = self.part_of[node]
        return tuple(new[r] for r in roots)

    # Upwards, to users: which nodes have the axis.

    def carried(self, node: Node) -> int | None:
        """The axis of a node that its operands' cut axis becomes; None where the node sums it."""
        found = {self.through(node, o, self.axes[o]) for o in node.operands if o in self.axes}
        if len(found) > 1:
            raise _AllOf
        return found.pop()

    def through(self, node: Node, operand: Node, axis: int) -> int | None:
        match node:
            case Map() | Cast() | Expand():
                return axis
            case Reshape():
                return _same_axis(operand.shape, axis, node.shape)
            case Permute(order=order):
                return order.index(axis + node.rank) - node.rank
            case Slice() | Concat() if node.axis != axis:
                return axis
            case Contract() if node.batched:
                raise _AllOf
            case Contract() if axis == -1:
                return None
            case Contract(lhs=lhs, rhs=rhs) if lhs is not rhs:
                return axis if operand is lhs else -1
            case Reduce(fn=fn) if MONOIDS[fn].is_plain_sum and node.axis == axis:
                return None
            case Reduce() if node.axis != axis:
                return axis
            case _:
                raise _AllOf

    def summed(self, node: Node) -> Node:
        """A sum over the axis as the sum over its chunks; contractions give at least float32."""
        total: Node | None = None
        for part in range(len(self.spans)):
            one = self.summand(node, part)
            total = one if total is None else Map(SUM, (total, one))
        assert total is not None
        return total if total.dtype == node.dtype else Cast(total, node.dtype)

    def summand(self, node: Node, part: int) -> Node:
        if isinstance(node, Contract):
            wide = node.lhs.dtype if node.lhs.dtype.size > f32.size else f32
            one = Contract(self.part(node.lhs, -1, part), self.part(node.rhs, -1, part), wide)
            self.part_of[one] = part
            return one
        assert isinstance(node, Reduce)
        return Reduce(node.fn, self.part(node.arg, node.axis, part), node.axis)

    def beside(self, root: Node) -> Node:
        """A value that keeps the axis, as the concatenation of its chunks."""
        axis = self.axes[root]
        return Concat(tuple(self.part(root, axis, p) for p in range(len(self.spans))), axis)

    # Downwards, to operands: a chunk of a node from chunks of its operands.

    def part(self, node: Node, axis: int, part: int) -> Node:
        """One chunk of a node along `axis`."""
        key = node, axis, part
        if key not in self.memo:
            with origin(node.where):
                self.memo[key] = self._part(node, axis, part)
            if isinstance(self.memo[key], Contract):
                self.part_of[self.memo[key]] = part
        return self.memo[key]

    def _part(self, node: Node, axis: int, part: int) -> Node:
        start, size = self.spans[part]
        match node:
            case Map(fn=fn, args=args):
                return Map(fn, tuple(self.narrow(a, axis, part) for a in args))
            case Cast(arg=arg, to=to):
                return Cast(self.part(arg, axis, part), to)
            case Expand(arg=arg, to=to):
                return Expand(self.narrow(arg, axis, part), _with(to, axis, size))
            case Permute(arg=arg, order=order):
                return Permute(self.part(arg, order[axis] - node.rank, part), order)
            case Contract(lhs=lhs, rhs=rhs, result=result) if axis == -1:
                return Contract(lhs, self.part(rhs, -2, part), result)
            case Contract(lhs=lhs, rhs=rhs, result=result) if axis == -2 or not node.batched:
                return Contract(self.part(lhs, axis, part), rhs, result)
            case Reduce(axis=reduced):
                operands = [self.narrow(o, axis, part) for o in node.operands]
                return Reduce(node.fn, operands[0], reduced, *operands[1:])
            case Reshape(arg=arg, to=to) if own := _find_axis(node.shape, axis, arg.shape):
                return Reshape(self.part(arg, own, part), _with(to, axis, size))
            case _:
                return Slice(node, axis, start, size, 1)

    def narrow(self, node: Node, axis: int, part: int) -> Node:
        """One chunk of an operand, or the whole operand if it does not have the axis."""
        inside = -axis <= node.rank and node.shape[axis] != ONE
        return self.part(node, axis, part) if inside else node


def _on(node: Node, operands: list[Node]) -> Node:
    """The same operation on other operands."""
    if all(a is b for a, b in zip(operands, node.operands, strict=True)):
        return node
    with origin(node.where):
        return node.with_operands(operands)


def _with(shape: Shape, axis: int, size: Dim) -> Shape:
    """A shape with axis `axis` (negative) of size `size`."""
    return tuple(size if i == axis + len(shape) else d for i, d in enumerate(shape))


def _same_axis(before: Shape, axis: int, after: Shape) -> int:
    """The axis of `after`, a reshape of `before`, with the elements of `axis`. Raises _AllOf."""
    found = _find_axis(before, axis, after)
    if found is None:
        raise _AllOf
    return found


def _find_axis(before: Shape, axis: int, after: Shape) -> int | None:
    """As `_same_axis`, but None if the reshape has no such axis."""
    inner = product(before[len(before) + axis + 1 :])
    for other in _axes(after):
        if after[other] == before[axis] and product(after[len(after) + other + 1 :]) == inner:
            return other
    return None


def _axes(shape: Shape) -> Iterator[int]:
    return iter(range(-1, -len(shape) - 1, -1))
