"""The mainloop of an attention kernel: one `Attend` node from memory to memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from coda.ir.attend import LSE, VALUE, Attend
from coda.ir.dims import product
from coda.kernels.attention.band import Banded, banded
from coda.kernels.attention.problem import Band, Forward
from coda.kernels.attention.scores import ScoreFunction, score_function
from coda.lowering.program.kernel import Kernel, OneNode, Sizes
from coda.lowering.program.target import Target


@dataclass(frozen=True)
class Attention(OneNode):
    """An attention of q, k and v, and the buffers of its value and of its logsumexp."""

    @property
    def node(self) -> Attend:
        """The attention, as the node of its value."""
        found = self.parts[0]
        assert isinstance(found, Attend)
        return found.of(VALUE)

    def buffer(self, part: str) -> str | None:
        """The buffer of one of the results; None if nothing reads it."""
        return dict(zip(self.parts, self.results, strict=True)).get(self.node.of(part))

    @cached_property
    def scores(self) -> Banded:
        """The scale and the band of its scores, and the rest."""
        return banded(self.node)

    @cached_property
    def function(self) -> ScoreFunction | None:
        """The function of one score, with its factor; None if it is the score itself."""
        rest = self.scores.rest
        return None if rest is None else score_function(rest, self.node.scores.inputs)

    @cached_property
    def diagonal(self) -> bool:
        """Whether the band is exactly j ≤ i + T - S."""
        scores, aside = self.scores, self.node.k.shape[2] - self.node.q.shape[2]
        return scores.lower is None and scores.upper == aside

    def problem(self, target: Target, sizes: Sizes) -> Forward:
        """The kernel that a call of these sizes needs."""
        q, v, scores = self.node.q.shape, self.node.v.shape, self.scores
        function = self.function
        captured = () if function is None else self.node.captured
        return Forward(
            target.arch,
            target.tensor_memory,
            self.node.q.dtype.name,
            q[3].size(sizes),
            v[3].size(sizes),
            q[1].size(sizes) // max(1, v[1].size(sizes)),
            Band(scores.lower is not None, scores.upper is not None, self.diagonal),
            self.buffer(LSE) is not None,
            "" if function is None else function.text,
            tuple((x.dtype.name, max(1, x.rank)) for x in captured),
            0 if function is None else len(function.numbers),
        )

    def ends(self, sizes: Sizes) -> tuple[int, int]:
        """lo and hi of the band lo ≤ j - i ≤ hi of a call; 0 for an end that it lacks."""
        lower, upper = self.scores.lower, self.scores.upper
        return (
            0 if lower is None else lower.size(sizes),
            0 if upper is None else upper.size(sizes),
        )

    def said(self, q: str, k: str, v: str, *captured: str) -> str:
        """The attention of operands of these names, in words."""
        scores, one = self.scores, self.node
        score = f"{scores.scale:.6g} · {q} {k}ᵀ"
        if scores.rest is not None:
            score = f"score({', '.join([score, *captured])})"
        ends = [f"{e}" for e in (scores.lower,) if e is not None] + ["j - i"]
        ends += [f"{e}" for e in (scores.upper,) if e is not None]
        masked = f", {' ≤ '.join(ends)}" if len(ends) > 1 else ""
        heads, groups = one.q.shape[1], one.k.shape[1]
        return f"softmax({score}{masked}) {v}, {heads} heads on {groups}"

    def pairs(self, sizes: Sizes) -> int:
        """The scores within the band."""
        heads = product(self.node.q.shape[:2]).size(sizes)
        rows, keys = (n.shape[2].size(sizes) for n in (self.node.q, self.node.k))
        lower, upper = self.scores.lower, self.scores.upper
        most = rows * keys if upper is None else pairs_up_to(upper.size(sizes), rows, keys)
        none = 0 if lower is None else pairs_up_to(lower.size(sizes) - 1, rows, keys)
        return heads * max(0, most - none)


def pairs_up_to(end: int, rows: int, keys: int) -> int:
    """The number of pairs with j - i ≤ end of `rows` numbers i and `keys` numbers j."""
    first, full = (min(max(0, n), rows) for n in (-end, keys - 1 - end))
    count = max(0, full - first)  # rows of i + end + 1 pairs; from `full` on a row has all keys
    return count * (first + full - 1) // 2 + count * (end + 1) + (rows - first - count) * keys


AttentionKernel = Kernel[Attention]
