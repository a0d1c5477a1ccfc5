"""Weights -> what the kernels load of them: views, or copies that are merged, folded and packed.

A prepared tensor depends on weights alone. It is made when a kernel first needs it, and again when
one of those weights has changed (torch counts the versions of a tensor). Weights that lie one below
the other in one memory are one matrix as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from coda.ir.evaluate import evaluate
from coda.ir.graph import Node
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.weights import one_below_another
from coda.lowering.algebra.roles import as_stored, stacked
from coda.lowering.program.body import Packed
from coda.lowering.program.program import Program


def together(program: Program, tensors: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
    """Prepared nodes that are arguments one below the other, where these lie so in memory."""
    found: dict[Node, Tensor] = {}
    for node in program.prepared.values():
        whole = one_below_another([tensors[i] for i in stacked(node)])
        if whole is not None:
            found[node] = whole
    return found


def folded_weights(
    program: Program,
    nodes: Iterable[Node],
    tensors: Mapping[Node, Tensor],
    compute: torch.dtype,
    rounding: bool,
) -> dict[Node, Tensor]:
    """Values of some prepared nodes; those that a GEMM reads as one matrix lie so in memory.

    Weights of contractions come first, rounded as they are stored: sums over them must see the
    same rounded values, or a large mean would not cancel.
    """
    known, nodes = dict(tensors), list(nodes)
    factors = [[c.rhs for c in k.mainloop.contracts] for k in gemms(program)]
    weights = {as_stored(w) for group in factors for w in group}
    for node in sorted(nodes, key=lambda n: n not in weights):
        (value,) = evaluate([node], known, program.sizes, compute)
        if node in weights and rounding:
            value = value.to(node.dtype.torch)
        known[node] = value.contiguous()
    for group in factors:
        if len(group) > 1 and all(n in nodes for n in group):
            parts = [known[n] for n in group]
            known |= zip(group, torch.cat(parts).split([len(p) for p in parts]), strict=True)
    return {n: known[n] for n in nodes}


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
