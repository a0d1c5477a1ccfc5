"""Nodes -> values at the columns of one kernel: which columns does an element of a node read?

A kernel computes at points: a row and a column of its *space* (the accumulator's columns, or those
of the tiles that a row kernel loads). A node is computable there if each of its elements needs one
row, and at most two columns. So for each element of a node we keep its scalar expression and the
columns that it reads, as integer arrays over the node's own columns; views (slices, heads, concat)
only move the arrays. RoPE, gated activations and per-head norms need no case of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

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
from coda.lowering.epilogue import Acc, Call, Expr, Literal, Load, Stat

Ints = NDArray[np.int64]
NO_LANE = -1  # the lane of a load that is the same for all columns
TILE_PARTS = (32, 64, 128, 256)  # widths of groups that every tile or subtile is made of
LEAF = "%"  # Load("%3") is row leaf 3 of an element: a vector that the element names itself


class Refused(Exception):
    """A node cannot be computed at the points of a kernel; the message says why, for `explain`."""


@dataclass(eq=False)
class Value:
    """A node at the columns of a kernel.

    Attributes:
        shape: the node's column axes.
        expr: for each element (row-major) an index into the space's expressions, in which lane i
            of Acc and of tile loads stands for `slots[:, i]`.
        slots: columns of the space that an element reads, ascending, -1 for none.
        leaves: (source, index) of each row leaf of an element, -1 for none.
        group: the column group whose statistic an element reads, -1 for none.
    """

    shape: tuple[int, ...]
    expr: Ints
    slots: Ints
    leaves: Ints
    group: Ints

    @property
    def count(self) -> int:
        """The number of elements in a row."""
        return len(self.expr)

    @property
    def narrow(self) -> bool:
        """Whether the value is the same for all columns."""
        return self.count == 1 and self.slots.shape[1] == 0 and self.leaves.shape[1] == 0

    def move(self, change: Callable[[NDArray], NDArray]) -> Value:
        """The elements that a view keeps, in its order; `change` acts on the column axes."""
        index = change(np.arange(self.count).reshape(self.shape))
        flat = index.reshape(-1)
        return Value(
            index.shape, self.expr[flat], self.slots[flat], self.leaves[flat], self.group[flat]
        )


@dataclass(frozen=True)
class Spread:
    """How an operand that depends on some row axes is repeated over all of them.

    Attributes:
        lead: the row axes.
        columns: how many of the operand's last axes are columns.
    """

    lead: Shape
    columns: int


@dataclass(frozen=True)
class GroupStatistic:
    """A reduction over groups of `size` columns of the space, of a per-column expression."""

    name: str
    fn: str
    expr: Expr
    size: int


@dataclass
class Space:
    """The columns of one kernel and the nodes that were computed there.

    Attributes:
        width: number of columns.
        rows: number of rows, as a dim.
        sizes: the size of every symbol.
        leaf: what a node is called that the kernel loads, or None where it does not.
        accumulators: contractions of this kernel, with the first column of each.
        whole_rows: whether a reduction over all columns can be used again (row kernels).
        refused: nodes that are not computed here, and why.
        statistics: reductions of whole rows by name, with what they reduce.
        folds: reductions by name whose partials this kernel folds.
        leads: the row axes under which values were seen, as [B, S] for rows of B·S.
        spread: operands that depend on some of the row axes only, by name.
        tables: sources that depend on the rows, with their number of columns.
    """

    width: int
    rows: Dim
    sizes: Mapping[str, int]
    leaf: Callable[[Node], str | None] = lambda node: None
    accumulators: Mapping[Node, int] = field(default_factory=dict)
    whole_rows: bool = False
    values: dict[Node, Value] = field(default_factory=dict)
    refused: dict[Node, str] = field(default_factory=dict)
    exprs: list[Expr] = field(default_factory=list)
    index: dict[Expr, int] = field(default_factory=dict)
    sources: list[Node] = field(default_factory=list)
    groups: list[GroupStatistic] = field(default_factory=list)
    statistics: dict[str, tuple[Node, Value]] = field(default_factory=dict)
    folds: dict[str, Node] = field(default_factory=dict)
    leads: dict[Shape, None] = field(default_factory=dict)
    spread: dict[str, Spread] = field(default_factory=dict)
    tables: dict[Node, int] = field(default_factory=dict)

    def id(self, expr: Expr) -> int:
        """The index of an expression."""
        if expr not in self.index:
            self.index[expr] = len(self.exprs)
            self.exprs.append(expr)
        return self.index[expr]

    def compute(self, node: Node) -> Value:
        """The value of a node whose operands were computed here, or are loaded. Raises Refused."""
        if node not in self.values:
            self.values[node] = self._compute(node)
        return self.values[node]

    def fold(self, node: Node, mean: Node | None = None) -> None:
        """Take a reduction's total from partials that an earlier kernel left.

        `mean` is the mean of the same values where `node` is their variance: a plane of it.
        """
        name = f"f{len(self.folds)}"
        self.folds[name] = node
        self.values[node] = self.at(self.columns(node), Stat(name), None)
        if mean is not None:
            self.values[mean] = self.at(self.columns(mean), Stat(name, "mean"), None)

    def split(self, node: Node) -> int:
        """How many of the node's leading axes are the rows. Raises Refused."""
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
        """Whether an operand depends on the rows; on some of their axes, it is to be spread."""
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
        return tuple(d.size(self.sizes) for d in node.shape[self.split(node) :])

    def _compute(self, node: Node) -> Value:
        if node in self.accumulators:
            first = self.accumulators[node]
            count = node.shape[-1].size(self.sizes)
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
                return _spread(self._aligned(arg, len(shape)), shape)
            case Reduce():
                return self._reduce(node)
        raise Refused(f"`{type(node).__name__.lower()}` is not computed point by point")

    # Leaves.

    def operand(self, node: Node, columns: int) -> Value:
        """A node as an operand of an elementwise operation on values with `columns` column axes."""
        if isinstance(node, Const | Size):
            value = node.value if isinstance(node, Const) else node.dim.size(self.sizes)
            return self.at((1,) * columns, Literal(float(value)), None)
        name = self.leaf(node)
        if name is None:
            return self.compute(node)
        cut = max(0, node.rank - columns)
        over_rows = self.over_rows(name, node, columns)
        shape = tuple(d.size(self.sizes) for d in node.shape[cut:])
        shape = (1,) * (columns - len(shape)) + shape
        count = int(np.prod(shape))
        if count == 1:
            return self.at(shape, Load(name, NO_LANE), None)
        if (over_rows or self.rows == ONE) and count == self.width:
            return self.at(shape, Load(name, 0), np.arange(count))
        if over_rows and self.rows != ONE:
            self.tables[node] = count
        return self._source(shape, node)

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
        """A vector or a table narrower than the space: each element names its own column of it."""
        if np.prod(shape) > 16 * self.width + 65536:
            raise Refused("an operand is larger than the rows of the kernel")
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
        value = _combine(self, node.fn, args)
        sums = all(n.fn == "sum" for n, _ in self.statistics.values() if isinstance(n, Reduce))
        if self.whole_rows and not sums and value.slots.shape[1] > 1:
            raise Refused("a row kernel takes sums of pairs of columns, and no other statistic")
        return value

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
            return _combine(self, "where", [value, one, zero])
        if node.to.kind != "float":
            raise Refused(f"a cast to {node.to} rounds")
        return value

    def _axis(self, node: Node, axis: int) -> int:
        """An axis as an index into the column axes, from the right."""
        if -axis > node.rank - self.split(node):
            raise Refused("it crosses the rows")
        return axis

    def _slice(self, node: Slice) -> Value:
        axis = self._axis(node.arg, node.axis)
        first, count = node.start.size(self.sizes), node.size.size(self.sizes)
        where = slice(first, first + (count - 1) * node.step + 1, node.step)
        return self.compute(node.arg).move(lambda a: a[(..., where, *(slice(None),) * (-axis - 1))])

    def _concat(self, node: Concat) -> Value:
        axis = self._axis(node, node.axis)
        parts = [self.operand(a, node.rank - self.split(node)) for a in node.args]
        slots = max(p.slots.shape[1] for p in parts)
        leaves = max(p.leaves.shape[1] for p in parts)
        joined = Value(
            (sum(p.count for p in parts),),
            np.concatenate([p.expr for p in parts]),
            np.concatenate([_pad(p.slots, slots) for p in parts]),
            np.concatenate([_pad(p.leaves, leaves) for p in parts]),
            np.concatenate([p.group for p in parts]),
        )
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

    def _reduce(self, node: Reduce) -> Value:
        axis = self._axis(node.arg, node.axis)
        value = self.compute(node.arg)
        if value.count == value.shape[axis]:
            return self._whole_row(node, value)
        return self._group(node, value, axis)

    def _whole_row(self, node: Reduce, value: Value) -> Value:
        if not self.whole_rows:
            raise Refused(f"`{node.fn}` needs the whole row, and a tile has a part of it")
        if value.count != self.width or (value.slots.shape[1] > 1 and node.fn != "sum"):
            raise Refused("it does not reduce the columns of the kernel one by one")
        name = f"s{len(self.statistics)}"
        self.statistics[name] = (node, value)
        return self.at(self.columns(node), Stat(name), None)

    def _group(self, node: Reduce, value: Value, axis: int) -> Value:
        """A statistic of aligned groups of columns (a head), from the accumulator."""
        if self.whole_rows:
            raise Refused("a row kernel takes statistics of whole rows")
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
        if node.fn not in ("sum", "mean"):
            raise Refused(f"a group statistic is a sum, not `{node.fn}`")
        found = GroupStatistic(
            f"g{len(self.groups)}", node.fn, self.exprs[int(value.expr[0])], size
        )
        same = [g for g in self.groups if (g.fn, g.expr, g.size) == (found.fn, found.expr, size)]
        found = same[0] if same else found
        if not same:
            if any(g.size != size for g in self.groups):
                raise Refused("its groups differ in size from another statistic's")
            self.groups.append(found)
        out = self.at(self.columns(node), Stat(found.name), None)
        out.group = start[:, 0] // size
        return out


