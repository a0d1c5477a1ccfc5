"""`Attend`: attention as one node of a normal form, a fold over keys with their scores.

It is what `Σ_j exp(s_j - logsumexp s) v_j` means, with s a function of q kᵀ, elementwise in
positions. Graphs of users have none: a stage of the lowering makes it where a kernel takes it. One
operation has several results, each a node of its own with the same operands: `Attend.part`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from coda.errors import DtypeError, ShapeError
from coda.ir.dims import ONE, Shape, show_shape
from coda.ir.node import Node
from coda.ir.types import DType, f32

VALUE, LSE = PARTS = ("value", "lse")
DQ, DK, DV = GRADIENTS = ("dq", "dk", "dv")
Order = tuple[int, ...]  # of axes


@dataclass(frozen=True)
class Scores:
    """Scores [B, H, S, T] as a function of q kᵀ and of captured tensors, elementwise.

    Attributes:
        inputs: arguments that stand for q kᵀ and for each captured tensor, in order.
        root: the scores, a node over `inputs`, numbers and positions.
    """

    inputs: tuple[Node, ...]
    root: Node

    def with_root(self, root: Node) -> Scores:
        """Another function of the same arguments."""
        return Scores(self.inputs, root)


@dataclass(frozen=True, eq=False, repr=False)
class Attend(Node):
    """`%y = attend %q, %k, %v`: softmax(scores) v, or the logsumexp of the scores.

    q is [B, H, S, d], k [B, G, T, d] and v [B, G, T, e]. Head h reads head h // (H / G) of k and v.
    The value is [B, H, S, e] with its axes in some order, of v's type.

    The logsumexp is log Σ_j exp s_j of each row, [B, H, S, 1], float32, with the natural logarithm.
    It is -inf for a row whose scores are all -inf, and for a row of no keys.

    Attributes:
        order: of the axes of the value; (0, 2, 1, 3) is [B, S, H, e].
        empty: the value in a row whose scores are all -inf: 0, or NaN as it is defined.
        part: which result this is, `VALUE` or `LSE`.
    """

    q: Node
    k: Node
    v: Node
    captured: tuple[Node, ...]
    scores: Scores
    order: tuple[int, ...]
    empty: float
    part: str = VALUE

    @property
    def parts(self) -> tuple[Attend, ...]:
        """The value and the logsumexp."""
        return tuple(map(self.of, PARTS))

    def of(self, part: str) -> Attend:
        """The result `part` of the same attention."""
        return replace(self, part=part)

    def with_scores(self, change: Callable[[Node], Node]) -> Attend:
        """The same attention with its scores' root changed."""
        return replace(self, scores=self.scores.with_root(change(self.scores.root)))

    def infer(self) -> tuple[Shape, DType]:
        q, k, v = self.q.shape, self.k.shape, self.v.shape
        if not len(q) == len(k) == len(v) == 4 or q[3] != k[3] or k[:3] != v[:3] or q[0] != k[0]:
            raise ShapeError(
                "attention takes q [B, H, S, d], k [B, G, T, d] and v [B, G, T, e]",
                found=", ".join(map(show_shape, (q, k, v))),
            )
        if not self.q.dtype == self.k.dtype == self.v.dtype:
            raise DtypeError("attention takes q, k and v of one type", found=str(self.k.dtype))
        if self.part == LSE:
            return (*q[:3], ONE), f32
        shape = (*q[:3], v[3])
        return tuple(shape[a] for a in self.order), self.v.dtype


@dataclass(frozen=True, eq=False, repr=False)
class AttendGradient(Node):
    """`%dq = attend_gradient %q, %k, %v, %y, %lse, %d`: the cotangent of q, k or v of an attention.

    With scores s = f(q kᵀ), p = exp(s - lse) and y = p v, of cotangents d of y and e of lse:

        ds = p (d vᵀ - Σ d y + e)     dz = f' ds     dq = dz k     dk = dzᵀ q     dv = pᵀ d

    p is recomputed from q, k and lse, so that no tensor of scores is saved.

    q, k and v are those of `Attend`. y, its value, and d are [B, H, S, e] with their axes in one
    order; lse is [B, H, S, 1], float32.

    Attributes:
        more: the cotangent of lse, of its shape and type, if it has one, and then the captured
            tensors.
        scores: the scores, as those of `Attend`.
        slope: their derivative: (cotangent of the scores, product, captured tensors) -> the
            cotangent of the product.
        order: of the axes of y and d.
        orders: of the axes of dq, dk and dv.
        part: which result this is, one of `GRADIENTS`.
    """

    q: Node
    k: Node
    v: Node
    y: Node
    lse: Node
    d: Node
    more: tuple[Node, ...]
    scores: Scores
    slope: Scores
    order: Order
    orders: tuple[Order, Order, Order]
    part: str = DQ

    @property
    def attend(self) -> Attend:
        """The attention that is differentiated, as the node of its value."""
        _, captured = self.given
        return Attend(self.q, self.k, self.v, captured, self.scores, self.order, 0.0)

    @property
    def given(self) -> tuple[Node | None, tuple[Node, ...]]:
        """The cotangent of lse, or None, and the captured tensors."""
        count = len(self.scores.inputs) - 1
        has = len(self.more) > count
        return (self.more[0] if has else None), self.more[has:]

    @property
    def own_order(self) -> Order:
        """The order of the axes of this result."""
        return self.orders[GRADIENTS.index(self.part)]

    @property
    def parts(self) -> tuple[AttendGradient, ...]:
        """dq, dk and dv."""
        return tuple(map(self.of, GRADIENTS))

    def of(self, part: str) -> AttendGradient:
        """The result `part` of the same operation."""
        return replace(self, part=part)

    def with_scores(self, change: Callable[[Node], Node]) -> AttendGradient:
        """The same derivative with the roots of scores and slope changed."""
        scores, slope = (f.with_root(change(f.root)) for f in (self.scores, self.slope))
        return replace(self, scores=scores, slope=slope)

    def infer(self) -> tuple[Shape, DType]:
        whole = self.attend
        rows = (*self.q.shape[:3], ONE)
        if not self.y.shape == self.d.shape == whole.shape or self.lse.shape != rows:
            raise ShapeError(
                "the derivative of attention takes the value, its cotangent and the logsumexp",
                found=", ".join(show_shape(n.shape) for n in (self.y, self.d, self.lse)),
            )
        operand = (self.q, self.k, self.v)[GRADIENTS.index(self.part)]
        return tuple(operand.shape[a] for a in self.own_order), operand.dtype
