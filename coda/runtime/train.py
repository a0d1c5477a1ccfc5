"""A block, called where torch records gradients -> outputs, and a backward by the derived Program.

Eager calls are one autograd function; what torch compiles or traces are two operators. Both run the
same two Programs, and keep of the arguments only what the backward reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coda.errors import UnsupportedError
from coda.lowering.program import Program
from coda.runtime.run import (
    BACKENDS,
    Sizes,
    Trained,
    apart,
    bind,
    block_of,
    choose_backend,
    needs_dispatch,
    target_arch,
)


def train_block(
    number: int, inputs: list[Tensor], dims: list[int], backend: str, arch: str
) -> Sequence[Tensor]:
    """The outputs of a block, whose gradients its derived backward gives."""
    wanted = [t.requires_grad for t in inputs]
    if needs_dispatch(inputs):
        return train_op(number, inputs, dims, backend, arch, wanted)
    return _Eager.apply(number, dims, backend, arch, wanted, *inputs)


def trained(
    number: int, inputs: Sequence[Tensor], dims: Sequence[int], arch: str, wanted: Sequence[bool]
) -> tuple[Trained, Sizes]:
    """The Programs for these arguments, and the size of every symbol."""
    graph, sizes = bind(number, inputs, dims)
    pairs = zip(graph.inputs, wanted, strict=True)
    names = tuple(i.name for i, asked in pairs if asked and i.dtype.kind == "float")
    return block_of(number).trained_for(graph, target_arch(arch), names, sizes), sizes


def _run(
    program: Program, inputs: Sequence[Tensor], sizes: Sizes, backend: str
) -> Sequence[Tensor]:
    mine = {s: sizes[s] for s in program.sizes}
    return BACKENDS[choose_backend(backend)](program, inputs, mine)


def _forward(
    number: int,
    inputs: list[Tensor],
    dims: list[int],
    backend: str,
    arch: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The outputs, then what is saved."""
    found, sizes = trained(number, inputs, dims, arch, wanted)
    taken = {t.data_ptr() for t in inputs}
    outputs = _run(found.forward, inputs, sizes, backend)
    return [t.clone() if t.data_ptr() in taken else t for t in outputs]


