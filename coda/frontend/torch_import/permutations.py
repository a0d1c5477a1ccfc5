"""Imported graphs, tidied: permutations moved to the outside, tables under the axes of heads.

Torch's models permute heads before tokens between a projection and attention. What lies between
(RoPE, norms of heads) is computed in the projection's own order, and the permutation is left to be
a view of the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coda.ir.dims import ONE, Shape, product
from coda.ir.graph import (
    Cast,
    Concat,
    Contract,
    Input,
    Map,
    Node,
    Permute,
    Reduce,
    Reshape,
    Slice,
    transform,
    walk,
)

Order = tuple[int, ...]


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
    turned = [o for o in node.operands if isinstance(o, Permute) and not _is_turned_weight(o)]
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
    inner = {
        place: i for i, place in enumerate(i for i in range(arg.rank) if arg.arg.shape[i] != ONE)
    }
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
    """Axes of more than one element that a reshape turns into others, as few at once as can be."""
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
