"""Two contractions with a softmax between them -> one node, `Attend`, where a kernel takes it.

It is the law `weights_past_contraction`: Σ_j exp(s_j - logsumexp s) v_j is softmax(s) v. Scores are
walked from the softmax down to the one contraction that they depend on. If all values between are
read by nothing else, no tensor of scores is left. Otherwise the graph stays as it is. The logsumexp
alone may be read: it is a second result of the same operation. If weights are exp(s - c) with any
other number c of each row, such as that of sinks, the value has the factor exp(logsumexp s - c).
Of kernels that give 0 where all scores are -inf, the logsumexp tells the rows that are NaN.

    p = exp(s - logsumexp s), s = where(j <= i, q kᵀ / 8, -inf), y = p v
        ->  y = attend q, k, v    with scores where(j <= i, s / 8, -inf)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from coda.errors import DimError
from coda.ir.attend import LSE, VALUE, Attend, AttendGradient, Scores
from coda.ir.dims import ONE, Shape
from coda.ir.graph import (
    Cast,
    Const,
    Contract,
    Expand,
    Gather,
    Graph,
    Input,
    Iota,
    Map,
    Node,
    Permute,
    Reduce,
    Reshape,
    Size,
    Slice,
    users,
    walk,
)
from coda.ir.scalars import SCALARS
from coda.ir.types import f32
from coda.ir.views import is_squeeze, shaped, under_reshapes
from coda.lowering.algebra.attend_gradients import attend_gradients
from coda.lowering.algebra.constants import folding
from coda.lowering.algebra.roles import permuted, row_symbols, softmax, transposed
from coda.lowering.algebra.vjp import vjp

HEADS_FIRST, TOKENS_FIRST = (0, 1, 2, 3), (0, 2, 1, 3)


class _Unlike(Exception):
    """Nodes are no attention."""


Takes = Callable[[Node, Mapping[str, int]], bool]


def takes_none(node: Node, sizes: Mapping[str, int]) -> bool:
    """No kernel computes an attention."""
    return False


def differentiable(graph: Graph, takes: Takes, asked: Iterable[Node]) -> Takes:
    """Whether kernels compute an attention and its derivative, in which nothing but q, k, v is.

    Args:
        graph: the graph.
        takes: whether a kernel computes an attention, or its derivative.
        asked: the arguments that are differentiated.
    """
    active = set(asked)
    for node in walk(graph.roots):
        if node.dtype.kind == "float" and not active.isdisjoint(node.operands):
            active.add(node)

    def both(node: Node, sizes: Mapping[str, int]) -> bool:
        if not isinstance(node, Attend) or not active.isdisjoint(node.captured):
            return False
        folded = folding(graph, sizes)
        d = Input("d", node.of(VALUE).shape, node.v.dtype)
        slopes = attend_gradients(node.of(VALUE), d, None, vjp)
        parts = [p for _, n in slopes for p in walk([n]) if isinstance(p, AttendGradient)]
        return all(takes(folded(n), sizes) for n in (node, *parts))

    return both


def attends(graph: Graph, sizes: Mapping[str, int], takes: Takes) -> Graph:
    """The graph with each attention as one node, if kernels take them all.

    Args:
        graph: in normal form.
        sizes: the size of every symbol.
        takes: whether a kernel computes an attention, given the sizes that are compiled in.
    """
    above = users(graph.roots)
    found: dict[Node, Node] = {}
    for node in walk(graph.roots):
        if isinstance(node, Contract) and node.batched:
            try:
                new = _attention(node, above, graph.roots)
            except _Unlike:
                continue
            if not takes(new.attend, sizes) and math.isnan(new.attend.empty):
                new = _with_nan(new)
            if takes(new.attend, sizes):
                found[new.target] = new.value
                found |= dict.fromkeys(new.lse, new.attend.of(LSE))
    if not found:
        return graph
    made: dict[Node, Node] = {}
    for node in walk(graph.roots):
        same = found.get(node, node)
        for one in walk([same]):  # an attention reads views that the graph does not have
            if one not in made:
                made[one] = _unrounded(one.with_operands(made[o] for o in one.operands))
        value = shaped(made[same], node.shape)
        made[node] = value if value.dtype == node.dtype else Cast(value, node.dtype)
    fused = graph.with_roots(made[r] for r in graph.roots)
    nodes = list(walk(fused.roots))
    known = {s: n for s, n in sizes.items() if s not in row_symbols(nodes)}
    left = [n for n in nodes if isinstance(n, Attend) and not takes(n, known)]
    return graph if left else fused


@dataclass(frozen=True)
class _Found:
    """An attention of a graph.

    Attributes:
        attend: the attention.
        target: the node that has its value, up to a reshape.
        value: what takes its place: the attention, perhaps with a factor.
        lse: the logsumexps of its scores that the graph then still reads.
    """

    attend: Attend
    target: Node
    value: Node
    lse: Set[Node]


def _attention(
    node: Contract, above: Mapping[Node, Sequence[Node]], roots: Sequence[Node]
) -> _Found:
    """An attention that ends with a contraction of weights and values. Raises _Unlike."""
    weights = under_reshapes(node.lhs)
    x, c, empty = _exponents_of(weights)
    reader = _ScoreReader(x)
    root = reader.read(x)
    product = reader.product
    if product is None or x.rank != 4 or not isinstance(product, Contract):
        raise _Unlike
    q, k, v = _operands(product, x.shape, node)
    if any(product in walk([one]) for one in reader.captured):
        raise _Unlike
    scores = Scores(reader.inputs, root)
    target, order = _result(node, (*q.shape[:3], v.shape[3]), above, roots)
    attend = Attend(q, k, v, tuple(reader.captured), scores, order, empty)
    value = attend if c is None else _with_factor(attend, c)
    lse = _logsumexps(reader, above)
    left = _reached(roots, {target: [*attend.operands, *([] if c is None else [c])]}, lse)
    if left & _between([node.lhs, *lse], product, lse):
        raise _Unlike
    return _Found(attend, target, value, lse & left)


def _with_nan(found: _Found) -> _Found:
    """The same, of an attention whose value in a row of −inf is 0: NaN by its logsumexp.

    A factor, so that the gradients that such a row has a part in are NaN too.
    """
    attend = replace(found.attend, empty=0.0)
    some = permuted(Map("gt", (attend.of(LSE), Const(-math.inf, f32))), attend.order)
    one, nan = (Const(x, attend.dtype) for x in (1.0, math.nan))
    value = Map("mul", (attend, Map("where", (some, one, nan))))
    return replace(found, attend=attend, value=value)


def _with_factor(attend: Attend, c: Node) -> Node:
    """Σ exp(s - c) v: an attention times exp(logsumexp s - c), a number of each row."""
    factor = Map("exp", (Map("sub", (attend.of(LSE), _wide(c))),))
    return Map("mul", (attend, Cast(permuted(factor, attend.order), attend.dtype)))


def _reached(
    roots: Sequence[Node], instead: Mapping[Node, Sequence[Node]], ends: Set[Node]
) -> set[Node]:
    """The nodes that roots read if some nodes read others instead, and `ends` nothing."""
    found: set[Node] = set()
    stack = list(roots)
    while stack:
        one = stack.pop()
        if one not in found:
            found.add(one)
            stack.extend(() if one in ends else instead.get(one, one.operands))
    return found


def _unrounded(node: Node) -> Node:
    """A logsumexp in float32, as its kernel stores it, where it was a cast of a narrower one."""
    if isinstance(node, Cast) and node.to == f32:
        under = under_reshapes(node.arg)
        if isinstance(under, Cast) and isinstance(under.arg, Attend) and under.arg.part == LSE:
            return shaped(under.arg, node.shape)
    return node


def _exponents_of(weights: Node) -> tuple[Node, Node | None, float]:
    """(x, c, value of a row of −inf) of weights exp(x - c).

    c is a number of each row; None for a softmax. Raises _Unlike.
    """
    shifted = weights.operands[0] if weights.operands else weights
    if len(shifted.operands) != 2:
        raise _Unlike
    x, c = shifted.operands
    if x.rank and x.dtype.kind == "float":
        for of, empty in ((softmax, math.nan), (_softmax_or_zero, 0.0)):
            if weights is of(x):
                return x, None, empty
        if c.shape[-1:] in ((), (ONE,)) and weights is Map("exp", (Map("sub", (x, c)),)):
            return x, c, 0.0
    raise _Unlike


def _softmax_or_zero(x: Node) -> Node:
    """The weights of a softmax, 0 in a row of −inf: what is subtracted there is 0, not −inf."""
    lse = Reduce("logsumexp", x, -1)
    least, zero = Const(-math.inf, lse.dtype), Const(0.0, lse.dtype)
    shift = Map("where", (Map("gt", (lse, least)), lse, zero))
    return Map("exp", (Map("sub", (x, shift)),))


@dataclass
class _ScoreReader:
    """Scores -> a function of their contraction, of positions and of captured tensors.

    Its floats are float32, since casts between types of floats round nothing.

    Attributes:
        x: the scores [B, H, S, T].
        product: the contraction, once it is found.
        captured: the tensors that the function reads besides.
    """

    x: Node
    product: Node | None = None
    captured: list[Node] = field(default_factory=list[Node])
    known: dict[Node, Node] = field(default_factory=dict[Node, Node])
    names: list[Input] = field(default_factory=list[Input])
    score: Input | None = None

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The arguments of the function: the product, then each captured tensor."""
        assert self.score is not None
        return (self.score, *self.names)

    def read(self, node: Node) -> Node:
        """A node as one over the function's arguments. Raises _Unlike."""
        if node not in self.known:
            self.known[node] = self._read(node)
        return self.known[node]

    def _read(self, node: Node) -> Node:
        under = under_reshapes(node)
        if isinstance(under, Contract) and under.batched and under.shape[-1] == self.x.shape[-1]:
            return self._product(node, under)
        match node:
            case Cast(arg=arg, to=to) if to.kind == "float":
                return _wide(self.read(arg))
            case Map() if self.is_apart(node):
                return self._capture(node)
            case Map() | Cast() | Expand():
                return node.with_operands(self.read(o) for o in node.operands)
            case Gather(table=table, indices=indices):
                return Gather(self._capture(table), tuple(map(self.read, indices)))
            case Const(value=value, element=element) if element.kind == "float":
                return Const(value, f32)
            case _ if _is_position(node):
                return _wide(node) if node.dtype.kind == "float" else node
            case Reshape() if is_squeeze(node):
                return node.with_operands(map(self.read, node.operands))
            case Permute() | Slice() if isinstance(_under_views(node), Map | Gather):
                return node.with_operands(map(self.read, node.operands))
            case _:
                return self._capture(node)

    def is_apart(self, node: Map) -> bool:
        """Whether a value is computed by a kernel before: not for each score, and not cheap."""
        each = node.rank > 1 and node.shape[-2:] == self.x.shape[-2:]
        return bool(SCALARS[node.fn].special) and not each and not _is_position(node)

    def _capture(self, node: Node) -> Node:
        """An argument that stands for a tensor."""
        if node not in self.captured:
            self.captured.append(node)
            self.names.append(Input(f"captured{len(self.names)}", node.shape, node.dtype))
        found = self.names[self.captured.index(node)]
        return _wide(found) if node.dtype.kind == "float" else found

    def _product(self, node: Node, under: Node) -> Node:
        if node.shape != self.x.shape or self.product not in (None, under):
            raise _Unlike
        self.product = under
        self.score = Input("s", node.shape, f32)
        return self.score


