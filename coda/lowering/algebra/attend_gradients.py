"""An attention and the cotangents of its results -> those of q, k and v: `AttendGradient`.

The derivative of the scores is taken by the rules of every other scalar function, on the graph of
the scores alone, so that a kernel of the derivative computes it from q kᵀ again.

    s = where(j <= i, z / 8, -inf)     dz = where(j <= i, ds, 0) / 8
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from coda.ir.attend import DK, DQ, DV, LSE, VALUE, Attend, AttendGradient, Order, Scores
from coda.ir.dims import inverse
from coda.ir.graph import Const, Expand, Input, Node, Permute
from coda.lowering.algebra.roles import keeps_columns, permuted

Pair = tuple[Node, Node]
Vjp = Callable[[Mapping[Node, Node], Sequence[Node]], Mapping[Node, Node]]


def attend_gradients(node: Attend, d: Node | None, dlse: Node | None, vjp: Vjp) -> list[Pair]:
    """q, k and v, each with its cotangent, of its shape and type.

    Args:
        node: a result of the attention.
        d, dlse: the cotangents of the value and of the logsumexp, of their shapes and types; None
            for 0. One is given.
        vjp: outputs with their cotangents, and leaves -> the leaves' cotangents.
    """
    value, lse = node.of(VALUE), node.of(LSE)
    if d is None:
        d = Expand(Const(0.0, value.dtype), value.shape)
    operands = {DQ: node.q, DK: node.k, DV: node.v}
    dq, dk, dv = (_order(o) for o in operands.values())
    more = (*(() if dlse is None else (dlse,)), *node.captured)
    whole = AttendGradient(
        node.q, node.k, node.v, value, lse, d, more, node.scores, slope_of(node.scores, vjp),
        node.order, (dq, dk, dv),
    )  # fmt: skip
    return [
        (operand, permuted(whole.of(part), inverse(order)))
        for (part, operand), order in zip(operands.items(), whole.orders, strict=True)
    ]


def _order(operand: Node) -> Order:
    """The order of axes of an operand's cotangent: that of the tensor that the operand permutes."""
    if isinstance(operand, Permute) and keeps_columns(operand):
        return operand.inverse
    return tuple(range(operand.rank))


def slope_of(scores: Scores, vjp: Vjp) -> Scores:
    """The derivative of scores: (their cotangent, product, captured) -> that of the product."""
    product = scores.inputs[0]
    given = Input("ds", scores.root.shape, scores.root.dtype)
    found = vjp({scores.root: given}, [product]).get(product)
    nothing = Expand(Const(0.0, product.dtype), product.shape)
    return Scores((given, *scores.inputs), nothing if found is None else found)
