"""Imported graphs, tidied: permutations moved to the outside, and rows told from columns.

Torch's models permute heads before tokens between a projection and attention. What lies between
(RoPE, norms of heads) is computed in the projection's own order, and the permutation is left to be
a view of the result.

Where torch gives sizes as numbers, the axes that are rows of a contraction are found by following
each axis through the graph, and get symbols. So 16 tokens and 16 columns are told apart, weights
are known, and a Program serves any number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count

from coda.errors import CodaError
from coda.ir.dims import ONE, Dim, Shape, product
from coda.ir.graph import (
    Cast,
    Concat,
    Contract,
    Expand,
    Gather,
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
    origin,
    transform,
    walk,
)

Order = tuple[int, ...]


# Permutations.


def inverse(order: Order) -> Order:
    """The permutation that undoes this one."""
    return tuple(order.index(i) for i in range(len(order)))


def permuted(node: Node, order: Order) -> Node:
    """A permutation, as a reshape where it moves only axes of size 1."""
    if isinstance(node, Permute):
        order = tuple(node.order[i] for i in order)
        node = node.arg
    if order == tuple(range(len(order))):
        return node
    wide = [i for i in order if node.shape[i] != ONE]
    if wide == sorted(wide):
        return reshaped(node, tuple(node.shape[i] for i in order))
    return Permute(node, order)


def reshaped(node: Node, shape: Shape) -> Node:
    """A reshape, of what lies under other reshapes, casts and functions of arguments alone.

    So a table of angles has the axes of the heads that it meets before it is computed.
    """
    if node.shape == shape:
        return node
    if isinstance(node, Reshape):
        return reshaped(node.arg, shape)
    if isinstance(node, Cast):
        return Cast(reshaped(node.arg, shape), node.to)
    found = None
    if isinstance(node, Map) and not any(isinstance(n, Contract) for n in walk([node])):
        found = _table(node, shape)
    return found or Reshape(node, shape)


def _table(node: Map, shape: Shape) -> Node | None:
    """A function whose operands get or lose axes of size 1; None for other reshapes."""
    groups = _groups(node.shape, shape)
    if groups is None or any(len(a) != len(b) for a, b in groups):
        return None
    operands: list[Node] = []
    for one in node.args:
        full = (ONE,) * (node.rank - one.rank) + one.shape
        wanted = [ONE] * len(shape)
        for (before,), (after,) in groups:
            wanted[after] = full[before]
        operands.append(one if one.rank == 0 else reshaped(one, tuple(wanted)))
    found = node.with_operands(operands)
    return found if found.shape == shape else None


def outward(roots: Iterable[Node]) -> list[tuple[Node, Order]]:
    """Each root as a node and a permutation of its axes, with no permutation left on the way."""
    found = transform(roots, _outward)
    out: list[tuple[Node, Order]] = []
    for root in found:
        apart = isinstance(root, Permute) and not isinstance(root.arg, Input)
        if apart and isinstance(root, Permute):
            out.append((root.arg, root.order))
        else:
            out.append((root, tuple(range(root.rank))))
    return out


def _is_turned_weight(node: Node) -> bool:
    return isinstance(node, Permute) and isinstance(node.arg, Input) and node.rank == 2


def _outward(node: Node) -> Node:
    """A node with a permutation of its operands behind it instead."""
    if isinstance(node, Permute):
        return permuted(node.arg, node.order)
    if isinstance(node, Reshape):
        return _reshape(node)
    if isinstance(node, Slice):
        node = _of_sliced_weight(node) or node
    turned = [
        o for o in node.operands if isinstance(o, Permute) and not _is_turned_weight(o)
    ]
    if not turned:
        return node
    if isinstance(node, Map | Concat):
        whole = [o for o in turned if o.rank == node.rank]
        return _elementwise(node, whole[0].order) if whole else node
    if isinstance(node, Cast | Slice | Reduce):
        return _along(node, turned[0])
    return node


def _elementwise(node: Map | Concat, order: Order) -> Node:
    """An operation on permuted operands as a permutation of an operation."""
    back = inverse(order)
    operands: list[Node] = []
    for one in node.operands:
        if one.rank == 0:
            operands.append(one)
            continue
        full = reshaped(one, (ONE,) * (node.rank - one.rank) + one.shape)
        operands.append(permuted(full, back))
    if isinstance(node, Map):
        return permuted(node.with_operands(operands), order)
    axis = order[node.axis] - node.rank
    return permuted(Concat(tuple(operands), axis), order)


def _along(node: Cast | Slice | Reduce, arg: Permute) -> Node:
    """An operation along an axis of a permuted operand."""
    if isinstance(node, Cast):
        return permuted(Cast(arg.arg, node.to), arg.order)
    axis = arg.order[node.axis] - arg.rank
    if isinstance(node, Slice):
        inner: Node = Slice(arg.arg, axis, node.start, node.size, node.step)
    else:
        inner = Reduce(node.fn, arg.arg, axis)
    return permuted(inner, arg.order)


def _reshape(node: Reshape) -> Node:
    """A reshape goes under a permutation that keeps the axes which it joins or splits together."""
    arg = node.arg
    if not isinstance(arg, Permute) or _is_turned_weight(arg):
        return reshaped(arg, node.to)
    groups = _groups(arg.shape, node.to)
    if groups is None:
        return node
    inner = {place: i for i, place in enumerate(i for i in range(arg.rank) if arg.arg.shape[i] != ONE)}
    places = [[inner[arg.order[i]] for i in before] for before, _ in groups]
    if any(p != list(range(p[0], p[0] + len(p))) for p in places):
        return node
    after = [after for _, (_, after) in sorted(zip(places, groups, strict=True))]
    sources = _beside_their_neighbours([i for a in after for i in a], node.to)
    under = reshaped(arg.arg, tuple(node.to[i] for i in sources))
    return permuted(under, tuple(sources.index(i) for i in range(node.rank)))


def _beside_their_neighbours(wide: Sequence[int], shape: Shape) -> list[int]:
    """Axes in this order, with each axis of size 1 after the one that it follows in the shape."""
    found = list(wide)
    for i, d in enumerate(shape):
        if d == ONE:
            found.insert(found.index(i - 1) + 1 if i else 0, i)
    return found


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Axes (of more than one element) that a reshape turns into others, as few at once as can be."""
    old = [i for i, d in enumerate(before) if d != ONE]
    new = [i for i, d in enumerate(after) if d != ONE]
    found: list[tuple[list[int], list[int]]] = []
    while old and new:
        a, b = [old.pop(0)], [new.pop(0)]
        while (x := product(before[i] for i in a)) != (y := product(after[i] for i in b)):
            if x.constant is None or y.constant is None:
                return None
            side, rest = (a, old) if x.constant < y.constant else (b, new)
            if not rest:
                return None
            side.append(rest.pop(0))
        found.append((a, b))
    return None if old or new else found


