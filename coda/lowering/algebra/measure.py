"""Node before and after a law -> whether the measure falls: the proof that rewriting terminates.

Two measures, compared in this order:

    additions   the number of sums of two whole matrices; `contractions_together` removes one
    order       the recursive path order of a node (Dershowitz 1982)

The path order compares nodes as terms. A node is larger than each of its operands; than a node of a
lower rank whose operands are all smaller than it; and than a node of its own rank whose operands
are smaller, as a sequence (a contraction: the first operand counts before the second) or as a
multiset. If a part of a graph falls, the whole falls. So a law whose right side is smaller than its
left side, for all values of its variables, can be applied only finitely often.

    sum (x ⊙ r)  >  (sum x) ⊙ r      `sum` ranks above `mul`; sum (x ⊙ r) > sum x and > r
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from coda.ir.dims import ONE
from coda.ir.graph import Cast, Contract, Input, Map, Node, Reduce, walk
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SCALARS
from coda.lowering.algebra.roles import base

# From the largest; any other kind ranks below all of these.
RANKS = (
    "scaled",  # a contraction whose right operand is an argument times a row factor
    "batches",  # a batched contraction
    "contract",
    "shift",  # the sum of a matrix and a vector that all its rows share
    "add",
    "average",
    "sum",
    "fold",  # any other reduction
    "divide",
    "power",
    "cast",
    "mul",
    "scale",  # a product with a row factor
)
_RANK = {name: len(RANKS) - i for i, name in enumerate(RANKS)}


def kind(node: Node) -> str:
    """A node's symbol in the path order: one of `RANKS`, or the name of its class or function."""
    match node:
        case Contract():
            if _is_scaled_argument(node.rhs):
                return "scaled"
            return "batches" if node.batched else "contract"
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
        case _:
            return type(node).__name__


def _is_scaled(node: Map) -> bool:
    """Whether a product has a row factor ([..., 1]) and an operand with columns."""
    return len({a.shape[-1:] in ((), (ONE,)) for a in node.args}) == 2


def _is_scaled_argument(node: Node) -> bool:
    """Whether an operand is an argument times (or divided by) a row factor, or a view of that.

    No law makes such an operand of another one, so a contraction's rank does not rise if its
    operand is rewritten.
    """
    product = base(node)
    if not isinstance(product, Map) or not SCALARS[product.fn].powers or not _is_scaled(product):
        return False
    wide = [a for a in product.args if a.shape[-1:] not in ((), (ONE,))]
    return all(isinstance(base(a), Input) for a in wide)


def _is_shifted(node: Map) -> bool:
    """Whether a sum of a matrix has an operand that all rows share."""
    return _has_rows(node) and not all(_has_rows(a) for a in node.args)


def _has_rows(node: Node) -> bool:
    return any(d != ONE for d in node.shape[:-1])


def additions(roots: Iterable[Node]) -> int:
    """The number of sums of two matrices, both with several rows, in a graph."""
    nodes = [n for n in walk(list(roots)) if isinstance(n, Map) and kind(n) == "add"]
    return sum(all(_has_rows(a) for a in n.args) for n in nodes)


def falls(before: Node, after: Node) -> bool:
    """Whether `after`, which a law puts in the place of `before`, is smaller."""
    fewer = additions([after]) < additions([before])
    return fewer or Order().is_larger(before, after)


class Order:
    """The recursive path order; `known` caches the compared pairs."""

    def __init__(self) -> None:
        self.known: dict[tuple[Node, Node], bool] = {}

    def is_larger(self, a: Node, b: Node) -> bool:
        """Whether `a` is strictly larger than `b`."""
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
        if x in ("scaled", "batches", "contract", "shift"):
            return self.first_larger(_ordered(a), _ordered(b))
        return self.more(a.operands, b.operands)

    def first_larger(self, a: list[Node], b: list[Node]) -> bool:
        """Whether `a` is larger at the first pair of operands that differ."""
        for one, other in zip(a, b, strict=True):
            if one is not other:
                return self.is_larger(one, other)
        return False

    def more(self, a: Iterable[Node], b: Iterable[Node]) -> bool:
        """Whether `a` is larger as a multiset: each new operand is below one that is gone."""
        gone, new = Counter(a) - Counter(b), Counter(b) - Counter(a)
        return bool(gone) and all(any(self.is_larger(g, n) for g in gone) for n in new)


def _ordered(node: Node) -> list[Node]:
    """The operands; those of a sum with the matrix first."""
    if isinstance(node, Contract):
        return list(node.operands)
    return sorted(node.operands, key=_has_rows, reverse=True)
