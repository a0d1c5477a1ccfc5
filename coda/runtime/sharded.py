"""DTensor arguments -> a call on each rank's local tensors, and DTensor outputs.

On each mesh axis at most one dim of the block is sharded: rows of activations (data and sequence
parallel), or columns and rows of weights (tensor parallel). `coda.ir.sharding` says what each rank
then has of outputs and gradients: a shard, a replica or a partial sum. The only communication is
the sum of a gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from coda.errors import CallError
from coda.ir.graph import Graph, Input
from coda.ir.sharding import (
    FULL,
    PARTIAL,
    SPLIT,
    Inseparable,
    ShardedBlock,
    axis_of,
    candidates,
    share,
)
from coda.lowering.program.cost import describe
from coda.runtime.bind import bind_sizes
from coda.runtime.modes import opaque


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether an argument is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # a DTensor exists only if it is imported
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def _call_sharded(
    graph: Graph,
    tensors: Sequence[Any],
    dims: dict[str, int],
    call: Callable[[list[Tensor], dict[str, int]], Sequence[Tensor]],
) -> list[Tensor]:
    """The outputs of a block whose arguments are DTensors.

    Args:
        graph: the block.
        tensors: its arguments.
        dims: global sizes that the shapes do not determine.
        call: runs the block on local tensors, with local sizes.

    Raises:
        CallError: for placements under which ranks cannot compute their parts independently.
    """
    from torch.distributed.tensor import DTensor

    mesh = _mesh_of(graph, tensors)
    sizes = bind_sizes(graph, tensors, dims)
    plans = [_shared(graph, tensors, i) for i in range(mesh.ndim)]
    local = [
        _local(node, t, [p and p.gradients[node.name] for p in plans])
        for node, t in zip(graph.inputs, tensors, strict=True)
    ]
    mine = dict(dims)
    for plan, count in zip(plans, mesh.shape, strict=True):
        if plan is not None and plan.symbol in mine:
            mine[plan.symbol] //= count
    outputs = call(local, mine)
    found: list[Tensor] = []
    for i, ((_, node), value) in enumerate(zip(graph.outputs, outputs, strict=False)):
        places = [_placement(node.shape, p and p.outputs[i], p) for p in plans]
        shape = torch.Size(d.size(sizes) for d in node.shape)
        stride = torch.empty(shape, device="meta").stride()
        wrap = DTensor.from_local(value, mesh, places, run_check=False, shape=shape, stride=stride)
        found.append(wrap)
    return found


# torch.compile breaks its graph here: the analysis cannot be traced.
call_sharded: Callable[..., list[Tensor]] = opaque(_call_sharded)


def _mesh_of(graph: Graph, tensors: Sequence[Any]) -> Any:
    """The mesh of all arguments. Raises CallError if one is no DTensor, or is on another mesh."""
    from torch.distributed.tensor import DTensor

    if len(tensors) != len(graph.inputs):
        raise CallError(
            f"`{graph.name}` takes {len(graph.inputs)} tensors", found=str(len(tensors))
        )
    first = next(t for t in tensors if isinstance(t, DTensor))
    for node, t in zip(graph.inputs, tensors, strict=True):
        if not isinstance(t, DTensor):
            raise CallError(
                f"`{node.name}` is a plain tensor among DTensors",
                found=str(tuple(t.shape)),
                help=f"distribute_tensor({node.name}, mesh, [Replicate()])",
            )
        if t.device_mesh != first.device_mesh:
            raise CallError(
                f"`{node.name}` is on another mesh", found=f"{t.device_mesh}", help="use one mesh"
            )
    return first.device_mesh


def _shared(graph: Graph, tensors: Sequence[Any], axis: int) -> ShardedBlock | None:
    """The dim that is sharded on a mesh axis, and the states of outputs and gradients."""
    split: list[tuple[Input, int]] = []
    for node, t in zip(graph.inputs, tensors, strict=True):
        place = t.placements[axis]
        if place.is_shard():
            split.append((node, place.dim % node.rank))
        elif not place.is_replicate():
            raise CallError(
                f"`{node.name}` is {place!r}: a block reads whole values",
                help=f"{node.name}.redistribute(placements=[Replicate()])",
            )
    if not split:
        return None
    refused: Exception | None = None
    for symbol in candidates(graph, [n.shape[a] for n, a in split]):
        try:
            _check_places(graph, tensors, axis, symbol)
            return share(graph, symbol)
        except Inseparable as e:
            refused = refused or _refusal(symbol, e)
        except CallError as e:
            refused = refused or e
    if refused is not None:
        raise refused
    names = ", ".join(f"`{n.name}` along `{n.shape[a]}`" for n, a in split)
    raise CallError("one mesh axis shares out one dim of a block", found=names)


def _check_places(graph: Graph, tensors: Sequence[Any], axis: int, symbol: str) -> None:
    """Raise CallError for an argument that is not sharded as the dim is."""
    for node, t in zip(graph.inputs, tensors, strict=True):
        wanted, place = axis_of(node.shape, symbol), t.placements[axis]
        found = place.dim % node.rank if place.is_shard() else None
        if found != wanted:
            right = "Replicate()" if wanted is None else f"Shard({wanted})"
            raise CallError(
                f"`{node.name}` is not sharded as `{symbol}` is",
                found=repr(place),
                help=f"{node.name}.redistribute(placements=[{right}])",
            )
        count = t.device_mesh.shape[axis]
        if wanted is not None and t.shape[wanted] % count:
            raise CallError(
                f"`{symbol}` is not sharded evenly",
                found=f"axis {wanted} of `{node.name}` is {t.shape[wanted]}, on {count} ranks",
            )


def _refusal(symbol: str, e: Inseparable) -> CallError:
    return CallError(
        f"`{symbol}` is sharded among ranks, and `{describe(e.node)}` cannot be: {e}",
        help="end the block before it, and redistribute what it reads",
        where=e.node.where,
    )


def _local(node: Input, tensor: Any, kinds: Sequence[str | None]) -> Tensor:
    """This rank's part of an argument; the gradient comes back with the argument's placements."""
    from torch.distributed.tensor import Partial

    if tensor.requires_grad and torch.is_grad_enabled() and "" in kinds:
        raise CallError(
            f"the gradient of `{node.name}` is a sum over ranks in one part and whole in another",
            help="make two blocks of it, or pass it twice under two names",
        )
    summed = [
        Partial() if k == PARTIAL else p for k, p in zip(kinds, tensor.placements, strict=True)
    ]
    if tuple(summed) == tuple(tensor.placements):
        return tensor.to_local()
    return _Whole.apply(tensor).to_local(grad_placements=summed)


class _Whole(torch.autograd.Function):
    """A tensor whose gradient is summed over ranks as soon as it is computed."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Any:
        ctx.placements = tensor.placements
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        return given[0].redistribute(placements=ctx.placements)


def _placement(shape: Any, state: str | None, plan: ShardedBlock | None) -> Any:
    """The placement of an output on one mesh axis."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if plan is None or state == FULL:
        return Replicate()
    axis = axis_of(shape, plan.symbol)
    return Shard(axis) if state == SPLIT and axis is not None else Partial()
