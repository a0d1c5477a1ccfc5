"""`Attend`: attention as one node of a normal form, a fold over keys with their scores.

It is what `Σ_j exp(s_j - logsumexp s) v_j` means, with s a function of q kᵀ, elementwise in
positions. Graphs of users have none: a stage of the lowering makes it where a kernel takes it. One
operation has several results, each a node of its own with the same operands: `Attend.part`.
"""

from __future__ import annotations

from dataclasses import dataclass

from coda.errors import DtypeError, ShapeError
from coda.ir.dims import ONE, Shape, show_shape
from coda.ir.node import Node
from coda.ir.types import DType, f32

VALUE, LSE = PARTS = ("value", "lse")


@dataclass(frozen=True)
class Scores:
    """Scores [B, H, S, T] as a function of q kᵀ and of captured tensors, elementwise.

    Attributes:
        inputs: arguments that stand for q kᵀ and for each captured tensor, in order.
        root: the scores, a node over `inputs`, numbers and positions.
    """

    inputs: tuple[Node, ...]
    root: Node


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
        return Attend(
            self.q, self.k, self.v, self.captured, self.scores, self.order, self.empty, part
        )

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
