"""Gradients of weights, added where they are kept by the kernels that compute them.

Torch adds what a backward returns to `.grad` in a pass of its own, which reads the new gradient and
the old one and writes the sum. Inside `accumulate_gradients()` the epilogue of the weight's GEMM
does it: it loads the old gradient, adds in float32, and stores over it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from coda.ir.types import DType, from_torch

_lock = threading.Lock()
_depth = 0  # of the whole process: autograd runs backwards on threads of its own

Leaves = Sequence["weakref.ref[Tensor] | None"]


@contextmanager
def accumulate_gradients() -> Iterator[None]:
    """Let backwards of blocks add weights' gradients in place: `with ...: loss.backward()`.

    The gradient of a parameter goes to its `main_grad`, if it has that attribute (a tensor of the
    parameter's shape, in float32 or the parameter's type), else to its `.grad`. Kernels that
    compute the gradient of a matrix add it there. A parameter with neither gets its `.grad` as
    always, and so does one with hooks, which see its gradient.

    `torch.autograd.grad` gives no gradients of such parameters inside, and data-parallel wrappers
    do not see them: use it where gradients are not reduced (`no_sync()`). Blocks under
    `torch.compile` are not concerned. The context is that of the process.
    """
    global _depth
    with _lock:
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1


def leaves_of(inputs: Sequence[Tensor]) -> Leaves:
    """The parameters among a call's arguments."""
    return [weakref.ref(t) if t.requires_grad and t.is_leaf else None for t in inputs]


def kept_gradients(names: Sequence[str], leaves: Leaves) -> dict[str, Tensor]:
    """Tensors to which gradients are added in this backward, by the argument's name."""
    if not _depth:
        return {}
    found: dict[str, Tensor] = {}
    for name, reference in zip(names, leaves, strict=True):
        leaf = reference() if reference is not None else None
        held = None if leaf is None else _kept(leaf)
        if held is not None:
            found[name] = held
    return found


def _kept(leaf: Tensor) -> Tensor | None:
    """Where a parameter's gradient is added, or None where torch has to see it."""
    if leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
        return None
    held = getattr(leaf, "main_grad", None)
    held = leaf.grad if held is None else held
    if type(held) is not Tensor or held.layout != torch.strided or held.requires_grad:
        return None
    types = (torch.float32, leaf.dtype)
    same = held.shape == leaf.shape and held.device == leaf.device
    return held if same and held.dtype in types else None


def in_kernels(kept: Mapping[str, Tensor]) -> dict[str, DType]:
    """The element types of those that a GEMM's epilogue adds to: contiguous matrices, each once."""
    found: dict[str, DType] = {}
    seen: set[int] = set()
    for name, held in kept.items():
        dtype = from_torch(held.dtype)
        if dtype and held.ndim == 2 and held.is_contiguous() and held.data_ptr() not in seen:
            found[name] = dtype
            seen.add(held.data_ptr())
    return found


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Contiguous matrices as rows of one, where they lie one behind the other in one memory.

    So lie gradients of siblings (q, k and v) that a backward has given: rows of one product.
    """
    first, rows = tensors[0], sum(t.shape[0] for t in tensors)
    end, memory = first.data_ptr(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        same = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:]
        inside = tensor.untyped_storage().data_ptr() == memory and tensor.data_ptr() == end
        if not (same and inside):
            return None
        end += tensor.numel() * tensor.element_size()
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def add(held: Tensor, gradient: Tensor, summed: bool) -> None:
    """Leave a gradient where it is kept. `summed`: it is the sum already, in memory or on its way.

    Kernels write behind torch's back, so its count of changes is moved on by hand.
    """
    if not summed:
        held.add_(gradient)
    elif gradient.data_ptr() != held.data_ptr():
        held.copy_(gradient)
    else:
        torch.autograd.graph.increment_version(held)