# Parts of heads.


def _of_sliced_weight(node: Slice) -> Node | None:
    """Some columns of each head, as a product with those rows of the weight.

    Models that keep the q, k and v of a head side by side slice every head's columns. Such columns
    lie in no one piece of a product's result, but the rows of its weight can be put together once.
    """
    heads = node.arg
    if not isinstance(heads, Reshape) or heads.arg.rank < 2:
        return None
    lead = heads.arg.rank - 1
    axis = heads.rank + node.axis
    if heads.shape[:lead] != heads.arg.shape[:lead] or axis <= lead:
        return None
    columns = heads.shape[lead:]

    def part(one: Node, at: int) -> Node:
        """The columns, of a vector or of a matrix in which axis `at` has them."""
        split = Reshape(one, (*one.shape[:at], *columns, *one.shape[at + 1 :]))
        cut = Slice(split, axis - lead + at - split.rank, node.start, node.size, node.step)
        whole = product(cut.shape[at : at + len(columns)])
        return Reshape(cut, (*one.shape[:at], whole, *one.shape[at + 1 :]))

    def visit(one: Node) -> Node | None:
        if one.shape[-1:] == (ONE,) or one.rank == 0:
            return one
        if one.rank == 1 or all(d == ONE for d in one.shape[:-1]):
            return part(one, one.rank - 1)
        if isinstance(one, Contract) and not any(isinstance(n, Contract) for n in walk([one.rhs])):
            return Contract(one.lhs, part(one.rhs, 0), one.result)
        if isinstance(one, Cast):
            inner = visit(one.arg)
            return None if inner is None else Cast(inner, one.to)
        if not isinstance(one, Map):
            return None
        found = [visit(a) for a in one.args]
        return one.with_operands(f for f in found if f) if None not in found else None

    found = visit(heads.arg)
    return None if found is None else Reshape(found, node.shape)


# Rows.


