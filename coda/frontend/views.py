"""Arguments of `reshape`, `permute` and indexing -> view nodes, or a Gather: at tensors of ints.

    x[:, 1::2]  ->  slice x axis -1 from 1 size D/2 step 2    [M, D] -> [M, D/2]
    x[0]        ->  slice x axis -2 from 0 size 1 step 1      [M, D] -> [1, D]
                    reshape                                   [1, D] -> [D]
    x[i, j]     ->  gather x, i, j                            [M, D] at [S, 1] and [T] -> [S, T]

Whether a view is materialised is decided when kernels are placed.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

from coda.errors import DimError, ShapeError, TraceError
from coda.frontend.shapes import Axes, parse_rearrangement
from coda.ir.dims import ONE, Dim, Shape, product, show_shape
from coda.ir.graph import Gather, Iota, Node, Permute, Reshape, Slice
from coda.ir.views import shaped, under_reshapes

Index = int | Dim | slice | EllipsisType | Node | None


def reshaped(node: Node, shape: Sequence[str | int | Dim]) -> Node:
    """Reshape in row-major order: by "M (H d) -> M H d", or by dims, one of which may be -1.

    Raises ShapeError, or DimError for a symbol that the node's shape does not have.
    """
    if len(shape) == 1 and isinstance(shape[0], str):
        return Reshape(node, _rearranged(node.shape, shape[0]))
    for size in shape:
        if not isinstance(size, str | int | Dim) or isinstance(size, bool):
            raise ShapeError(
                "a reshape takes dims, or one text",
                found=repr(size),
                help='x.reshape(x.shape[0], -1) or x.reshape("M (H d) -> M H d")',
            )
    dims = [Dim.of(size) for size in shape]
    free = [i for i, size in enumerate(shape) if isinstance(size, int) and size == -1]
    if len(free) == 1:
        dims[free[0]] = product(node.shape) // product(d for d in dims if d != Dim.of(-1))
    return Reshape(node, tuple(dims))


def _rearranged(shape: Shape, text: str) -> Shape:
    left, right = parse_rearrangement(text)
    if left:
        found = tuple(product(a) for a in left)
        if found != shape:
            declared = ", or declare the argument so" if len(found) == len(shape) else ""
            raise ShapeError(
                f'"{text}" does not begin with the shape of the tensor',
                found=show_shape(shape),
                help=f'"{show_shape(shape)[1:-1].replace(", ", " ")} -> …"{declared}',
            )
        _check_order(left, right, text)
    known = {s for d in shape for s in d.symbols}
    new = tuple(product(axis) for axis in right)
    unknown = sorted({s for d in new for s in d.symbols} - known)
    if unknown:
        raise DimError(
            f"dim `{unknown[0]}` is unknown here",
            found=show_shape(shape),
            help="use the dims of the tensor's own shape",
        )
    return new


def _check_order(left: Axes, right: Axes, text: str) -> None:
    """Raise ShapeError if a text changes the order of axes: that is a permutation."""
    before, after = ([d for axis in side for d in axis] for side in (left, right))
    both = {d for d in before if d.symbols and before.count(d) == after.count(d) == 1}
    if [d for d in before if d in both] != [d for d in after if d in both]:
        raise ShapeError(
            "a reshape keeps the order of the axes",
            found=f'"{text}"',
            help="join or split neighbouring axes; `.T` is the transpose of a matrix",
        )


def permuted(node: Node, order: Sequence[int]) -> Node:
    """Permute axes, which may be negative: axis i of the result is order[i]. Raises ShapeError."""
    whole = all(isinstance(i, int) and -node.rank <= i < node.rank for i in order)
    at = tuple(i % node.rank for i in order) if whole else ()
    if sorted(at) != list(range(node.rank)):
        raise ShapeError(
            "a permutation names each axis once",
            found=f"{tuple(order)} of {show_shape(node.shape)}",
            help=f"x.permute({', '.join(map(str, reversed(range(node.rank))))})",
        )
    if isinstance(node, Permute):
        node, at = node.arg, tuple(node.order[i] for i in at)
    return node if at == tuple(range(node.rank)) else Permute(node, at)


def transposed(node: Node, *, batches: bool = False) -> Node:
    """Transpose a matrix, or with `batches` each matrix of [..., M, N]. Raises ShapeError."""
    if node.rank < 2 or (node.rank > 2 and not batches):
        raise ShapeError(
            "`.mT` takes matrices" if batches else "`.T` takes a matrix",
            found=show_shape(node.shape),
            help="`.mT` exchanges the last two axes, x.permute(…) any" if node.rank > 2 else "",
        )
    last = node.rank - 1
    return permuted(node, (*range(last - 1), last, last - 1))


def sliced(node: Node, index: tuple[Index, ...]) -> Node:
    """torch's indexing: ints, dims, slices with positive steps, tensors of ints, `...` and None.

    Raises ShapeError for an index outside the shape, TraceError for any other kind of index.
    """
    items = _of_each_axis(node, index)
    if any(isinstance(i, Node) for i in items):
        return _at_tensors(node, items)
    shape: list[Dim] = []
    axis = -node.rank
    for item in items:
        if item is None:
            shape.append(ONE)
        else:
            node = _take(node, axis, item)
            if isinstance(item, slice):
                shape.append(node.shape[axis])
            axis += 1
    return shaped(node, tuple(shape))


def _of_each_axis(node: Node, index: tuple[Index, ...]) -> list[Index]:
    """An index with an item for each axis of the node, besides None. Raises ShapeError."""
    given = sum(i is not None and i is not ... for i in index)
    if given > node.rank:
        raise ShapeError(f"{given} indices into {node.rank} axes", found=show_shape(node.shape))
    rests = sum(i is ... for i in index)
    if rests > 1:
        raise ShapeError("an index has one `...` at most", found=f"{rests} of them")
    whole = [slice(None)] * (node.rank - given)
    items: list[Index] = []
    for item in index if rests else (*index, ...):
        items += whole if item is ... else [item]
    return items


def _at_tensors(node: Node, items: list[Index]) -> Node:
    """A node at some tensors of ints, which broadcast and whose axes replace those they index."""
    single = [i for i, item in enumerate(items) if isinstance(item, int | Dim | Node)]
    if single != list(range(single[0], single[-1] + 1)):
        raise TraceError(
            "tensors of ints, and ints beside them, index neighbouring axes",
            found=", ".join("a tensor" if isinstance(i, Node) else repr(i) for i in items),
            help="x.permute(…) brings the axes together",
        )
    indices = tuple(item for item in items if isinstance(item, Node))
    node = sliced(node, tuple(slice(None) if isinstance(i, Node) else i for i in items))
    axes = list(range(node.rank))
    mine = axes[single[0] : single[0] + len(indices)]
    found = _gathered(permuted(node, [*mine, *(a for a in axes if a not in mine)]), indices)
    own = list(range(found.rank - node.rank + len(mine)))  # those of the indices, which come first
    rest = [a for a in range(found.rank) if a not in own]
    return permuted(found, [*rest[: single[0]], *own, *rest[single[0] :]])


def _gathered(table: Node, indices: tuple[Node, ...]) -> Node:
    """A table [V, W, ...] at indices; a view where each counts an axis: table[i, j] transposed."""
    gather = Gather(table, indices)
    along = [_counts(i, size) for i, size in zip(indices, table.shape, strict=False)]
    places = [a for a in along if a is not None]
    if len(set(places)) < len(indices):
        return gather
    order = sorted(range(len(places)), key=lambda k: places[k])
    return Reshape(permuted(table, [*order, *range(len(order), table.rank)]), gather.shape)


def _counts(index: Node, size: Dim) -> int | None:
    """The axis, from the right, along which an index is 0, 1, … size - 1; None if there is none."""
    axes = [a - index.rank for a, d in enumerate(index.shape) if d != ONE]
    index = under_reshapes(index)
    counts = isinstance(index, Iota) and index.count == size and len(axes) == 1
    return axes[0] if counts else None


def _take(node: Node, axis: int, item: Any) -> Node:
    size = node.shape[axis]
    if isinstance(item, int | Dim) and not isinstance(item, bool):
        return Slice(node, axis, _inside(item, size), ONE, 1)
    if not isinstance(item, slice):
        raise TraceError(
            "an index is an int, a dim, a slice, a tensor of ints, `...` or None",
            found=type(item).__name__ if isinstance(item, float | str) else repr(item),
            help="coda.where chooses by a condition",
        )
    if item == slice(None):
        return node
    step = 1 if item.step is None else item.step
    if not isinstance(step, int) or step < 1:
        raise TraceError("a slice goes forward by whole steps", found=f"step {step!r}")
    start = _inside(0 if item.start is None else item.start, size)
    stop = _inside(size if item.stop is None else item.stop, size)
    span = stop - start
    if span.constant is not None and not span.constant > 0:
        raise ShapeError("a slice is empty", found=f"{start}:{stop} of {size}")
    count = span if step == 1 else steps(span, step)
    return Slice(node, axis, start, count, step)


def _inside(at: Any, size: Dim) -> Dim:
    """A position in [0, size], counted from the front. Raises ShapeError or TraceError."""
    if not isinstance(at, int | Dim) or isinstance(at, bool):
        raise TraceError("a position is an int or a dim", found=type(at).__name__)
    at = Dim.of(at)
    if at.constant is not None and at.constant < 0:
        at = size + at
    beyond = size - at
    if beyond.constant is not None and beyond.constant < 0:
        raise ShapeError("a position is outside its axis", found=f"{at} of {size}")
    return at


def steps(span: Dim, step: int) -> Dim:
    """ceil(span / step); `step` must divide the symbolic part of `span`. Raises DimError."""
    constant = dict(span.terms).get((), 0)
    return (span - constant) // step + -(-constant // step)
