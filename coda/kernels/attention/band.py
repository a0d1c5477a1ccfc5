"""Scores of an attention -> scale · q kᵀ within a band lo ≤ j - i ≤ hi, if they are no more.

where((j <= i) & (j > i - 128), s * 0.125, -inf)    scale 0.125, lo = -127, hi = 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from coda.ir.attend import Attend
from coda.ir.dims import Dim
from coda.ir.graph import Cast, Const, Map, Node, Size
from coda.ir.scalars import SCALARS
from coda.lowering.placement.positions import along
from coda.lowering.placement.values import Refused


@dataclass(frozen=True)
class Banded:
    """Scores scale · q kᵀ, kept where lower ≤ j - i ≤ upper; None for no such end."""

    scale: float = 1.0
    lower: Dim | None = None
    upper: Dim | None = None


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


def banded(node: Attend) -> Banded | None:
    """The scores of an attention as a band; None if they are anything else."""
    root, (score, *captured) = node.scores.root, node.scores.inputs
    if captured:
        return None
    scale, ends = 1.0, (None, None)
    match root:
        case Map(args=(mask, kept, Const(value=value))) if SCALARS[root.fn].chooses:
            found = _ends(mask)
            if value != -math.inf or found is None:
                return None
            root, ends = kept, found
        case _:
            pass
    match root:
        case Map(args=(one, Const(value=value))) if SCALARS[root.fn].is_product:
            root, scale = one, value
        case _:
            pass
    return Banded(scale, *ends) if root is score and math.isfinite(scale) else None


def keeps_a_key(node: Attend, scores: Banded) -> bool:
    """Whether each query of an attention reads a key, for all sizes (of at least one key)."""
    lower, upper = scores.lower, scores.upper
    ahead = upper is None or (upper.constant is not None and upper.constant >= 0)
    if lower is None:
        return ahead  # the first key
    own = lower.constant is not None and lower.constant <= 0
    return ahead and own and node.q.shape[2] == node.k.shape[2]  # the query's own


Ends = tuple[Dim | None, Dim | None]


def _ends(mask: Node) -> Ends | None:
    """The band of a condition: a comparison of positions, or the conjunction of two."""
    match mask:
        case Map(args=(Map(args=(a, b)) as both, Const(value=0.0))) if _is_and(mask, both):
            one, other = _ends(_condition(a)), _ends(_condition(b))
            return None if one is None or other is None else _both(one, other)
        case Map(args=(a, b)):
            return _compared(mask.fn, a, b)
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


def _both(one: Ends, other: Ends) -> Ends | None:
    """The intersection of two bands; None if an end of both is not the same for all sizes."""
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
