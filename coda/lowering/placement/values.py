"""`Value`: a node as integer arrays over its columns, and elementwise functions of values.

The head of `columns.py` has an example: the arrays of RoPE before and after the rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, reduce
from math import prod
from typing import Protocol, cast

import numpy as np

from coda.ir.scalars import SCALARS
from coda.lowering.placement.arrays import (
    all_set,
    any_set,
    classes,
    constant,
    distinct,
    rows_are_equal,
    taken,
)
from coda.lowering.program.body import Ints
from coda.lowering.program.epilogue import Acc, Call, Expr, Literal, Load, Stat

NO_LANE = -1  # the lane of a load that is constant along the columns
TILE_PARTS = (32, 64, 128, 256)  # group widths that align with every tile and subtile
LONGEST = 100  # dependent operations in one kernel at most; later ones go to another kernel
MOST_COLUMNS = 4  # of a row that an element reads in a row-wise kernel: two swaps of blocks
WIDEST = 1 << 20  # elements of a row: a whole matrix, of which each is looked at, is no row
UNALIKE = "the column pairs that its elements read have no common distance"
LEAF = "%"  # Load("%3") is row leaf 3: the vector element `leaves[:, 3]` of each element


class Refused(Exception):
    """A node cannot be computed in a kernel; the message is the reason that `explain` shows."""


@dataclass(eq=False)
class Value:
    """One row of a node, as arrays over its n elements in row-major order, all int64.

    Attributes:
        shape: the sizes of the node's column axes, of product n.
        expr: [n], index into the space's expressions, in which lane i of Acc and of tile loads
            stands for column `slots[:, i]`.
        slots: [n, 0 to 2], the kernel's columns that an element reads, ascending; -1 for none. In
            row-wise kernels up to MOST_COLUMNS.
        leaves: [n, row leaves, 2], (source, index) of each vector element that it reads; -1 for
            none.
        group: [n], the column group whose statistic an element reads; -1 for none.
    """

    shape: tuple[int, ...]
    expr: Ints
    slots: Ints
    leaves: Ints
    group: Ints

    @property
    def count(self) -> int:
        """The number n of elements in a row."""
        return len(self.expr)

    @property
    def narrow(self) -> bool:
        """Whether the value is constant along the columns."""
        return self.count == 1 and self.of_rows

    @property
    def of_rows(self) -> bool:
        """Whether no element reads columns: each is a value of the row."""
        return self.slots.shape[1] == 0 and self.leaves.shape[1] == 0

    @cached_property
    def uniform(self) -> bool:
        """Whether all elements have the same expression."""
        return rows_are_equal(self.expr)

    @cached_property
    def numbers(self) -> list[int]:
        """The distinct numbers of expressions in `expr`, ascending."""
        return distinct(self.expr)

    @cached_property
    def sources(self) -> set[int]:
        """The distinct sources of row leaves."""
        columns = range(self.leaves.shape[1])
        found = {s for i in columns for s in distinct(self.leaves[:, i, 0])}
        return found - {-1}

    @cached_property
    def distance(self) -> int | None:
        """The distance of the two columns that an element reads; None if all read at most one.

        Raises:
            Refused: if the distances of elements differ.
        """
        if self.slots.shape[1] > 2:
            raise Refused(UNALIKE)
        pairs = self.partners
        if len(pairs) == 0:
            return None
        between = pairs[:, 1] - pairs[:, 0]
        if not rows_are_equal(between):
            raise Refused(UNALIKE)
        return int(between[0])

    @cached_property
    def partners(self) -> Ints:
        """[pairs, 2] int64: the columns of each element that reads two."""
        if self.slots.shape[1] < 2:
            return self.slots[:0]
        paired = self.slots[:, 1] >= 0
        return self.slots if paired.all() else self.slots[paired]

    @cached_property
    def accumulator_column(self) -> int:
        """The accumulator's column of the first element; -1 for one element per column pair."""
        if self.slots.shape[1] == 0 or self.count == 0:
            return -1
        pairs = self.partners
        if len(pairs) and np.bincount(pairs[:, 0]).max() == 1:
            return -1
        for start in self.slots[0]:
            if start >= 0 and _reads_each(self.slots, int(start) + np.arange(self.count)):
                return int(start)
        return -1

    def move(self, change: Callable[[Ints], Ints]) -> Value:
        """The value of a view; `change` does to an array of the column axes what the view does."""
        index = change(np.arange(self.count).reshape(self.shape))
        flat = index.reshape(-1)
        arrays = self.expr, self.slots, self.leaves, self.group
        return Value(index.shape, *(taken(a, flat) for a in arrays))


def beside(values: Sequence[Value]) -> Value:
    """The concatenation of values along the columns."""
    if len(values) == 1:
        return values[0]
    slots = max(v.slots.shape[1] for v in values)
    leaves = max(v.leaves.shape[1] for v in values)
    return Value(
        (sum(v.count for v in values),),
        np.concatenate([v.expr for v in values]),
        np.concatenate([pad(v.slots, slots) for v in values]),
        np.concatenate([pad(v.leaves, leaves) for v in values]),
        np.concatenate([v.group for v in values]),
    )


