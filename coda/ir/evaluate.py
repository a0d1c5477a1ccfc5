"""A graph and tensors for its inputs -> values of its nodes, computed by torch.

This is the reference: in float64 it is the oracle for every kernel; op by op it is what eager torch
computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import assert_never, cast

import torch
from torch import Tensor

from coda.errors import CallError
from coda.ir.attend import DQ, DV, LSE, Attend, AttendGradient
from coda.ir.dims import Dim, inverse
from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Contract,
    Expand,
    Gather,
    Input,
    Iota,
    Map,
    Node,
    Op,
    Permute,
    Pick,
    Put,
    Reduce,
    Reshape,
    Scan,
    Size,
    Slice,
)
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import PAIR, SCALARS
from coda.ir.types import DType


def evaluate(
    roots: Iterable[Node],
    values: Mapping[Node, Tensor],
    sizes: Mapping[str, int],
    compute: torch.dtype | None = torch.float64,
) -> list[Tensor]:
    """The values of `roots`, given values of inputs (or of any other nodes).

    Args:
        roots: nodes to evaluate.
        values: tensors for nodes, each of its node's shape; operands of these are not evaluated.
        sizes: the size of every symbol.
        compute: the float type of all computation, without intermediate rounding; None evaluates
            op by op as eager torch does, each result rounded to its node's dtype.

    Returns:
        One tensor for each root, of the root's shape.

    Raises:
        KeyError: for an input without a value.
        CallError: for a gather at an index outside its table (on a GPU, torch's assertion).
    """
    roots = tuple(roots)
    return _Evaluator(values, sizes, compute).run(roots)


class _Evaluator:
    def __init__(
        self, values: Mapping[Node, Tensor], sizes: Mapping[str, int], compute: torch.dtype | None
    ) -> None:
        self.sizes, self.compute = sizes, compute
        self.known = {n: self.lift(t) for n, t in values.items()}
        self.device = next(iter(values.values())).device if values else torch.device("cpu")

    def run(self, roots: tuple[Node, ...]) -> list[Tensor]:
        for node in self.order(roots):
            value = self.apply(node, [self.known[o] for o in node.operands])
            number = isinstance(node, Const | Size)
            if self.compute is None and value.dtype != node.dtype.torch and not number:
                value = value.to(node.dtype.torch)
            self.known[node] = value
        return [self.known[r] for r in roots]

    def order(self, roots: tuple[Node, ...]) -> Iterable[Node]:
        """The nodes to compute in topological order, without those of known value."""
        stack, done = [(r, False) for r in reversed(roots)], set(self.known)
        out: list[Node] = []
        while stack:
            node, ready = stack.pop()
            if node in done:
                continue
            if ready:
                done.add(node)
                out.append(node)
            else:
                stack.append((node, True))
                stack.extend((o, False) for o in node.operands)
        return out

    def lift(self, x: Tensor) -> Tensor:
        """Cast a float tensor to the compute type; ints and predicates are unchanged."""
        return x.to(self.compute) if self.compute and x.is_floating_point() else x

    def float_type(self, dtype: DType) -> torch.dtype:
        return self.compute if self.compute and dtype.kind == "float" else dtype.torch

    def shape(self, dims: Iterable[Dim]) -> list[int]:
        return [d.size(self.sizes) for d in dims]

    def apply(self, node: Node, args: list[Tensor]) -> Tensor:
        match cast(Op, node):
            case Input(name=name):
                raise KeyError(f"no value for the input `{name}`")
            case Const(value=v, element=t):
                return self.number(v, t)
            case Size(dim=d, element=t):
                return self.number(d.size(self.sizes), t)
            case Map(fn=fn):
                return self.map(fn, args)
            case Reduce(fn=fn, axis=axis):
                x = [_wide(a) for a in args]
                return MONOIDS[fn].reduce(SCALARS[PAIR].evaluate(*x) if len(x) > 1 else x[0], axis)
            case Scan() as scan:
                return _scan(scan, _wide(args[0]))
            case Contract():
                return _contract(args[0], args[1], self.compute)
            case Cast(to=to):
                return args[0].to(self.float_type(to))
            case Reshape() | Permute() | Slice() | Concat() | Expand() as view:
                return self.view(view, args)
            case Iota(count=n, element=t):
                kind = self.float_type(t)
                return torch.arange(n.size(self.sizes), dtype=kind, device=self.device)
            case Gather() | Pick() | Put() as indexed:
                return self.indexed(indexed, args)
            case Attend() as attend:
                return self.attend(attend, args)
            case AttendGradient() as gradient:
                return self.attend_gradient(gradient, args)
            case _ as never:
                assert_never(never)

    def indexed(self, node: Gather | Pick | Put, args: list[Tensor]) -> Tensor:
        match node:
            case Gather():
                return _take(node, args[0], args[1:])
            case Pick():
                return pick(args[0], args[1])
            case Put(rows=rows):
                return _put(args[0], args[1:], self.shape(rows))

    def attend(self, node: Attend, args: list[Tensor]) -> Tensor:
        """softmax(scores) v, or the logsumexp of the scores."""
        q, k, v, *captured = args
        _, scores = self.scores(node, q, k, captured)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        if node.part == LSE:
            return lse
        if not math.isnan(node.empty):
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
        p = _grouped((scores - lse).exp(), k)
        return (p @ v).reshape(*q.shape[:3], v.shape[3]).permute(node.order)

    def scores(
        self, node: Attend, q: Tensor, k: Tensor, captured: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """q kᵀ, and the scores of an attention, [B, H, S, T]."""
        s = _contract(_grouped(q, k), k, self.compute).reshape(*q.shape[:3], k.shape[2])
        given = dict(zip(node.scores.inputs, (s, *captured), strict=True))
        (scores,) = evaluate([node.scores.root], given, self.sizes, self.compute)
        return s, scores

    def attend_gradient(self, node: AttendGradient, args: list[Tensor]) -> Tensor:
        """The cotangent of q, k or v."""
        q, k, v, y, lse, d, *more = args
        dlse = more.pop(0) if node.given[0] is not None else 0.0
        y, d = (x.permute(inverse(node.order)) for x in (y, d))
        s, scores = self.scores(node.attend, q, k, more)
        p = (scores - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
        if node.part != DV:
            dp = (_grouped(d, k) @ v.mT).reshape(s.shape)
            ds = p * (dp - (d * y).sum(-1, keepdim=True) + dlse)
            given = dict(zip(node.slope.inputs, (ds, s, *more), strict=True))
            (ds,) = evaluate([node.slope.root], given, self.sizes, self.compute)
            ds = _grouped(ds, k)
            found = (ds @ k).reshape(q.shape) if node.part == DQ else ds.mT @ _grouped(q, k)
        else:
            found = _grouped(p, k).mT @ _grouped(d, k)
        return found.permute(node.own_order)

    def view(self, node: Reshape | Permute | Slice | Concat | Expand, args: list[Tensor]) -> Tensor:
        match node:
            case Reshape(to=to):
                return args[0].reshape(self.shape(to))
            case Permute(order=order):
                return args[0].permute(order)
            case Slice():
                return self.slice(node, args[0])
            case Concat(axis=axis):
                return torch.cat([a.to(self.float_type(node.dtype)) for a in args], axis)
            case Expand(to=to):
                return args[0].expand(self.shape(to))

    def number(self, value: float, dtype: DType) -> Tensor:
        """A 0-d tensor; op by op it is float64, since torch does not round Python numbers."""
        wide = torch.float64 if self.compute is None else self.compute
        kind = wide if dtype.kind == "float" else dtype.torch
        return torch.tensor(value, dtype=kind, device=self.device)

    def slice(self, node: Slice, x: Tensor) -> Tensor:
        first, count = node.start.size(self.sizes), node.size.size(self.sizes)
        stop = first + max(count - 1, 0) * node.step + (count > 0)
        return x[(..., slice(first, stop, node.step), *(slice(None),) * (-node.axis - 1))]

    def map(self, fn: str, args: list[Tensor]) -> Tensor:
        if self.compute is not None:
            return SCALARS[fn].evaluate(*args)
        values = [_wide(a) if a.dtype.itemsize == 1 and a.is_floating_point() else a for a in args]
        return SCALARS[fn].evaluate(*values)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, S, d] as [B, G, (H / G) S, d] for keys [B, G, T, d]."""
    rows = x.shape[1] // k.shape[1] * x.shape[2]
    return x.reshape(*k.shape[:2], rows, x.shape[3])


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index[...]], with size 1 on the last axis; NaN (ints: 0) if out of range."""
    width = x.shape[-1]
    inside = (index >= 0) & (index < width)
    found = x.gather(-1, index.clamp(0, width - 1).long().unsqueeze(-1))
    nothing = torch.nan if x.is_floating_point() else 0
    return torch.where(inside.unsqueeze(-1), found, x.new_full((), nothing))


def _take(node: Node, table: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Gather rows of a table. Raises CallError out of range (on a GPU, torch's assertion)."""
    axes = len(indices)
    index = _row(indices, table.shape[:axes])
    try:
        rows = table.flatten(0, axes - 1).index_select(0, index.reshape(-1))
    except IndexError:
        raise CallError(
            f"rows are taken of a table of {' × '.join(map(str, table.shape[:axes]))}",
            found=" and ".join(f"indices from {int(i.min())} to {int(i.max())}" for i in indices),
            help="an index counts from 0: coda.where, or clamp, puts others into the range",
            where=node.where,
        ) from None
    return rows.reshape(*index.shape, *table.shape[axes:])