def _pad(a: NDArray, width: int) -> NDArray:
    """More slots or leaves, all -1."""
    missing = width - a.shape[1]
    if missing == 0:
        return a
    return np.concatenate([a, np.full((len(a), missing, *a.shape[2:]), -1)], 1)


def _spread(value: Value, shape: tuple[int, ...]) -> Value:
    """A value broadcast to other column axes."""
    if value.shape == shape:
        return value
    return value.move(lambda a: np.broadcast_to(a, shape))


def _combine(space: Space, fn: str, args: Sequence[Value]) -> Value:
    """A scalar function of values, element by element."""
    shape = np.broadcast_shapes(*(a.shape for a in args))
    args = [_spread(a, shape) for a in args]
    slots, lanes = _union([a.slots for a in args])
    group = _same_group([a.group for a in args])
    leaves, names = _shared([a.leaves for a in args])
    keys = np.stack([a.expr for a in args], 1)
    kinds = np.concatenate([keys, *lanes], 1)
    first, inverse = distinct_rows(kinds)
    found = np.empty(len(first), np.int64)
    for i, element in enumerate(first):
        parts = []
        for j, arg in enumerate(args):
            renamed = tuple(int(v) for v in lanes[j][element])
            expr = space.exprs[int(arg.expr[element])]
            parts.append(substitute(expr, renamed, names[j]))
        found[i] = space.id(_fold(fn, tuple(parts)))
    return Value(shape, found[inverse], slots, leaves, group)


