"""Views of iotas -> the numbers that an element has along one axis, as first + its index there.

i = iota S, %v = reshape (slice i from 2) [S-2, 1]    Along(axis=-2, size=S-2, first=2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from coda.ir.dims import ONE, Dim
from coda.ir.graph import Cast, Iota, Node, Permute, Reshape, Slice
from coda.ir.scalars import SUM
from coda.lowering.placement.values import Refused
from coda.lowering.program.epilogue import Call, Expr, Literal, Position


@dataclass(frozen=True)
class Along:
    """A node whose elements are first, first + 1, … along one axis; all other axes are 1.

    Attributes:
        axis: counted from the last, which is -1.
        size: of the axis.
        first: the number of its first element.
    """

    axis: int
    size: Dim
    first: int


def counted_from(position: Position, first: int) -> Expr:
    """A position whose numbers begin with `first`."""
    return Call(SUM, (position, Literal(float(first)))) if first else position


def along(node: Node, sizes: Mapping[str, int]) -> Along:
    """The numbers of a view of an iota. Raises Refused for any other node, and for steps."""
    match node:
        case Iota(count=count):
            return Along(-1, count, 0)
        case Cast(arg=arg):  # exact, as of every position
            return along(arg, sizes)
        case Reshape(arg=arg):
            found = along(arg, sizes)
            axes = [i for i, d in enumerate(node.shape) if d != ONE]
            if found.size == ONE:
                return replace(found, axis=-1)
            if len(axes) == 1:
                return replace(found, axis=axes[0] - node.rank)
        case Permute(arg=arg, order=order):
            found = along(arg, sizes)
            return replace(found, axis=order.index(found.axis + node.rank) - node.rank)
        case Slice(arg=arg, axis=axis, start=start, size=size, step=1):
            found = along(arg, sizes)
            if axis != found.axis:
                return found
            if not start.symbols - sizes.keys():
                return Along(axis, size, found.first + start.size(sizes))
        case _:
            pass
    raise Refused("its numbers do not follow from the row or the column alone")
