"""The mainloop of an attention kernel: one `Attend` node from memory to memory."""

from __future__ import annotations

from dataclasses import dataclass

from coda.ir.attend import Attend
from coda.ir.dims import product
from coda.ir.graph import Node
from coda.kernels.attention.band import Banded, banded
from coda.kernels.attention.problem import Band, Forward
from coda.lowering.program.kernel import Kernel, Sizes
from coda.lowering.program.target import Target


@dataclass(frozen=True)
class Attention:
    """An attention, and the buffer of its result.

    Attributes:
        node: the attention.
        result: the buffer of its result, in the node's shape.
    """

    node: Attend
    result: str

    @property
    def operands(self) -> tuple[Node, ...]:
        """q, k and v."""
        return self.node.operands

    @property
    def results(self) -> tuple[str, ...]:
        """The buffer of the result."""
        return (self.result,)

    def points(self, sizes: Sizes) -> tuple[int, int]:
        """(0, 0): there is no body."""
        return 0, 0

    @property
    def scores(self) -> Banded:
        """The scale and the band of its scores."""
        found = banded(self.node)
        assert found is not None, "the kind refuses other scores"
        return found

    @property
    def diagonal(self) -> bool:
        """Whether the band is exactly j ≤ i + T - S."""
        scores, aside = self.scores, self.node.k.shape[2] - self.node.q.shape[2]
        return scores.lower is None and scores.upper == aside

    def problem(self, target: Target, sizes: Sizes) -> Forward:
        """What is compiled for a call of these sizes."""
        q, v, scores = self.node.q.shape, self.node.v.shape, self.scores
        return Forward(
            target.arch,
            target.tensor_memory,
            self.node.q.dtype.name,
            q[3].size(sizes),
            v[3].size(sizes),
            q[1].size(sizes) // max(1, v[1].size(sizes)),
            Band(scores.lower is not None, scores.upper is not None, self.diagonal),
        )

    def pairs(self, sizes: Sizes) -> int:
        """The scores that are computed: half of them up to the diagonal."""
        every = product((*self.node.q.shape[:3], self.node.k.shape[2])).size(sizes)
        return every // 2 if self.diagonal else every


AttentionKernel = Kernel[Attention]
