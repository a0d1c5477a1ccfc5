"""Weights -> what the kernels load of them: merged, interleaved, folded and packed, once a version.

A prepared tensor depends on weights alone. It is made when a kernel first needs it, and again when
one of those weights has changed (torch counts the versions of a tensor).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from coda.ir.evaluate import evaluate
from coda.ir.graph import Input, Node, walk
from coda.lowering.assemble import Packed
from coda.lowering.program import GemmKernel, Program, RowwiseKernel
from coda.lowering.roles import is_turned


def folded_weights(
    program: Program, tensors: Mapping[Node, Tensor], compute: torch.dtype, rounding: bool
) -> dict[Node, Tensor]:
    """Values of all prepared nodes.

    Weights of contractions come first, rounded as they are stored: sums over them must see the
    same rounded values, or a large mean would not cancel.
    """
    known = dict(tensors)
    factors = [c.rhs for k in program.gemms() for c in k.contracts]
    weights = [w.operands[0] if is_turned(w) else w for w in factors]
    nodes = list(program.prepared.values())
    for node in sorted(nodes, key=lambda n: n not in weights):
        (value,) = evaluate([node], known, program.sizes, compute)
        if node in weights and rounding:
            value = value.to(node.dtype.torch)
        known[node] = value.contiguous()
    return {n: known[n] for n in nodes}


def weight_matrix(kernel: GemmKernel, values: Mapping[Node, Tensor]) -> Tensor:
    """The GEMM's B, [N, K]: siblings one under the other, rows in the kernel's order of columns."""
    parts = [values[c.rhs] for c in kernel.contracts]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    order = kernel.assembled.order
    if order is None:
        return whole
    return whole[torch.from_numpy(order).to(whole.device)]


def packed_row(
    packed: Packed, sources: Mapping[int, Node], values: Mapping[Node, Tensor], like: Tensor
) -> Tensor:
    """One packed row operand, a vector of the compute type of `like`."""
    numbers = packed.numbers if packed.numbers is not None else packed.index * 0.0
    row = torch.from_numpy(numbers.copy()).to(like.device, like.dtype)
    source = torch.from_numpy(packed.source).to(like.device)
    index = torch.from_numpy(packed.index).to(like.device)
    for number, node in sources.items():
        here = source == number
        if bool(here.any()):
            row[here] = values[node].reshape(-1).to(like.dtype)[index[here]]
    return row


def weights_of(program: Program, kernel: GemmKernel | RowwiseKernel) -> tuple[Input, ...]:
    """The inputs on which a kernel's prepared tensors depend."""
    roots = list(kernel.assembled.sources.values())
    if isinstance(kernel, GemmKernel):
        roots += [c.rhs for c in kernel.contracts]
    return tuple(n for n in walk(roots) if isinstance(n, Input))
