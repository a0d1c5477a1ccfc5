"""`CODA_DISABLE=1`: a block's arguments -> its outputs by torch, op by op, without any lowering.

Torch's autograd differentiates the operators, so neither coda's kernels nor its derivatives run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coda.ir.evaluate import evaluate
from coda.ir.graph import Node
from coda.runtime import settings
from coda.runtime.call import bind, memory_of
from coda.runtime.modes import opaque

DISABLED = "CODA_DISABLE=1 leaves everything to torch"


def disabled() -> bool:
    """Whether `CODA_DISABLE=1` leaves everything to torch. Raises CodaError for an unknown value.

    To torch's compiler it is a constant: compiled code keeps what held when it was compiled.
    """
    return settings.DISABLE.get() == "1"


disabled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run_in_torch(handle: str, inputs: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """The outputs of a block by torch, each operation rounded to its dtype.

    Args:
        handle: of the block, as in `run_block`.
        inputs: its arguments in order.
        dims: sizes of the graph's symbols in their order, -1 where the shapes give them; or empty.

    Raises:
        CallError: if the arguments do not fit the block.
    """
    graph, sizes = bind(handle, inputs, dims)
    values: dict[Node, Tensor] = dict(zip(graph.inputs, inputs, strict=True))
    with torch.autocast(inputs[0].device.type, enabled=False):
        found = evaluate(graph.roots, values, sizes, None)
    taken = {memory_of(t) for t in inputs}
    return [t.clone() if memory_of(t) in taken else t for t in found]


run_in_torch = opaque(_run_in_torch)  # a compiler breaks its graph here: it traces no graph of ours