def _backward(
    found: Trained, sizes: Sizes, backend: str, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of the wanted arguments; `tensors` are the backward's own arguments."""
    if found.backward is None:
        return []
    like = zip(found.backward.graph.inputs, tensors, strict=True)
    cast = [t if t.dtype == i.dtype.torch else t.to(i.dtype.torch) for i, t in like]
    return list(_run(found.backward, cast, sizes, backend))


def _kept(found: Trained, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that the backward reads, without the cotangents."""
    training = found.training
    known = dict(zip([i.name for i in training.forward.inputs], inputs, strict=True))
    names = [n for n, _ in training.forward.outputs]
    computed = dict(zip(names, outputs, strict=True))
    known |= {n: computed[n] for n in training.saved}
    cotangents = set(training.cotangents)
    return [known[i.name] for i in training.backward.inputs if i.name not in cotangents]


def _arguments(
    found: Trained, sizes: Sizes, kept: Sequence[Tensor], given: Sequence[Tensor | None]
) -> list[Tensor]:
    """The backward's arguments, with zeros for cotangents that nobody gave."""
    training = found.training
    cotangents = dict(zip(training.cotangents, given, strict=False))
    supply = iter(kept)
    like = next(t for t in (*kept, *given) if t is not None)
    out: list[Tensor] = []
    for node in training.backward.inputs:
        if node.name not in cotangents:
            out.append(next(supply))
            continue
        d = cotangents[node.name]
        if d is None:
            shape = [s.size(sizes) for s in node.shape]
            d = like.new_zeros(shape, dtype=node.dtype.torch)
        out.append(d.contiguous())
    return out


def _by_argument(found: Trained, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """One gradient for each argument of the block, or None."""
    known: dict[str, Tensor] = dict(zip(found.training.wanted, gradients, strict=True))
    return [known.get(i.name) for i in found.training.forward.inputs]


def _refuse_second_order(given: Sequence[Tensor | None], kept: Sequence[Tensor]) -> None:
    """Raise UnsupportedError where torch asks for the derivative of a derivative."""
    tensors = [t for t in (*given, *kept) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise UnsupportedError(
            "the gradients of a block have no gradients of their own",
            found="create_graph=True",
            help="call the torch function that the block stands for where you need them",
        )


class _Eager(torch.autograd.Function):
    """A call outside torch's compiler."""

    @staticmethod
    def forward(
        ctx: Any,
        number: int,
        dims: list[int],
        backend: str,
        arch: str,
        wanted: list[bool],
        *inputs: Tensor,
    ) -> Any:
        found, sizes = trained(number, inputs, dims, arch, wanted)
        outputs = _forward(number, list(inputs), dims, backend, arch, wanted)
        ctx.found, ctx.sizes, ctx.backend = found, sizes, backend
        ctx.save_for_backward(*_kept(found, inputs, outputs))
        ctx.set_materialize_grads(False)
        returned = tuple(outputs[: len(found.training.cotangents)])
        ctx.mark_non_differentiable(*(t for t in returned if not t.is_floating_point()))
        return returned

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        kept = ctx.saved_tensors
        _refuse_second_order(given, kept)
        found: Trained = ctx.found
        if all(d is None for d in given):
            return (None,) * (5 + len(found.training.forward.inputs))
        arguments = _arguments(found, ctx.sizes, kept, given)
        gradients = _backward(found, ctx.sizes, ctx.backend, arguments)
        return (None,) * 5 + tuple(_by_argument(found, gradients))


@torch.library.custom_op("coda::train", mutates_args=())
def train_op(
    number: int,
    inputs: list[Tensor],
    dims: list[int],
    backend: str,
    arch: str,
    wanted: list[bool],
) -> list[Tensor]:
    """Run a block for training: its outputs, then what is saved."""
    found = _forward(number, inputs, dims, backend, arch, wanted)
    return [t.contiguous() for t in apart(found)]


@train_op.register_fake
def _(
    number: int,
    inputs: list[Tensor],
    dims: list[int],
    backend: str,
    arch: str,
    wanted: list[bool],
) -> list[Tensor]:
    found, sizes = trained(number, inputs, dims, arch, wanted)
    return [
        inputs[0].new_empty([d.size(sizes) for d in n.shape], dtype=n.dtype.torch)
        for n in found.training.forward.roots
    ]


@torch.library.custom_op("coda::train_backward", mutates_args=())
def backward_op(
    number: int,
    shapes: list[Tensor],
    tensors: list[Tensor],
    dims: list[int],
    backend: str,
    arch: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of a block's wanted arguments.

    Args:
        number: from `register`.
        shapes: the block's arguments, for their shapes alone.
        tensors: the backward's arguments.
        dims, backend, arch, wanted: as in the forward.
    """
    found, sizes = trained(number, shapes, dims, arch, wanted)
    taken = {t.data_ptr() for t in tensors}
    gradients = _backward(found, sizes, backend, tensors)
    apart_ = apart([t.clone() if t.data_ptr() in taken else t for t in gradients])
    return [t.contiguous() for t in apart_]


@backward_op.register_fake
def _(
    number: int,
    shapes: list[Tensor],
    tensors: list[Tensor],
    dims: list[int],
    backend: str,
    arch: str,
    wanted: list[bool],
) -> list[Tensor]:
    found, sizes = trained(number, shapes, dims, arch, wanted)
    return [
        shapes[0].new_empty([d.size(sizes) for d in n.shape], dtype=n.dtype.torch)
        for n in found.training.backward.roots
    ]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    number, tensors, dims, backend, arch, wanted = inputs
    found, _ = trained(number, tensors, dims, arch, wanted)
    ctx.call = number, dims, backend, arch, wanted
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, *_kept(found, tensors, output))


def _gradients(ctx: Any, given: Sequence[Tensor | None]) -> Any:
    tensors = ctx.saved_tensors
    inputs, kept = list(tensors[: ctx.count]), tensors[ctx.count :]
    number, dims, backend, arch, wanted = ctx.call
    found, sizes = trained(number, inputs, dims, arch, wanted)
    _refuse_second_order(given, ())
    arguments = _arguments(found, sizes, kept, given)
    gradients = backward_op(number, inputs, arguments, dims, backend, arch, wanted)
    return None, _by_argument(found, gradients), None, None, None, None


train_op.register_autograd(_gradients, setup_context=_save)
