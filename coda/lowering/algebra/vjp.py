"""Outputs and their cotangents -> the cotangents of inputs, as nodes of the graph.

Reverse-mode differentiation with one rule per kind of node; the derivatives of scalar functions are
in the table of `coda.ir.scalars`. A cotangent may be narrow: of size 1 along an axis of its node
along which it is constant. It is expanded only if a rule needs all elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import assert_never, cast

import torch

from coda.errors import UnsupportedError
from coda.ir.attend import LSE, VALUE, Attend, AttendGradient
from coda.ir.dims import ONE, Dim, Shape, product
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
    users,
    walk,
)
from coda.ir.node import origin
from coda.ir.scalar import Term
from coda.ir.scalars import SCALARS
from coda.ir.types import DType, i32
from coda.ir.views import shaped
from coda.lowering.algebra.attend_gradients import attend_gradients
from coda.lowering.algebra.batches import lhs_cotangent, rhs_cotangent
from coda.lowering.algebra.linear import (
    factor_cotangent,
    linear_outputs,
    read_by_attention,
    row_factor,
)
from coda.lowering.algebra.roles import permuted, reduced, softmax
from coda.lowering.algebra.slices import joined


def vjp(
    cotangents: Mapping[Node, Node], leaves: Iterable[Node], *, kept: bool = False
) -> dict[Node, Node]:
    """Leaf -> its cotangent, of its shape and dtype; missing if no output depends on it.

    Args:
        cotangents: output node -> cotangent, of the output's shape and dtype.
        leaves: inputs, or other nodes at which differentiation stops.
        kept: whether derivatives may read the outputs, and operands of attention
            (`lowering/algebra/linear.py`).

    Raises UnsupportedError for an operation without a derivative.
    """
    above = users(cotangents) if kept else {}
    read = read_by_attention(above)
    above = {node: [] if node in read else after for node, after in above.items()}
    return _Cotangents(tuple(dict.fromkeys(leaves)), above, read).run(cotangents)


def full(d: Node, shape: Shape) -> Node:
    """A narrow cotangent, expanded to the shape of its node."""
    return d if d.shape == shape else Expand(d, shape)


@dataclass(frozen=True)
class _Term(Term):
    """A node with Python's operators, for the derivatives of the scalar table."""

    node: Node

    def apply(self, fn: str, *args: Term | float) -> _Term:
        like = next((a.node for a in args[1:] if isinstance(a, _Term)), self.node).dtype
        return _Term(_applied(fn, tuple(_node(a, like) for a in args)))


def _applied(fn: str, nodes: tuple[Node, ...]) -> Node:
    """A scalar function of nodes, folded if all are constants; so is `where` by a constant."""
    found = Map(fn, nodes)
    numbers = [torch.tensor(n.value, dtype=torch.float64) for n in nodes if isinstance(n, Const)]
    if len(numbers) == len(nodes):
        return Const(float(SCALARS[fn].evaluate(*numbers)), found.dtype)
    if fn == "where" and isinstance(nodes[0], Const):
        return nodes[1] if nodes[0].value else nodes[2]
    return found


def _is_nothing(d: Node) -> bool:
    """Whether a cotangent is the number 0."""
    return isinstance(d, Const) and d.value == 0.0


def _node(value: Term | float, like: DType) -> Node:
    if isinstance(value, _Term):
        return value.node
    assert isinstance(value, int | float), value
    return Const(float(value), like)


def _first_parts(order: Iterable[Node]) -> dict[Node, Attend]:
    """Result of an attention -> the first of its results, in the order of nodes."""
    found: dict[Node, Attend] = {}
    for node in order:
        if isinstance(node, Attend):
            found[node] = next((found[p] for p in node.parts if p in found), node)
    return found


