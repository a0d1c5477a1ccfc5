"""Needed nodes and the cost of saving each node -> the cheapest set of nodes to save.

A minimum cut between the sources of a computation and its needed nodes, by shortest augmenting
paths (Edmonds and Karp, 1972). Graphs have about a hundred nodes. Each node is an edge from its
entry to its exit with its cost as capacity; data dependences are edges without a bound.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from types import MappingProxyType

from coda.ir.graph import Input, Node, walk

_ENDLESS = 1 << 62
Point = tuple[Node, int] | str  # a vertex: a node's entry (0) or exit (1), "start" or "end"


def minimum_cut(
    needed: Iterable[Node],
    free: Set[Node],
    sources: Set[Node],
    cost: Callable[[Node], int | None],
    again: Mapping[Node, int] = MappingProxyType({}),
    *,
    nodes: Iterable[Node] | None = None,
) -> list[Node]:
    """Nodes from which all of `needed` can be computed, of the least total cost.

    Of several cuts of the same cost it is the one closest to `needed`.

    Args:
        needed: nodes that must be available.
        free: nodes that cost nothing to recompute.
        sources: nodes that must not be recomputed; inputs are sources, too.
        cost: of saving a node, in bytes; None if it cannot be saved.
        again: cost of recomputing a node, in bytes, in addition to the cost of its operands.
        nodes: the part of the graph to be cut, operands first; by default all that `needed` reads.
    """
    needed = list(needed)
    edges: dict[Point, dict[Point, int]] = {}

    def edge(a: Point, b: Point, capacity: int) -> None:
        edges.setdefault(a, {})[b] = edges.get(a, {}).get(b, 0) + capacity
        edges.setdefault(b, {}).setdefault(a, 0)

    nodes = [n for n in (walk(needed) if nodes is None else nodes) if n not in free]
    for node in nodes:
        price = cost(node)
        edge((node, 0), (node, 1), _ENDLESS if price is None else price + 1)
        if isinstance(node, Input) or node in sources:
            edge("start", (node, 0), _ENDLESS)
        elif node in again:
            edge("start", (node, 0), again[node])
        if not (isinstance(node, Input) or node in sources):
            for operand in node.operands:
                if operand not in free:
                    edge((operand, 1), (node, 0), _ENDLESS)
    for node in needed:
        edge((node, 1), "end", _ENDLESS)
    while _augment(edges):
        pass
    reaching = _reaching(edges)
    return [n for n in nodes if (n, 0) not in reaching and (n, 1) in reaching]


def _augment(edges: dict[Point, dict[Point, int]]) -> bool:
    """Push flow along a shortest path with residual capacity; False if there is none."""
    before: dict[Point, Point] = {}
    queue: deque[Point] = deque(["start"])
    while queue and "end" not in before:
        at = queue.popleft()
        for to, room in edges.get(at, {}).items():
            if room > 0 and to not in before and to != "start":
                before[to] = at
                queue.append(to)
    if "end" not in before:
        return False
    path: list[tuple[Point, Point]] = []
    at: Point = "end"
    while at != "start":
        path.append((before[at], at))
        at = before[at]
    room = min(edges[a][b] for a, b in path)
    for a, b in path:
        edges[a][b] -= room
        edges[b][a] += room
    return True


def _reaching(edges: dict[Point, dict[Point, int]]) -> set[Point]:
    """The vertices with a residual path to the end: these give the latest minimum cut."""
    found: set[Point] = {"end"}
    queue: deque[Point] = deque(["end"])
    while queue:
        at = queue.popleft()
        for a in edges.get(at, {}):
            if a not in found and edges[a].get(at, 0) > 0:
                found.add(a)
                queue.append(a)
    return found
