"""A graph of ATen operators -> disjoint regions that become blocks; the rest is left to torch.

The level of an operator is the number of torch's operators on the longest path to it that follow
one of coda's. A region is a connected set of coda's operators of one level. It can be one call: a
path from one of them through torch back to another would end at a higher level. Operators that
neither feed nor follow a contraction (position tables, masks) are left to torch and add no level.

A product of two batches of matrices is inside a region if a GEMM of coda computes it. If not all of
such a region runs in kernels of coda, or it does not pay, the graph is cut again at these products.
What no kernel computes, though a block may have it (gathers, cumulative sums), is left to torch.

Example: linear -> norm -> attention (torch's) -> linear -> add gives two regions, {linear, norm} on
level 0 and {linear, add} on level 1, even where the last `add` also reads the first region.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch.fx import Graph as FxGraph
from torch.fx import Node as FxNode

from coda.errors import Reason
from coda.frontend.torch_import.importer import (
    meaning,
    moves_rows,
    products_of_batches,
    value_of,
)
from coda.frontend.torch_import.operators import VIEWS
from coda.ir.types import from_torch
from coda.kernels.gemm.batches import why_not as no_gemm

MOVES = "no kernel reads or adds rows at indices, or sums along the way"
NOTHING: Mapping[FxNode, str] = MappingProxyType({})


@dataclass
class RegionCut:
    """The partition of a graph.

    Attributes:
        regions: lists of nodes in their order, each to become a block.
        left: operators left to torch -> the reason.
    """

    regions: list[list[FxNode]] = field(default_factory=list)
    left: dict[FxNode, str] = field(default_factory=dict)


def cut(
    graph: FxGraph, fixed: Mapping[FxNode, str] = NOTHING, ends: Collection[FxNode] = ()
) -> RegionCut:
    """Partition a graph into regions.

    Args:
        graph: functional ATen operators, each with a fake value in `meta`.
        fixed: operators that torch must run -> the reason.
        ends: products of batches at which regions end.
    """
    left = dict(fixed)
    calls = [n for n in graph.nodes if n.op == "call_function"]
    for node in calls:
        means, why = ([], left[node]) if left.get(node) else meaning(node)
        if not why and node in ends:
            why = OF_BATCHES
        if not why and moves_rows(means):
            why = Reason(MOVES, "nothing: torch has a kernel of its own for it")
        if not why and _name(node) in BATCHES:
            reasons = [r for c in products_of_batches(means) if (r := no_gemm(c, {}))]
            why = Reason(f"{OF_BATCHES}: {reasons[0]}", LAYOUT) if reasons else ""
        if why:
            left[node] = why
    _keep_predicates_inside(calls, left)
    _leave_what_meets_no_product(calls, left)
    mine = {n for n in calls if n not in left}
    regions: list[list[FxNode]] = []
    for group in _components(calls, mine, _levels(graph, mine)):
        kept = _trimmed(group, left)
        why = _does_not_pay(kept)
        if why:
            left |= dict.fromkeys(kept, why)
        else:
            regions.append(kept)
    return RegionCut(regions, left)


def of_batches(nodes: Iterable[FxNode]) -> list[FxNode]:
    """Those of some operators of coda's that multiply two batches of matrices."""
    return [n for n in nodes if _name(n) in BATCHES and products_of_batches(meaning(n)[0])]


def _keep_predicates_inside(calls: Sequence[FxNode], left: dict[FxNode, str]) -> None:
    """Leave to torch values that are not floats and that torch reads."""
    for node in reversed(calls):
        value = value_of(node)
        if node in left or isinstance(value, tuple | list) or value.dtype.is_floating_point:
            continue
        if any(u in left or u.op != "call_function" for u in node.users):
            left[node] = Reason("a predicate that torch reads", "nothing: its reader is torch's")


def _leave_what_meets_no_product(calls: Sequence[FxNode], left: dict[FxNode, str]) -> None:
    """Leave to torch operators that neither follow a contraction nor feed one through coda's."""
    after: set[FxNode] = set()
    before: set[FxNode] = set()
    for node in calls:
        if (is_product(node) and node not in left) or any(o in after for o in node.all_input_nodes):
            after.add(node)
    for node in reversed(calls):
        mine = [u for u in node.users if u not in left]
        if node not in left and any(is_product(u) or u in before for u in mine):
            before.add(node)
    for node in calls:
        if node not in left and node not in after and node not in before:
            left[node] = Reason(
                "it neither feeds nor follows a contraction",
                "a contraction that it reaches through operators that coda takes",
            )


