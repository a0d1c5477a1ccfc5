"""A batched contraction -> how a GEMM reads the matrices of each operand, or why it cannot.

A GEMM numbers the matrices of a batch by one index, and an operand of two batch axes may have two
strides. So the index has two parts, outer and inner, of which the inner one is compiled in:

    q [b, s, h, d] read as [b, h, s, d]    inner h, stride d; outer b, stride s · (stride of s)
    p [b, h, s, s], contiguous             inner h, stride s · s; outer b, stride h · s · s
    k [b, 1, s, d], shared by all heads    inner h, stride 0; outer b, stride s · d

An operand is passed with one stride; those of both parts follow by its `BatchStrides`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from coda.errors import DimError
from coda.ir.dims import ONE, Dim, Shape, product
from coda.ir.graph import Contract, Input, Node, Permute, Reshape, Slice
from coda.ir.types import bf16, f16
from coda.kernels.gemm.mainloop import Gemm
from coda.lowering.algebra.roles import base, is_view
from coda.lowering.program.body import Body
from coda.lowering.program.program import Program

Sizes = Mapping[str, int]
COMPILED = (bf16, f16)
Order = tuple[int, ...]  # of axes of a result in memory, outer to inner
ALIGNED = 16  # bytes: the strides of an operand are multiples, so that TMA can read it


class BatchStrides(Enum):
    """The strides of an operand's outer and inner batch index.

    They follow from the stride that it is passed with, and from the number and the stride of its
    rows (of its columns, if those are not contiguous).
    """

    PLAIN = "(inner · stride, stride)"
    NESTED = "(rows · row stride, stride)"
    SHARED = "(0, 0)"
    SHARED_INSIDE = "(rows · row stride, 0)"
    SHARED_OUTSIDE = "(0, rows · row stride)"


@dataclass(frozen=True)
class Batches:
    """The batch of a GEMM.

    Attributes:
        inner: the size of the inner batch index; 1 if there is only an outer one.
        a, b: how A and B are read.
        stores: how each store of the body is written, in order.
        loads: how each matrix of the body is read that some matrices of the batch share, in order.
    """

    inner: int
    a: BatchStrides
    b: BatchStrides
    stores: tuple[BatchStrides, ...] = ()
    loads: tuple[BatchStrides, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether each matrix has one stride for the whole batch."""
        return {self.a, self.b, *self.stores, *self.loads} == {BatchStrides.PLAIN}


PLAIN = Batches(1, BatchStrides.PLAIN, BatchStrides.PLAIN)


class Unread(Exception):
    """An operand cannot be read in place; the message says why."""


Axis = tuple[Dim, Dim]  # size and stride in elements


def batches(
    node: Contract,
    sizes: Sizes,
    stored: Callable[[Node], bool] = lambda n: False,
    orders: Sequence[Order | None] = (),
    shared: Sequence[Node] = (),
) -> Batches:
    """How a GEMM reads the operands of a batched contraction, and writes its results.

    Args:
        node: the contraction.
        sizes: the sizes that are known when it is compiled.
        stored: whether a view has memory of its own, in which it is contiguous.
        orders: for each result, the order of the contraction's rows in memory; None for their own.
        shared: operands of the epilogue that lack some of the batch axes.

    Raises:
        Unread: if TMA cannot read an operand.
    """
    lead = node.shape[:-2]
    found = [_Operand.of(o, lead, sizes, stored) for o in node.operands]
    found += [_Operand.written(node.shape, order) for order in orders]
    found += [_Operand.of(o, lead, sizes, stored) for o in shared]
    inner = {o.groups[-1][0] for o in found if len(o.groups) == 2}
    if len(inner) > 1:
        raise Unread("its operands divide the batch in two ways")
    size = next(iter(inner), ONE)
    if size.symbols - sizes.keys():
        raise Unread(f"the number `{size}` of matrices side by side is known only in the call")
    a, b, *rest = (o.step(sizes) for o in found)
    stores, loads = tuple(rest[: len(orders)]), tuple(rest[len(orders) :])
    return Batches(size.size(sizes), a, b, stores, loads)