def _fold(fn: str, args: tuple[Expr, ...]) -> Expr:
    """A call, or the literal that it is."""
    if fn == "neg" and isinstance(args[0], Literal):
        return Literal(-args[0].value)
    return Call(fn, args)


def _union(slots: list[Ints]) -> tuple[Ints, list[Ints]]:
    """The columns that any operand reads, and each operand's lanes among them."""
    used = [s for s in slots if s.shape[1]]
    if not used:
        return slots[0], list(slots)
    if all(s is used[0] or np.array_equal(s, used[0]) for s in used):
        lanes = np.broadcast_to(np.arange(used[0].shape[1]), used[0].shape)
        lanes = np.where(used[0] >= 0, lanes, -1)
        return used[0], [lanes if s.shape[1] else s for s in slots]
    high = np.iinfo(np.int64).max
    every = np.concatenate(used, 1)
    every = np.sort(np.where(every < 0, high, every), 1)
    repeated = np.zeros_like(every, bool)
    repeated[:, 1:] = every[:, 1:] == every[:, :-1]
    every = np.sort(np.where(repeated, high, every), 1)
    width = int((every != high).sum(1).max())
    if width > 2:
        raise Refused(f"an element reads {width} columns of a row; an epilogue has two at hand")
    union = np.where(every[:, :width] == high, -1, every[:, :width])
    lanes = []
    for s in slots:
        lane = np.argmax(union[:, None, :] == s[:, :, None], -1) if s.shape[1] else s
        lanes.append(np.where(s >= 0, lane, -1))
    return union, lanes


def _shared(leaves: list[Ints]) -> tuple[Ints, list[tuple[int, ...]]]:
    """Row leaves of all operands, equal ones once; and what each operand's leaves are called."""
    kept: list[Ints] = []
    names: list[tuple[int, ...]] = []
    for one in leaves:
        mine = []
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
    out = groups[0]
    for g in groups[1:]:
        if np.any((out >= 0) & (g >= 0) & (out != g)):
            raise Refused("it mixes statistics of different groups of columns")
        out = np.maximum(out, g)
    return out


def distinct_rows(kinds: Ints) -> tuple[Ints, Ints]:
    """Elements that represent the distinct rows of `kinds`, and each row's representative."""
    if len(kinds) == 0 or np.all(kinds == kinds[0]):
        return np.zeros(min(1, len(kinds)), np.int64), np.zeros(len(kinds), np.int64)
    code = np.zeros(len(kinds), np.int64)
    for column in kinds.T:
        low, high = int(column.min()), int(column.max())
        code = code * (high - low + 1) + (column - low)
        _, code = np.unique(code, return_inverse=True)
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    return first, inverse


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
    return cast(Expr, expr)