def rebuild(
    graph: Graph, shape: Callable[[Node, Shape], Shape], dim: Callable[[Dim], Dim]
) -> Graph:
    """The graph under other dims.

    Args:
        graph: a graph.
        shape: (node, its shape) -> the new shape, of nodes that state one.
        dim: (dim) -> the new dim, of slices and sizes.
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
    return Graph(graph.name, inputs, graph.outputs).with_roots(new[r] for r in graph.roots)


Axis = tuple[Node, int]


class _Axes:
    """Classes of axes that have one size whatever the sizes are, and how reshapes merge them.

    `sizes` are sizes of the symbols under which only equal products are equal.
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
        """Axes of an elementwise operand, at the right."""
        for i in range(arg.rank):
            if arg.shape[i] != ONE:
                self.same((arg, i), (node, i + node.rank - arg.rank))

    def visit(self, node: Node) -> None:
        """What a node says of its axes and its operands'."""
        match node:
            case Map(args=args):
                for arg in args:
                    self.aligned(node, arg)
            case Cast(arg=arg):
                self.aligned(node, arg)
            case Expand(arg=arg):
                self.aligned(node, arg)
            case Contract(lhs=lhs, rhs=rhs):
                last = lhs.rank - 1
                for i in range(last):
                    self.same((lhs, i), (node, i))
                self.rows += [(node, i) for i in range(last)]
                self.same((rhs, 0), (node, last))
                self.same((rhs, 1), (lhs, last))
                self.columns += [(rhs, 0), (rhs, 1)]
            case Reduce(arg=arg, axis=axis):
                self.others(node, arg, axis)
            case Slice(arg=arg, axis=axis):
                self.others(node, arg, axis)
                self.columns += [(arg, arg.rank + axis), (node, node.rank + axis)]
            case Concat(args=args, axis=axis):
                for arg in args:
                    self.others(node, arg, axis)
                    self.columns.append((arg, arg.rank + axis))
                self.columns.append((node, node.rank + axis))
            case Permute(arg=arg, order=order):
                for i, source in enumerate(order):
                    self.same((node, i), (arg, source))
            case Reshape(arg=arg):
                self.reshape(node, arg)
            case Gather(table=table, index=index):
                for i in range(index.rank):
                    self.same((index, i), (node, i))
                for i in range(1, table.rank):
                    self.same((table, i), (node, index.rank + i - 1))
            case Pick(arg=arg, index=index):
                for i in range(index.rank):
                    self.same((index, i), (node, i))
                    self.same((arg, i), (node, i))
            case _:
                self.columns += [(node, i) for i in range(node.rank)] * (
                    not isinstance(node, Input)
                )

    def size(self, axes: Sequence[Axis]) -> int:
        """The number of elements of some axes."""
        return product(node.shape[i] for node, i in axes).size(self.sizes)

    def others(self, node: Node, arg: Node, axis: int) -> None:
        for i in range(arg.rank):
            if i != arg.rank + axis:
                self.same((node, i), (arg, i))

    def reshape(self, node: Node, arg: Node) -> None:
        """Pair the axes before and after: groups of equal products, as short as they can be."""
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
    """The graph with symbols for the axes that are rows; as it is where they cannot be told."""
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


def _assign(axes: _Axes, nodes: Sequence[Node]) -> dict[Axis, Dim]:
    """Symbols for the classes that are rows and never columns, merged ones as products."""
    columns = {axes.find(a) for a in axes.columns}
    rows = {axes.find(a) for a in axes.rows if a[0].shape[a[1]] != ONE} - columns
    merges = [
        tuple([axes.find(a) for a in side] for side in (one, other))
        for one, other in axes.merges
    ]
    parts: dict[Axis, list[Axis]] = {}
    progress = True
    while progress:
        progress = False
        for a, b in merges:
            for whole, several in ((a, b), (b, a)):
                if len(whole) == 1 and whole[0] in rows and not columns & set(several):
                    known = parts.setdefault(whole[0], several)
                    if known != several and len(known) == len(several):
                        for x, y in zip(known, several, strict=True):
                            axes.same(x, y)
                    progress |= not set(several) <= rows
                    rows |= set(several)
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
            if node.shape[i].constant is None:
                found[axis] = node.shape[i]
            else:
                found[axis] = product(map(resolve, inner)) if inner else next(fresh)
        return found[axis]

    for node in nodes:
        for i in range(node.rank):
            if axes.find((node, i)) in roots:
                resolve((node, i))
    return found