def _under_views(node: Node) -> Node:
    """The node of whose elements a view consists."""
    while isinstance(node, Reshape | Permute | Slice | Expand):
        node = node.arg
    return node


def _wide(node: Node) -> Node:
    """A node in float32."""
    if isinstance(node, Size):
        return Size(node.dim, f32)
    return node if node.dtype == f32 else Cast(node, f32)


def _is_position(node: Node) -> bool:
    """Whether a node is a function of iotas, numbers and sizes alone."""
    return all(
        isinstance(n, Iota | Const | Size | Map | Cast | Reshape | Slice | Permute | Expand)
        for n in walk([node])
    )


def _logsumexps(reader: _ScoreReader, above: Mapping[Node, Sequence[Node]]) -> set[Node]:
    """The logsumexps of the scores that were read, in any type."""
    assert reader.product is not None
    found: set[Node] = set()
    stack, seen = [reader.product], set[Node]()
    while stack:
        for user in set(above[stack.pop()]) - seen:
            seen.add(user)
            if isinstance(user, Map | Cast | Reshape):
                stack.append(user)
            elif isinstance(user, Reduce) and user is Reduce("logsumexp", user.arg, -1):
                other = _ScoreReader(user.arg)
                try:
                    same = other.read(user.arg) is reader.read(reader.x)
                except _Unlike:
                    continue
                if same and (other.product, other.captured) == (reader.product, reader.captured):
                    found.add(user)
    return found