def first_column(value: Value) -> int:
    """The kernel's column of a value's first element, if elements are at consecutive columns.

    -1 if they are not, or if no element reads a column.
    """
    if not any_set(value.slots):
        return -1
    used = np.flatnonzero(value.slots[:, 0] >= 0)  # slots ascend, and -1 comes last
    slots = value.slots.take(used, 0)
    first = int(slots[0, 0] - used[0])
    return first if first >= 0 and _reads_each(slots, first + used) else -1


def _reads_each(slots: Ints, columns: Ints) -> bool:
    """Whether each element reads a given column: slots [n, k], columns [n]."""
    found = np.zeros(len(slots), np.bool_)
    for i in range(slots.shape[1]):
        found |= slots[:, i] == columns
    return bool(found.all())


class Expressions(Protocol):
    """A numbered list of expressions.

    Attributes:
        exprs: the expressions.
        most_columns: how many columns of a row an element may read.
    """

    exprs: list[Expr]

    @property
    def most_columns(self) -> int: ...

    def id(self, expr: Expr) -> int:
        """The number of an expression."""
        ...


def pad(a: Ints, width: int) -> Ints:
    """`a` [n, k, ...] with -1 appended along axis 1 up to `width`."""
    missing = width - a.shape[1]
    if missing == 0:
        return a
    return np.concatenate([a, np.full((len(a), missing, *a.shape[2:]), -1)], 1)


def spread(value: Value, shape: tuple[int, ...]) -> Value:
    """A value broadcast to other column axes. Raises Refused if they are too wide."""
    if value.shape == shape:
        return value
    if prod(shape) > WIDEST:
        raise Refused(f"more than {WIDEST} elements of a row are computed from fewer")
    return value.move(lambda a: np.broadcast_to(a, shape))


def combine(space: Expressions, fn: str, args: Sequence[Value]) -> Value:
    """A scalar function of values, elementwise, with broadcasting.

    Raises Refused if an element would read too many columns, or be too deep an expression.
    """
    shape = np.broadcast_shapes(*(a.shape for a in args))
    args = [spread(a, shape) for a in args]
    slots, lanes = _union([a.slots for a in args], space.most_columns)
    group = _same_group([a.group for a in args])
    leaves, names = _shared([a.leaves for a in args])
    alike = all(a.uniform for a in args) and all(map(rows_are_equal, lanes))
    if alike:
        first, inverse = np.zeros(min(1, len(group)), np.int64), group[:0]
    else:
        first, inverse = classes(np.concatenate([np.stack([a.expr for a in args], 1), *lanes], 1))
    found = np.empty(len(first), np.int64)
    for i, element in enumerate(first):
        parts: list[Expr] = []
        for j, arg in enumerate(args):
            renamed = tuple(int(v) for v in lanes[j][element])
            expr = space.exprs[int(arg.expr[element])]
            parts.append(substitute(expr, renamed, names[j]))
        folded = _fold(fn, tuple(parts))
        if isinstance(folded, Call) and folded.depth > LONGEST:
            raise Refused(f"more than {LONGEST} operations follow each other in the kernel")
        found[i] = space.id(folded)
    expr = constant(len(group), int(found[0])) if len(found) == 1 else found.take(inverse)
    return Value(shape, expr, slots, leaves, group)


def _fold(fn: str, args: tuple[Expr, ...]) -> Expr:
    """A call; the negation of a literal is folded."""
    if SCALARS[fn].is_negation and isinstance(args[0], Literal):
        return Literal(-args[0].value)
    return Call(fn, args)


def _union(slots: list[Ints], most: int) -> tuple[Ints, list[Ints]]:
    """Slots [n, k] of several operands -> their union, and each operand's lanes [n, k] in it.

    Raises Refused if an element reads more columns than `most`.
    """
    used = [s for s in slots if s.shape[1]]
    if not used:
        return slots[0], list(slots)
    if all(s is used[0] or np.array_equal(s, used[0]) for s in used):
        return used[0], [_lanes(used[0]) if s.shape[1] else s for s in slots]
    if all(s.shape[1] == 1 for s in used) and len(used[0]):
        apart = _apart(slots)
        if apart is not None:
            return apart
    columns = [s[:, i] for s in used for i in range(s.shape[1])]
    none = np.iinfo(np.int64).max
    first = reduce(np.minimum, [np.where(c < 0, none, c) for c in columns])
    last = reduce(np.maximum, columns)
    if any(np.any((c >= 0) & (c != first) & (c != last)) for c in columns):
        return _wide_union(slots, columns, most)
    union = [np.where(last < 0, -1, first), np.where(last > first, last, -1)]
    union = np.stack(union if any_set(union[1]) else union[:1], 1)
    return union, [np.where(s < 0, -1, s != first[:, None]) for s in slots]