@dataclass
class _Cotangents:
    """One run from outputs to inputs.

    Attributes:
        leaves: where differentiation stops.
        users: node -> its users, but for attention; empty if derivatives may not read outputs.
        read: operands of attention, which are in memory as outputs are.
        given: output, or one of `read` -> its cotangent.
        found: node -> the summands of its cotangent so far.
        parts: node -> the cotangents of its slices so far.
        of_parts: first result of an attention -> the cotangents of its results so far, by part.
    """

    leaves: tuple[Node, ...]
    users: Mapping[Node, list[Node]] = field(default_factory=dict[Node, list[Node]])
    read: Set[Node] = frozenset()
    given: dict[Node, Node] = field(default_factory=dict[Node, Node])
    found: dict[Node, list[Node]] = field(default_factory=dict[Node, list[Node]])
    parts: dict[Node, list[tuple[Slice, Node]]] = field(
        default_factory=dict[Node, list[tuple[Slice, Node]]]
    )
    active: set[Node] = field(default_factory=set[Node])
    of_parts: dict[Attend, dict[str, Node]] = field(default_factory=dict[Attend, dict[str, Node]])

    def run(self, cotangents: Mapping[Node, Node]) -> dict[Node, Node]:
        order = list(walk(cotangents))
        self.given = dict(cotangents)
        self.active = set(self.leaves)
        for node in order:
            if node.dtype.kind == "float" and any(o in self.active for o in node.operands):
                self.active.add(node)
        for node, d in cotangents.items():
            self.give(node, d)
        out: dict[Node, Node] = {}
        first = _first_parts(order)
        for node in reversed(order):
            if node not in self.active:
                continue
            with origin(node.where):
                d = self.total(node)
                if isinstance(node, Attend):
                    self.attention(node, d, first[node])
                if d is None or isinstance(node, Attend):
                    continue
                if node in self.read:
                    self.given[node] = full(d, node.shape)
                if node in self.leaves:
                    out[node] = full(d, node.shape)
                if not isinstance(node, Input):
                    self.rule(node, d)
        return out

    def give(self, node: Node, d: Node) -> None:
        """Add a summand to a node's cotangent, in the node's dtype; it may be narrow."""
        if node not in self.active:
            return
        d = _unbroadcast(d, node.shape)
        self.found.setdefault(node, []).append(d if d.dtype == node.dtype else Cast(d, node.dtype))

    def total(self, node: Node) -> Node | None:
        """The sum of all summands; contractions come first, where a law can merge them."""
        terms = self.found.pop(node, []) + joined(node, self.parts.pop(node, []))
        if not terms:
            return None
        terms.sort(key=lambda t: not isinstance(t, Contract))
        total = terms[0]
        for term in terms[1:]:
            total = Map("add", (total, term))
        return total

    def rule(self, node: Node, d: Node) -> None:
        match cast(Op, node):
            case Map() as n:
                self.map(n, d)
            case Reduce(value=Node()) as n:
                self.weights(n, d)
            case Reduce() as n:
                self.give(n.arg, _reduce_rule(n, d))
            case Scan(fn="sum", arg=arg, axis=axis, reverse=reverse):
                self.give(arg, Scan("sum", full(d, node.shape), axis, not reverse))
            case Scan(fn=fn):
                raise UnsupportedError(f"a scan of `{fn}` has no derivative", where=node.where)
            case Contract() as n if n.batched:
                self.batches(n, full(d, n.shape))
            case Contract() as n:
                self.contract(n, full(d, n.shape))
            case Cast(arg=arg):
                self.give(arg, Cast(d, arg.dtype))
            case Reshape() | Permute() | Slice() | Concat() | Expand() as n:
                self.view(n, d)
            case Gather() | Pick() | Put() as n:
                self.indexed(n, d)
            case Attend() | AttendGradient():
                raise UnsupportedError("a derivative of attention has no derivative")
            case Input() | Const() | Size() | Iota():
                pass
            case _ as never:
                assert_never(never)

    def attention(self, node: Attend, d: Node | None, first: Attend) -> None:
        """The cotangents of q, k and v, once those of all results of an attention are known.

        Args:
            node: one of the results.
            d: its cotangent; None for 0.
            first: the result that comes first in the order of nodes.
        """
        known = self.of_parts.setdefault(first, {})
        if d is not None:
            known[node.part] = full(d, node.shape)
        if node is first and known and any(o in self.active for o in node.captured):
            raise UnsupportedError("attention has no gradient of tensors that its scores read")
        if node is first and known:
            value, lse = known.get(VALUE), known.get(LSE)
            for operand, share in attend_gradients(node, value, lse, vjp):
                self.give(operand, share)

    def indexed(self, node: Gather | Pick | Put, d: Node) -> None:
        match node:
            case Gather(table=table, indices=indices):
                rows = table.shape[: len(indices)]
                self.give(table, Put(full(d, node.shape), indices, rows))
            case Pick(arg=arg, index=index):
                self.give(arg, _one_hot(d, arg, index))
            case Put(indices=indices, arg=arg):
                self.give(arg, Gather(full(d, node.shape), indices))

    def view(self, node: Reshape | Permute | Slice | Concat | Expand, d: Node) -> None:
        match node:
            case Reshape(arg=arg):
                self.give(arg, _reshaped(d, node.shape, arg.shape))
            case Permute(arg=arg) as n:
                self.give(arg, permuted(d, n.inverse))
            case Slice(arg=arg) as n:
                if n.shape == arg.shape:
                    self.give(arg, d)
                elif arg in self.active:
                    self.parts.setdefault(arg, []).append((n, full(d, n.shape)))
            case Concat() as n:
                self.concat(n, full(d, n.shape))
            case Expand(arg=arg, to=to):
                self.give(arg, _summed(d, arg.shape, to))

    def map(self, node: Map, d: Node) -> None:
        row = SCALARS[node.fn]
        if row.derivative is None:
            raise UnsupportedError(f"`{node.fn}` has no derivative", where=node.where)
        terms = row.derivative(_Term(d), _Term(node), *(_Term(a) for a in node.args))
        gifts: dict[Node, Node] = {}
        factor = row_factor(node) if self.users else None
        outputs = linear_outputs(node, self.users, self.given) if factor in self.active else None
        if factor is not None and outputs is not None:
            terms = tuple(None if a is factor else t for a, t in zip(node.args, terms, strict=True))
            self.give(factor, factor_cotangent(factor, outputs, self.given))
        for arg, term in zip(node.args, terms, strict=True):
            if isinstance(term, _Term) and arg in self.active and not _is_nothing(term.node):
                share = _summed(term.node, arg.shape, node.shape)
                gifts[arg] = Map("add", (gifts[arg], share)) if arg in gifts else share
        for arg, share in gifts.items():
            self.give(arg, share)

    def contract(self, node: Contract, d: Node) -> None:
        x, w = node.lhs, node.rhs
        rows = product(x.shape[:-1])
        if x in self.active and rows == ONE:
            total = Reduce("sum", Map("mul", (shaped(d, (w.shape[0], ONE)), w)), -2)
            self.give(x, shaped(total, x.shape))
        elif x in self.active:
            self.give(x, Contract(d, Permute(w, (1, 0)), x.dtype))
        if w not in self.active:
            return
        flat_d, flat_x = (shaped(n, (rows, n.shape[-1])) for n in (d, x))
        if rows == ONE:
            self.give(w, Map("mul", (shaped(d, (w.shape[0], ONE)), flat_x)))
        else:
            self.give(w, Contract(Permute(flat_d, (1, 0)), Permute(flat_x, (1, 0)), w.dtype))

    def weights(self, node: Reduce, d: Node) -> None:
        """y = Σ p v with p = softmax x: p d (v − y) for x, and p d for v."""
        x, v = node.operands
        shares = Map("mul", (softmax(x, node.axis), d))
        found = {x: Map("mul", (shares, Map("sub", (v, node)))), v: shares}
        if x is v:
            away = Map("add", (Map("sub", (v, node)), Const(1.0, d.dtype)))
            found = {x: Map("mul", (shares, away))}
        for operand, share in found.items():
            if operand in self.active:
                self.give(operand, _summed(share, operand.shape, reduced(node).shape))

    def batches(self, node: Contract, d: Node) -> None:
        for operand, cotangent in ((node.lhs, lhs_cotangent), (node.rhs, rhs_cotangent)):
            if operand in self.active:
                self.give(operand, cotangent(node, d))

    def concat(self, node: Concat, d: Node) -> None:
        start = Dim.of(0)
        for arg in node.args:
            size = arg.shape[node.axis]
            if arg in self.active:
                self.give(arg, Slice(d, node.axis, start, size, 1))
            start = start + size


