"""Concatenation along the rows -> one value per row: other rows of its parts, chosen by the row.

A token shift is concat(0 · x[:, :1], x[:, :-1]) along the tokens of x [B, S, D]. The row of token i
has the first part's row i if i < 1, otherwise the row i - 1 of x, which a row-wise kernel loads as
an operand of its own, `x@0`. Slices, concatenations and elementwise functions are followed to what
is in memory with all rows; of that, rows at a distance are loaded:

    where(i in [0, 1), x · 0, x@0)      x@0: x shifted by 1 along S

A distance may depend on sizes of the call. Rows of another sequence are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import numpy as np

from coda.ir.dims import ONE, Dim, Shape, product
from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Expand,
    Map,
    Node,
    Reshape,
    Size,
    Slice,
)
from coda.ir.scalars import CHOICE
from coda.lowering.algebra.roles import is_window, joins_windows
from coda.lowering.placement.values import NO_LANE, Expressions, Refused, Value, combine, spread
from coda.lowering.program.access import SHIFTED, RowStep
from coda.lowering.program.body import Ints
from coda.lowering.program.epilogue import Between, Expr, Load

Away = tuple[tuple[int, Dim], ...]  # (row axis, how much less the index of the row that is read is)


class KernelRows(Expressions, Protocol):
    """What is asked of the space of a kernel."""

    whole_rows: bool
    width: int
    shifts: dict[str, tuple[RowStep, ...]]
    segment: tuple[int, int] | None

    def split(self, node: Node) -> int: ...
    def size(self, dim: Dim) -> int: ...
    def operand(self, node: Node, columns: int) -> Value: ...
    def at(self, shape: tuple[int, ...], expr: Expr, slots: Ints | None) -> Value: ...
    def anchored(self, name: str) -> int: ...
    def cast(self, node: Cast, value: Value) -> Value: ...


def joins_rows(node: Node, rows: int) -> bool:
    """Whether a node concatenates rows of others along one of its `rows` leading axes."""
    return isinstance(node, Concat) and node.rank + node.axis < rows and joins_windows(node)


def under_views(node: Node) -> Iterator[Node]:
    """A node, and what is under its reshapes."""
    yield node
    while isinstance(node, Reshape):
        node = node.arg
        yield node


@dataclass
class JoinedRows:
    """The rows of one concatenation.

    Attributes:
        space: of the kernel.
        leaf: node -> the name under which the kernel loads it; None if it does not.
        node: the concatenation.
        lead: its row axes.
        known: (node, distance) -> value.
    """

    space: KernelRows
    leaf: Callable[[Node], str | None]
    node: Concat
    lead: Shape
    known: dict[tuple[Node, Away], Value] = field(default_factory=dict[tuple[Node, Away], Value])

    @staticmethod
    def of(space: KernelRows, leaf: Callable[[Node], str | None], node: Concat) -> JoinedRows:
        """The rows of a concatenation. Raises Refused in a kernel that cannot read other rows."""
        if not space.whole_rows:
            raise Refused("it reads other rows than its own, as row-wise kernels do")
        return JoinedRows(space, leaf, node, node.shape[: space.split(node)])

    def value(self) -> Value:
        """The value of the concatenation. Raises Refused."""
        return self.joined(self.node, ())

    @property
    def columns(self) -> int:
        """The number of column axes."""
        return self.node.rank - len(self.lead)

    def rows_of(self, node: Node) -> Shape:
        """The row axes of a node, aligned with those of the concatenation."""
        rows = node.shape[: max(0, node.rank - self.columns)]
        return (ONE,) * (len(self.lead) - len(rows)) + rows

    def read(self, node: Node, away: Away, user: Shape) -> Value:
        """The value of a node at a distance, for a user with such row axes. Raises Refused.

        What the user repeats along an axis is the same at any distance.
        """
        rows = self.rows_of(node)
        away = tuple((a, by) for a, by in away if rows[a] != ONE or user[a] == ONE)
        if (node, away) not in self.known:
            self.known[node, away] = self._read(node, away, rows)
        return self.known[node, away]

    def _read(self, node: Node, away: Away, rows: Shape) -> Value:
        alone = all(rows[axis] == ONE for axis, _ in away)
        shared = all(d in (ONE, s) for d, s in zip(rows, self.lead, strict=True))
        given = isinstance(node, Const | Size) or self.leaf(node) is not None
        own = given or rows == self.lead or not is_window(node, self.node.axis)
        if shared and alone and own:
            return self.space.operand(node, self.columns)
        if rows == self.lead:
            for under in under_views(node):
                name = None if isinstance(under, Const | Size) else self.leaf(under)
                if name is not None:
                    return self.shifted(node, name, away)
        return self.computed(node, away)

    def computed(self, node: Node, away: Away) -> Value:
        """The value of an operation on what is read at a distance. Raises Refused."""
        own = self.rows_of(node)
        match node:
            case Map(fn=fn, args=args):
                return combine(self.space, fn, [self.read(a, away, own) for a in args])
            case Cast(arg=arg):
                return self.space.cast(node, self.read(arg, away, own))
            case Expand(arg=arg):
                shape = tuple(map(self.space.size, node.shape[node.rank - self.columns :]))
                return spread(self.read(arg, away, own), shape)
            case Slice(axis=axis) if -axis > self.columns:
                return self.sliced(node, away)
            case Slice(arg=arg, axis=axis):
                first, count = self.space.size(node.start), self.space.size(node.size)
                where = slice(first, first + (count - 1) * node.step + 1, node.step)
                rest = (slice(None),) * (-axis - 1)
                return self.read(arg, away, own).move(lambda a: a[(..., where, *rest)])
            case Concat(axis=axis) if -axis > self.columns:
                return self.joined(node, away)
            case _:
                raise Refused("rows at a distance are read of what is in memory")

    def sliced(self, node: Slice, away: Away) -> Value:
        """A slice of rows: the row that is read of its operand is further by its start."""
        if node.step != 1:
            raise Refused("it takes every second row, or fewer")
        axis = len(self.lead) + self.columns + node.axis
        by = dict(away).get(axis, Dim.of(0)) - node.start
        return self.read(node.arg, self.with_step(away, axis, by), self.rows_of(node.arg))

    def joined(self, node: Concat, away: Away) -> Value:
        """A concatenation of rows: a choice of the part by the index of the row."""
        axis = len(self.lead) + self.columns + node.axis
        first = dict(away).get(axis, Dim.of(0))
        size, inner = self.lead[axis], product(self.lead[axis + 1 :])
        parts: list[tuple[Dim, Dim, Value]] = []
        for arg in node.args:
            end = first + arg.shape[node.axis]
            value = self.read(arg, self.with_step(away, axis, first), self.rows_of(arg))
            parts.append((first, end, value))
            first = end
        _, _, found = parts[-1]
        for begin, end, value in reversed(parts[:-1]):
            test = self.space.at((1,) * self.columns, Between(begin, end, size, inner), None)
            found = combine(self.space, CHOICE, [test, value, found])
        return found

    def with_step(self, away: Away, axis: int, by: Dim) -> Away:
        """A distance with another one along one axis."""
        steps: Mapping[int, Dim] = {**dict(away), axis: by}
        return tuple((a, b) for a, b in sorted(steps.items()) if b.constant != 0)

    def shifted(self, node: Node, name: str, away: Away) -> Value:
        """The load of a matrix, or of one value per row, at a distance. Raises Refused."""
        space = self.space
        steps = tuple(
            RowStep(by, self.lead[axis], product(self.lead[axis + 1 :])) for axis, by in away
        )
        number = list(dict.fromkeys([*space.shifts.values(), steps])).index(steps)
        shape = tuple(map(space.size, node.shape[node.rank - self.columns :]))
        count, alias = prod(shape), f"{name}{SHIFTED}{number}"
        if count == 1:
            value = space.at(shape, Load(alias, NO_LANE), None)
        elif count == space.width:
            value = space.at(shape, Load(alias, 0), np.arange(count))
        elif space.segment is not None and count == space.segment[1]:
            value = space.at(shape, Load(alias, 0), space.anchored(alias) + np.arange(count))
        else:
            raise Refused("rows at a distance have another width than the kernel")
        space.shifts[alias] = steps
        return value
