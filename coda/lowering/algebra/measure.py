"""What falls when a law is applied: why rewriting comes to an end.

Two measures, the first before the second:

    additions   how many sums of whole matrices a graph adds: `contractions_together` takes one away
    order       the path order of a node: an operation is larger than what is made of smaller ones

The path order compares nodes as terms. A node is larger than each of its operands; than a node of a
lower rank whose operands are all smaller than it; and than a node of its own rank whose operands
are smaller as a sequence (of a contraction, whose first operand counts before its second) or as a
multiset. It falls wherever something in a graph falls, so a law whose right side is smaller than
its left side, whatever the variables stand for, can be applied only so often (Dershowitz 1982).

    sum (x ⊙ r)  >  (sum x) ⊙ r      `sum` ranks above `mul`; sum (x ⊙ r) > sum x and > r
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from coda.ir.dims import ONE
from coda.ir.graph import Cast, Contract, Map, Node, Reduce, walk
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SCALARS

# From the largest; what is not named ranks below all of them.
RANKS = (
    "contract",
    "shift",  # a sum of a matrix and a vector that its rows have in common
    "add",
    "average",
    "sum",
    "fold",  # any other reduction
    "divide",
    "power",
    "cast",
    "mul",
    "scale",  # a product with a factor of the row
)
_RANK = {name: len(RANKS) - i for i, name in enumerate(RANKS)}


def kind(node: Node) -> str:
    """What a node is to the order: one of `RANKS`, or the name of a class or function."""
    match node:
        case Contract():
            return "contract"
        case Cast():
            return "cast"
        case Reduce(fn=fn):
            monoid = MONOIDS[fn]
            return "average" if monoid.average_of else "sum" if monoid.sums else "fold"
        case Map(fn=fn):
            row = SCALARS[fn]
            if row.is_product:
                return "scale" if _is_scaled(node) else "mul"
            if row.signs == (1, 1):
                return "shift" if _is_shifted(node) else "add"
            if row.powers and len(row.powers) > 1:
                return "divide"
            return "power" if fn == "pow" else fn
    return type(node).__name__


def _is_scaled(node: Map) -> bool:
    """Whether a product has one operand for each row and one of whole rows."""
    return len({a.shape[-1:] in ((), (ONE,)) for a in node.args}) == 2


def _is_shifted(node: Map) -> bool:
    """Whether a sum of a matrix has an operand that all rows have in common."""
    return _has_rows(node) and not all(_has_rows(a) for a in node.args)


def _has_rows(node: Node) -> bool:
    return any(d != ONE for d in node.shape[:-1])


def additions(roots: Iterable[Node]) -> int:
    """How many sums of two matrices of the same rows a graph has."""
    nodes = [n for n in walk(list(roots)) if isinstance(n, Map) and kind(n) == "add"]
    return sum(all(_has_rows(a) for a in n.args) for n in nodes)


def falls(before: Node, after: Node) -> bool:
    """Whether a node that a law has made is smaller than the one that it replaces."""
    fewer = additions([after]) < additions([before])
    return fewer or Order().is_larger(before, after)


class Order:
    """The path order, with the pairs of nodes that were compared."""

    def __init__(self) -> None:
        self.known: dict[tuple[Node, Node], bool] = {}

    def is_larger(self, a: Node, b: Node) -> bool:
        """Whether `a` is larger than `b`."""
        if a is b:
            return False
        if (a, b) not in self.known:
            self.known[a, b] = self._is_larger(a, b)
        return self.known[a, b]

    def _is_larger(self, a: Node, b: Node) -> bool:
        if any(o is b or self.is_larger(o, b) for o in a.operands):
            return True
        if not all(self.is_larger(a, o) for o in b.operands):
            return False
        x, y = kind(a), kind(b)
        if x != y:
            return _RANK.get(x, 0) > _RANK.get(y, 0)
        if x in ("contract", "shift"):
            return self.first_larger(_ordered(a), _ordered(b))
        return self.more(a.operands, b.operands)

    def first_larger(self, a: list[Node], b: list[Node]) -> bool:
        """Whether the first pair of operands that differ falls."""
        for one, other in zip(a, b, strict=True):
            if one is not other:
                return self.is_larger(one, other)
        return False

    def more(self, a: Iterable[Node], b: Iterable[Node]) -> bool:
        """Whether operands are larger as a multiset: what is new is smaller than what is gone."""
        gone, new = Counter(a) - Counter(b), Counter(b) - Counter(a)
        return bool(gone) and all(any(self.is_larger(g, n) for g in gone) for n in new)


def _ordered(node: Node) -> list[Node]:
    """The operands, those with rows first where they may be exchanged."""
    if isinstance(node, Contract):
        return list(node.operands)
    return sorted(node.operands, key=_has_rows, reverse=True)
