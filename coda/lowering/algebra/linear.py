"""Product with a row factor -> the factor's cotangent from the outputs (law 2).

The identity is ⟨Aᵀ dy, z⟩ = ⟨dy, A z⟩. If rows z = x · r reach the outputs y = A z by linear
operations alone, the cotangent of r is

    Σ dz · x = (Σ dz · z) / r = (Σ dy · y) / r

a sum over the outputs, which stay in memory anyway, instead of over x, which need not be saved. If
outputs have the rows in another order, o [b, i, h, d] of z [b, h, i, d], so has the sum.

Operands of attention are in memory too, since its derivative reads them, and count as outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from coda.ir.attend import Attend
from coda.ir.dims import ONE, Shape, inverse, product
from coda.ir.graph import (
    Cast,
    Concat,
    Contract,
    Map,
    Node,
    Permute,
    Reduce,
    Reshape,
    Slice,
)
from coda.ir.scalars import SCALARS
from coda.lowering.algebra.roles import keeps_columns, permuted


@dataclass(frozen=True)
class Outputs:
    """Outputs that are linear in a node, row by row.

    Attributes:
        nodes: the outputs.
        order: axis i of their rows is axis order[i] of the node's.
    """

    nodes: tuple[Node, ...]
    order: tuple[int, ...]


def row_factor(node: Map) -> Node | None:
    """The factor of a product that is constant along each row ([..., 1]) and never 0, or None."""
    if not SCALARS[node.fn].is_product:
        return None
    for factor, other in (node.args, node.args[::-1]):
        under = factor
        while isinstance(under, Cast | Reshape):
            under = under.arg
        never_zero = isinstance(under, Map) and SCALARS[under.fn].diverges_at_zero
        rows = factor.rank == node.rank and factor.shape[:-1] == node.shape[:-1]
        if never_zero and rows and factor.shape[-1] == ONE != other.shape[-1]:
            return factor
    return None


def read_by_attention(above: dict[Node, list[Node]]) -> set[Node]:
    """The nodes that only attention reads, perhaps with their rows permuted.

    Args:
        above: node -> its users, operands before users.
    """
    found: set[Node] = set()
    for node, readers in reversed(above.items()):
        views = [u in found and isinstance(u, Permute) and keeps_columns(u) for u in readers]
        if readers and all(v or isinstance(u, Attend) for u, v in zip(readers, views, strict=True)):
            found.add(node)
    return found


def linear_outputs(
    node: Node, users: Mapping[Node, list[Node]], outputs: Mapping[Node, Node]
) -> Outputs | None:
    """The outputs that a node reaches by linear operations; None if it has any other use.

    Every operation takes each row (one index of all axes but the last) to one row, all outputs have
    the rows in one order, and none has a user inside the graph. They come in the order of the
    node's users.
    """
    reached: dict[Node, None] = {node: None}
    ends: list[Node] = []
    stack = [node]
    while stack:
        one = stack.pop()
        above = users.get(one, [])
        if one in outputs:
            ends.append(one)
            if above:
                return None
        new = [u for u in above if u not in reached]
        reached |= dict.fromkeys(new)
        stack += reversed(new)
        if not above and one not in outputs:
            return None
    orders = {node: tuple(range(node.rank - 1))}
    stack = list(ends)
    while stack:
        one = stack[-1]
        waiting = [o for o in one.operands if o in reached and o not in orders]
        if one not in orders and not waiting:
            order = _row_order(one, orders, node.shape) if _is_linear(one, reached) else None
            if order is None:
                return None
            orders[one] = order
        stack = stack + waiting if waiting else stack[:-1]
    found = {orders[n] for n in ends}
    return Outputs(tuple(ends), found.pop()) if len(found) == 1 else None


def _is_linear(node: Node, inside: Collection[Node]) -> bool:
    """Whether a node is linear in its operands of `inside`, with all others as coefficients."""
    known = [o in inside for o in node.operands]
    match node:
        case Slice() | Reshape() | Permute() | Cast() | Concat():
            return all(known)
        case Map(fn=fn):
            return SCALARS[fn].is_linear_in(known)
        case Contract() if not node.batched:
            return known == [True, False]
        case _:
            return False


def _row_order(
    node: Node, orders: Mapping[Node, tuple[int, ...]], shape: Shape
) -> tuple[int, ...] | None:
    """The order in which a node has the rows of `shape`; None if it mixes rows.

    `orders` has those of its operands that count; each row of the node is computed of one of them.
    """
    inside = [o for o in node.operands if o in orders]
    below, lead = {orders[o] for o in inside}, len(shape) - 1
    if len(below) > 1:
        return None
    order = below.pop()
    keeps = True
    match node:
        case Slice(axis=axis) | Concat(axis=axis):
            keeps = node.rank + axis >= lead
        case Permute(order=axes):
            keeps = sorted(axes[:lead]) == list(range(lead))
            order = tuple(order[i] for i in axes[:lead]) if keeps else order
        case Map():
            keeps = all(o.rank == node.rank for o in inside)
        case Contract(lhs=lhs):
            keeps = lhs.rank > lead
        case _:
            pass
    return order if keeps and node.shape[:lead] == tuple(shape[i] for i in order) else None


def factor_cotangent(factor: Node, found: Outputs, cotangents: Mapping[Node, Node]) -> Node:
    """The cotangent of a row factor, (Σ dy · y) / r over all columns of the outputs.

    Args:
        factor: r, [..., 1].
        found: outputs y, each with the leading axes of the factor, perhaps in another order.
        cotangents: dy of each output, of its shape.
    """
    lead = tuple(factor.shape[i] for i in found.order)
    parts: list[Node] = []
    for one in found.nodes:
        rest = product(one.shape[len(lead) :])
        flat = [Reshape(n, (*lead, rest)) for n in (cotangents[one], one)]
        parts.append(Map("mul", tuple(n.arg if n.arg.shape == n.shape else n for n in flat)))
    whole = parts[0] if len(parts) == 1 else Concat(tuple(parts), -1)
    total = permuted(Reduce("sum", whole, -1), (*inverse(found.order), len(lead)))
    return Map("mul", (total, Map("recip", (factor,))))
