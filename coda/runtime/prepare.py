"""Weights -> the tensors that kernels load: views, or copies that are merged, folded and packed.

A prepacked tensor depends on weights alone. It is computed when a kernel first needs it, and again
after one of those weights has changed (torch counts the versions of a tensor). Weights that are
stacked along rows in one storage are used as one matrix, without a copy.
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
    """Prepacked nodes whose arguments are already stacked along rows in one storage."""
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
    *,
    rounding: bool,
) -> dict[Node, Tensor]:
    """Values of some prepacked nodes; weights that one GEMM reads are row slices of one matrix.

    Weights of contractions come first, rounded to the type in which they are stored: sums over them
    must see the same rounded values, or a large mean would not cancel.
    """
    known, nodes = dict(tensors), list(nodes)
    factors = [[c.rhs for c in k.mainloop.contracts] for k in gemms(program)]
    every = [o for k in gemms(program) for c in k.mainloop.contracts for o in c.operands]
    weights = {as_stored(o) for o in every}
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
    """One packed row vector, [columns], of the dtype and device of `like`."""
    numbers = packed.numbers if packed.numbers is not None else packed.index * 0.0
    row = torch.from_numpy(numbers.copy()).to(like.device, like.dtype)
    source = torch.from_numpy(packed.source).to(like.device)
    index = torch.from_numpy(packed.index).to(like.device)
    for number, node in sources.items():
        here = source == number
        if bool(here.any()):
            row[here] = values[node].reshape(-1).to(like.dtype)[index[here]]
    return row
