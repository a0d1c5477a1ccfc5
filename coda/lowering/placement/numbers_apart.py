"""Rows of a few numbers -> `Value` of numbers apart: an expression of the row for each of them.

A row-wise kernel of one column (`SpaceState.apart`) loads each column of a matrix [M, 16] as a
vector of rows. An expression may read any of them, so a reduction over a small axis of the numbers
is spelled out, whatever the axis:

    mix [M, 4, 4]            expr m0 m1 … m15
    Σ mix over axis -2       expr m0 + m4 + m8 + m12, m1 + m5 + m9 + m13, …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

from coda.ir.dims import Dim, product
from coda.ir.graph import Node, Reduce, Slice
from coda.ir.monoids import MONOIDS
from coda.ir.scalar import Term
from coda.ir.scalars import PRODUCT, SUM
from coda.ir.views import shaped
from coda.lowering.placement.space_state import SpaceState
from coda.lowering.placement.values import NO_LANE, Refused, Value, beside, combine
from coda.lowering.program.epilogue import Literal, Load

OPERATORS = {"+": SUM, "*": PRODUCT}  # of `Warp.step`; any other is a scalar function


def loaded(space: SpaceState, node: Node, shape: tuple[int, ...]) -> Value:
    """The numbers of a matrix in memory, each loaded as a vector of rows. Raises Refused."""
    loads = [column(space, node, i) for i in range(prod(shape))]
    return beside([space.at((1,), one, None) for one in loads]).move(lambda a: a.reshape(shape))


def column(space: SpaceState, node: Node, index: int) -> Load:
    """The load of one column of a matrix in memory, as a vector of rows. Raises Refused."""
    rows = space.split(node)
    flat = (*node.shape[:rows], product(node.shape[rows:]))
    name = space.leaf(Slice(shaped(node, flat), -1, Dim.of(index), Dim.of(1), 1))
    if name is None:
        raise Refused("one column of a matrix that the kernel reads as a whole")
    return Load(name, NO_LANE)


def reduced(space: SpaceState, node: Reduce, value: Value, axis: int) -> Value:
    """A reduction of numbers apart over one of their axes."""
    parts = [value.move(lambda a, i=i: a.take([i], axis)) for i in range(value.shape[axis])]
    shape = space.columns(node)
    return _fold(space, node.fn, parts).move(lambda a: a.reshape(shape))


@dataclass(frozen=True)
class _Numbers(Term):
    """A value, as a term of a formula."""

    space: SpaceState
    value: Value

    def apply(self, fn: str, *args: Term | float) -> _Numbers:
        return _Numbers(self.space, combine(self.space, fn, [self._value(a) for a in args]))

    def _value(self, arg: Term | float) -> Value:
        if isinstance(arg, _Numbers):
            return arg.value
        assert isinstance(arg, float)
        return self.space.at((1,) * len(self.value.shape), Literal(arg), None)


def _fold(space: SpaceState, fn: str, parts: Sequence[Value]) -> Value:
    """The fold of values, number by number."""
    row = MONOIDS[fn]
    if row.passes:
        near = _Numbers(space, _fold(space, row.passes.near, parts))
        t = row.passes.bound(near) if row.passes.bound else near
        terms = [row.passes.term(_Numbers(space, p), t) for p in parts]
        total = _fold(space, row.passes.total, [t.value for t in terms if isinstance(t, _Numbers)])
        found = row.passes.value(t, _Numbers(space, total))
        assert isinstance(found, _Numbers)
        return found.value
    step = OPERATORS.get(row.warp.step, row.warp.step)
    total = reduce(lambda a, b: combine(space, step, [a, b]), parts)
    if not row.average_of:
        return total
    share = space.at((1,) * len(total.shape), Literal(1.0 / len(parts)), None)
    return combine(space, PRODUCT, [total, share])
