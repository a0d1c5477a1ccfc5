"""Matrices that kernels read as one -> row slices of one buffer, which the parameters alias.

A parameter stays the same object, with its name, hooks, gradient and optimizer state; only its
storage is replaced. Nothing is moved that other code may reference: a tensor that is part of a
larger storage (flattened, or tied by a view), a storage with other references (buffers of sharded
training, a graph of autograd), or a tensor of a subclass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from coda.errors import CallError
from coda.runtime.prepare import one_below_another

ALONE = 2  # references to a storage: its tensor, and torch's Python object for it


def share_weights(*weights: nn.Parameter) -> None:
    """Stack matrices along rows in one buffer, so that kernels read them as one matrix.

    Args:
        weights: contiguous parameters [N_i, K] of one K, dtype and device, in the order in which a
            block takes them: q, k and v; gate and up. They stay the same objects and keep their
            values. A module's `.to()` and a deep copy separate them again.

    Raises:
        CallError: if one of them cannot be moved.
    """
    why = share(weights)
    if why:
        raise CallError(
            "these weights cannot be moved into one buffer",
            found=why,
            help="blocks then read them from a copy, made once for each version of them",
        )


def share(weights: Sequence[Tensor]) -> str:
    """Move matrices into one buffer, if they are not in one; returns why they cannot be, or ""."""
    if lie_together(weights):
        return ""
    why = why_apart(weights)
    if why:
        return why
    with torch.inference_mode(False), torch.no_grad():
        first, rows = weights[0], [len(w) for w in weights]
        buffer = first.new_empty((sum(rows), first.shape[1]), requires_grad=False)
        for weight, part in zip(weights, buffer.split(rows), strict=True):
            part.copy_(weight)
            weight.data = part
    return ""


def lie_together(weights: Sequence[Tensor]) -> bool:
    """Whether matrices are stacked along rows in one storage."""
    plain = all(type(w) in (Tensor, nn.Parameter) and w.layout == torch.strided for w in weights)
    return plain and all(not w.is_meta for w in weights) and one_below_another(weights) is not None


def why_apart(weights: Sequence[Tensor]) -> str:
    """Why matrices cannot be moved into one buffer, or ""."""
    for number, weight in enumerate(weights):
        why = _why_fixed(weight)
        if why:
            return f"weight {number} of {len(weights)} {why}"
    if len({id(w) for w in weights}) != len(weights):
        return "one of them is there twice"
    kinds = {(w.dtype, w.device, w.shape[1]) for w in weights}
    if len(kinds) > 1:
        shown = ", ".join(f"{tuple(w.shape)} of {w.dtype} on {w.device}" for w in weights)
        return f"they differ in width, type or device: {shown}"
    return ""


def _why_fixed(weight: Tensor) -> str:
    """Why one parameter is not moved, or ""."""
    if type(weight) is not nn.Parameter:
        return f"is not a plain parameter: {type(weight).__name__}"
    if weight.layout != torch.strided or weight.ndim != 2 or not weight.is_contiguous():
        return "is not a contiguous matrix"
    if weight.is_meta or not weight.numel():
        return "has no memory"
    if weight.is_inference():
        return "was made in inference mode"
    size = weight.element_size()
    if weight.shape[1] * size % 16:
        return f"has rows of {weight.shape[1] * size} bytes, not a multiple of 16"
    memory = weight.untyped_storage()
    if memory.nbytes() != weight.numel() * size:
        return "is a part of a larger memory"
    if memory.is_shared() and not weight.is_cuda:
        return "is shared with other processes"
    if torch._C._storage_Use_Count(memory._cdata) > ALONE:
        return "has storage that another tensor aliases"
    return ""


def shared_groups(weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, ...]]:
    """Names of the tensors that are stacked along rows in one storage, in that order."""
    by_memory: dict[int, list[tuple[str, Tensor]]] = {}
    for name, weight in weights:
        if type(weight) is nn.Parameter and weight.ndim == 2 and weight.numel():
            by_memory.setdefault(weight.untyped_storage().data_ptr(), []).append((name, weight))
    found: list[tuple[str, ...]] = []
    for group in by_memory.values():
        ordered = sorted(group, key=lambda item: item[1].storage_offset())
        if len(ordered) > 1 and lie_together([w for _, w in ordered]):
            found.append(tuple(n for n, _ in ordered))
    return found
