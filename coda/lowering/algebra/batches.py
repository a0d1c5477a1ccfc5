"""Batched contraction and its cotangent -> the cotangents of both operands, batched contractions.

For y = x wᵀ with x [*b, M, K], w [*b, N, K], and d [*b, M, N] the cotangent of y:

    dx = d w        dw = dᵀ x       of w = vᵀ, a transposed view:   dw = (xᵀ d)ᵀ, so that dv = xᵀ d

If several batches share an operand, its cotangent is the sum of theirs. That sum is part of the
contraction, which then runs over two axes, so no partial cotangent is rounded. Queries
[B, G, R, S, d], of which R heads share the keys [B, G, 1, T, d], give

    dw [B, G, 1, T, d] = dᵀ as [B, G, T, (R S)]  times  x as [B, G, (R S), d]
"""

from __future__ import annotations

from coda.ir.dims import ONE, Shape, product
from coda.ir.graph import Contract, Expand, Node, Permute, Reshape
from coda.ir.views import shaped
from coda.lowering.algebra.roles import is_transposed_view, transposed


def lhs_cotangent(node: Contract, d: Node) -> Node:
    """The cotangent of the left operand of a batched contraction: its shape and dtype.

    Args:
        node: x [*b, M, K] times w [*b, N, K].
        d: the cotangent of its result, [*b, M, N], every axis of its full size.
    """
    return _cotangent(d, node.rhs, node.lhs)


def rhs_cotangent(node: Contract, d: Node) -> Node:
    """The cotangent of the right operand; the arguments are those of `lhs_cotangent`."""
    return _cotangent(transposed(d), node.lhs, node.rhs)


def _cotangent(d: Node, other: Node, mine: Node) -> Node:
    """Σ_q d[*b, p, q] other[*b, q, k], summed over the batches that `mine` [*b, P, K] shares."""
    left, right = _shared_last(d, other, mine.shape)
    if is_transposed_view(mine):
        found = transposed(Contract(transposed(right), left, mine.dtype))
    else:
        found = Contract(left, transposed(right), mine.dtype)
    return shaped(found, mine.shape)


def _shared_last(d: Node, other: Node, mine: Shape) -> tuple[Node, Node]:
    """Move the batch axes that an operand shares into the contracted axis.

    Args:
        d: [*b, P, Q], with all batch axes.
        other: [*b, Q, K]; batch axes may be 1 or missing.
        mine: the shape [*b, P, K] of the operand to differentiate; batch axes may be 1 or missing.

    Returns:
        d as [*kept, P, (shared Q)] and other as [*kept, (shared Q), K].
    """
    whole, batch = d.shape, d.rank - 2
    wide = (ONE,) * (d.rank - len(mine)) + mine
    shared = [i for i in range(batch) if wide[i] == ONE != whole[i]]
    if not shared:
        return d, other
    kept = [i for i in range(batch) if i not in shared]
    other = shaped(other, (ONE,) * (d.rank - other.rank) + other.shape)
    lead = tuple(whole[i] if i in shared else other.shape[i] for i in range(batch))
    other = _expanded(other, (*lead, *other.shape[-2:]))
    d = Permute(d, (*kept, batch, *shared, batch + 1))
    other = Permute(other, (*kept, *shared, batch, batch + 1))
    summed = product(other.shape[len(kept) : -1])
    d = Reshape(d, (*d.shape[: len(kept) + 1], summed))
    return d, Reshape(other, (*other.shape[: len(kept)], summed, other.shape[-1]))


def _expanded(node: Node, shape: Shape) -> Node:
    return node if node.shape == shape else Expand(node, shape)