def _put(x: Tensor, indices: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Scatter-add x into zeros [*rows, ...], accumulated in float32 or wider."""
    index = _row(indices, rows)
    rest = x.shape[index.ndim :]
    wide = x.float() if x.dtype.itemsize < 4 else x
    out = torch.zeros((math.prod(rows), *rest), dtype=wide.dtype, device=x.device)
    out.index_add_(0, index.reshape(-1).long(), wide.reshape(-1, *rest))
    return out.to(x.dtype).reshape(*rows, *rest)


def _row(indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The row of a table [*sizes] as a matrix; -1 where one of several indices is outside it."""
    if len(indices) == 1:
        return indices[0]
    row = torch.zeros((), dtype=torch.long, device=indices[0].device)
    inside = row == 0
    for index, size in zip(indices, sizes, strict=True):
        row, inside = row * size + index.long(), inside & (index >= 0) & (index < size)
    return torch.where(inside, row, -1)


def _wide(x: Tensor) -> Tensor:
    """Cast 8-bit floats to float32, since torch has no arithmetic on them."""
    return x.float() if x.is_floating_point() and x.dtype.itemsize == 1 else x


def _contract(x: Tensor, w: Tensor, compute: torch.dtype | None) -> Tensor:
    x, w = _wide(x), _wide(w)
    if x.dtype != w.dtype:
        wide = torch.promote_types(x.dtype, w.dtype)
        x, w = x.to(wide), w.to(wide)
    return x @ w.transpose(0, 1) if w.ndim == 2 else _batched(x, w)


def _batched(x: Tensor, w: Tensor) -> Tensor:
    """[*b, M, K] with [*b, N, K] -> [*b, M, N].

    Inner batch axes on which w has size 1 are flattened into the rows of x, so that w is not
    materialised for each of them.
    """
    rows = 1
    while min(x.ndim - rows, w.ndim - 1) > 1 and w.shape[-3] == 1 != x.shape[-2 - rows]:
        w = w.squeeze(-3)
        rows += 1
    lead = x.shape[-1 - rows : -1]
    y = x.flatten(-1 - rows, -2) @ w.transpose(-1, -2)
    return y.reshape(*y.shape[:-2], *lead, y.shape[-1])


def _scan(node: Scan, x: Tensor) -> Tensor:
    fold = MONOIDS[node.fn].scan
    assert fold is not None
    found = (
        fold(x.flip(node.axis), node.axis).flip(node.axis) if node.reverse else fold(x, node.axis)
    )
    return found if x.is_floating_point() else found.to(x.dtype)
