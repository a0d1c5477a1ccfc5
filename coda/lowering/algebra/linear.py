"""Product with a row factor -> the factor's cotangent from the outputs (law 2).

The identity is ⟨Aᵀ dy, z⟩ = ⟨dy, A z⟩. If rows z = x · r reach the outputs y = A z by linear
operations alone, the cotangent of r is

    Σ dz · x = (Σ dz · z) / r = (Σ dy · y) / r

a sum over the outputs, which stay in memory anyway, instead of over x, which need not be saved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from coda.ir.dims import ONE, Shape, product
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


def linear_outputs(
    node: Node, users: Mapping[Node, list[Node]], outputs: Mapping[Node, Node]
) -> list[Node] | None:
    """The outputs that a node reaches by linear operations; None if it has any other use.

    Every operation takes each row (one index of all axes but the last) to the same row, and no
    output has a user inside the graph. The order is that of the node's users.
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
    inside, rows = reached.keys(), node.shape[:-1]
    linear = all(
        n is node or (_is_linear(n, inside) and _keeps_rows(n, inside, rows)) for n in reached
    )
    return ends if linear else None


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


def _keeps_rows(node: Node, inside: Collection[Node], rows: Shape) -> bool:
    """Whether a node has the leading axes `rows`, and each row is computed from that row alone.

    Its operands of `inside` have these leading axes as well.
    """
    lead = len(rows)
    if node.shape[:lead] != rows:
        return False
    match node:
        case Slice(axis=axis) | Concat(axis=axis):
            return node.rank + axis >= lead
        case Permute(order=order):
            return order[:lead] == tuple(range(lead))
        case Map():
            return all(o.rank == node.rank for o in node.operands if o in inside)
        case Contract(lhs=lhs):
            return lhs.rank > lead
        case _:
            return True


def factor_cotangent(factor: Node, outputs: list[Node], cotangents: Mapping[Node, Node]) -> Node:
    """The cotangent of a row factor, (Σ dy · y) / r over all columns of the outputs.

    Args:
        factor: r, [..., 1].
        outputs: y, each with the leading axes of the factor.
        cotangents: dy of each output, of its shape.
    """
    lead = factor.shape[:-1]
    parts: list[Node] = []
    for one in outputs:
        rest = product(one.shape[len(lead) :])
        flat = [Reshape(n, (*lead, rest)) for n in (cotangents[one], one)]
        parts.append(Map("mul", tuple(n.arg if n.arg.shape == n.shape else n for n in flat)))
    whole = parts[0] if len(parts) == 1 else Concat(tuple(parts), -1)
    return Map("mul", (Reduce("sum", whole, -1), Map("recip", (factor,))))
