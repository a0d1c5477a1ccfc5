"""An imported graph with constant sizes -> the same graph with symbols for its row (token) axes.

Axes are unified through the graph, starting from the rows of contractions. So 16 tokens differ from
16 columns, weights are recognised, and one Program serves any number of tokens. Example: in
`x [16, 16] @ w [16, 64]` the first axis of x becomes `n0`, and the others stay constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count

from coda.errors import CodaError
from coda.ir.dims import ONE, Dim, Shape, product
from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Contract,
    Expand,
    Graph,
    Input,
    Map,
    Node,
    Permute,
    Pick,
    Reduce,
    Reshape,
    Size,
    Slice,
    walk,
)
from coda.ir.node import origin


def rebuild(
    graph: Graph, shape: Callable[[Node, Shape], Shape], dim: Callable[[Dim], Dim]
) -> Graph:
    """Rebuild a graph with other dims.

    Args:
        graph: a graph.
        shape: (node, its shape) -> the new shape, for nodes that state one.
        dim: dim -> the new dim, for slices and sizes.
    """
    new: dict[Node, Node] = {}
    for node in walk([*graph.inputs, *graph.roots]):
        with origin(node.where):
            operands = [new[o] for o in node.operands]
            match node:
                case Input(name=name, declared=declared, element=element):
                    new[node] = Input(name, shape(node, declared), element)
                case Reshape(to=to):
                    new[node] = Reshape(operands[0], shape(node, to))
                case Expand(to=to):
                    new[node] = Expand(operands[0], shape(node, to))
                case Slice(axis=axis, start=start, size=size, step=step):
                    new[node] = Slice(operands[0], axis, dim(start), dim(size), step)
                case Size(dim=of, element=element):
                    new[node] = Size(dim(of), element)
                case _:
                    new[node] = node.with_operands(operands)
    inputs = tuple(n for i in graph.inputs if isinstance(n := new[i], Input))
    renamed = Graph(graph.name, inputs, graph.outputs, graph.constants)
    return renamed.with_roots(new[r] for r in graph.roots)


Axis = tuple[Node, int]


class _Axes:
    """Equivalence classes (union-find) of axes with equal size, and merges of axes by reshapes.

    `sizes` maps symbols to distinct primes, so that only equal products of dims compare equal.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.parent: dict[Axis, Axis] = {}
        self.merges: list[tuple[list[Axis], list[Axis]]] = []
        self.columns: list[Axis] = []
        self.rows: list[Axis] = []

    def find(self, axis: Axis) -> Axis:
        root = axis
        while (above := self.parent.get(root, root)) != root:
            root = above
        if root != axis:
            self.parent[axis] = root
        return root

    def same(self, a: Axis, b: Axis) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[a] = b

    def aligned(self, node: Node, arg: Node) -> None:
        """Unify the axes of an elementwise operand with the node's, aligned at the right."""
        for i in range(arg.rank):
            if arg.shape[i] != ONE:
                self.same((arg, i), (node, i + node.rank - arg.rank))

    def visit(self, node: Node) -> None:
        """Unify the axes of a node with those of its operands."""
        match node:
            case Input() | Const():
                pass
            case Map() | Cast() | Expand():
                for arg in node.operands:
                    self.aligned(node, arg)
            case Contract():
                self.contract(node)
            case Reduce() | Slice() | Concat():
                self.along(node)
            case Permute(arg=arg, order=order):
                for i, source in enumerate(order):
                    self.same((node, i), (arg, source))
            case Reshape(arg=arg):
                self.reshape(node, arg)
            case Pick(arg=arg, index=index):
                for i in range(index.rank):
                    self.same((index, i), (node, i))
                    self.same((arg, i), (node, i))
            case _:
                self.columns += [(node, i) for i in range(node.rank)]

    def contract(self, node: Contract) -> None:
        last = node.rank - 1
        if node.batched:
            self.batches(node)
            return
        for i in range(last):
            self.same((node.lhs, i), (node, i))
        self.rows += [(node, i) for i in range(last)]
        self.same((node.rhs, 0), (node, last))
        self.same((node.rhs, 1), (node.lhs, last))
        self.columns += [(node.rhs, 0), (node.rhs, 1)]

    def batches(self, node: Contract) -> None:
        """Batch axes and those of the left rows are rows; the right rows are columns."""
        x, w, last = node.lhs, node.rhs, node.rank - 1
        for operand in (x, w):
            for i in range(operand.rank - 2):
                if operand.shape[i] != ONE:
                    self.same((operand, i), (node, i + node.rank - operand.rank))
        self.same((x, x.rank - 2), (node, last - 1))
        self.same((w, w.rank - 2), (node, last))
        self.same((w, w.rank - 1), (x, x.rank - 1))
        self.rows += [(node, i) for i in range(last)]
        self.columns += [(w, w.rank - 2), (w, w.rank - 1)]

    def along(self, node: Reduce | Slice | Concat) -> None:
        """Unify all axes but the one of the operation."""
        axis = node.rank + node.axis
        for arg in node.operands:
            for i in range(arg.rank):
                if i != axis:
                    self.same((node, i), (arg, i))
            if not isinstance(node, Reduce):
                self.columns += [(arg, axis), (node, axis)]

    def size(self, axes: Sequence[Axis]) -> int:
        """The number of elements of some axes."""
        return product(node.shape[i] for node, i in axes).size(self.sizes)

    def reshape(self, node: Node, arg: Node) -> None:
        """Pair axes before and after a reshape: minimal groups of equal element count."""
        before = [(arg, i) for i in range(arg.rank) if arg.shape[i] != ONE]
        after = [(node, i) for i in range(node.rank) if node.shape[i] != ONE]
        i = j = 0
        while i < len(before) and j < len(after):
            a, b = [before[i]], [after[j]]
            i, j = i + 1, j + 1
            while (x := self.size(a)) != (y := self.size(b)):
                if x < y and i < len(before):
                    a.append(before[i])
                    i += 1
                elif j < len(after):
                    b.append(after[j])
                    j += 1
                else:
                    break
            if len(a) == len(b) == 1:
                self.same(a[0], b[0])
            else:
                self.merges.append((a, b))
        self.columns += before[i:] + after[j:]


PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079, 10091, 10093)


def with_row_symbols(graph: Graph) -> Graph:
    """The graph with symbols for its row axes; unchanged if they cannot be determined."""
    nodes = list(walk([*graph.inputs, *graph.roots]))
    if any(isinstance(n, Size) for n in nodes) or len(graph.symbols) > len(PRIMES):
        return graph
    axes = _Axes(dict(zip(graph.symbols, PRIMES, strict=False)))
    for node in nodes:
        axes.visit(node)
    dims = _assign(axes, nodes)

    def shape(node: Node, now: Shape) -> Shape:
        return tuple(dims.get(axes.find((node, i)), d) for i, d in enumerate(now))

    try:
        return rebuild(graph, shape, lambda d: d)
    except CodaError:
        return graph


def canonical(graph: Graph) -> Graph:
    """The graph with its symbols named n0, n1, ... in the order of the arguments."""
    found: dict[str, Dim] = {}
    for node in graph.inputs:
        for dim in node.shape:
            for symbol in sorted(dim.symbols):
                found.setdefault(symbol, Dim.of(f"n{len(found)}"))

    def shape(node: Node, now: Shape) -> Shape:
        return tuple(d.substitute(found) for d in now)

    return rebuild(graph, shape, lambda d: d.substitute(found)) if found else graph


def _with_parts(columns: set[Axis], merges: Sequence[tuple[list[Axis], ...]]) -> set[Axis]:
    """Columns, and the axes into which a reshape divides one of them (heads of a row)."""
    found = set(columns)
    before = -1
    while len(found) != before:
        before = len(found)
        for sides in merges:
            for whole, several in (sides, sides[::-1]):
                if len(whole) == 1 and whole[0] in found:
                    found.update(several)
    return found


def _assign(axes: _Axes, nodes: Sequence[Node]) -> dict[Axis, Dim]:
    """Class of axes -> its symbol, if it is a row and never a column; a product if merged."""
    merges = [
        tuple([axes.find(a) for a in side] for side in (one, other)) for one, other in axes.merges
    ]
    columns = _with_parts({axes.find(a) for a in axes.columns}, merges)
    rows = {axes.find(a) for a in axes.rows if a[0].shape[a[1]] != ONE} - columns
    parts: dict[Axis, list[Axis]] = {}
    progress = True
    while progress:
        progress = False
        for a, b in merges:
            for whole, several in ((a, b), (b, a)):
                if len(whole) == 1 and whole[0] in rows and not set(several) <= columns:
                    known = parts.setdefault(whole[0], several)
                    if known != several and len(known) == len(several):
                        for x, y in zip(known, several, strict=True):
                            axes.same(x, y)
                    progress |= not set(several) <= rows | columns
                    rows |= set(several) - columns
                if len(whole) == 1 and set(several) <= rows and whole[0] not in rows | columns:
                    rows.add(whole[0])
                    parts.setdefault(whole[0], several)
                    progress = True
    found: dict[Axis, Dim] = {}
    roots = {axes.find(r) for r in rows}
    fresh = (Dim.of(f"r{i}") for i in count())

    def resolve(axis: Axis) -> Dim:
        axis = axes.find(axis)
        if axis not in found:
            node, i = axis
            inner = parts.get(axis)
            if node.shape[i].constant is None or axis in columns:
                found[axis] = node.shape[i]
            else:
                found[axis] = product(map(resolve, inner)) if inner else next(fresh)
        return found[axis]

    for node in nodes:
        for i in range(node.rank):
            if axes.find((node, i)) in roots:
                resolve((node, i))
    return found
