"""A contraction with interleaved heads -> one contraction per part, over a slice of the weight.

Models that store q, k and v of a head adjacently (GPT-NeoX) slice some columns of every head from
one result: for 2 heads its columns are [q0 k0 v0 q1 k1 v1], and q is not a contiguous range. Here
each part gets its own contraction with its rows of the weight, [q0 q1], [k0 k1], [v0 v1], which are
gathered once per version of the weight. Parts that a later node joins again (the two halves of a
head in a rotation) are not split.
"""

from __future__ import annotations

from collections.abc import Sequence

from coda.ir.dims import ONE, product
from coda.ir.graph import (
    Cast,
    Contract,
    Input,
    Map,
    Node,
    Permute,
    Reshape,
    Slice,
    transform,
    users,
)


def heads_apart(roots: Sequence[Node]) -> tuple[Node, ...]:
    """Equal values, with slices of heads as contractions of their own."""
    readers = users(roots)
    chosen: dict[Node, Node] = {}
    for node in readers:
        parts = readers[node]
        if isinstance(node, Reshape) and len(parts) > 1 and node not in roots:
            found = [_of_sliced_weight(p) for p in parts if isinstance(p, Slice)]
            if len(found) == len(parts) and None not in found and _apart(parts, readers):
                chosen |= {p: f for p, f in zip(parts, found, strict=True) if f is not None}
    return transform(roots, lambda n: chosen.get(n, n)) if chosen else tuple(roots)


def _apart(parts: Sequence[Node], readers: dict[Node, list[Node]]) -> bool:
    """Whether no node depends on two of the parts."""
    seen: set[Node] = set()
    for part in parts:
        mine: set[Node] = set()
        stack = [part]
        while stack:
            node = stack.pop()
            if node not in mine:
                mine.add(node)
                stack += readers[node]
        if mine & seen:
            return False
        seen |= mine
    return True


def _of_sliced_weight(node: Slice) -> Node | None:
    """A slice of each head as a contraction with the matching rows of the weight; or None."""
    heads = node.arg
    if not isinstance(heads, Reshape) or heads.arg.rank < 2:
        return None
    lead = heads.arg.rank - 1
    axis = heads.rank + node.axis
    if heads.shape[:lead] != heads.arg.shape[:lead] or axis <= lead:
        return None
    columns = heads.shape[lead:]

    def part(one: Node, at: int) -> Node:
        """The slice of each head, of a vector or matrix with the columns on axis `at`."""
        split = Reshape(one, (*one.shape[:at], *columns, *one.shape[at + 1 :]))
        cut = Slice(split, axis - lead + at - split.rank, node.start, node.size, node.step)
        whole = product(cut.shape[at : at + len(columns)])
        return Reshape(cut, (*one.shape[:at], whole, *one.shape[at + 1 :]))

    def visit(one: Node) -> Node | None:
        if one.shape[-1:] == (ONE,) or one.rank == 0:
            return one
        if one.rank == 1 or all(d == ONE for d in one.shape[:-1]):
            return part(one, one.rank - 1)
        matrix = isinstance(one, Contract) and not one.batched
        if isinstance(one, Contract) and matrix and isinstance(_transposed(one.rhs), Input):
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


def _transposed(node: Node) -> Node:
    return node.arg if isinstance(node, Permute) else node