def _wide_union(slots: list[Ints], columns: Sequence[Ints], most: int) -> tuple[Ints, list[Ints]]:
    """`_union` of more than two columns [n] of an element. Raises Refused, as `_union`."""
    none = np.iinfo(np.int64).max
    every = np.sort(np.stack([np.where(c < 0, none, c) for c in columns], 1), 1)
    every[:, 1:][every[:, 1:] == every[:, :-1]] = none
    every.sort(1)
    width = int((every != none).sum(1).max())
    if width > most:
        kernel = "an epilogue has two" if most == 2 else f"a row-wise kernel has {most}"
        raise Refused(f"an element reads {width} columns of a row; {kernel}")
    union = np.where(every == none, -1, every)[:, :width]
    found = [np.argmax(union[:, None] == s[:, :, None], 2) for s in slots]
    return union, [np.where(s < 0, -1, f) for s, f in zip(slots, found, strict=True)]


def _lanes(slots: Ints) -> Ints:
    """The lanes of an operand whose slots are the union itself."""
    columns = np.arange(slots.shape[1], dtype=np.int64)
    lanes = np.broadcast_to(columns, slots.shape)
    return lanes if all_set(slots) else np.where(slots >= 0, lanes, -1)


def _apart(slots: list[Ints]) -> tuple[Ints, list[Ints]] | None:
    """`_union` for operands of two different single columns, one left of the other everywhere."""
    kinds: list[Ints] = []
    for one in slots:
        if one.shape[1] and not any(one is k or np.array_equal(one, k) for k in kinds):
            kinds.append(one)
    if len(kinds) != 2 or not all(map(all_set, kinds)):
        return None
    low, high = kinds if kinds[0][0] < kinds[1][0] else kinds[::-1]
    if not np.all(low < high):
        return None
    first, second = (np.broadcast_to(np.int64(lane), low.shape) for lane in (0, 1))
    lanes = [
        s if not s.shape[1] else first if s is low or np.array_equal(s, low) else second
        for s in slots
    ]
    return np.concatenate([low, high], 1), lanes


def _shared(leaves: list[Ints]) -> tuple[Ints, list[tuple[int, ...]]]:
    """The distinct row leaves of all operands, and each operand's leaves as indices into them."""
    kept: list[Ints] = []
    names: list[tuple[int, ...]] = []
    for one in leaves:
        mine: list[int] = []
        for column in np.moveaxis(one, 1, 0):
            same = [i for i, k in enumerate(kept) if np.array_equal(k, column)]
            mine.append(same[0] if same else len(kept))
            if not same:
                kept.append(column)
        names.append(tuple(mine))
    if not kept:
        return leaves[0], names
    return np.stack(kept, 1), names


def _same_group(groups: list[Ints]) -> Ints:
    some = [g for g in groups if any_set(g)]
    out = some[0] if some else groups[0]
    for g in some[1:]:
        if np.any((out >= 0) & (g >= 0) & (out != g)):
            raise Refused("it mixes statistics of different groups of columns")
        out = np.maximum(out, g)
    return out


@dataclass
class Reading:
    """The leaves of an element's expression, as they are read at a point.

    Attributes:
        lanes: of slot i.
        leaves: of row leaf i.
        statistics: statistic -> the name under which the point reads it, where that is another.
        known: expression -> the same at the point.
    """

    lanes: tuple[int, ...]
    leaves: Sequence[Expr]
    statistics: Mapping[str, str]
    known: dict[Call, Expr] = field(default_factory=dict[Call, Expr])

    def at_point(self, expr: Expr) -> Expr:
        """An element's expression at the point: slots become lanes, row leaves become loads."""
        match expr:
            case Acc(lane=lane):
                return Acc(self.lanes[lane])
            case Load(operand=name) if name.startswith(LEAF):
                return self.leaves[int(name[1:])]
            case Load(operand=name, lane=lane) if lane != NO_LANE:
                return Load(name, self.lanes[lane])
            case Stat(name=name) if name in self.statistics:
                return replace(expr, name=self.statistics[name])
            case Call(fn=fn, args=args):
                if expr not in self.known:
                    self.known[expr] = Call(fn, tuple(self.at_point(a) for a in args))
                return self.known[expr]
            case _:
                return expr


@lru_cache(maxsize=100_000)
def substitute(expr: Expr, lanes: tuple[int, ...], leaves: tuple[int, ...]) -> Expr:
    """An expression with its lanes and its row leaves renamed."""
    match expr:
        case Acc(lane=lane):
            return Acc(lanes[lane])
        case Load(operand=name, lane=lane) if name.startswith(LEAF):
            return Load(LEAF + str(leaves[int(name[1:])]), lane)
        case Load(operand=name, lane=lane) if lane != NO_LANE:
            return Load(name, lanes[lane])
        case Call(fn=fn, args=args):
            return Call(fn, tuple(substitute(a, lanes, leaves) for a in args))
        case _:
            return cast(Expr, expr)
