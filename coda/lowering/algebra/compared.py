"""Graph -> the values that must be materialised so that a comparison with a maximum is exact.

The derivative of a maximum recomputes it and compares it with the values. Two kernels, or two
sweeps of one kernel, may round a recomputed value differently (multiply and add fused or not,
products regrouped). Then no value would equal the maximum and the row's gradient would be lost. So
values and maximum follow, without rounding, from values in memory, which have the same bits for
every kernel. The same holds for a comparison that a block itself makes, as in y == max y.

    max |x · r · w|:  x · r · w is materialised; |.| does not round
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
    """The maxima and minima that an exact function, such as `eq`, combines with their operand."""
    found: set[Node] = set()
    for node in walk(roots):
        if isinstance(node, Map):
            for extreme in map(_spread, node.args):
                chosen = isinstance(extreme, Reduce) and MONOIDS[extreme.fn].chosen
                if chosen and SCALARS[node.fn].exact and extreme.operands[0] in node.args:
                    found.add(extreme)
    return found


def _spread(node: Node) -> Node:
    """The node under reshapes and expands."""
    while isinstance(node, Reshape | Expand):
        node = node.arg
    return node


def sources(extremes: Iterable[Node]) -> set[Node]:
    """The values to materialise, from which the operands of `extremes` follow without rounding."""
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
    """Whether a node's elements follow from those of its operands without rounding."""
    match node:
        case Map(fn=fn, args=args):
            fits = [a.dtype.nearest(a.value) == a.value for a in args if isinstance(a, Const)]
            return SCALARS[fn].unrounded and all(fits)
        case Cast(arg=arg, to=to):
            return to.holds(arg.dtype)
        case Reduce(fn=fn):
            return MONOIDS[fn].chosen
        case _:
            return is_view(node) or isinstance(node, Concat | Expand | Gather | Pick)
