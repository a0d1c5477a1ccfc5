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

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

import numpy as np

from coda.ir.dims import ONE, Dim, Shape, broadcast, product
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
    walk,
)
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import CHOICE
from coda.ir.types import f32
from coda.lowering.algebra.roles import base
from coda.lowering.placement.values import (
    LEAF,
    LONGEST,
    NO_LANE,
    TILE_PARTS,
    Refused,
    Value,
    beside,
    combine,
    first_column,
    spread,
)
from coda.lowering.program.body import Ints, Spread
from coda.lowering.program.epilogue import Acc, Expr, Literal, Load, Stat, leaves, stat_names

GROUPED = "a matrix with one element for each group of columns"
Segment = tuple[int, int]  # columns of a kernel: (first, number)


@lru_cache(maxsize=100_000)
def at_sizes(dim: Dim, sizes: tuple[tuple[str, int], ...]) -> Dim:
    """A dim with the sizes of some symbols substituted."""
    return dim.substitute({symbol: Dim.of(size) for symbol, size in sizes})


def is_number(node: Node) -> bool:
    """Whether all axes of a node are 1."""
    return all(d == ONE for d in node.shape)


@dataclass(frozen=True)
class GroupStatistic:
    """A reduction of a per-column expression over aligned groups of `size` columns (GEMM)."""

    name: str
    fn: str
    expr: Expr
    size: int


@dataclass(frozen=True)
class RowStatistic:
    """A reduction in a row-wise kernel of `value`, which is 0 outside its `count` columns.

    `group` is the width of the groups that are reduced separately; 0 for the whole row.
    """

    node: Reduce
    value: Value
    count: int
    group: int


