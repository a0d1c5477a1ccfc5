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
    nodes: Sequence[Node], sizes: Mapping[str, int], *, chunked: bool = False
) -> tuple[set[Node], dict[Node, str]]:
    """(positions, inexact nodes -> the reason): arguments as of `position_nodes`."""
    positions = position_nodes(nodes, sizes, chunked=chunked)
    return positions, inexact_nodes(nodes, positions)


def position_nodes(
    nodes: Iterable[Node], sizes: Mapping[str, int], *, chunked: bool = False
) -> set[Node]:
    """Exact functions of iotas and constants: kernels compute them from where an element is.

    Their types have all of their numbers exactly, and so has float32.

    Args:
        nodes: all nodes of a graph, operands first.
        sizes: those of symbols that are known when the graph is lowered.
        chunked: whether values are cut into chunks. Slices of iotas are then loaded: the number of
            a chunk's first column would be a constant of its kernels, which chunks share.
    """
    found: dict[Node, int] = {}  # node -> a bound of its numbers
    for node in nodes:
        if chunked and isinstance(node, Slice):
            continue
        bound = _position_bound(node, found, sizes)
        if bound is not None and bound <= 1 << min(node.dtype.digits, f32.digits):
            found[node] = bound
    return set(found)


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


def inexact_nodes(nodes: Iterable[Node], positions: Collection[Node]) -> dict[Node, str]:
    """Nodes that float32 may compute wrongly -> the reason that kernels refuse them.

    Concatenations and picks only pass numbers on, and views are torch's.

    Args:
        nodes: all nodes of a graph.
        positions: those that kernels compute from where an element is.
    """
    return {n: INEXACT for n in nodes if _is_inexact(n, positions)}


def _is_inexact(node: Node, positions: Collection[Node]) -> bool:
    match node:
        case Map(fn=fn):
            row = SCALARS[fn]
            wide = [o for o in node.operands if _is_wide(o, positions)] if row.of_ints else []
            return len(wide) > (1 if row.result == "bool" else 0)
        case Concat() | Pick():
            return _is_wide(node, positions)
        case _:
            return False


def _is_wide(node: Node, positions: Collection[Node]) -> bool:
    """Whether a node has whole numbers without a bound that float32 holds."""
    if node.dtype.kind != "int" or node.dtype.digits <= f32.digits or node in positions:
        return False
    if isinstance(node, Const):
        return abs(node.value) > EXACT
    return not isinstance(node, Size)
