"""Graph -> graph with picks of columns and slices of rows moved towards the inputs.

    pick(f(x, r), i) = f(pick(x, i), r)     f a sum or a multiple, r constant along each row
    pick(x, i) = Σ_k x where i is k         if no GEMM has the elements of x in its epilogue
    (x wᵀ)[rows]     = x[rows] wᵀ           if no operation reads other rows

A picked column of a log softmax is one logit minus the logsumexp: no kernel writes the other
columns. Logits of tokens that are not read are not computed. A pick does not move past other
functions: their derivative would read their operand once more, for the picked column. The sum is
divided by 1, or for an index that is no column by 0: 0 / 0 is the NaN of such a pick.
"""

from __future__ import annotations

from collections.abc import Mapping

from coda.ir.dims import ONE
from coda.ir.graph import (
    Cast,
    Const,
    Contract,
    Graph,
    Iota,
    Map,
    Node,
    Pick,
    Reduce,
    Reshape,
    Size,
    Slice,
    transform,
    users,
    walk,
)
from coda.ir.node import origin
from coda.ir.scalars import SCALARS
from coda.ir.types import i32
from coda.lowering.algebra.conditions import depth


def push_down(graph: Graph) -> Graph:
    """Move picks and slices of rows as close to the inputs as the two laws allow."""
    above = users(graph.roots)
    returned = set(graph.roots)

    def change(node: Node) -> Node:
        match node:
            case Pick():
                return _picked(node.arg, node)
            case Slice() if node.axis != -1 and _is_alone(node.arg, above, returned):
                return _rows(node.arg, node)
            case _:
                return node

    return graph.with_roots(transform(graph.roots, change))


def _picked(arg: Node, pick: Pick) -> Node:
    """pick(arg, index), with the pick below the linear functions that `arg` consists of."""
    way: list[tuple[Node, Node]] = []
    while (under := _under(arg)) is not None:
        way.append((arg, under))
        arg = under
    column: Node = Pick(arg, pick.index) if _in_epilogue(arg) else _by_sum(arg, pick.index)
    for node, under in reversed(way):
        with origin(node.where):
            column = node.with_operands(column if o is under else o for o in node.operands)
    return column


def _in_epilogue(node: Node) -> bool:
    """Whether a GEMM's epilogue may have all elements of a node: what it reads is known before.

    A norm's statistic of the GEMM's operand is; a logsumexp of the GEMM's result is not.
    """
    seen = list(walk([node], until=Contract))
    last = max((depth(n) for n in seen if isinstance(n, Contract)), default=0)
    return all(depth(n) < last for n in seen if isinstance(n, Reduce)) and last > 0


def _by_sum(x: Node, index: Node) -> Node:
    """The column of each row at an index, as a sum over the row; NaN (ints: 0) for no column."""
    column = Reshape(index, (*index.shape, ONE))
    chosen = Map("eq", (column, Iota(x.shape[-1], i32)))
    total = Reduce("sum", Map("where", (chosen, x, Const(0.0, x.dtype))), -1)
    if x.dtype.kind != "float":
        return total
    one, none = Const(1.0, x.dtype), Const(0.0, x.dtype)
    below = Map("where", (Map("lt", (column, Size(x.shape[-1], index.dtype))), one, none))
    inside = Map("where", (Map("lt", (column, Const(0.0, index.dtype))), none, below))
    return Map("div", (total, inside))


def _under(node: Node) -> Node | None:
    """The operand with columns of a sum, multiple or cast whose other operands have none."""
    if isinstance(node, Cast):
        return node.arg if node.arg.dtype.kind == node.to.kind else None
    wide = [a for a in node.operands if a.rank and a.shape[-1] != ONE]
    alone = len(wide) == 1 and wide[0].shape == node.shape
    return wide[0] if alone and _is_linear(node, wide[0]) else None


def _is_linear(node: Node, x: Node) -> bool:
    """Whether a node is a sum of `x` with other values, or a multiple of it by a constant."""
    if not isinstance(node, Map):
        return False
    numbers = all(isinstance(a, Const | Size) for a in node.args if a is not x)
    row = SCALARS[node.fn]
    return bool(row.signs) or (row.is_linear_in([a is x for a in node.args]) and numbers)


def _is_alone(node: Node, above: Mapping[Node, list[Node]], returned: set[Node]) -> bool:
    """Whether a node is a product x wᵀ, or a function of one, and each has a single user."""
    if node in returned or len(above.get(node, ())) != 1:
        return False
    if isinstance(node, Cast | Map):
        made = [o for o in node.operands if o.rank]
        return len(made) == 1 and _is_alone(made[0], above, returned)
    return isinstance(node, Contract) and node.rank > 2 and not node.batched


def _rows(arg: Node, cut: Slice) -> Node:
    """(x wᵀ)[rows] -> x[rows] wᵀ, below elementwise functions."""
    with origin(arg.where):
        if isinstance(arg, Contract):
            some = Slice(arg.lhs, cut.axis, cut.start, cut.size, cut.step)
            return Contract(some, arg.rhs, arg.result)
        return arg.with_operands([_rows(o, cut) if o.rank else o for o in arg.operands])