def batches_of(program: Program, kernel: Gemm) -> Batches:
    """How a GEMM with a batch reads its operands; plain where an operand has to be copied."""
    (node,) = kernel.mainloop.contracts
    known = {s: program.sizes[s] for s in program.fixed}
    made = set(program.prepared.values())
    in_memory = lambda n: n in program.places or n in made  # noqa: E731
    orders = _orders(kernel.body)
    shared = [kernel.body.nodes[name] for name in shared_tiles(kernel.body)]
    try:
        return batches(node, known, in_memory, orders, shared)
    except Unread:  # the operands are copied
        return batches(_copied(node), known, orders=orders, shared=shared)


def _copied(node: Contract) -> Contract:
    """A contraction of contiguous copies of its operands, each with all batch axes."""
    x, w = (Input("copy", (*node.shape[:-2], *o.shape[-2:]), o.dtype) for o in node.operands)
    return Contract(x, w, node.result)


def _orders(body: Body) -> list[Order | None]:
    """The order of the rows of each store; None for the kernel's own."""
    return [s.rows.order if s.rows else None for s in body.epilogue.stores]


def shared_tiles(body: Body) -> list[str]:
    """The matrices of a body that some matrices of the batch share, and that are read in place."""
    return [o.name for o in body.epilogue.operands if (s := body.spread.get(o.name)) and s.in_place]


def why_not(node: Contract, sizes: Sizes) -> str:
    """The reason why no GEMM computes a batched contraction; "" if one does."""
    types = {o.dtype for o in node.operands}
    if len(types) > 1 or not types <= set(COMPILED):
        names = " and ".join(sorted(map(str, types)))
        return f"a product of batches of {names} is one operation of torch, not of bf16 or f16"
    if any(d.symbols - sizes.keys() for d in (node.shape[-1], node.lhs.shape[-1])):
        return "the columns of a batched contraction are known only in the call"
    if any(d.size(sizes) == 0 for d in (node.shape[-1], node.lhs.shape[-1])):
        return "a product of batches without columns is one operation of torch"
    try:
        batches(node, sizes)
    except Unread as reason:
        return f"a product of batches is one operation of torch, since {reason}"
    return ""


def why_not_in(node: Contract, order: Order, sizes: Sizes) -> str:
    """The reason why a GEMM cannot store a contraction with its axes in this order; "" if not."""
    if not node.batched:
        return "it has no batch"
    try:
        batches(node, sizes, orders=(order[:-1],))
    except Unread as reason:
        return str(reason)
    return ""


def why_not_shared(node: Contract, body: Body, shared: Sequence[Node], sizes: Sizes) -> str:
    """The reason why a GEMM cannot read matrices that some matrices of its batch share."""
    if not node.batched or any(o.shape[-2:] != node.shape[-2:] for o in shared):
        return "they are no matrices of the batch"
    orders = _orders(body)
    try:
        batches(_copied(node), sizes, orders=orders, shared=shared)
        batches(node, sizes, orders=orders, shared=shared)
    except Unread as reason:
        return str(reason)
    return ""


@dataclass(frozen=True)
class _Operand:
    """The strides of an operand [*b, R, C].

    Attributes:
        groups: (size, stride) of its batch axes, outer to inner, with those merged that have one
            stride; at most two.
        tokens: (size, stride) of the one of R and C that is not contiguous.
    """

    groups: tuple[Axis, ...]
    tokens: Axis

    @staticmethod
    def of(node: Node, lead: Shape, sizes: Sizes, stored: Callable[[Node], bool]) -> _Operand:
        """The strides of an operand of a contraction with batch axes `lead`. Raises Unread."""
        strides = strides_of(node, stored)
        rows, columns = zip(node.shape[-2:], strides[-2:], strict=True)
        if ONE not in (rows[1], columns[1]):
            raise Unread("neither the rows nor the columns of an operand are contiguous")
        tokens = rows if columns[1] == ONE else columns
        missing = len(lead) - (node.rank - 2)
        own = [(ONE, ONE)] * missing + list(zip(node.shape, strides, strict=True))[:-2]
        axes: list[Axis] = [
            (whole, stride if size == whole else Dim.of(0))
            for whole, (size, stride) in zip(lead, own, strict=True)
            if whole != ONE
        ]
        groups = tuple(_merged(axes))
        if len(groups) > 2:
            raise Unread("an operand's batch axes have more than two strides")
        made = not isinstance(base(node), Input)
        for _, stride in (*groups, tokens):
            _check(stride, node, sizes, made)
        return _Operand(groups, tokens)

    @staticmethod
    def written(shape: Shape, order: Order | None) -> _Operand:
        """The strides of a contraction's result whose rows are in memory in another order."""
        if order is None:
            order = tuple(range(len(shape) - 1))
        below = _contiguous((*(shape[i] for i in order), shape[-1]))
        strides = [below[order.index(i)] for i in range(len(order))]
        axes = [a for a in zip(shape[:-2], strides, strict=False) if a[0] != ONE]
        groups = tuple(_merged(axes))
        if len(groups) > 2:
            raise Unread("the batch axes of a result have more than two strides")
        return _Operand(groups, (shape[-2], strides[-1]))

    def step(self, sizes: Sizes) -> BatchStrides:
        """How the operand is read. Raises Unread."""
        strides = [stride for _, stride in self.groups]
        none, every = Dim.of(0), self.tokens[0] * self.tokens[1]
        match strides:
            case []:
                return BatchStrides.PLAIN
            case [one]:
                return BatchStrides.SHARED if one == none else BatchStrides.PLAIN
            case [outer, inner] if inner == none and outer == every:
                return BatchStrides.SHARED_INSIDE
            case [outer, inner] if outer == none and inner == every:
                return BatchStrides.SHARED_OUTSIDE
            case [outer, _] if outer == every and self.side_by_side(sizes):
                return BatchStrides.NESTED
        raise Unread("an operand's batch axes have strides of their own")

    def side_by_side(self, sizes: Sizes) -> bool:
        """Whether the matrices of the inner index are beside each other in one row."""
        (size, stride), row = self.groups[-1], self.tokens[1]
        whole = size * stride
        known = not (whole.symbols | row.symbols) - sizes.keys()
        return known and whole.size(sizes) <= row.size(sizes)


