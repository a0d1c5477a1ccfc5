"""Graph -> graph without reductions over a flattened (rows, columns) axis.

    Σ_(m k) x = Σ_m (Σ_k x)         sum of [M K]  ->  sum of [M, K] to [M, 1], then of [M] to [1]

The inner reduction is a row statistic; the outer one folds one number per row, for any number of
rows. Elementwise operations on a flattened matrix become operations on the matrix. So no kernel has
several rows of the block as its columns, and the per-column arrays of the lowering stay as short as
a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from coda.ir.dims import ONE, Dim, Shape, product
from coda.ir.graph import Cast, Expand, Graph, Map, Node, Reduce, Reshape, Size, transform, walk
from coda.ir.monoids import MONOIDS
from coda.ir.node import origin
from coda.ir.views import shaped, under_reshapes
from coda.lowering.algebra.roles import as_defined, gemms, row_axes, squared_deviation
from coda.lowering.algebra.small_sums import spell_small_sums


def columns_first(graph: Graph, *, differentiated: bool = False) -> Graph:
    """The graph with reductions of rows and columns at once split, columns first.

    If it will be `differentiated`, extremes are left whole: each of equal ones has the same share
    of the cotangent, and split they would share it in their row first, then among the rows.
    """
    rows = row_axes(gemms(walk(graph.roots)), graph.inputs)

    def change(node: Node) -> Node:
        if isinstance(node, Reshape) and node.shape == under_reshapes(node).shape:
            return under_reshapes(node)
        if isinstance(node, Map | Cast):
            return _of_matrices(node, rows)
        if not isinstance(node, Reduce) or (differentiated and MONOIDS[node.fn].chosen):
            return node
        found = _merged(node, rows)
        with origin(node.where):
            if node.value is not None and found is not None:
                return transform([as_defined(node)], change)[0]
            return _as_sum(node) if found is None else found.whole()

    return spell_small_sums(graph.with_roots(transform(graph.roots, change)), rows)


@dataclass(frozen=True)
class _Merged:
    """A reduction over axes [first, rank) of `under`: rows [first, columns), then columns."""

    node: Reduce
    under: Node
    first: int
    columns: int

    def whole(self) -> Node:
        """The same reduction, over the columns and then over the rows."""
        x, fn = self.under, self.node.fn
        if not MONOIDS[fn].nests:
            square = squared_deviation(x, self.reduced("mean", x))
            return shaped(self.reduced("mean", square), self.node.shape)
        return shaped(self.reduced(fn, x), self.node.shape)

    def reduced(self, fn: str, x: Node) -> Node:
        """Reduce `x`, of the shape of `under`; the reduced axes stay with size 1."""
        shape = x.shape
        lead, rows = shape[: self.first], product(shape[self.first : self.columns])
        columns = product(shape[self.columns :])
        inner = Reduce(fn, shaped(x, (*shape[: self.columns], columns)), -1)
        outer = Reduce(fn, shaped(inner, (*lead, rows)), -1)
        return shaped(outer, (*lead, *(ONE,) * (len(shape) - len(lead))))


def _as_sum(node: Reduce) -> Node:
    """An average over rows of values with columns, as its sum over the number of rows."""
    fn = MONOIDS[node.fn].average_of
    if not fn or product(node.shape[node.axis :]) == ONE:
        return node
    total = Reduce(fn, node.arg, node.axis)
    return Map("div", (total, Size(node.arg.shape[node.axis], node.dtype)))


def _of_matrices(node: Map | Cast, rows: Dim) -> Node:
    """An elementwise operation on flattened matrices -> on the matrices, and then flattened."""
    given = [o.arg if isinstance(o, Expand) and _is_number(o.arg) else o for o in node.operands]
    wide = [o for o in given if not _is_number(o)]
    under = {o.arg.shape for o in wide if isinstance(o, Reshape)}
    joined = all(isinstance(o, Reshape) and o.shape == node.shape for o in wide)
    if len(under) != 1 or not joined or _has(node.shape, rows):
        return node
    (shape,) = under
    if not _has(shape, rows):
        return node
    with origin(node.where):
        operands = [o.arg if o in wide and isinstance(o, Reshape) else o for o in given]
        numbers = [shaped(o, ()) if _is_number(o) else o for o in operands]
        return shaped(node.with_operands(numbers), node.shape)


def _is_number(node: Node) -> bool:
    return product(node.shape) == ONE


def _has(shape: Shape, rows: Dim) -> bool:
    """Whether some leading axes of a shape together have the size `rows`."""
    return any(product(shape[:i]) == rows for i in range(len(shape) + 1))


def _merged(node: Reduce, rows: Dim) -> _Merged | None:
    """The axes that a reduction over rows and columns reduces; None for any other reduction.

    The rows are the block's if the value under the reshapes has them, otherwise all axes but the
    last.
    """
    axis = node.rank + node.axis
    if product(node.shape[axis:]) != ONE:
        return None
    lead, under, deepest = product(node.shape[:axis]), node.arg, None
    while True:
        firsts = [i for i in range(under.rank) if product(under.shape[:i]) == lead]
        if firsts:
            columns = [i for i in range(under.rank + 1) if product(under.shape[:i]) == rows]
            deepest = under, firsts[-1]
            if columns and rows != ONE:
                return _apart(node, under, firsts[-1], columns[-1])
        if not isinstance(under, Reshape):
            break
        under = under.arg
    return deepest and _apart(node, *deepest, deepest[0].rank - 1)


def _apart(node: Reduce, under: Node, first: int, columns: int) -> _Merged | None:
    """The split at `columns`, if there is more than one row and more than one column."""
    rows, rest = product(under.shape[first:columns]), product(under.shape[columns:])
    both = first < columns and ONE not in (rows, rest)
    return _Merged(node, under, first, columns) if both else None