def _between(ends: Sequence[Node], product: Node, lse: Set[Node]) -> frozenset[Node]:
    """The nodes that depend on the product of queries and keys, up to some ends.

    Logsumexps and what depends on these alone are not among them.
    """
    found: set[Node] = set()
    for one in walk(ends):
        if one is product or (one not in lse and any(o in found for o in one.operands)):
            found.add(one)
    return frozenset(found)


def _operands(product: Contract, shape: Shape, node: Contract) -> tuple[Node, Node, Node]:
    """q [B, H, S, d], k [B, G, T, d] and v [B, G, T, e]. Raises _Unlike."""
    batch, heads, rows, _ = shape
    k, v = product.rhs, transposed(node.rhs)
    if k.rank != 4 or v.rank != 4 or k.shape[:3] != v.shape[:3] or k.shape[0] != batch:
        raise _Unlike
    try:
        shared = heads // k.shape[1]
    except DimError:
        raise _Unlike from None
    if product.lhs.shape != (batch, k.shape[1], shared * rows, k.shape[3]):
        raise _Unlike
    q, wanted = product.lhs, (batch, heads, rows, k.shape[3])
    chain = [q]
    while isinstance(q, Reshape):
        q = q.arg
        chain.append(q)
    found = next((n for n in reversed(chain) if n.shape == wanted), None)
    return (found or Reshape(product.lhs, wanted)), k, v


def _result(
    node: Node, shape: Shape, above: Mapping[Node, Sequence[Node]], roots: Sequence[Node]
) -> tuple[Node, tuple[int, ...]]:
    """The node that has the value [B, H, S, e] of a contraction, and the order of its axes."""
    one, last = node, node
    while one is not None:
        last = one if one.shape == shape else last
        after = above[one]
        alone = len(after) == 1 and one not in roots
        user = after[0] if alone and one is last else None
        if isinstance(user, Permute) and user.order == TOKENS_FIRST:
            return user, TOKENS_FIRST
        one = after[0] if alone and isinstance(after[0], Reshape) else None
    return last, HEADS_FIRST
