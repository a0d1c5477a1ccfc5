"""A maximum's derivative asks which value was taken -> what it is asked of, to be kept as it is.

The backward takes the maximum again and compares it with the values. Two kernels (and two sweeps of
one) may round a value otherwise: a product and a sum are contracted or not, products regrouped. No
value would then equal the maximum, and the row's gradient would be lost. So values and maximum are
made, without a rounding, of values that are in memory: of the same bits in every kernel. So is what
a block itself compares, as in y == max y.

    max |x · r · w|:  x · r · w is kept, of which |.| is a function without a rounding
"""

from __future__ import annotations

from collections.abc import Iterable

from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Expand,
    Gather,
    Map,
    Node,
    Pick,
    Reduce,
    Reshape,
    walk,
)
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SCALARS
from coda.lowering.algebra.roles import is_view


def compared(roots: Iterable[Node]) -> set[Node]:
    """The maxima (and minima) that meet the values that they are taken of in one function."""
    found: set[Node] = set()
    for node in walk(roots):
        if isinstance(node, Map):
            for extreme in map(_spread, node.args):
                chosen = isinstance(extreme, Reduce) and MONOIDS[extreme.fn].chosen
                if chosen and SCALARS[node.fn].exact and extreme.operands[0] in node.args:
                    found.add(extreme)
    return found


def _spread(node: Node) -> Node:
    """What is under other axes, or repeated along them."""
    while isinstance(node, Reshape | Expand):
        node = node.arg
    return node


def sources(extremes: Iterable[Node]) -> set[Node]:
    """The values that have to be in memory, so that what is compared is made without a rounding."""
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [n.operands[0] for n in extremes]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if is_exact(node):
                stack.extend(node.operands)
            elif node.operands:
                found.add(node)
    return found


def is_exact(node: Node) -> bool:
    """Whether a node's elements are elements of its operands, or follow from them unrounded."""
    match node:
        case Map(fn=fn, args=args):
            fits = [a.dtype.nearest(a.value) == a.value for a in args if isinstance(a, Const)]
            return SCALARS[fn].unrounded and all(fits)
        case Cast(arg=arg, to=to):
            return to.holds(arg.dtype)
        case Reduce(fn=fn):
            return MONOIDS[fn].chosen
    return is_view(node) or isinstance(node, Concat | Expand | Gather | Pick)
