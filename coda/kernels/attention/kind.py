"""The kind of attention kernels: softmax of banded scores, by flash-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from coda.ir.attend import Attend
from coda.ir.evaluate import evaluate
from coda.ir.graph import Node
from coda.ir.types import bf16, f16
from coda.kernels.attention.band import banded, keeps_a_key
from coda.kernels.attention.mainloop import Attention, AttentionKernel
from coda.kernels.attention.problem import VERSION, why_not_widths
from coda.kernels.attention.scores import score_function
from coda.kernels.protocol import LaunchRun, Run
from coda.lowering.placement.values import Refused
from coda.lowering.program.cost import at_rates, label
from coda.lowering.program.kernel import Account, Code, Flops, Kernel, Kind, OneNode, Sizes, Source
from coda.lowering.program.program import Program


def _refuses(node: Node, sizes: Sizes) -> str:
    if not isinstance(node, Attend):
        return "it is no attention"
    return why_not(node, sizes)


def why_not(node: Attend, sizes: Sizes) -> str:
    """The reason why no kernel computes an attention; "" if one does."""
    if node.q.dtype not in (bf16, f16):
        return f"attention of {node.q.dtype} has no kernel"
    scores = banded(node)
    if scores.rest is not None:
        try:
            score_function(scores.rest, node.scores.inputs)
        except Refused as why:
            return str(why)
    if math.isnan(node.empty) and not keeps_a_key(node, scores):
        return "a row without keys is NaN"
    widths = node.q.shape[3], node.v.shape[3]
    if any(d.symbols - sizes.keys() for d in widths):
        return "the widths of its heads are known only in the call"
    width, width_v = (d.size(sizes) for d in widths)
    why = (why_not_widths(width, width_v, tensor_memory=t) for t in (False, True))
    return next(filter(None, why), "")  # of both, since a refusal is for all GPUs


def _flops(kernel: AttentionKernel, sizes: Sizes) -> Flops:
    node = kernel.mainloop.node
    columns = node.q.shape[3].size(sizes) + node.v.shape[3].size(sizes)
    pairs, function = kernel.mainloop.pairs(sizes), kernel.mainloop.function
    scalar = 0 if function is None else pairs * function.flops
    return Flops(tensor=2 * columns * pairs, scalar=scalar, dtype=node.q.dtype)


def _explain(program: Program, kernel: AttentionKernel) -> Account:
    one = kernel.mainloop
    what = one.said(*(label(o, program) for o in one.operands))
    return Account(f"attend {', '.join(one.results)} = {what}", what)


def reference(run: Run, kernel: Kernel[OneNode]) -> None:
    """Compute the results of an operation on its operands in memory, by its definition."""
    one = kernel.mainloop
    known = {o: run.value(o) for o in one.operands}
    values = evaluate(one.parts, known, run.sizes, run.compute)
    for buffer, x in zip(one.results, values, strict=True):
        run.keep(buffer, x)


@dataclass(frozen=True)
class AttentionSource:
    """The key of a compiled kernel, as a Python module: flash-attention's version and the problem.

    Attributes:
        text: the module's text.
    """

    text: str

    @property
    def name(self) -> str:
        """A name that is unique to the text."""
        return f"attention_{sha256(self.text.encode()).hexdigest()[:16]}"


def _emit(program: Program, kernel: AttentionKernel) -> Sequence[Source]:
    problem = kernel.mainloop.problem(program.target, program.sizes)
    lines = [
        f'"""flash-attn-4 {VERSION}, forward; sizes, scale and ends of the band are arguments."""',
        "from coda.kernels.attention.problem import Band, Forward",
        *([problem.scores, "", ""] if problem.scores else []),
        f"PROBLEM = {replace(problem, scores='')}",
    ]
    return (AttentionSource("\n".join(lines) + "\n"),)


def _launch(run: LaunchRun, kernel: AttentionKernel) -> None:
    from coda.kernels.attention.bind import launch

    launch(run, kernel)


def _compile(run: LaunchRun, kernel: AttentionKernel) -> None:
    from coda.kernels.attention.bind import compiled

    compiled(run, kernel)


ATTENTION = Kind(
    name="attention",
    refuses=_refuses,
    mainloop=Attention.of,
    flops=_flops,
    time=at_rates,
    explain=_explain,
    reference=reference,
    code=Code(_emit, _launch, _compile),
)
