"""The kind of kernel for single nodes that torch computes; it admits every node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from coda.ir.dims import product
from coda.ir.evaluate import evaluate
from coda.ir.graph import Contract, Node
from coda.kernels.protocol import Run
from coda.lowering.program.cost import at_rates, describe, label
from coda.lowering.program.kernel import Account, Builder, Flops, Kernel, Kind, OneNode, Sizes
from coda.lowering.program.program import Program


@dataclass(frozen=True)
class Operation(OneNode):
    """One node that torch computes, with all operands and the result materialised.

    Attributes:
        why: the reason why no kernel of coda computes it.
    """

    why: str


def _refuses(node: Node, sizes: Sizes) -> str:
    return ""


def _mainloop(builder: Builder, name: Callable[[Node], str]) -> Operation:
    (node,) = builder.homed
    return Operation((node,), (name(node),), builder.why)


def _flops(kernel: Kernel[Operation], sizes: Sizes) -> Flops:
    node = kernel.mainloop.node
    elements = product(node.shape).size(sizes)
    depth = node.lhs.shape[-1].size(sizes) if isinstance(node, Contract) else 0
    return Flops(tensor=2 * elements * depth, scalar=elements)


def _explain(program: Program, kernel: Kernel[Operation]) -> Account:
    one = kernel.mainloop
    args = ", ".join(label(o, program) for o in one.operands)
    head = f"torch {one.results[0]} = {describe(one.node)} {args}  # {one.why}"
    return Account(head, f"torch: {describe(one.node)}", one.why)


def _reference(run: Run, kernel: Kernel[Operation]) -> None:
    one = kernel.mainloop
    known = {o: run.value(o) for o in one.operands}
    own = run.compute == torch.float32 and _adds_in_float32(one.node, known.values())
    (x,) = evaluate([one.node], known, run.sizes, None if own else run.compute)
    run.keep(one.results[0], x)


def _adds_in_float32(node: Node, operands: Iterable[Tensor]) -> bool:
    """Whether torch's contraction of narrow operands accumulates in float32.

    Tensor cores do, if the result has the dtype of the operands.
    """
    narrow = all(x.is_cuda and x.dtype == node.dtype.torch for x in operands)
    return isinstance(node, Contract) and narrow


TORCH = Kind(
    name="torch",
    refuses=_refuses,
    mainloop=_mainloop,
    flops=_flops,
    time=at_rates,
    explain=_explain,
    reference=_reference,
)
