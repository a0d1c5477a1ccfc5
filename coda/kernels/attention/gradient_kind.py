"""The kind of kernels of the derivative of attention: dq, dk and dv, by flash-attention.

A kernel is several launches: one before, the main one, and one for each gradient that is added up
in float32. They pass tensors to each other in scratch memory, in flash-attention's own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from coda.ir.attend import AttendGradient, Scores
from coda.ir.graph import Node
from coda.ir.types import f32
from coda.kernels.attention.kind import AttentionSource, reference, why_not
from coda.kernels.attention.mainloop import Attention
from coda.kernels.attention.problem import VERSION, Backward
from coda.kernels.attention.scores import ScoreFunction, score_function
from coda.kernels.protocol import LaunchRun
from coda.lowering.algebra.attend_gradients import slope_of
from coda.lowering.algebra.vjp import vjp
from coda.lowering.placement.values import Refused
from coda.lowering.program.cost import at_rates, label
from coda.lowering.program.kernel import (
    Account,
    Code,
    Flops,
    Kernel,
    Kind,
    OneNode,
    Scratch,
    Sizes,
    Source,
)
from coda.lowering.program.program import Program
from coda.lowering.program.target import Target
from coda.lowering.program.time import Time


@dataclass(frozen=True)
class Gradient(OneNode):
    """The derivative of an attention, and the buffers of those of dq, dk and dv that are read."""

    @property
    def node(self) -> AttendGradient:
        """The derivative, as the node of one of its results."""
        found = self.parts[0]
        assert isinstance(found, AttendGradient)
        return found

    def buffer(self, part: str) -> str | None:
        """The buffer of one of the results; None if nothing reads it."""
        return dict(zip(self.parts, self.results, strict=True)).get(self.node.of(part))

    @cached_property
    def attention(self) -> Attention:
        """The attention that is differentiated."""
        return Attention((self.node.attend,), ("",))

    @cached_property
    def slope(self) -> ScoreFunction | None:
        """The derivative of the function of one score: of the cotangent and the score."""
        rest, function = self.attention.scores.rest, self.attention.function
        if rest is None or function is None:
            return None
        score, *captured = self.node.scores.inputs
        slope = slope_of(Scores((score, *captured), rest), vjp)
        return score_function(slope.root, slope.inputs, ("ds", "s"), function.numbers)

    def problem(self, target: Target, sizes: Sizes) -> Backward:
        """The kernels that a call of these sizes needs."""
        forward, slope = self.attention.problem(target, sizes), self.slope
        numbers = 0 if slope is None else len(slope.numbers)
        forward = replace(forward, lse=False, numbers=numbers)
        text = "" if slope is None else slope.text
        return Backward(forward, self.node.given[0] is not None, text)

    def scratch(self, problem: Backward, sizes: Sizes) -> dict[str, tuple[int, int, int]]:
        """The shapes of the float32 tensors that its launches pass to each other."""
        q, k = ([d.size(sizes) for d in n.shape] for n in (self.node.q, self.node.k))
        return problem.scratch(k[0], k[1], (q[2], k[2]))


GradientKernel = Kernel[Gradient]


def _refuses(node: Node, sizes: Sizes) -> str:
    if not isinstance(node, AttendGradient):
        return "it is no derivative of an attention"
    why = why_not(node.attend, sizes)
    try:
        _ = "" if why else Gradient((node,), ("",)).slope
    except Refused as refusal:
        return f"of the derivative of its scores: {refusal}"
    if why or node.q.shape[1] == node.k.shape[1]:
        return why
    width, width_v = (n.shape[3].size(sizes) for n in (node.q, node.v))
    same = width == width_v  # else no kernel of Hopper, and a refusal is for all GPUs
    return "" if same else "heads of queries share one of keys, of other columns than its values"


def _flops(kernel: GradientKernel, sizes: Sizes) -> Flops:
    one = kernel.mainloop
    columns = 3 * one.node.q.shape[3].size(sizes) + 2 * one.node.v.shape[3].size(sizes)
    pairs, functions = one.attention.pairs(sizes), (one.attention.function, one.slope)
    scalar = pairs * sum(f.flops for f in functions if f is not None)
    return Flops(tensor=2 * columns * pairs, scalar=scalar, dtype=one.node.q.dtype)


def _scratch(program: Program, kernel: GradientKernel) -> Scratch:
    """Its tensors, read once; sums are written as zeros first, and then added to."""
    problem = kernel.mainloop.problem(program.target, program.sizes)
    held = sum(f32.nbytes(prod(s)) for s in _shapes(program, kernel).values())
    sums = {n: s for n, s in _shapes(program, kernel).items() if n in problem.summed}
    again = sum(f32.nbytes(prod(s)) for s in sums.values())
    return Scratch(held, read=held, written=held + again)


def _shapes(program: Program, kernel: GradientKernel) -> dict[str, tuple[int, int, int]]:
    one = kernel.mainloop
    return one.scratch(one.problem(program.target, program.sizes), program.sizes)


def _launches(program: Program, kernel: GradientKernel) -> int:
    """Before, main and after."""
    return 2 + len(kernel.mainloop.problem(program.target, program.sizes).summed)


def _time(program: Program, kernel: GradientKernel) -> Time:
    found = at_rates(program, kernel)
    return replace(found, launch=found.launch * _launches(program, kernel))


def _explain(program: Program, kernel: GradientKernel) -> Account:
    one = kernel.mainloop
    read = one.node.q, one.node.k, one.node.v, *one.node.given[1]
    said = one.attention.said(*(label(o, program) for o in read))
    parts = ", ".join(p.part for p in one.parts if isinstance(p, AttendGradient))
    what = f"{parts} of {said}, {_launches(program, kernel)} launches"
    return Account(f"attend {', '.join(one.results)} = {what}", what)


def _emit(program: Program, kernel: GradientKernel) -> Sequence[Source]:
    problem = kernel.mainloop.problem(program.target, program.sizes)
    lines = [
        f'"""flash-attn-4 {VERSION}, backward; sizes, scale and ends of the band are arguments."""',
        "from coda.kernels.attention.problem import Backward, Band, Forward",
        *([problem.forward.scores, "", "", problem.slope, "", ""] if problem.slope else []),
        f"PROBLEM = {replace(problem, forward=replace(problem.forward, scores=''), slope='')}",
    ]
    return (AttentionSource("\n".join(lines) + "\n"),)


def _launch(run: LaunchRun, kernel: GradientKernel) -> None:
    from coda.kernels.attention.bind_gradient import launch

    launch(run, kernel)


def _compile(run: LaunchRun, kernel: GradientKernel) -> None:
    from coda.kernels.attention.bind_gradient import compiled

    compiled(run, kernel)


GRADIENT = Kind(
    name="attention_gradient",
    refuses=_refuses,
    mainloop=Gradient.of,
    flops=_flops,
    time=_time,
    explain=_explain,
    reference=reference,
    scratch=_scratch,
    launches=_launches,
    code=Code(_emit, _launch, _compile),
)