@dataclass
class Space:
    """The columns of one kernel, and the values of nodes computed there.

    Attributes:
        width, rows: the numbers of columns and of rows.
        sizes: the sizes of all symbols on which columns may depend.
        leaf: node -> name under which the kernel loads it; None if it does not.
        weights: the weights of the graph, known before the call.
        accumulators: contraction of this GEMM -> its first column.
        whole_rows: whether the kernel is row-wise, so that it can read its own row statistics.
        segmented: whether the parts of a concatenation are each loaded at their own columns.
        values, refused: node -> its value; node that must not be computed here -> the reason.
        exprs, index, sources: expressions by number, their numbers, and sources of row leaves.
        groups, statistics: of column groups in a GEMM; of rows or groups in a row-wise kernel.
        folds: name -> reduction whose partials this kernel folds.
        lines: name -> reduction over rows of values that earlier kernels stored per row.
        leads: the row axes of computed nodes, such as [B, S] for B·S rows.
        spread: name -> expansion of an operand that depends on some of the row axes only.
        tables: source that depends on the rows -> its number of columns.
        segment, segments: the columns at which narrower matrices are loaded now; all so far.
        offsets: operand narrower than the kernel -> its first column.
        sunk: values that are summed over the rows.
        nested: the present depth of recursion of `compute`.
    """

    width: int
    rows: Dim
    sizes: Mapping[str, int]
    leaf: Callable[[Node], str | None] = lambda node: None
    weights: Collection[Node] = ()
    accumulators: Mapping[Node, int] = field(default_factory=dict)
    whole_rows: bool = False
    segmented: bool = True
    values: dict[Node, Value] = field(default_factory=dict)
    refused: dict[Node, str] = field(default_factory=dict)
    exprs: list[Expr] = field(default_factory=list)
    index: dict[Expr, int] = field(default_factory=dict)
    sources: list[Node] = field(default_factory=list)
    groups: list[GroupStatistic] = field(default_factory=list)
    statistics: dict[str, RowStatistic] = field(default_factory=dict)
    folds: dict[str, Node] = field(default_factory=dict)
    lines: dict[str, Reduce] = field(default_factory=dict)
    leads: dict[Shape, None] = field(default_factory=dict)
    spread: dict[str, Spread] = field(default_factory=dict)
    tables: dict[Node, int] = field(default_factory=dict)
    segment: Segment | None = None
    segments: dict[Segment, None] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    sunk: list[Value] = field(default_factory=list)
    nested: int = 0

    def size(self, dim: Dim) -> int:
        """The size of a column axis. Raises Refused if it depends on the number of rows."""
        if dim.symbols - self.sizes.keys():
            raise Refused("its columns are rows, of which a call has any number")
        return dim.size(self.sizes)

    @contextmanager
    def inside(self, segment: Segment | None) -> Iterator[None]:
        """Inside, load matrices that are as wide as the segment at its columns. None: no change."""
        before = self.segment
        self.segment = segment or before
        try:
            yield
        finally:
            self.segment = before

    def parts(self, node: Node) -> list[tuple[Node, Segment | None]]:
        """The operands of a node; those of a concatenation along the columns with their segment."""
        plain: list[tuple[Node, Segment | None]] = [(o, None) for o in node.operands]
        if not (self.whole_rows and self.segmented and isinstance(node, Concat)):
            return plain
        axes = node.rank - self.split(node)
        first, count = self.segment or (0, self.width)
        if axes != -node.axis or self.size(product(node.shape[-axes:])) != count:
            return plain
        found: list[tuple[Node, Segment | None]] = []
        for arg in node.args:
            size = self.size(product(arg.shape[-axes:]))
            found.append((arg, (first, size)))
            self.segments.setdefault((first, size))
            first += size
        return found

    def matches(self, elements: Dim) -> bool:
        """Whether a matrix of so many elements has the kernel's width, or the segment's."""
        part = self.segment is not None and self.is_filled_by(elements, self.segment[1])
        return part or self.is_filled_by(elements)

    def is_filled_by(self, elements: Dim, width: int | None = None) -> bool:
        """Whether `elements` = rows · width, by default the kernel's width."""
        known = tuple(self.sizes.items())
        whole = at_sizes(self.rows, known) * (self.width if width is None else width)
        return at_sizes(elements, known) == whole

    def has_rows(self, node: Node) -> bool:
        """Whether some leading axes of a node are the rows."""
        return any(product(node.shape[:i]) == self.rows for i in range(node.rank + 1))

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """Inside there is no segment, and expressions that get numbers are discarded at the end."""
        known, segment = len(self.exprs), self.segment
        self.segment = None
        try:
            yield
        finally:
            self.segment = segment
            for expr in self.exprs[known:]:
                del self.index[expr]
            del self.exprs[known:]

    @contextmanager
    def attempt(self, kept: Callable[[Node], bool]) -> Iterator[None]:
        """Roll back the values computed inside if Refused is raised, except for `kept` nodes."""
        nodes, offsets = set(self.values), dict(self.offsets)
        statistics, segments = dict(self.statistics), dict(self.segments)
        groups = list(self.groups)
        try:
            yield
        except Refused:
            for node in set(self.values) - nodes:
                if not kept(node):
                    del self.values[node]
            stay = set(self.values) - nodes
            self.statistics = self.needed(statistics, stay)
            self.groups = self.read_groups(groups, stay)
            self.offsets, self.segments = offsets | self.offsets_of(stay), segments
            raise

    def needed(
        self, before: Mapping[str, RowStatistic], nodes: Iterable[Node]
    ) -> dict[str, RowStatistic]:
        """The statistics of `before`, and those on which some nodes or sinks depend."""
        values = [self.values[n] for n in nodes] + self.sunk
        found = dict(before)
        for name, one in reversed(self.statistics.items()):
            if name in before or name in stat_names(self.expressions(values)):
                found[name] = one
                values.append(one.value)
        return {name: found[name] for name in self.statistics if name in found}

    def read_groups(
        self, before: Sequence[GroupStatistic], nodes: Iterable[Node]
    ) -> list[GroupStatistic]:
        """The group statistics of `before`, and those that some nodes read."""
        names = {g.name for g in before}
        if len(self.groups) > len(before):
            names |= stat_names(self.expressions([self.values[n] for n in nodes]))
        return [g for g in self.groups if g.name in names]

    def offsets_of(self, nodes: Iterable[Node]) -> dict[str, int]:
        """The offsets of the narrower matrices that some nodes, sinks or statistics load."""
        values = [self.values[n] for n in nodes] + self.sunk
        values += [s.value for s in self.statistics.values()]
        read = {e.operand for e in leaves(self.expressions(values)) if isinstance(e, Load)}
        return {name: first for name, first in self.offsets.items() if name in read}

    def expressions(self, values: Iterable[Value]) -> list[Expr]:
        """The distinct expressions of each value."""
        return [self.exprs[i] for v in values for i in np.unique(v.expr)]

    def place_of(self, value: Value) -> int:
        """The column of a value's first element. Raises Refused if columns are not consecutive."""
        if value.count == self.width:
            return 0
        first = first_column(value)
        if first < 0 and self.segment is not None and self.segment[1] == value.count:
            first = self.segment[0]
        if first < 0 or first + value.count > self.width:
            raise Refused("it does not lie in the columns of the kernel, one by one")
        return first

    def widened(self, value: Value) -> Value:
        """A value padded with 0 to the kernel's width. Raises Refused, as `place_of`."""
        first = self.place_of(value)
        rest = self.width - first - value.count
        zeros = [self.at((n,), Literal(0.0), None) for n in (first, rest)]
        return beside([v for v in (zeros[0], value, zeros[1]) if v.count] or [value])

    @property
    def group_size(self) -> int:
        """The width of the column groups of statistics; 0 if there are none."""
        sizes = [g.size for g in self.groups]
        return next(iter(sizes + [s.group for s in self.statistics.values() if s.group]), 0)

    def id(self, expr: Expr) -> int:
        """The number of an expression."""
        if expr not in self.index:
            self.index[expr] = len(self.exprs)
            self.exprs.append(expr)
        return self.index[expr]

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
        self.values[node] = self.at(self.columns(node), Stat(name), None)
        if mean is not None:
            self.values[mean] = self.at(self.columns(mean), Stat(name, MONOIDS[node.fn].also), None)

    def split(self, node: Node) -> int:
        """The number of leading axes of a node that are the rows. Raises Refused if none are."""
        if self.rows != ONE and is_number(node):
            return 0
        total = ONE
        for i in range(node.rank + 1):
            if total == self.rows and (i or self.rows == ONE):
                if (
                    i == node.rank
                    and i > 1
                    and node.shape[0] == ONE != self.rows
                    and self.width > 1
                ):
                    raise Refused("its last axis may be rows or columns of the kernel")
                self.leads.setdefault(node.shape[:i])
                return i
            if i < node.rank:
                total = total * node.shape[i]
        for lead in self.leads:
            mine = node.shape[: len(lead)]
            if len(mine) == len(lead) and broadcast(mine, lead) == lead:
                return len(lead)
        raise Refused("its leading axes are not the rows of the kernel")

    def over_rows(self, name: str, node: Node, columns: int) -> bool:
        """Whether an operand depends on the rows; one of some row axes is recorded in `spread`."""
        axes = node.shape[: max(0, node.rank - columns)]
        if product(axes) in (ONE, self.rows):
            return product(axes) != ONE
        fitting = [lead for lead in self.leads if broadcast(axes, lead) == lead]
        if len(fitting) != 1:
            raise Refused("an operand depends on some of the row axes only")
        if any(not isinstance(n, Input | Reshape | Permute | Slice) for n in walk([node])):
            raise Refused("an operand of some of the row axes is not an argument")
        found = Spread(fitting[0], min(columns, node.rank))
        if self.spread.setdefault(name, found) != found:
            raise Refused("an operand is spread over the rows in two ways")
        return True

    def columns(self, node: Node) -> tuple[int, ...]:
        """The sizes of the node's column axes."""
        return tuple(self.size(d) for d in node.shape[self.split(node) :])

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
                return self._cast(node, self.compute(arg))
            case Reshape(arg=arg):
                self.split(node)
                value, shape = self.compute(arg), self.columns(node)
                if value.count != int(np.prod(shape)):
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
        raise Refused(f"`{type(node).__name__.lower()}` is not computed point by point")

    # Leaves.

    def operand(self, node: Node, columns: int) -> Value:
        """The value of an operand of an elementwise operation with `columns` column axes."""
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
        count = int(np.prod(shape))
        if count == 1:
            if not over_rows and self.accumulators and node in self.weights and node.dtype != f32:
                return self._source(shape, node)  # a GEMM's scalars are float32, vectors are packed
            return self.at(shape, Load(name, NO_LANE), None)
        if (over_rows or self.rows == ONE) and count == self.width:
            return self.at(shape, Load(name, 0), np.arange(count))
        if over_rows and self.segment is not None and count == self.segment[1]:
            return self.at(shape, Load(name, 0), self.anchored(name) + np.arange(count))
        if over_rows and self.rows != ONE:
            if name in self.offsets:
                raise Refused("a matrix is read at two places of the kernel's columns")
            self.tables[node] = count
        return self._source(shape, node)

    def anchored(self, name: str) -> int:
        """The first column of a matrix of the segment's width. Raises Refused if it has another."""
        assert self.segment is not None
        if self.offsets.setdefault(name, self.segment[0]) != self.segment[0]:
            raise Refused("a matrix is read at two places of the kernel's columns")
        return self.offsets[name]

    def at(self, shape: tuple[int, ...], expr: Expr, slots: Ints | None) -> Value:
        count = int(np.prod(shape))
        none = np.zeros((count, 0), np.int64)
        return Value(
            shape,
            np.full(count, self.id(expr)),
            none if slots is None else slots.reshape(-1, 1),
            np.zeros((count, 0, 2), np.int64),
            np.full(count, -1),
        )

    def _source(self, shape: tuple[int, ...], node: Node) -> Value:
        """A vector or a table of another width than the kernel: element i is a row leaf of it."""
        if np.prod(shape) > 16 * self.width + 65536:
            raise Refused("an operand is larger than the rows of the kernel")
        if self.rows == ONE and isinstance(base(node), Input) and node not in self.weights:
            raise Refused("an argument that is new in every call is not packed")
        if node not in self.sources:
            self.sources.append(node)
        value = self.at(shape, Load(LEAF + "0", NO_LANE), None)
        index = np.arange(value.count)
        source = np.full(value.count, self.sources.index(node))
        value.leaves = np.stack([source, index], -1).reshape(-1, 1, 2)
        return value

    # Operations.

    def _map(self, node: Map) -> Value:
        columns = self._column_axes(node)
        args = [self._aligned(a, columns) for a in node.args]
        value = combine(self, node.fn, args)
        sums = all(MONOIDS[s.node.fn].sums for s in self.statistics.values())
        if self.whole_rows and not sums and value.slots.shape[1] > 1:
            raise Refused("a row kernel takes sums of pairs of columns, and no other statistic")
        if self.tables and not self.whole_rows:
            self._check_tables(value)
        return value

    def _check_tables(self, value: Value) -> None:
        """Raise Refused if a GEMM would read a matrix with one element per column group."""
        for leaf in np.moveaxis(value.leaves, 1, 0):
            tables = {self.sources[s] for s in np.unique(leaf[:, 0]) if s >= 0} & self.tables.keys()
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

    def _cast(self, node: Cast, value: Value) -> Value:
        if node.arg.dtype.kind == "bool" and node.to.kind != "bool":
            one, zero = (self.at((1,) * len(value.shape), Literal(v), None) for v in (1.0, 0.0))
            return combine(self, CHOICE, [value, one, zero])
        if node.to.kind != "float":
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
        if not self.whole_rows or self.leaf(node.arg) is None or product(node.shape) != self.rows:
            raise Refused(f"`{node.fn}` over rows of what is not in memory")
        name = f"r{len(self.lines)}"
        self.lines[name] = node
        return self.at(self.columns(node), Stat(name), None)

    def _reduce(self, node: Reduce) -> Value:
        if node.arg.shape[node.axis].symbols - self.sizes.keys():
            return self._line(node)
        axis = self._axis(node.arg, node.axis)
        value = self.compute(node.arg)
        if value.count == value.shape[axis]:
            return self._whole_row(node, value)
        group = self._group_of_row if self.whole_rows else self._group
        return group(node, value, axis)

    def _whole_row(self, node: Reduce, value: Value) -> Value:
        if not self.whole_rows:
            raise Refused(f"`{node.fn}` needs the whole row, and a tile has a part of it")
        paired = value.count != self.width or value.slots.shape[1] > 1
        if paired and not MONOIDS[node.fn].sums:
            raise Refused("it does not reduce the columns of the kernel one by one")
        return self.at(self.columns(node), Stat(self._statistic(node, value, 0)), None)

    def _statistic(self, node: Reduce, value: Value, group: int) -> str:
        """Add a statistic of the row, or of groups of its columns; return its name."""
        name = next(n for i in count() if (n := f"s{i}") not in self.statistics)
        self.statistics[name] = RowStatistic(node, self.widened(value), value.count, group)
        return name

    def _group_of_row(self, node: Reduce, value: Value, axis: int) -> Value:
        """A statistic of aligned column groups in a row-wise kernel."""
        size, first = value.shape[axis], self.place_of(value)
        sizes = {s.group for s in self.statistics.values() if s.group} | {size}
        if axis != -1 or first % size or size not in TILE_PARTS or len(sizes) > 1:
            raise Refused(f"`{node.fn}` does not reduce aligned groups of columns of one size")
        if not MONOIDS[node.fn].sums:
            raise Refused(f"a group statistic is a sum, not `{node.fn}`")
        out = self.at(self.columns(node), Stat(self._statistic(node, value, size)), None)
        out.group = (first + np.arange(0, value.count, size)) // size
        return out

    def _group(self, node: Reduce, value: Value, axis: int) -> Value:
        """A statistic of aligned column groups (heads) of a GEMM's accumulator."""
        size = value.shape[axis]
        moved = value.move(lambda a: np.moveaxis(a, axis, -1))
        columns = moved.slots.reshape(-1, size) if moved.slots.shape[1] == 1 else None
        uniform = np.all(value.expr == value.expr[0]) and value.leaves.shape[1] == 0
        if columns is None or not uniform or axis != -1 or np.any(value.group >= 0):
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