# Shapes.


def _unbroadcast(d: Node, shape: Shape) -> Node:
    """Drop leading axes of size 1 that a node does not have."""
    extra = d.rank - len(shape)
    return d if extra <= 0 else Reshape(d, d.shape[extra:])


def _summed(d: Node, shape: Shape, whole: Shape) -> Node:
    """The cotangent of an operand broadcast from `shape` to `whole`: d summed over those axes."""
    rank = len(whole)
    wide = (ONE,) * (rank - len(shape)) + shape
    d = Reshape(d, (ONE,) * (rank - d.rank) + d.shape) if d.rank < rank else d
    done, d = _summed_together(d, wide)
    for i, (mine, all_of) in enumerate(zip(wide, whole, strict=True)):
        if i < done or mine != ONE or all_of == ONE:
            continue
        if d.shape[i] == ONE:
            d = Map("mul", (d, Size(all_of, d.dtype)))
        elif i + 1 < rank and wide[i + 1] == ONE != d.shape[i + 1]:
            together = d.shape[i] * d.shape[i + 1]  # one sum over two adjacent axes
            d = Reshape(d, (*d.shape[:i], ONE, together, *d.shape[i + 2 :]))
        else:
            d = Reduce("sum", d, i - rank)
    return shaped(d, d.shape[rank - len(shape) :])


