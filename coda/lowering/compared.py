"""A maximum's derivative asks which value was taken -> what it is asked of, to be kept as it is.

The backward takes the maximum again and compares it with the values. Two kernels (and two sweeps of
one) may round a value otherwise: a product and a sum are contracted or not, products regrouped. No
value would then equal the maximum, and the row's gradient would be lost. So values and maximum are
made, without a rounding, of values that are in memory: of the same bits in every kernel.

    max |x · r · w|:  x · r · w is kept, of which |.| is a function without a rounding
"""

from __future__ import annotations

from collections.abc import Iterable

from coda.ir.graph import Cast, Concat, Const, Expand, Gather, Map, Node, Pick, Reduce, walk
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SCALARS
from coda.lowering.roles import is_view


def compared(roots: Iterable[Node]) -> set[Reduce]:
    """The maxima (and minima) that are compared with the values that they are taken of."""
    return {
        o
        for n in walk(roots)
        if isinstance(n, Map)
        for o in n.args
        if isinstance(o, Reduce) and MONOIDS[o.fn].chosen and o.arg in n.args
    }


def sources(extremes: Iterable[Reduce]) -> set[Node]:
    """The values that have to be in memory, so that what is compared is made without a rounding."""
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [n.arg for n in extremes]
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
