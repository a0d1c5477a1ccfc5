"""Scores of an attention -> a scale of q kᵀ, a band lo ≤ j - i ≤ hi, and the rest as a function.

where((j <= i) & (j > i - 128), s * 0.125, -inf)    scale 0.125, lo = -127, hi = 0
where((j <= i) & (j > 4), tanh(s * 0.125), -inf)    scale 0.125, hi = 0, where(j > 4, tanh s, -inf)
s * 0.125 + where(j <= i, 0, -3.4e38)               scale 0.125, hi = 0: each row keeps a key
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from coda.ir.attend import Attend
from coda.ir.dims import Dim
from coda.ir.graph import Cast, Const, Map, Node, Size, users, walk
from coda.ir.scalars import CHOICE, SCALARS
from coda.ir.types import f32
from coda.lowering.algebra.rewrite import substituted
from coda.lowering.placement.positions import along
from coda.lowering.placement.values import Refused


@dataclass(frozen=True)
class Banded:
    """Scores rest(scale · q kᵀ), kept where lower ≤ j - i ≤ upper.

    Attributes:
        scale: the factor of q kᵀ.
        lower, upper: the ends of the band; None for no such end.
        rest: a function of the attention's `Scores.inputs`, of which the first is the score with
            its factor; None for the score itself.
    """

    scale: float = 1.0
    lower: Dim | None = None
    upper: Dim | None = None
    rest: Node | None = None


@dataclass(frozen=True)
class _Linear:
    """queries · i + keys · j + rest."""

    queries: int
    keys: int
    rest: Dim

    def plus(self, other: _Linear, sign: int) -> _Linear:
        return _Linear(
            self.queries + sign * other.queries,
            self.keys + sign * other.keys,
            self.rest + other.rest * sign,
        )


def banded(node: Attend) -> Banded:
    """The scores of an attention as a band and the rest.

    A finite number that is as good as -inf masks as -inf does only if each row keeps a key.
    """
    found = _banded(node, LOWEST)
    return found if keeps_a_key(node, found) else _banded(node, -math.inf)


def _banded(node: Attend, least: float) -> Banded:
    """The scores of an attention, of which those up to `least` are -inf."""
    root, ends = node.scores.root, (None, None)
    others: list[Node] = []  # conditions that are no bands
    while (masked := _masked(root)) is not None and masked[2] <= least:
        mask, inside, value = masked
        ranges = {c: _ends(c) for c in _conjuncts(mask)}
        if value > -math.inf and None in ranges.values():
            break  # what its band leaves out is not known to have a key
        root = inside
        for condition, one in ranges.items():
            both = _both(ends, one)
            if both is None:
                others.append(condition)
            else:
                ends = both
    scale, rest = _scaled(root, node.scores.inputs[0])
    for condition in others:
        rest = Map(CHOICE, (condition, rest, Const(-math.inf, f32)))
    plain = rest is node.scores.inputs[0] and scale > 0  # its maximum is that of q kᵀ
    return Banded(scale, *ends, None if plain else rest)


def _masked(root: Node) -> tuple[Node, Node, float] | None:
    """(mask, scores, number of what is masked) of masked scores; None for any other node.

    They are a choice between scores and the number, or a sum of scores and a choice between 0 and
    the number.
    """
    match root:
        case Map(args=(mask, inside, Const(value=value))) if SCALARS[root.fn].chooses:
            return mask, inside, value
        case Map(args=(a, b)) if SCALARS[root.fn].signs == (1, 1):
            for choice, inside in ((a, b), (b, a)):
                found = _masked(choice) if isinstance(choice, Map) else None
                if found is not None and isinstance(found[1], Const) and found[1].value == 0:
                    return found[0], inside, found[2]
        case _:
            pass
    return None


def _conjuncts(mask: Node) -> Iterator[Node]:
    """The conditions of which a mask is the conjunction."""
    match mask:
        case Map(args=(Map(args=(a, b)) as both, Const(value=0.0))) if _is_and(mask, both):
            yield from _conjuncts(_condition(a))
            yield from _conjuncts(_condition(b))
        case _:
            yield mask


def _scaled(root: Node, score: Node) -> tuple[float, Node]:
    """(scale, function of scale · score), if a function multiplies the score by it wherever it
    reads it; (1, the function) if it does not."""
    scale = 1.0
    while root is not score:
        product, *others = users([root])[score]
        match product:
            case Map(args=(one, Const(value=factor))) if SCALARS[product.fn].is_product:
                apart = bool(others) or one is not score
            case _:
                break
        if apart or not LEAST <= abs(scale * factor) <= 1 / LEAST:
            break
        scale, (root,) = scale * factor, substituted([root], {product: score})
    return scale, root


def keeps_a_key(node: Attend, scores: Banded) -> bool:
    """Whether each query of an attention reads a key, for all sizes (of at least one key)."""
    if scores.rest is not None:
        numbers = {n.value for n in walk([scores.rest]) if isinstance(n, Const)}
        if node.captured or -math.inf in numbers:
            return False  # it may be -inf for all keys
    lower, upper = scores.lower, scores.upper
    ahead = upper is None or (upper.constant is not None and upper.constant >= 0)
    if lower is None:
        return ahead  # the first key
    own = lower.constant is not None and lower.constant <= 0
    return ahead and own and node.q.shape[2] == node.k.shape[2]  # the query's own


LEAST = 2.0**-60  # a factor of scores; a larger and a smaller one are computed as they are
LOWEST = -(2.0**126)  # up to this number, e^(what is masked) is 0 beside any score

Ends = tuple[Dim | None, Dim | None]


def _ends(condition: Node) -> Ends | None:
    """The band of a condition that is a comparison of positions; None for any other."""
    match condition:
        case Map(args=(a, b)):
            return _compared(condition.fn, a, b)
        case _:
            return None


def _is_and(mask: Map, both: Map) -> bool:
    """Whether a condition is min(a, b) ≠ 0 of conditions as numbers."""
    values = [(p, q) for p in (0.0, 1.0) for q in (0.0, 1.0)]
    a, b = (torch.tensor(v) for v in zip(*values, strict=True))
    numbers = SCALARS[both.fn].evaluate(a, b)
    holds = SCALARS[mask.fn].evaluate(numbers, torch.zeros(4)).tolist()
    return holds == [bool(p and q) for p, q in values]


def _condition(node: Node) -> Node:
    """A condition that is cast to a number."""
    return node.arg if isinstance(node, Cast) and node.arg.dtype.kind == "bool" else node


def _both(one: Ends, other: Ends | None) -> Ends | None:
    """The intersection of two bands; None if an end of both is not the same for all sizes."""
    if other is None:
        return None
    found: list[Dim | None] = []
    for a, b, largest in zip(one, other, (True, False), strict=True):
        if a is None or b is None:
            found.append(b if a is None else a)
            continue
        apart = (a - b).constant
        if apart is None:
            return None
        found.append(a if (apart > 0) == largest else b)
    return found[0], found[1]


def _compared(fn: str, a: Node, b: Node) -> Ends | None:
    """The band of a comparison a fn b of whole numbers, linear in j - i."""
    left, right = _linear(a), _linear(b)
    if left is None or right is None or SCALARS[fn].result != "bool":
        return None
    apart = left.plus(right, -1)
    if (apart.queries, apart.keys) not in ((1, -1), (-1, 1)):
        return None
    # Which signs of the difference are kept, and then those of keys · (j - i) + rest.
    signs = torch.tensor([-1.0, 0.0, 1.0])
    below, equal, above = SCALARS[fn].evaluate(signs, torch.zeros(3)).tolist()
    if apart.keys < 0:
        apart, below, above = _Linear(0, 1, -apart.rest), above, below
    if below == above:
        return None  # equality, inequality
    end = -apart.rest
    if below:
        return None, end if equal else end - 1
    return end if equal else end + 1, None


def _linear(node: Node) -> _Linear | None:
    """A whole number that is linear in i and j."""
    match node:
        case Const(value=value):
            return _Linear(0, 0, Dim.of(int(value))) if value.is_integer() else None
        case Size(dim=dim):
            return _Linear(0, 0, dim)
        case Map(args=(a, b)) if SCALARS[node.fn].signs in ((1, 1), (1, -1)):
            one, other = _linear(a), _linear(b)
            sign = SCALARS[node.fn].signs[1]
            return None if one is None or other is None else one.plus(other, sign)
        case _:
            return _position(node)


def _position(node: Node) -> _Linear | None:
    """The number of a query or a key."""
    try:
        found = along(node, {})
    except Refused:
        return None
    if found.axis not in (-1, -2):
        return None
    return _Linear(int(found.axis == -2), int(found.axis == -1), Dim.of(found.first))
