"""Graph -> graph in which sums over a small axis of wide rows are spelled out.

    Σ_j mix[:, i, j] · s[:, j, :]  =  mix[:, i, 0] · s[:, 0, :] + mix[:, i, 1] · s[:, 1, :] + …

A product of a small matrix for each row is one (mix @ s), where a GEMM's tiles would have 4 rows.
An element of such a sum reads several columns of a row, which no kernel does; spelled out, it reads
one column of each of several slices, and each slice is in memory. Slices are taken as close to the
inputs as elementwise operations and views allow, so that nothing is as large as what is summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import product as product_of
from math import prod

from coda.ir.dims import ONE, Dim, product
from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Contract,
    Expand,
    Graph,
    Map,
    Node,
    Permute,
    Reduce,
    Reshape,
    Slice,
    transform,
)
from coda.ir.monoids import MONOIDS, PLAIN_SUM
from coda.ir.node import origin
from coda.ir.scalars import PRODUCT, SUM
from coda.ir.views import shaped, under_reshapes
from coda.lowering.algebra.roles import transposed

MOST_SUMMED = 8  # values that a sum has
MOST_TERMS = 64  # values of all sums of a row and a column
WIDE = 64  # columns below the axis, if they are known: of fewer, a kernel has the numbers apart


def spell_small_sums(graph: Graph, rows: Dim) -> Graph:
    """Spell out sums over a small axis of wide rows; `rows` is the number of rows of the block."""

    def change(node: Node) -> Node:
        with origin(node.where):
            under = _as_sum(node, rows) if isinstance(node, Contract) else node
            found = _small(under, rows)
            if found is None:
                return node
            return shaped(found.spelled(), node.shape)

    return graph.with_roots(transform(graph.roots, change))


@dataclass(frozen=True)
class _Small:
    """A sum of an argument of shape [*rows, *outer, count, width] over its axis of `count`.

    Attributes:
        node: the sum.
        outer: the sizes of the axes between, along which what is wide is the same.
        count: the number of values in each sum.
    """

    node: Reduce
    outer: tuple[int, ...]
    count: int

    def spelled(self) -> Node:
        """The sums of slices, beside each other along the columns."""
        found = [self.total(index) for index in product_of(*map(range, self.outer))]
        whole = Concat(tuple(found), -1) if len(found) > 1 else found[0]
        return shaped(whole, self.node.shape)

    def total(self, index: tuple[int, ...]) -> Node:
        """One of the sums, [*rows, width]."""
        terms = [self.at((*index, i)) for i in range(self.count)]
        total = reduce(lambda a, b: Map(SUM, (a, b)), terms)
        if not MONOIDS[self.node.fn].average_of:
            return total
        return Map(PRODUCT, (total, Const(1.0 / self.count, total.dtype)))

    def at(self, index: tuple[int, ...]) -> Node:
        """One term of a sum, [*rows, width]."""
        term, axes = self.node.arg, range(-1 - len(index), -1)
        for axis, i in zip(axes, index, strict=True):
            term = _part(term, axis, i)
        return _without(term, len(index))


def _as_sum(node: Contract, rows: Dim) -> Node:
    """A product of a small matrix for each row, as a sum of products; other contractions as is."""
    batch = node.shape[:-2]
    alike = node.lhs.shape[:-2] == node.rhs.shape[:-2] == batch and product(batch) == rows
    if not (node.batched and alike):
        return node
    x, w = (o if o.dtype == node.dtype else Cast(o, node.dtype) for o in node.operands)
    (count, width), some = node.shape[-2:], x.shape[-1]
    x = Reshape(x, (*batch, count, some, ONE))
    w = Reshape(transposed(w), (*batch, ONE, some, width))
    return Reduce(PLAIN_SUM, Map(PRODUCT, (x, w)), -2)


def _small(node: Node, rows: Dim) -> _Small | None:
    """A sum over a small axis with a wide one behind it, both of a row; None for any other node."""
    if not isinstance(node, Reduce) or node.axis != -2 or not MONOIDS[node.fn].sums:
        return None
    shape, width = node.arg.shape, node.arg.shape[-1].constant
    leads = [i for i in range(len(shape) - 1) if product(shape[:i]) == rows]
    if not leads or rows == ONE or (width is not None and width <= WIDE):
        return None
    sizes = [d.constant or 0 for d in shape[leads[-1] : -1]]
    if not all(0 < n <= MOST_SUMMED for n in sizes) or prod(sizes) > MOST_TERMS or sizes[-1] < 2:
        return None
    outer = tuple(sizes[:-1])
    return None if outer and _varies(node.arg, len(outer)) else _Small(node, outer, sizes[-1])


def _varies(node: Node, outer: int) -> bool:
    """Whether some wide operand differs along the `outer` axes: then these are rows of it."""
    if isinstance(node, Map | Cast):
        return any(_varies(o, outer) for o in node.operands)
    wide = node.rank > 2 and node.shape[-1] != ONE
    return wide and product(node.shape[max(0, node.rank - 2 - outer) : -2]) != ONE


def _without(node: Node, count: int) -> Node:
    """[..., 1, 1, width] -> [..., width], without `count` axes, below what is elementwise."""
    if node.rank < 2:
        return node
    if isinstance(node, Map | Cast):
        return node.with_operands([_without(o, count) for o in node.operands])
    shape = (*node.shape[: max(0, node.rank - 1 - count)], node.shape[-1])
    return shaped(under_reshapes(node), shape)


def _part(node: Node, axis: int, index: int) -> Node:
    """node[..., index, ...] along an axis, which stays with size 1."""
    if node.rank < -axis or node.shape[axis] == ONE:
        return node
    match node:
        case Map() | Cast():
            return node.with_operands([_part(o, axis, index) for o in node.operands])
        case Expand(arg=arg):
            shape = list(node.shape)
            shape[axis] = ONE
            return Expand(_part(arg, axis, index), tuple(shape))
        case Permute(arg=arg, order=order):
            return Permute(_part(arg, order[node.rank + axis] - arg.rank, index), order)
        case Reshape(arg=arg):
            found = _of_reshaped(node, arg, axis, index)
            if found is not None:
                return found
        case _:
            pass
    return Slice(node, axis, Dim.of(index), ONE, 1)


def _of_reshaped(node: Reshape, arg: Node, axis: int, index: int) -> Node | None:
    """A slice of a reshaped value as a slice of the value; None if the axis is no part of one."""
    at = node.rank + axis
    lead, count, width = product(node.shape[:at]), node.shape[at], product(node.shape[at + 1 :])
    shape = (*node.shape[:at], ONE, *node.shape[at + 1 :])
    for i, size in enumerate(arg.shape):
        if product(arg.shape[:i]) != lead:
            continue
        if size == count and product(arg.shape[i + 1 :]) == width:
            return Reshape(_part(arg, i - arg.rank, index), shape)
        if i == arg.rank - 1 and size == count * width:
            return Reshape(Slice(arg, -1, width * index, width, 1), shape)
    return None
