"""Node -> `Value`: for each element of a row, its scalar expression and the columns that it reads.

The *space* of a kernel is the set of its columns: the accumulator's, or those of the row that a
row-wise kernel loads. A node can be computed in a kernel if each of its elements reads one row and
at most two columns. Arrays over the elements record this, and views only index them, so RoPE, gated
activations and per-head norms need no case of their own. RoPE of one head, with x [M, 4] the
accumulator and tables cos, sin [M, 2]; acc.i is at column slots[:, i], %i is leaves[:, i]:

    before, x:  expr e0 e0 e0 e0   slots [0] [1] [2] [3]   e0 = acc.0
    after, y = concat(x[:, :2]·cos − x[:, 2:]·sin, x[:, 2:]·cos + x[:, :2]·sin):
                expr e1 e1 e2 e2   slots [0 2] [1 3] [0 2] [1 3]
                leaves %0: cos 0, cos 1, cos 0, cos 1    %1: sin 0, sin 1, sin 0, sin 1
                e1 = acc.0 · %0 − acc.1 · %1             e2 = acc.1 · %0 + acc.0 · %1
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from math import prod

import numpy as np

from coda.ir.dims import ONE, broadcast, product
from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Expand,
    Input,
    Map,
    Node,
    Permute,
    Reduce,
    Reshape,
    Size,
    Slice,
)
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import CHOICE
from coda.ir.types import f32
from coda.lowering.algebra.roles import as_defined, base, reduced
from coda.lowering.placement import numbers_apart
from coda.lowering.placement.arrays import any_set, distinct
from coda.lowering.placement.joined_rows import JoinedRows, joins_rows
from coda.lowering.placement.positions import along, counted_from
from coda.lowering.placement.space_state import (
    MOST_NUMBERS,
    GroupStatistic,
    RowStatistic,
    SpaceState,
    is_number,
)
from coda.lowering.placement.values import (
    LEAF,
    LONGEST,
    NO_LANE,
    TILE_PARTS,
    Refused,
    Value,
    beside,
    combine,
    spread,
)
from coda.lowering.program.body import FORMULAS
from coda.lowering.program.epilogue import Acc, Literal, Load, Position, Stat

GROUPED = "a matrix with one element for each group of columns"


@dataclass
class Space(SpaceState):
    """The columns of one kernel, and the values of nodes computed there.

    Attributes:
        nested: the present depth of recursion of `compute`.
    """

    nested: int = 0

    def compute(self, node: Node) -> Value:
        """The value of a node, whose operands are loaded or computed as well. Raises Refused."""
        if node not in self.values:
            if self.nested == LONGEST:
                raise Refused(f"it is more than {LONGEST} operations away from what is known here")
            self.nested += 1
            try:
                self.values[node] = self._compute(node)
            finally:
                self.nested -= 1
        return self.values[node]

    def fold(self, node: Reduce, mean: Reduce | None = None) -> None:
        """Compute a reduction, and `mean`, its first plane, by folding a kernel's partials."""
        name = f"f{len(self.folds)}"
        self.folds[name] = node
        self.folded |= {node} if mean is None else {node, mean}
        self.values[node] = self.at(self.columns(node), Stat(name), None)
        if mean is not None:
            self.values[mean] = self.at(self.columns(mean), Stat(name, MONOIDS[node.fn].also), None)

    def _compute(self, node: Node) -> Value:
        if node in self.accumulators:
            first = self.accumulators[node]
            count = self.size(node.shape[-1])
            return self.at(self.columns(node), Acc(0), np.arange(first, first + count))
        if node in self.refused:
            raise Refused(self.refused[node])
        if self.leaf(node) is not None:
            return self.operand(node, node.rank - self.split(node))
        match node:
            case Map():
                return self._map(node)
            case Cast(arg=arg):
                return self.cast(node, self.compute(arg))
            case Reshape(arg=arg):
                self.split(node)
                value, shape = self.compute(arg), self.columns(node)
                if value.count != prod(shape):
                    raise Refused("it turns rows into columns")
                return value.move(lambda a: a.reshape(shape))
            case Slice():
                return self._slice(node)
            case Concat():
                return self._concat(node)
            case Permute():
                return self._permute(node)
            case Expand(arg=arg):
                shape = self.columns(node)
                return spread(self._aligned(arg, len(shape)), shape)
            case Reduce():
                return self._reduce(node)
            case _:
                raise Refused(f"`{type(node).__name__.lower()}` is not elementwise")

    # Leaves.

    def operand(self, node: Node, columns: int) -> Value:
        """The value of an operand of an elementwise operation with `columns` column axes."""
        if node in self.positions:
            try:
                return self._position(node, columns)
            except Refused:
                if node not in self.weights:
                    raise
        name = self.leaf(node)
        if isinstance(node, Const | Size) and name is None:
            value = node.value if isinstance(node, Const) else self.size(node.dim)
            return self.at((1,) * columns, Literal(float(value)), None)
        if name is None:
            value = self.compute(node)
            alone = is_number(node) and len(value.shape) != columns
            return value.move(lambda a: a.reshape((1,) * columns)) if alone else value
        cut = max(0, node.rank - columns)
        over_rows = self.over_rows(name, node, columns)
        shape = tuple(self.size(d) for d in node.shape[cut:])
        shape = (1,) * (columns - len(shape)) + shape
        count = prod(shape)
        if count == 1:
            if not over_rows and self.accumulators and node in self.weights and node.dtype != f32:
                return self._source(shape, node)  # a GEMM's scalars are float32, vectors are packed
            return self.at(shape, Load(name, NO_LANE), None)
        if (over_rows or self.rows == ONE) and count == self.width:
            if node in self.tables:  # read before the kernel widened
                raise Refused("a matrix is read as a table and as a tile")
            return self.at(shape, Load(name, 0), np.arange(count))
        if over_rows and self.apart and count <= MOST_NUMBERS and name not in self.spread:
            return numbers_apart.loaded(self, node, shape)
        if over_rows and self.segment is not None and count == self.segment[1]:
            return self.at(shape, Load(name, 0), self.anchored(name) + np.arange(count))
        if over_rows and self.rows != ONE:
            if name in self.offsets:
                raise Refused("a matrix is read at two places of the kernel's columns")
            self.tables[node] = count
        return self._source(shape, node)

    def _source(self, shape: tuple[int, ...], node: Node) -> Value:
        """A vector or a table of another width than the kernel: element i is a row leaf of it."""
        if prod(shape) > 16 * self.width + 65536:
            raise Refused("an operand is larger than the rows of the kernel")
        if self.rows == ONE and isinstance(base(node), Input) and node not in self.weights:
            raise Refused("an argument that is new in every call is not packed")
        if node not in self.sources:
            self.sources.append(node)
        value = self.at(shape, Load(LEAF + "0", NO_LANE), None)
        index = np.arange(value.count)
        source = np.full(value.count, self.sources.index(node))
        value.leaves = np.stack([source, index], 1)[:, None]
        return value

    def _position(self, node: Node, columns: int) -> Value:
        """The value of a node of `positions`, which loads nothing. Raises Refused."""
        match node:
            case Map(fn=fn, args=args):
                return combine(self, fn, [self.operand(a, columns) for a in args])
            case Cast(arg=arg):
                return self.cast(node, self.operand(arg, columns))
            case _:
                found = along(node, self.sizes)
        if -found.axis <= columns:
            shape = (1,) * (columns + found.axis) + (self.size(found.size),)
            return self._source(shape + (1,) * (-found.axis - 1), node)
        if found.size == ONE:
            return self.at((1,) * columns, Literal(float(found.first)), None)
        axes = node.shape[: node.rank - columns] if columns else node.shape
        fitting = [axes] if product(axes) == self.rows else [*self.leads]
        fitting = [lead for lead in fitting if broadcast(axes, lead) == lead]
        if len(fitting) != 1:
            raise Refused("its leading axes are not the rows of the kernel")
        (lead,) = fitting
        at = len(lead) + found.axis + columns
        count = ONE if product(lead[:at]) == ONE else lead[at]
        inner = self.size(product(lead[at + 1 :]))
        number = Position("row", inner, 0 if count == ONE else self.size(count))
        return self.at((1,) * columns, counted_from(number, found.first), None)

    # Operations.

    def _map(self, node: Map) -> Value:
        columns = self._column_axes(node)
        args = [self._aligned(a, columns) for a in node.args]
        value = combine(self, node.fn, args)
        if self.tables and not self.whole_rows:
            self._check_tables(value)
        return value

    def _check_tables(self, value: Value) -> None:
        """Raise Refused if a GEMM would read a matrix with one element per column group."""
        for leaf in np.moveaxis(value.leaves, 1, 0):
            tables = {self.sources[s] for s in distinct(leaf[:, 0]) if s >= 0} & self.tables.keys()
            for period in {self.tables[t] for t in tables}:
                group, rest = divmod(value.count, period)
                if group > 1 and not rest and np.all(leaf[:, 1] == np.arange(value.count) // group):
                    raise Refused(GROUPED)

    def _column_axes(self, node: Map) -> int:
        """The number of column axes of an elementwise result."""
        return node.rank - self.split(node)

    def _aligned(self, node: Node, columns: int) -> Value:
        value = self.operand(node, columns)
        if len(value.shape) != columns:
            raise Refused("rows and columns of its operands do not line up")
        return value

    def cast(self, node: Cast, value: Value) -> Value:
        """The value of a cast, from that of its operand. Raises Refused."""
        if node.arg.dtype.kind == "bool" and node.to.kind != "bool":
            one, zero = (self.at((1,) * len(value.shape), Literal(v), None) for v in (1.0, 0.0))
            return combine(self, CHOICE, [value, one, zero])
        if node.to.kind != "float" and node not in self.positions:
            raise Refused(f"a cast to {node.to} rounds")
        return value

    def _axis(self, node: Node, axis: int) -> int:
        """Return a negative axis unchanged. Raises Refused if it is no column axis."""
        if -axis > node.rank - self.split(node):
            raise Refused("it crosses the rows")
        return axis

    def _slice(self, node: Slice) -> Value:
        axis = self._axis(node.arg, node.axis)
        first, count = self.size(node.start), self.size(node.size)
        where = slice(first, first + (count - 1) * node.step + 1, node.step)
        return self.compute(node.arg).move(lambda a: a[(..., where, *(slice(None),) * (-axis - 1))])

    def _concat(self, node: Concat) -> Value:
        if joins_rows(node, self.split(node)):
            return JoinedRows.of(self, lambda n: self.leaf(n), node).value()
        axis = self._axis(node, node.axis)
        parts: list[Value] = []
        for arg, segment in self.parts(node):
            with self.inside(segment):
                parts.append(self.operand(arg, node.rank - self.split(node)))
        joined = beside(parts)
        starts = np.cumsum([0] + [p.count for p in parts])
        order = np.concatenate(
            [np.arange(p.count).reshape(p.shape) + s for p, s in zip(parts, starts, strict=False)],
            axis,
        )
        return joined.move(lambda _: order)

    def _permute(self, node: Permute) -> Value:
        rows = self.split(node.arg)
        if node.order[:rows] != tuple(range(rows)):
            raise Refused("it moves rows into columns")
        order = tuple(i - rows for i in node.order[rows:])
        return self.compute(node.arg).move(lambda a: a.transpose(order))

    def _line(self, node: Reduce) -> Value:
        """A reduction over rows of values in memory, one per row."""
        alone = node.value is None and self.leaf(node.arg) is not None
        last = product(node.shape[node.axis :]) == ONE  # else numbers of a result are apart
        if not (self.whole_rows and alone and last and product(node.shape) == self.rows):
            raise Refused(f"`{node.fn}` over rows of what is not in memory")
        name = f"r{len(self.lines)}"
        self.lines[name] = node
        return self.at(self.columns(node), Stat(name), None)

    def _reduce(self, node: Reduce) -> Value:
        if node.arg.shape[node.axis].symbols - self.sizes.keys():
            return self._line(node)
        axis = self._axis(reduced(node), node.axis)
        value = self.compute(reduced(node))
        if self.apart and value.count > 1 and value.of_rows:
            if node.value is not None:
                return self.compute(as_defined(node))
            return numbers_apart.reduced(self, node, value, axis)
        if value.count == value.shape[axis]:
            return self._whole_row(node, value)
        group = self._group_of_row if self.whole_rows else self._group
        return group(node, value, axis)

    def _whole_row(self, node: Reduce, value: Value) -> Value:
        if not self.whole_rows:
            raise Refused(f"`{node.fn}` needs the whole row, and a tile has a part of it")
        if value.count != self.width and not MONOIDS[node.fn].sums:
            raise Refused("it does not reduce the columns of the kernel one by one")
        return self.at(self.columns(node), Stat(self._statistic(node, value)), None)

    def _statistic(self, node: Reduce, value: Value, group: int = 0, groups: int = 1) -> str:
        """Add a statistic of the row, or of groups of its columns; return its name."""
        name = next(n for i in count() if (n := f"s{i}") not in self.statistics)
        self.statistics[name] = RowStatistic(node, self.widened(value), value.count, group, groups)
        return name

    def _group_of_row(self, node: Reduce, value: Value, axis: int) -> Value:
        """A statistic of aligned column groups in a row-wise kernel."""
        size = value.shape[axis]
        if not MONOIDS[node.fn].nests:
            return self.compute(as_defined(node))
        if not MONOIDS[node.fn].sums:
            raise Refused(f"a group statistic is a sum, not `{node.fn}`")
        if axis == -1 and size > TILE_PARTS[-1] and value.count <= FORMULAS * size:
            return self._few_groups(node, value, size)
        first = self.place_of(value)
        sizes = {s.group for s in self.statistics.values() if s.group} | {size}
        if axis != -1 or first % size or size not in TILE_PARTS or len(sizes) > 1:
            raise Refused(f"`{node.fn}` does not reduce aligned groups of columns of one size")
        out = self.at(self.columns(node), Stat(self._statistic(node, value, size)), None)
        out.group = (first + np.arange(0, value.count, size)) // size
        return out

    def _few_groups(self, node: Reduce, value: Value, size: int) -> Value:
        """A statistic of a few wide groups: for each, one of a row that is 0 in other columns."""
        shape = self.columns(node)
        found: list[Value] = []
        for start in range(0, value.count, size):
            part = value.move(lambda a, s=start: a.reshape(-1)[s : s + size])
            name = self._statistic(node, part, groups=value.count // size)
            found.append(self.at((1,), Stat(name), None))
        return beside(found).move(lambda a: a.reshape(shape))

    def _group(self, node: Reduce, value: Value, axis: int) -> Value:
        """A statistic of aligned column groups (heads) of a GEMM's accumulator."""
        size = value.shape[axis]
        moved = value.move(lambda a: np.moveaxis(a, axis, -1))
        columns = moved.slots.reshape(-1, size) if moved.slots.shape[1] == 1 else None
        uniform = value.uniform and value.leaves.shape[1] == 0
        if columns is None or not uniform or axis != -1 or any_set(value.group):
            raise Refused(f"`{node.fn}` over these columns is not a statistic of the accumulator")
        start = columns[:, :1]
        if np.any(columns != start + np.arange(size)) or np.any(start % size):
            raise Refused(f"`{node.fn}` does not reduce aligned groups of columns")
        if size not in TILE_PARTS:
            raise Refused(f"groups of {size} columns are not parts of a tile ({TILE_PARTS})")
        if not MONOIDS[node.fn].group:
            raise Refused(f"a group statistic is a sum, not `{node.fn}`")
        name = next(n for i in count() if (n := f"g{i}") not in {g.name for g in self.groups})
        found = GroupStatistic(name, node.fn, self.exprs[int(value.expr[0])], size)
        same = [g for g in self.groups if (g.fn, g.expr, g.size) == (found.fn, found.expr, size)]
        found = same[0] if same else found
        if not same:
            if any(g.size != size for g in self.groups):
                raise Refused("its groups differ in size from another statistic's")
            self.groups.append(found)
        out = self.at(self.columns(node), Stat(found.name), None)
        out.group = start[:, 0] // size
        return out
