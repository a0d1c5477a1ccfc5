"""A kind of kernel in a package of its own: cumulative sums along the rows of a matrix."""

from dataclasses import dataclass

import torch

from coda.ir.dims import product
from coda.ir.graph import Node, Scan
from coda.lowering.program.cost import label, streamed
from coda.lowering.program.kernel import Account, Flops, Kind


@dataclass(frozen=True)
class Running:
    """The mainloop: a scan, and the buffer that it is written to."""

    node: Scan
    result: str

    @property
    def operands(self) -> tuple[Node, ...]:
        return self.node.operands

    @property
    def results(self) -> tuple[str, ...]:
        return (self.result,)

    def points(self, sizes):
        return 0, 0


def _refuses(node, sizes):
    along = isinstance(node, Scan) and node.axis == -1 and not node.reverse
    return "" if along else "it is no cumulative sum along the rows"


def _mainloop(builder, name):
    (node,) = builder.homed
    return Running(node, name(node))


def _explain(program, kernel):
    what = f"running sums of {label(kernel.mainloop.node.arg, program)}"
    return Account(what, what, "the toy computes it")


def _reference(run, kernel):
    x = run.value(kernel.mainloop.node.arg).to(run.compute)
    run.keep(kernel.mainloop.result, torch.cumsum(x, -1))


RUNNING = Kind(
    name="running",
    refuses=_refuses,
    mainloop=_mainloop,
    flops=lambda kernel, sizes: Flops(scalar=product(kernel.mainloop.node.shape).size(sizes)),
    time=streamed,
    explain=_explain,
    reference=_reference,
)
