"""Imported graphs -> equal graphs with permutations moved to the outputs.

Models transpose [token, head, column] to [head, token, column] between a projection and attention,
and apply RoPE and norms of heads after it. Here these are computed in the projection's own layout,
and the permutation becomes a view of the result. Example: `rope(permute(x @ w))` with x [B, S, D]
becomes `permute(rope(x @ w))`, and the cosine table [S, C] is reshaped to [S, 1, C].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coda.ir.dims import ONE, Shape, inverse, product
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


def permuted(node: Node, order: Order) -> Node:
    """Permute axes; as a reshape if only axes of size 1 move."""
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
    """Reshape; moved below other reshapes, casts, and functions without contractions.

    So a RoPE table gets the axes of the heads before its functions are applied.
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
    """A Map with its operands reshaped, if only axes of size 1 come or go; else None."""
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
    """Each root as (node, permutation of its axes), with all inner permutations moved there."""
    found = transform(roots, _outward)
    out: list[tuple[Node, Order]] = []
    for root in found:
        apart = isinstance(root, Permute) and not isinstance(root.arg, Input)
        if apart and isinstance(root, Permute):
            out.append((root.arg, root.order))
        else:
            out.append((root, tuple(range(root.rank))))
    return out


def _is_transposed_weight(node: Node) -> bool:
    return isinstance(node, Permute) and isinstance(node.arg, Input) and node.rank == 2


def _outward(node: Node) -> Node:
    """Move the permutation of a node's operands after the node."""
    if isinstance(node, Permute):
        return permuted(node.arg, node.order)
    if isinstance(node, Reshape):
        return _reshape(node)
    moved = [o for o in node.operands if isinstance(o, Permute) and not _is_transposed_weight(o)]
    if not moved:
        return node
    if isinstance(node, Map | Concat):
        whole = [o for o in moved if o.rank == node.rank]
        return _elementwise(node, whole[0].order) if whole else node
    if isinstance(node, Cast | Slice | Reduce):
        return _along(node, moved[0])
    return node


def _elementwise(node: Map | Concat, order: Order) -> Node:
    """An elementwise operation on permuted operands -> a permutation of its result."""
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
    """A cast, slice or reduction of a permuted operand -> a permutation of its result."""
    if isinstance(node, Cast):
        return permuted(Cast(arg.arg, node.to), arg.order)
    axis = arg.order[node.axis] - arg.rank
    if isinstance(node, Slice):
        inner: Node = Slice(arg.arg, axis, node.start, node.size, node.step)
    else:
        inner = Reduce(node.fn, arg.arg, axis)
    return permuted(inner, arg.order)


def _reshape(node: Reshape) -> Node:
    """A reshape moves before a permutation that keeps the merged or split axes adjacent."""
    arg = node.arg
    if not isinstance(arg, Permute) or _is_transposed_weight(arg):
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
    """Axes in the order `wide`, with each axis of size 1 inserted after its predecessor."""
    found = list(wide)
    for i, d in enumerate(shape):
        if d == ONE:
            found.insert(found.index(i - 1) + 1 if i else 0, i)
    return found


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Minimal pairs (axes before, axes after) of equal element count of a reshape, or None."""
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