def _summed_together(d: Node, shape: Shape) -> tuple[int, Node]:
    """The number of leading axes that `shape` lacks, and d summed over them (if at least two)."""
    axes = 0
    while axes < len(shape) and shape[axes] == ONE != d.shape[axes]:
        axes += 1
    if axes < 2:
        return 0, d
    rest = d.shape[axes:]
    total = Reduce("sum", Reshape(d, (product(d.shape[:axes]), *rest)), -1 - len(rest))
    return axes, Reshape(total, (ONE,) * axes + rest)


def _reshaped(d: Node, now: Shape, before: Shape) -> Node:
    """The cotangent of a reshape's operand, from shape `now` to `before`; it stays narrow."""
    d = Reshape(d, (ONE,) * (len(now) - d.rank) + d.shape) if d.rank < len(now) else d
    target: list[Dim] = []
    i = j = 0
    while i < len(now) or j < len(before):
        a, b = now[i : i + 1], before[j : j + 1]
        i, j = i + len(a), j + len(b)
        while product(a) != product(b):
            if i < len(now) and (len(a) <= len(b) or j >= len(before)):
                a, i = (*a, now[i]), i + 1
            elif j < len(before):
                b, j = (*b, before[j]), j + 1
            else:
                return Reshape(full(d, now), before)
        mine = d.shape[i - len(a) : i]
        if mine == a:
            target += b
        elif all(m == ONE for m in mine):
            target += (ONE,) * len(b)
        else:
            return Reshape(full(d, now), before)
    return shaped(d, tuple(target))


# Reductions and picks.


def _reduce_rule(node: Reduce, d: Node) -> Node:
    """The cotangent of a reduction's operand; it may be narrow."""
    x = node.arg
    count = Size(x.shape[node.axis], d.dtype)
    match node.fn:
        case "sum":
            return d
        case "mean":
            return Map("div", (d, count))
        case "logsumexp":
            return Map("mul", (Map("exp", (Map("sub", (x, node)),)), d))
        case "variance":
            away = Map("sub", (x, Reduce("mean", x, node.axis)))
            share = Map("div", (Map("mul", (d, Const(2.0, d.dtype))), count))
            return Map("mul", (away, share))
        case "prod":
            return _product_rule(node, d)
        case "max" | "min":
            one, zero = Const(1.0, d.dtype), Const(0.0, d.dtype)
            same = Map("where", (Map("eq", (x, node)), one, full(zero, x.shape)))
            ties = Reduce("sum", same, node.axis)  # none where a row has a NaN: its gradient is NaN
            return Map("mul", (same, Map("div", (d, ties))))
        case _:
            raise UnsupportedError(f"`{node.fn}` has no derivative", where=node.where)


def _product_rule(node: Reduce, d: Node) -> Node:
    """The cotangent of a product's operand: the product of all other values, times d.

    Of a value that is not 0 that is the product over the value. Of the only 0 it is the product of
    the values that are not 0; of one of several it is the product, which is 0 or NaN.
    """
    x, zero, one = node.arg, Const(0.0, d.dtype), Const(1.0, d.dtype)
    is_zero = Map("eq", (x, zero))
    zeros = Reduce("sum", Map("where", (is_zero, one, full(zero, x.shape))), node.axis)
    others = Reduce("prod", Map("where", (is_zero, one, x)), node.axis)
    alone = Map("where", (Map("eq", (zeros, one)), others, node))
    return Map("mul", (Map("where", (is_zero, alone, Map("div", (node, x)))), d))


def _one_hot(d: Node, arg: Node, index: Node) -> Node:
    """The cotangent of a pick's operand: d in the picked column, 0 in all others."""
    columns = Iota(arg.shape[-1], i32)
    chosen = Map("eq", (Reshape(index, (*index.shape, ONE)), columns))
    return Map("where", (chosen, d, Const(0.0, d.dtype)))
