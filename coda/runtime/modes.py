"""A call under torch's modes -> its arguments and types under autocast, or a refusal.

`torch.func.vmap` and forward-mode derivatives are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._C._functorch as functorch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

from coda.errors import UnsupportedError
from coda.ir.graph import Graph


def opaque(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; torch's compiler breaks its graph at a call of it.

    `torch.compiler.disable` does the same, but imports the compiler at once, which takes longer
    than the rest of coda. Here it is imported when the function is first called.
    """
    return _disable_dynamo(fn)


def cast_arguments(
    graph: Graph,
    undeclared: Sequence[bool],
    multiplied: Sequence[bool],
    tensors: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], str]:
    """A call's arguments under autocast, and the types in which the block is to be computed.

    Arguments that are declared with a type are cast to it. Of the others, those that only
    contractions read are cast to autocast's type; for the rest, `autocast_graph` chooses the types
    inside the block. Tensors that torch does not cast (float64, and types that are no floats) are
    left alone.

    Args:
        graph: the block, with any type for arguments declared without one.
        undeclared: for each argument, whether it is declared without a type.
        multiplied: for each argument, whether only contractions read it.
        tensors: the arguments.

    Returns:
        The arguments, and type names as `Block.under_autocast` takes them: autocast's type, then
        one for each argument, "-" where it is declared; "" where autocast changes nothing.
    """
    if len(tensors) != len(graph.inputs):
        return tuple(tensors), ""
    narrow = torch.get_autocast_dtype(tensors[0].device.type)
    cast: list[Tensor] = []
    types: list[str] = []
    rows = zip(graph.inputs, undeclared, multiplied, tensors, strict=True)
    for node, free, factor, tensor in rows:
        wanted = narrow if factor else tensor.dtype
        wanted = wanted if free else node.dtype.torch
        floats = tensor.dtype in NAMES and (free or node.dtype.kind == "float")
        cast.append(tensor.to(wanted) if floats else tensor)
        types.append(NAMES.get(cast[-1].dtype, "") if free else "-")
    chosen = "" not in types and any(t != "-" for t in types)
    return tuple(cast), " ".join([NAMES[narrow], *types]) if chosen else ""


NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}  # cast by torch


def is_transformed() -> bool:
    """Whether the call happens inside a transform of `torch.func`."""
    if torch.compiler.is_compiling():
        return False
    return functorch.peek_interpreter_stack() is not None


def refuse_transforms(tensors: Sequence[Tensor]) -> None:
    """Raise UnsupportedError under transforms for which coda has no Program."""
    if torch.compiler.is_compiling():
        return
    if is_transformed():
        stack = functorch.get_interpreter_stack() or []
        if any(i.key() == functorch.TransformType.Jvp for i in stack):
            _refuse_forward_mode()
        refuse_vmap(tensors)
    elif forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        _refuse_forward_mode()


def refuse_vmap(tensors: Sequence[Tensor]) -> None:
    """Raise UnsupportedError if a tensor has a batch axis that `torch.func.vmap` hides."""
    for tensor in tensors:
        if functorch.is_legacy_batchedtensor(tensor):
            _refuse_hidden_axis("torch.autograd.grad(..., is_grads_batched=True)")
        while functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                _refuse_hidden_axis("torch.func.vmap")
            tensor = functorch.get_unwrapped(tensor)


def _refuse_hidden_axis(found: str) -> None:
    raise UnsupportedError(
        "a block is not mapped over a hidden axis",
        found=found,
        help="give the batch an axis of its own in the block, as in `B S D`",
    )


def _refuse_forward_mode() -> None:
    raise UnsupportedError(
        "a block has no forward-mode derivative",
        found="torch.func.jvp, or torch.autograd.forward_ad",
        help="torch.func.vjp, or call the torch function that the block stands for",
    )
