"""A backward's weight gradients -> added in place to `.grad` or `main_grad` by their kernels.

Torch adds the result of a backward to `.grad` in a separate kernel, which reads the new and the old
gradient and writes the sum. Inside `accumulate_gradients()` the epilogue of the weight's GEMM does
this: it loads the old gradient, adds in float32, and stores the sum in place.
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
_depth = 0  # open contexts of the process: autograd runs backwards on its own threads

Leaves = Sequence["weakref.ref[Tensor] | None"]


@contextmanager
def accumulate_gradients() -> Iterator[None]:
    """Let backwards of blocks add weights' gradients in place: `with ...: loss.backward()`.

    The gradient of a parameter is added to its `main_grad`, if it has that attribute (a tensor of
    the parameter's shape, in float32 or the parameter's dtype), else to its `.grad`. Kernels that
    compute the gradient of a contiguous matrix add it themselves. A parameter that has neither gets
    its `.grad` from torch as usual, and so does a parameter with hooks, which see its gradient.

    `torch.autograd.grad` returns no gradient of such a parameter inside the context, and
    data-parallel wrappers do not see one: use it where gradients are not reduced (`no_sync()`).
    Blocks under `torch.compile` are not affected. The context applies to the whole process.
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
    """Weak references to the parameters among a call's arguments, None for other arguments."""
    return [weakref.ref(t) if t.requires_grad and t.is_leaf else None for t in inputs]


def kept_gradients(names: Sequence[str], leaves: Leaves) -> dict[str, Tensor]:
    """The tensors that this backward adds gradients to, by argument name."""
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
    """The tensor that accumulates a parameter's gradient; None if torch has to see the gradient."""
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
    """Element types of the tensors that GEMM epilogues add to: contiguous matrices, each once."""
    found: dict[str, DType] = {}
    seen: set[int] = set()
    for name, held in kept.items():
        dtype = from_torch(held.dtype)
        if dtype and held.ndim == 2 and held.is_contiguous() and held.data_ptr() not in seen:
            found[name] = dtype
            seen.add(held.data_ptr())
    return found


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Contiguous matrices [N_i, K], adjacent in one storage -> one view [sum N_i, K]; else None.

    A backward returns the gradients of siblings (q, k and v) in this form: row slices of one
    product.
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


def add(held: Tensor, gradient: Tensor, *, summed: bool) -> None:
    """Store a gradient in the tensor that accumulates it.

    With `summed`, `gradient` already includes `held`: a kernel has added it, perhaps in place.
    Torch does not see what kernels write, so the version of `held` is incremented by hand.
    """
    if not summed:
        held.add_(gradient)
    elif gradient.data_ptr() != held.data_ptr():
        held.copy_(gradient)
    else:
        torch.autograd.graph.increment_version(held)
