"""Graph -> graph without the marks at which differentiation stops: they are identities.

y = x · stop_gradient(r)    forward    x · r
                            backward   dx = dy · r, nothing for r
"""

from __future__ import annotations

from collections.abc import Iterable

from coda.ir.graph import Map, Node, transform
from coda.ir.scalars import SCALARS


def without_stops(roots: Iterable[Node]) -> tuple[Node, ...]:
    """The same values without functions that only stop a derivative."""
    return transform(roots, lambda n: n.operands[0] if _stops(n) else n)


def _stops(node: Node) -> bool:
    return isinstance(node, Map) and SCALARS[node.fn].stops