def _levels(graph: FxGraph, mine: set[FxNode]) -> dict[FxNode, int]:
    """Level of each node: torch's operators after one of coda's on the longest path to it."""
    level: dict[FxNode, int] = {}
    reached: set[FxNode] = set()
    for node in graph.nodes:
        before = node.all_input_nodes
        if node in mine or any(o in reached for o in before):
            reached.add(node)
        steps = [level[o] + (o in reached and o not in mine) for o in before]
        level[node] = max(steps, default=0)
    return level


def _components(
    calls: Sequence[FxNode], mine: set[FxNode], level: dict[FxNode, int]
) -> list[list[FxNode]]:
    """Components of coda's nodes of one level, joined by an edge or a shared activation."""
    parent: dict[object, object] = {}

    def find(x: object) -> object:
        while (above := parent.setdefault(x, x)) != x:
            x = above
        return x

    for node in calls:
        if node not in mine:
            continue
        for operand in node.all_input_nodes:
            if operand in mine and level[operand] == level[node]:
                parent[find(operand)] = find(node)
            elif not is_parameter(operand):
                parent[find((operand, level[node]))] = find(node)
    groups: dict[object, list[FxNode]] = {}
    for node in calls:
        if node in mine:
            groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def is_parameter(node: FxNode) -> bool:
    """Whether a node is a parameter or buffer of the model."""
    return node.op == "get_attr" or bool(node.meta.get("coda_parameter"))


def _trimmed(group: list[FxNode], left: dict[FxNode, str]) -> list[FxNode]:
    """Remove from a region views at its edges, and operators with results outside it that follow
    none of its contractions: torch runs these at the same cost.
    """
    kept = dict.fromkeys(group)
    changed = True
    while changed:
        changed = False
        fed: set[FxNode] = set()
        for node in list(kept):
            inside = [o for o in node.all_input_nodes if o in kept]
            users = [u for u in node.users if u in kept]
            if is_product(node) or any(o in fed for o in inside):
                fed.add(node)
            why = ""
            if node.target in VIEWS:
                head = not inside and not any(is_parameter(o) for o in node.all_input_nodes)
                why = "a view" if head or not users else ""
            elif node not in fed and len(users) < len(node.users):
                why = Reason("it follows no contraction of its region", NOTHING_TO_GAIN)
            if why:
                left[node] = why
                del kept[node]
                changed = True
    return list(kept)


def is_product(node: FxNode) -> bool:
    """Whether an operator is a contraction."""
    return _name(node) in PRODUCTS


def _name(node: FxNode) -> str:
    return getattr(node.target, "__name__", "").split(".")[0]


PRODUCTS = ("linear", "mm", "addmm", "matmul", "einsum", "bmm", "baddbmm")
OF_BATCHES = "a product of two batches of matrices"
LAYOUT = "16-bit operands whose rows are multiples of 16 bytes, and sizes known before the call"
NOTHING_TO_GAIN = "nothing: torch runs it at the same cost"
BATCHES = ("bmm", "baddbmm", "matmul", "einsum")  # which may multiply two batches of matrices


def _does_not_pay(nodes: Sequence[FxNode]) -> str:
    """Why a region is left to torch; "" if it has a contraction to fuse with something."""
    if not any(is_product(n) for n in nodes):
        return Reason("no contraction to fuse with", NOTHING_TO_GAIN)
    beside = [n for n in nodes if not is_product(n) and n.target not in VIEWS]
    if not beside and sum(is_product(n) for n in nodes) < 2:
        return Reason("a contraction with nothing to fuse", NOTHING_TO_GAIN)
    kinds = {from_torch(v.dtype) for n in nodes if hasattr(v := value_of(n), "dtype")}
    return "" if kinds else "nothing is computed"


def without_tail(nodes: Sequence[FxNode]) -> list[FxNode]:
    """A region up to its last contractions; empty if that is all of it, or not worth a block.

    Tried if the whole region does not pay: operators after the last contraction may not fit in a
    generated kernel.
    """
    needed: set[FxNode] = set()
    for node in reversed(nodes):
        if is_product(node) or any(u in needed for u in node.users):
            needed.add(node)
    kept = [n for n in nodes if n in needed]
    return [] if len(kept) == len(nodes) or _does_not_pay(kept) else kept


def with_all_parts(nodes: Sequence[FxNode]) -> list[FxNode]:
    """A region with all `getitem`s of its tuple results: a block cannot return a tuple."""
    inside = set(nodes)
    whole = [n for n in nodes if isinstance(value_of(n), tuple | list)]
    return [*nodes, *(u for n in whole for u in n.users if u not in inside)]
