"""Contractions of one activation -> those that share a GEMM, with their weights stacked along rows.

In y = (x gᵀ) · silu(x uᵀ), k = x vᵀ the contractions with g and u are combined elementwise and pair
their columns in a GEMM of their own, and that with v is alone in its GEMM.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from coda.ir.dims import product
from coda.ir.graph import Contract, Map, Node, Pick, Reduce
from coda.lowering.algebra.roles import is_pointwise, pointwise_leaves


def group_siblings(
    contracts: list[Contract],
    nodes: list[Node],
    weights: set[Node],
    apart: bool = False,
    part_of: Mapping[Node, int] | None = None,
) -> dict[Node, tuple[Contract, ...]]:
    """For each contraction, the contractions of the same activation that share its GEMM.

    Contractions that an elementwise operation combines (gate and up) pair their columns in a GEMM
    of their own. A contraction that is combined with another matrix stays alone, since that matrix
    is not as wide as a shared GEMM. All others of an activation share one GEMM, with their weights
    stacked along rows.

    Args:
        contracts: the contractions to group.
        nodes: all nodes of the graph, operands first.
        weights: nodes that are weights; contractions with anything else stay alone.
        apart: keep contractions whose full rows are reduced alone, so that the reduction covers
            full rows of the GEMM and can be one of its sinks.
        part_of: contraction -> number of its chunk; different chunks do not share a GEMM.
    """
    part_of = part_of or {}
    by_input: dict[tuple[Node, int], list[Contract]] = {}
    out: dict[Node, tuple[Contract, ...]] = {c: (c,) for c in contracts}
    for one in contracts:
        if one.rhs in weights:
            by_input.setdefault((one.lhs, part_of.get(one, -1)), []).append(one)
    reach: dict[Node, Set[Contract]] = {}
    mixed: set[Node] = set()
    joined: set[tuple[Node, Node]] = set()
    related = {c for group in by_input.values() if len(group) > 1 for c in group}
    for node in nodes:
        if isinstance(node, Contract):
            reach[node] = related & {node}
        elif is_pointwise(node):
            reach[node] = set[Contract]().union(*(reach.get(o, ()) for o in node.operands))
            if isinstance(node, Map) and reach[node]:
                joined |= {(a, b) for a in reach[node] for b in reach[node]}
                others = [o for o in node.args if not reach.get(o) and o not in weights]
                beside = {i for o in others for i in pointwise_leaves(o)} - weights
                if any(product(i.shape) == product(node.shape) for i in beside):
                    mixed |= reach[node]
        elif apart and isinstance(node, Reduce | Pick):
            whole = node.operands[0]
            mixed |= {c for c in reach.get(whole, ()) if c.shape[-1] == whole.shape[-1]}
    for group in by_input.values():
        rest = list(group)
        while rest:
            coupled = _closure(rest[0], rest, joined)
            if len(coupled) == 1 and rest[0] not in mixed:
                alone = [c for c in rest if len(_closure(c, rest, joined)) == 1]
                coupled = [c for c in alone if c not in mixed]
            rest = [c for c in rest if c not in coupled]
            out |= dict.fromkeys(coupled, tuple(coupled))
    return out


def _closure(
    first: Contract, among: list[Contract], joined: set[tuple[Node, Node]]
) -> list[Contract]:
    """The contractions that elementwise operations combine with the first, transitively."""
    found = [first]
    for one in found:
        found += [c for c in among if c not in found and (one, c) in joined]
    return [c for c in among if c in found]
