"""Graph -> classes of nodes with equal neighbourhoods: same operations, shapes and dtypes.

The compiler decides once per class. The layers of a model are equal, and a decision for each layer
alone would take time quadratic in their number.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from coda.ir.graph import Input, Node, users, walk
from coda.ir.node import Field, is_operand

BELOW, ABOVE = 4, 3  # levels of operands and of users that have to agree


def kinds(roots: Iterable[Node]) -> dict[Node, int]:
    """The number of each node's class; equal for nodes with equal neighbourhoods."""
    roots = tuple(roots)
    nodes, above = list(walk(roots)), users(roots)
    numbers: dict[Hashable, int] = {}
    here = {n: numbers.setdefault(_operation(n), len(numbers)) for n in nodes}
    down = here
    for _ in range(BELOW):
        found = {n: (here[n], *(down[o] for o in n.operands)) for n in nodes}
        down = {n: numbers.setdefault(found[n], len(numbers)) for n in nodes}
    for _ in range(ABOVE):
        around = {n: (down[n], "above", *sorted(down[u] for u in above[n])) for n in nodes}
        down = {n: numbers.setdefault(around[n], len(numbers)) for n in nodes}
    return down


def _operation(node: Node) -> Hashable:
    """Type, shape, dtype and attributes of a node, without its operands and without names."""
    values: list[object] = []
    for name in () if isinstance(node, Input) else node.identity:
        value: Field = getattr(node, name)
        if not is_operand(value):
            values.append(repr(value) if isinstance(value, float) else value)
    return type(node), node.shape, node.dtype, tuple(values)
