"""Values of a kernel -> one expression for all of its points, and the operands that these load.

A point is one column of the kernel or one pair of columns. The elements that the points compute
differ in the columns and in the vector elements that they read; here slots become lanes of the
point, and row leaves become loads of packed vectors or of tables that repeat. Elements with
different formulas become a choice by the segment number of the column.

    points [0 2] [1 3], y = concat(a, b) with 2 elements each  ->  lanes (expr of a, expr of b)
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coda.ir.dims import ONE, Dim, product
from coda.ir.graph import Node, Slice
from coda.ir.scalars import AT_MOST, CHOICE
from coda.ir.types import DType, f32
from coda.lowering.placement.arrays import classes, constant, distinct, rows_are_equal, taken
from coda.lowering.placement.columns import GROUPED, Space
from coda.lowering.placement.moved_columns import OTHER_GROUP, Elsewhere, Swaps, show
from coda.lowering.placement.numbers_apart import column
from coda.lowering.placement.positions import along, counted_from
from coda.lowering.placement.values import (
    NO_LANE,
    Reading,
    Refused,
    Value,
)
from coda.lowering.program.access import (
    SHIFTED,
    Access,
    Alternating,
    ColumnVector,
    Grouped,
    OneElement,
    Periodic,
    RowVector,
    Shifted,
    Span,
    Tile,
)
from coda.lowering.program.body import (
    FORMULAS,
    TILED_FORMULAS,
    Ints,
    Packed,
    Spread,
    paired_columns,
)
from coda.lowering.program.epilogue import (
    Call,
    Expr,
    Literal,
    Load,
    Operand,
    Position,
)


@dataclass
class Points:
    """The points of a kernel, and the operands that their expressions load.

    Attributes:
        space: the space in which the values were computed.
        operand_of: operand name -> node and dtype in memory.
        split: the distance of the columns of a pair in the buffers; None for single columns.
        shape: (split, width, group width, moves or not): another shape is another layout.
        elsewhere: the columns at which points read matrices; None if each reads its own.
        operands, nodes: operand name -> its declaration, and the node that it loads.
        packed: the packed row vectors.
        lanes_used: name of a packed vector -> number of its lanes in use.
        vectors: contents of a vector, as bytes -> its operand and lane.
        spread: operand name -> expansion over the row axes.
        bound: expression of the row, of no column -> the same with its operands declared.
    """

    space: Space
    operand_of: Callable[[str], tuple[Node, DType]]
    split: int | None
    shape: tuple[int | None, int, int, bool]
    elsewhere: Elsewhere | None
    operands: dict[str, Operand] = field(default_factory=dict[str, Operand])
    nodes: dict[str, Node] = field(default_factory=dict[str, Node])
    packed: list[Packed] = field(default_factory=list[Packed])
    lanes_used: dict[str, int] = field(default_factory=dict[str, int])
    vectors: dict[bytes, tuple[str, int]] = field(default_factory=dict[bytes, tuple[str, int]])
    spread: MutableMapping[str, Spread] = field(init=False)
    bound: dict[Expr, Expr] = field(default_factory=dict[Expr, Expr])

    def __post_init__(self) -> None:
        self.spread = ChainMap({}, self.space.spread)

    @property
    def points(self) -> int:
        return self.space.width // (1 if self.split is None else 2)

    @cached_property
    def columns(self) -> Ints:
        """[points, lanes] int64: the columns of each point, in the order of the buffers."""
        if self.split is None:
            return np.arange(self.space.width)[:, None]
        return paired_columns(self.space.width, self.split)

    def lanes(self, value: Value) -> tuple[Expr, ...]:
        """One expression per lane, or a single one for a value with one element per pair.

        Two, of both neighbours, for a value with two elements per column. Raises Refused for a
        value of any other width.
        """
        columns = self.columns
        if value.count == self.space.width:
            return tuple(self.at(value, columns[:, i], columns) for i in range(columns.shape[1]))
        if self.split is not None and value.count == self.points:
            return (self.at(value, np.arange(self.points), columns),)
        if self.alternates(value):
            both = (np.arange(i, value.count, 2) for i in (0, 1))
            return tuple(self.at(value, element, columns) for element in both)
        raise Refused(f"it has {value.count} columns where the kernel has {self.space.width}")

    def of_row(self, value: Value) -> tuple[Expr, ...]:
        """The expressions of a value whose elements are each a value of the row."""
        return tuple(self.bind(self.space.exprs[int(i)], self.bound) for i in value.expr)

    @property
    def has_neighbours(self) -> bool:
        """Whether the kernel can read and write two neighbouring elements for each column."""
        return self.split is None and not self.space.whole_rows and not self.space.batched

    def alternates(self, value: Value) -> bool:
        """Whether a value has two elements for each column of the kernel, and it can write them."""
        return self.has_neighbours and value.count == 2 * self.space.width

    def is_filled_by(self, value: Value) -> bool:
        """Whether a value has one element per column, or one per column pair."""
        if self.split is None or value.count != self.points:
            return value.count == self.space.width
        return self.own_lanes(value.slots, self.columns) is not None

    def at(self, value: Value, element: Ints, columns: Ints) -> Expr:
        """The expression, common to all points, of one element per point.

        Args:
            value: the value.
            element: [points], the element that each point computes.
            columns: [points, lanes], as `self.columns`.
        """
        if value.count == len(element) and np.array_equal(element, np.arange(value.count)):
            slots, group, leaves, numbers = value.slots, value.group, value.leaves, value.expr
        else:
            slots, group = taken(value.slots, element), taken(value.group, element)
            leaves, numbers = taken(value.leaves, element), taken(value.expr, element)
        lane, other = self.lanes_of(slots, columns), self.groups_of(group, columns)
        if all(map(rows_are_equal, (numbers, lane, other))):
            first, which = range(min(1, len(numbers))), constant(len(numbers), 0)
        else:
            first, which = classes(np.concatenate([numbers[:, None], lane, other[:, None]], 1))
        exprs: list[Expr] = []
        for kind, i in enumerate(first):
            names = [self.leaf_of(leaves[:, j], which == kind) for j in range(leaves.shape[1])]
            read = Reading(tuple(map(int, lane[i])), names, self.renamed(int(other[i])))
            exprs.append(read.at_point(self.space.exprs[int(numbers[i])]))
        memo: dict[Expr, Expr] = {}
        exprs = [self.bind(e, memo) for e in exprs]
        return self.select(exprs, which)

    def groups_of(self, group: Ints, columns: Ints) -> Ints:
        """[points]: which group's statistic each element reads: 0 for its own. Raises Refused."""
        size, own = self.space.group_size, constant(len(group), 0)
        if not size:
            return own
        if self.elsewhere is not None:
            return self.elsewhere.groups(group, size)
        if self.split is not None and size % (2 * self.split):
            raise Refused("pairs of columns cross the groups of a statistic")
        if np.any((group >= 0) & (group != columns[:, 0] // size)):
            raise Refused(OTHER_GROUP)
        return own

    def renamed(self, other: int) -> dict[str, str]:
        """Statistic of groups -> its name, for elements that read that of another group."""
        if self.elsewhere is None or other == 0:
            return {}
        grouped = [name for name, s in self.space.statistics.items() if s.group]
        return {name: self.elsewhere.statistic(name, other) for name in grouped}

    def leaf_of(self, leaf: Ints, inside: NDArray[np.bool_]) -> Expr:
        """The value of `leaf` [points, 2] as `vector`, for the points `inside`.

        Points that read different tables have different formulas where each reads columns anywhere.
        """
        read = {self.space.sources[s] for s in distinct(leaf[:, 0]) if s >= 0}
        if self.elsewhere and len(read & self.space.tables.keys()) > 1:
            leaf = np.where(inside[:, None], leaf, -1)
        return self.vector(leaf)

    def lanes_of(self, slots: Ints, columns: Ints) -> Ints:
        """Slots [points, k] -> the lane of each among its point's columns [points, lanes].

        -1 for no slot. A point that reads columns elsewhere has a lane for each way to do so.
        Raises Refused if an element reads columns of another element or column pair.
        """
        if self.elsewhere is not None:
            return self.elsewhere.lanes(slots)
        lane = self.own_lanes(slots, columns)
        if lane is None:
            raise Refused("an element reads columns of another element or column pair")
        return lane

    def own_lanes(self, slots: Ints, columns: Ints) -> Ints | None:
        """As `lanes_of`, of points that read their own columns; None if one does not."""
        if slots.shape[1] == 0 or np.array_equal(slots, columns):
            return np.broadcast_to(np.arange(slots.shape[1]), slots.shape)
        lane = np.full(slots.shape, -1)
        for i in range(columns.shape[1]):
            lane[slots == columns[:, i : i + 1]] = i
        return lane if np.array_equal(lane >= 0, slots >= 0) else None

    def select(self, exprs: list[Expr], which: Ints) -> Expr:
        """One expression for points with several: a choice by the segment number of the column.

        Args:
            exprs: the distinct expressions.
            which: [points], the index of each point's expression.
        """
        kinds = list(dict.fromkeys(exprs)) or [Literal(0.0)]  # a value without elements
        if len(kinds) == 1:
            return kinds[0]
        if len(kinds) > (FORMULAS if self.space.whole_rows else TILED_FORMULAS):
            raise Refused(f"its columns have {len(kinds)} different formulas")
        number = np.array([kinds.index(e) for e in exprs], np.float64)[which]
        segment = self.constant(number)
        out = kinds[-1]
        for i in range(len(kinds) - 2, -1, -1):
            test = Call(AT_MOST, (segment, Literal(float(i))))
            out = Call(CHOICE, (test, kinds[i], out))
        return out

    # Row operands.

    def vector(self, leaf: Ints) -> Expr:
        """The value of `leaf` [points, 2], the (source, index) of one vector element per point."""
        source, index = leaf[:, 0], leaf[:, 1]
        sources = self.space.sources
        number = self.number(source, index)
        if number is not None:
            return number
        tables = {s for s in distinct(source) if s >= 0 and sources[s] in self.space.tables}
        if tables:
            return self.table(source, index, tables)
        key = source.tobytes() + index.tobytes()
        if key not in self.vectors:
            self.vectors[key] = self.lane_of_row(Packed("", source, index))
        return Load(*self.vectors[key])

    def number(self, source: Ints, index: Ints) -> Expr | None:
        """A vector that is the number of the column, plus a constant; None for any other."""
        used = np.flatnonzero(source >= 0)
        known = distinct(source.take(used))
        if self.split is not None or len(known) != 1:
            return None
        node = self.space.sources[known[0]]
        away = index.take(used) - used
        if node not in self.space.positions or not rows_are_equal(away):
            return None
        first = along(node, self.space.sizes).first + int(away[0])
        return counted_from(Position("column"), first)

    def constant(self, numbers: NDArray[np.float64]) -> Load:
        """The load of a packed vector of constants, [points]."""
        key = b"numbers" + numbers.tobytes()
        if key not in self.vectors:
            none = np.full(len(numbers), -1)
            self.vectors[key] = self.lane_of_row(Packed("", none, none, numbers))
        return Load(*self.vectors[key])

    def lane_of_row(self, part: Packed) -> tuple[str, int]:
        """Put a vector into a free lane of a packed row operand: (operand, lane)."""
        lanes = 1 if self.split is None else 2
        last = self.packed[-1] if self.packed else None
        if last is None or self.lanes_used[last.name] == lanes:
            name = f"row{len(self.packed)}"
            none = np.full(self.points * lanes, -1)
            last = Packed(name, none, none.copy(), np.zeros(self.points * lanes))
            self.packed.append(last)
            self.lanes_used[name] = 0
            self.operands[name] = Operand(name, f32, RowVector())
        lane = self.lanes_used[last.name]
        self.lanes_used[last.name] += 1
        last.source[lane::lanes], last.index[lane::lanes] = part.source, part.index
        if part.numbers is not None and last.numbers is not None:
            last.numbers[lane::lanes] = part.numbers
        return last.name, lane

    def table(self, source: Ints, index: Ints, tables: set[int]) -> Expr:
        """The load of a table that repeats along the columns, or has one element per group.

        Of one column of it that all read, the load is that of a vector of rows.

        `source` and `index` [points] are those of each point's element; `tables` are the sources.
        """
        used = source >= 0
        if len(tables) > 1 or np.any(source[used] != next(iter(tables))):
            raise Refused("its columns read different tables")
        node = self.space.sources[next(iter(tables))]
        period = self.space.tables[node]
        alone = distinct(index[used])
        if len(alone) == 1 < period and self.space.leaf(node) not in self.spread:
            return self.bind(column(self.space, node, alone[0]), {})
        point = np.arange(len(source))
        group, rest = divmod(len(source), period)
        if group > 1 and not rest and np.array_equal(index[used], point[used] // group):
            if not self.space.whole_rows:
                raise Refused(GROUPED)
            return self.repeated(node, Grouped(group))
        if self.elsewhere is not None:
            read = self.elsewhere.table(point[used], index[used], period)
            if read is not None:
                return self.repeated(node, read)
        if np.any(index[used] != point[used] % period):
            node, period = self.part(node, period, point[used], index[used])
        columns = period * (1 if self.split is None else 2)
        fits = any(t % columns == 0 or columns % t == 0 for t in (64, 128, 256))
        if not (fits or self.space.whole_rows):
            raise Refused(f"a table of {columns} columns is not a part of a tile")
        return self.repeated(node, Periodic(period))

    def repeated(self, node: Node, access: Periodic | Grouped) -> Load:
        """The load of a matrix by a Periodic or Grouped access."""
        name = self.space.leaf(node)
        if name is None:
            raise Refused("a table that is not in memory")
        if isinstance(access, Periodic) and (access.each > 1 or access.swaps):
            name = f"{name}{SHIFTED}each{access.each}{show(access.swaps)}"
        found = Operand(name, node.dtype, access)
        if self.operands.setdefault(name, found) != found:
            raise Refused("a table is read in two ways")
        self.nodes[name] = node
        return Load(name, 0)

    def part(self, node: Node, period: int, point: Ints, index: Ints) -> tuple[Node, int]:
        """A slice of a table that repeats along the pairs: one half, or every second column."""
        half = period // 2
        whole = node.rank and self.space.size(node.shape[-1]) == period
        for start, step in ((0, 1), (half, 1), (0, 2), (1, 2)):
            if half and whole and np.array_equal(index, point % half * step + start):
                found = Slice(node, -1, Dim.of(start), Dim.of(half), step)
                known, name = self.space.leaf(node), self.space.leaf(found)
                if name is not None and known is not None and known in self.spread:
                    self.spread[name] = self.spread[known]
                return found, half
        raise Refused("a table does not repeat along the columns")

    # Other operands.

    def bind(self, expr: Expr, memo: dict[Expr, Expr]) -> Expr:
        """Declare the operands of an expression; loads without a lane get lane 0."""
        if expr not in memo:
            memo[expr] = self._bind(expr, memo)
        return memo[expr]

    def _bind(self, expr: Expr, memo: dict[Expr, Expr]) -> Expr:
        match expr:
            case Load(operand=name, lane=lane):
                if self.elsewhere and lane > 0:
                    return self.moved(name, self.elsewhere.swaps[lane])
                if name in self.operands:
                    return Load(name, max(lane, 0))
                neighbour = self.neighbour(name) if lane != NO_LANE else None
                if neighbour is None:
                    self.declare(name, lane)
                return neighbour or Load(name, max(lane, 0))
            case Call(fn=fn, args=args):
                return Call(fn, tuple(self.bind(a, memo) for a in args))
            case _:
                return expr

    def moved(self, name: str, swaps: Swaps) -> Load:
        """The load of a matrix at other columns, as an operand of its own."""
        alias = f"{name}{SHIFTED}columns{show(swaps)}"
        if alias not in self.operands:
            if name in self.space.offsets:
                raise Refused("a matrix of some of the columns is read at others")
            node, dtype = self.operand_of(name)
            steps, spread = self.space.shifts.get(name), self.spread.get(name)
            access = Tile(swaps=swaps)
            access = Shifted(access, steps) if steps is not None else access
            self.operands[alias], self.nodes[alias] = Operand(alias, dtype, access), node
            if spread is not None:
                self.spread[alias] = spread
        return Load(alias, 0)

    def declare(self, name: str, lane: int) -> None:
        node, dtype = self.operand_of(name)
        if lane != NO_LANE:
            access: Access = self.tile(name, node)
        else:
            count = product(node.shape)
            over_rows = count.symbols & self.space.rows.symbols
            one = count == ONE or (not over_rows and self.space.size(count) == 1)
            access = OneElement() if one else ColumnVector()
        steps = self.space.shifts.get(name)
        if steps is not None and isinstance(access, Tile | ColumnVector):
            access = Shifted(access, steps)
        self.operands[name] = Operand(name, dtype, access)
        self.nodes[name] = node

    def neighbour(self, name: str) -> Load | None:
        """The load of every second column of a matrix in memory, as one of two neighbours.

        None for any other operand, or if the kernel does not read neighbours of 16 bits.
        """
        node, dtype = self.operand_of(name)
        if not (self.has_neighbours and isinstance(node, Slice) and node.step == 2):
            return None
        first, whole = node.start.constant, self.space.leaf(node.arg)
        every = node.axis == -1 and node.size * 2 == node.arg.shape[-1] and first in (0, 1)
        if whole is None or not every or dtype.size != 2 or name in self.spread:
            return None
        found = Operand(whole, dtype, Alternating())
        if self.operands.setdefault(whole, found) != found:
            raise Refused("a matrix is read in two ways")
        self.nodes[whole] = node.arg
        return Load(whole, int(first or 0))

    def tile(self, name: str, node: Node) -> Tile:
        """The access to a matrix: to all columns of the kernel, or to a span of them."""
        if self.split not in (None, 1) and not self.space.whole_rows:
            raise Refused("partners of a tile operand are not neighbours in memory")
        if name not in self.space.offsets:
            return Tile()
        spread = self.spread.get(name)
        first = self.space.split(node) if spread is None else node.rank - spread.columns
        columns = self.space.size(product(node.shape[first:]))
        return Tile(Span(self.space.offsets[name], columns))