def _check(stride: Dim, node: Node, sizes: Sizes, made: bool) -> None:
    """Raise Unread if a stride is known not to be a multiple of 16 bytes.

    The rows of a matrix that a kernel makes are padded, and so is what consists of whole rows.
    """
    if stride.symbols - sizes.keys():
        return
    count, width = stride.size(sizes), base(node).shape[-1]
    whole = made and not width.symbols - sizes.keys() and count % max(1, width.size(sizes)) == 0
    if count * node.dtype.size % ALIGNED and not whole:
        raise Unread(f"an operand has matrices or rows {count} elements apart, not a multiple of 8")


def strides_of(node: Node, stored: Callable[[Node], bool] = lambda n: False) -> tuple[Dim, ...]:
    """The strides of a node in the memory of the node that it is a view of, in elements."""
    if not is_view(node) or stored(node):
        return _contiguous(node.shape)
    match node:
        case Permute(arg=arg, order=order):
            below = strides_of(arg, stored)
            return tuple(below[i] for i in order)
        case Slice(arg=arg, axis=axis, step=step):
            found = list(strides_of(arg, stored))
            found[axis] = found[axis] * step
            return tuple(found)
        case Reshape(arg=arg):
            below = list(zip(arg.shape, strides_of(arg, stored), strict=True))
            return _reshaped(below, node.shape) or _contiguous(node.shape)  # torch copies it then
    raise AssertionError(node)


def _contiguous(shape: Shape) -> tuple[Dim, ...]:
    return tuple(product(shape[i + 1 :]) for i in range(len(shape)))


def _merged(axes: Sequence[Axis]) -> list[Axis]:
    """Axes, outer to inner, with neighbours merged that are one axis of one stride."""
    found: list[Axis] = []
    for size, stride in axes:
        if found and found[-1][1] == size * stride:
            found[-1] = found[-1][0] * size, stride
        else:
            found.append((size, stride))
    return found


def _reshaped(axes: Sequence[Axis], shape: Shape) -> tuple[Dim, ...] | None:
    """The strides of axes under another shape; None if a reshape copies."""
    runs = _merged([a for a in axes if a[0] != ONE])
    strides: list[Dim] = []
    done = ONE  # elements of the innermost run that axes of the result cover
    for size in reversed(shape):
        if size == ONE:
            strides.append(ONE)
            continue
        if not runs:
            return None
        total, stride = runs[-1]
        strides.append(stride * done)
        done = done * size
        if done == total:
            runs.pop()
            done = ONE
        elif not _divides(done, total):
            return None
    return None if runs else tuple(reversed(strides))


def _divides(part: Dim, whole: Dim) -> bool:
    """Whether a size is a multiple of another one, whatever their symbols are."""
    try:
        return whole // part is not None
    except DimError:
        return False
