"""Picked columns and chosen rows go before what is computed of them.

    pick(f(x, r), i) = f(pick(x, i), r)     f is a sum or a multiple, r the same for all of a row
    (x wᵀ)[rows]     = x[rows] wᵀ           where nobody reads other rows

One column of a log softmax is one logit less the logsumexp: no kernel writes the rest of it. And of
tokens whose logits nobody wants there are none. Other functions stay below a pick: the derivative
would read what they are functions of, once more for the column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coda.ir.dims import ONE
from coda.ir.graph import (
    Cast,
    Const,
    Contract,
    Map,
    Node,
    Pick,
    Size,
    Slice,
    origin,
    transform,
    users,
)


def descended(roots: Sequence[Node]) -> tuple[Node, ...]:
    """The same values, with picks and slices of rows as far down as they go."""
    above = users(roots)
    returned = set(roots)

    def change(node: Node) -> Node:
        match node:
            case Pick():
                return _picked(node.arg, node)
            case Slice() if node.axis != -1 and _is_alone(node.arg, above, returned):
                return _rows(node.arg, node)
        return node

    return transform(roots, change)


def _picked(arg: Node, pick: Pick) -> Node:
    """A column of a value, for each row, from a column of what it is made of."""
    with origin(arg.where):
        if isinstance(arg, Cast) and arg.arg.dtype.kind == arg.to.kind:
            return Cast(_picked(arg.arg, pick), arg.to)
        if isinstance(arg, Map):
            wide = [a for a in arg.args if a.rank and a.shape[-1] != ONE]
            if len(wide) == 1 and wide[0].shape == arg.shape and _is_linear(arg, wide[0]):
                column = _picked(wide[0], pick)
                return Map(arg.fn, tuple(column if a is wide[0] else a for a in arg.args))
        return Pick(arg, pick.index)


def _is_linear(node: Map, x: Node) -> bool:
    """Whether a function of `x` is a sum with others, or a multiple by a number."""
    numbers = all(isinstance(a, Const | Size) for a in node.args if a is not x)
    multiple = node.fn == "mul" or (node.fn == "div" and node.args[0] is x)
    return node.fn in ("add", "sub", "neg") or (multiple and numbers)


def _is_alone(node: Node, above: Mapping[Node, list[Node]], returned: set[Node]) -> bool:
    """Whether a product, or a function of one alone, is read by one operation alone."""
    if node in returned or len(above.get(node, ())) != 1:
        return False
    if isinstance(node, Cast | Map):
        made = [o for o in node.operands if o.rank]
        return len(made) == 1 and _is_alone(made[0], above, returned)
    return isinstance(node, Contract) and node.rank > 2


def _rows(arg: Node, cut: Slice) -> Node:
    """Some rows of a product as a product of some rows."""
    with origin(arg.where):
        if isinstance(arg, Contract):
            some = Slice(arg.lhs, cut.axis, cut.start, cut.size, cut.step)
            return Contract(some, arg.rhs, arg.result)
        return arg.with_operands([_rows(o, cut) if o.rank else o for o in arg.operands])
