"""A graph of ATen operators -> the regions that become blocks; the rest stays torch's.

Each operator has a level: how many operators of torch's lie on the longest way to it. Operators
of coda's on one level that are connected are a region: a way from one of them to another cannot
leave it, for it would come back on a higher level. What no product needs and what needs none
(position tables, masks) is torch's and makes no level.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch.fx import Graph as FxGraph
from torch.fx import Node as FxNode

from coda.frontend.torch_import.aten import VIEWS
from coda.frontend.torch_import.importer import value_of, why_not
from coda.ir.types import from_torch


@dataclass
class Cut:
    """What a graph was cut into.

    Attributes:
        regions: lists of nodes in their order, each to become a block.
        left: operators that are torch's, and why.
    """

    regions: list[list[FxNode]] = field(default_factory=list)
    left: dict[FxNode, str] = field(default_factory=dict)


def cut(graph: FxGraph, fixed: Iterable[FxNode] = ()) -> Cut:
    """The regions of a graph.

    Args:
        graph: functional, of ATen operators, each with a fake value.
        fixed: operators that torch has to run whatever they are.
    """
    left = {n: "it runs in another mode of autograd" for n in fixed}
    calls = [n for n in graph.nodes if n.op == "call_function"]
    for node in calls:
        why = left.get(node) or why_not(node)
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
    return Cut(regions, left)


def _keep_predicates_inside(calls: Sequence[FxNode], left: dict[FxNode, str]) -> None:
    """Leave to torch what is no float and is read by torch."""
    for node in reversed(calls):
        value = value_of(node)
        if node in left or isinstance(value, tuple | list) or value.dtype.is_floating_point:
            continue
        if any(u in left or u.op != "call_function" for u in node.users):
            left[node] = "a predicate that torch reads"


def _leave_what_meets_no_product(calls: Sequence[FxNode], left: dict[FxNode, str]) -> None:
    """Leave to torch what neither needs a product nor is needed by one through coda's operators."""
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
            left[node] = "no product needs it, and it needs none"


def _levels(graph: FxGraph, mine: set[FxNode]) -> dict[FxNode, int]:
    """How many operators of torch's, each after one of coda's, lie on the longest way to a node."""
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
    """Nodes of one level that are connected, by an edge or by an activation that they share."""
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
    """Whether a node is an argument of the graph that torch knows as a parameter or a buffer."""
    return node.op == "get_attr" or bool(node.meta.get("coda_parameter"))


def _trimmed(group: list[FxNode], left: dict[FxNode, str]) -> list[FxNode]:
    """A region without what torch does as well: views at its edges, and operators that make a
    result of no product of the region.
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
                why = "it needs no product of the region"
            if why:
                left[node] = why
                del kept[node]
                changed = True
    return list(kept)


def is_product(node: FxNode) -> bool:
    """Whether an operator is a contraction."""
    return getattr(node.target, "__name__", "").split(".")[0] in PRODUCTS


PRODUCTS = ("linear", "mm", "addmm", "matmul")


def _does_not_pay(nodes: Sequence[FxNode]) -> str:
    """Why a region is left to torch; "" where a product has something to take in."""
    if not any(is_product(n) for n in nodes):
        return "no product to go with"
    beside = [n for n in nodes if not is_product(n) and n.target not in VIEWS]
    if not beside and sum(is_product(n) for n in nodes) < 2:
        return "a product with nothing to take in"
    kinds = {from_torch(v.dtype) for n in nodes if hasattr(v := value_of(n), "dtype")}
    return "" if kinds else "nothing is computed"


def without_tail(nodes: Sequence[FxNode]) -> list[FxNode]:
    """A region up to its last products; empty where that is all of it, or too little.

    It is tried where the whole does not pay: what comes after the last product may be what no
    kernel lays out.
    """
    needed: set[FxNode] = set()
    for node in reversed(nodes):
        if is_product(node) or any(u in needed for u in node.users):
            needed.add(node)
    kept = [n for n in nodes if n in needed]
    return [] if len(kept) == len(nodes) or _does_not_pay(kept) else kept


def with_all_parts(nodes: Sequence[FxNode]) -> list[FxNode]:
    """A region with every part of what it takes apart: torch cannot take a part of it outside."""
    inside = set(nodes)
    whole = [n for n in nodes if isinstance(value_of(n), tuple | list)]
    return [*nodes, *(u for n in whole for u in n.users if u not in inside)]
