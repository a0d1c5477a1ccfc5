"""Nodes of whole numbers -> which of them kernels compute: in float32, exact to 2²⁴.

positions   i ≥ j − 8, table[i // 4]       from where an element is, with a bound of its numbers
inexact     id[b, i] = id[b, j], i64       any number may be there: torch compares them
neither     j < length[b], length i64      exact, since j has a bound and rounding keeps order
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Expand,
    Iota,
    Map,
    Node,
    Permute,
    Pick,
    Reshape,
    Size,
    Slice,
)
from coda.ir.scalars import SCALARS
from coda.ir.types import f32

EXACT = 1 << f32.digits  # whole numbers up to it are exact in float32
INEXACT = "its whole numbers may be larger than 2²⁴, and kernels compute in float32"


def whole_numbers(
    nodes: Sequence[Node],
    roots: Collection[Node],
    sizes: Mapping[str, int],
    *,
    chunked: bool = False,
) -> tuple[set[Node], dict[Node, str]]:
    """(positions, inexact nodes -> the reason that kernels refuse them).

    Args:
        nodes: all nodes of a graph, operands first.
        roots: the nodes that it returns.
        sizes: those of symbols that are known when the graph is lowered.
        chunked: whether values are cut into chunks. Slices of iotas are then loaded: the number of
            a chunk's first column would be a constant of its kernels, which chunks share.
    """
    bounds = position_bounds(nodes, sizes)
    found = _Inexact(bounds, sizes, roots)
    positions = position_bounds(nodes, sizes, chunked=True) if chunked else bounds
    return set(positions), dict.fromkeys(found.of(nodes), INEXACT)


def position_bounds(
    nodes: Iterable[Node], sizes: Mapping[str, int], *, chunked: bool = False
) -> dict[Node, int]:
    """Exact functions of iotas and constants -> a bound of their numbers.

    Kernels compute them from where an element is. Their types have all of their numbers exactly,
    and so has float32. Arguments as of `whole_numbers`.
    """
    found: dict[Node, int] = {}
    for node in nodes:
        if chunked and isinstance(node, Slice):
            continue
        bound = _position_bound(node, found, sizes)
        if bound is not None and bound <= min(1 << node.dtype.digits, EXACT):
            found[node] = bound
    return found


def _position_bound(node: Node, known: Mapping[Node, int], sizes: Mapping[str, int]) -> int | None:
    """A bound of the numbers of a node, from those of its operands; None if it is no position."""
    numbers = [o for o in node.operands if not isinstance(o, Const)]
    if isinstance(node, Iota):
        return 0 if node.count.symbols - sizes.keys() else node.count.size(sizes)
    if not numbers or not all(o in known for o in numbers):
        return None
    bound = max(known[o] for o in numbers)
    match node:
        case Reshape() | Slice() | Permute():
            return bound
        case Cast(arg=arg, to=to):
            whole = arg.dtype.kind == to.kind == "int"
            return bound if whole or to.kind == "float" else None
        case Map(fn=fn):
            row = SCALARS[fn]
            constants = [abs(o.value) for o in node.operands if isinstance(o, Const)]
            if row.signs and all(map(math.isfinite, constants)):
                return sum(known[o] for o in numbers) + math.ceil(sum(constants))
            if row.is_product and len(numbers) == 1 and all(map(math.isfinite, constants)):
                return bound * math.ceil(math.prod(constants))
            if row.quotient and node.operands[0] in known and min(constants, default=0) >= 1:
                return bound
            return 1 if row.result == "bool" else bound if row.chooses or row.selects else None
        case _:
            return None


class _Inexact:
    """Nodes that float32 may compute wrongly.

    A number without a bound, such as a label, is exact up to a *limit*, and what is larger is
    rounded to what is larger: 2²⁴ where it is loaded, and less by c after ± c. Its comparisons with
    numbers up to the limit are right, and so are picks from that many columns.

    Args:
        bounds: positions -> a bound of their numbers.
        sizes: those of symbols that are known.
        roots: the nodes that the graph returns.
    """

    def __init__(
        self, bounds: Mapping[Node, int], sizes: Mapping[str, int], roots: Collection[Node]
    ) -> None:
        self.bounds, self.sizes, self.roots = bounds, sizes, roots
        self.limits: dict[Node, int] = {}

    def of(self, nodes: Sequence[Node]) -> list[Node]:
        """Those among nodes, which are given operands first. Views are torch's."""
        for node in nodes:
            if node.dtype.kind == "int" and self.bound(node) is None:
                self.limits[node] = self.limit(node)
        seen = set(self.roots)  # nodes of which more is used than the order
        found: list[Node] = []
        for node in reversed(nodes):
            exact = node in self.limits and node in seen
            if not self.is_right(node) or (exact and isinstance(node, Map | Concat | Pick)):
                found.append(node)
            ordered = self.compared(node, exact=exact)
            seen.update(o for o in node.operands if o in self.limits and o not in ordered)
        return found

    def bound(self, node: Node) -> int | None:
        """A bound of the numbers of a node; None if float32 may not hold them."""
        if node.dtype.digits <= f32.digits:
            return 1 << node.dtype.digits
        if isinstance(node, Const):
            return abs(int(node.value)) if abs(node.value) <= EXACT else None
        return EXACT if isinstance(node, Size) else self.bounds.get(node)

    def limit(self, node: Node) -> int:
        """Up to which number a node without a bound is exact."""
        if isinstance(node, Reshape | Slice | Permute | Expand):
            return self.limits.get(node.arg, EXACT)
        if isinstance(node, Map) and self.keeps_order(node):
            known = [self.bound(o) or 0 for o in node.args]
            least = min((self.limits[o] for o in node.args if o in self.limits), default=EXACT)
            return least if SCALARS[node.fn].chooses else max(0, least - sum(known))
        return EXACT

    def keeps_order(self, node: Map) -> bool:
        """Whether the order of a node's numbers and smaller ones is that of its operands."""
        wide = [o for o in node.args if o in self.limits]
        row = SCALARS[node.fn]
        return row.chooses or (bool(row.signs) and len(wide) == 1)

    def is_right(self, node: Node) -> bool:
        """Whether a kernel computes a node rightly, if of its numbers the order is used."""
        if not isinstance(node, Map) or not SCALARS[node.fn].of_ints:
            return True
        wide = [o for o in node.args if o in self.limits]
        if SCALARS[node.fn].result != "bool":
            return not wide or (node in self.limits and self.keeps_order(node))
        others = [self.bound(o) or 0 for o in node.args if o not in self.limits]
        return not wide or (len(wide) == 1 and max(others, default=0) <= self.limits[wide[0]])

    def compared(self, node: Node, *, exact: bool) -> Collection[Node]:
        """The operands of which a node uses the order alone; `exact` if its numbers are used."""
        match node:
            case Map(fn=fn):
                ordered = SCALARS[fn].result == "bool" or (node in self.limits and not exact)
                return node.operands if ordered else ()
            case Reshape() | Slice() | Permute() | Expand():
                return () if exact else node.operands
            case Pick(index=index, arg=arg) if index in self.limits and index is not arg:
                fits = arg.shape[-1].size(self.sizes) <= self.limits[index]
                return (index,) if fits else ()
            case _:
                return ()
