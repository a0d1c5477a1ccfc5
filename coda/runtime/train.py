"""A block's call where torch records gradients -> outputs, and a backward by a derived Program.

An eager call is an autograd function; a compiled call is two operators. Both run the same two
Programs, and save only those arguments that the backward reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coda.errors import UnsupportedError
from coda.ir.graph import Graph
from coda.ir.types import DTYPES, DType
from coda.lowering.algebra.training import Training
from coda.lowering.program.program import Program
from coda.runtime.accumulate import add, in_kernels, joined, kept_gradients, leaves_of
from coda.runtime.bind import size_hint
from coda.runtime.call import (
    CallOptions,
    Sizes,
    apart,
    bind,
    block_of,
    execute,
    memory_of,
    needs_dispatch,
)
from coda.runtime.donation import alone, given_up
from coda.runtime.modes import is_transformed, opaque, refuse_vmap
from coda.runtime.plan import Plan, SavedLayout, make_plan, names_requiring_grad, plan_of


def train_block(inputs: list[Tensor], options: CallOptions) -> Sequence[Tensor]:
    """The outputs of a block; their gradients are computed by its derived backward."""
    if needs_dispatch(inputs) and not is_transformed():
        handle, dims, backend, arch, _, memory, requires_grad = options
        return train_op(handle, inputs, list(dims), backend, arch, memory, list(requires_grad))
    plan = plan_of(inputs, options)
    return (_Transformed if is_transformed() else _Eager).apply(plan, *inputs)


def _refuse_second_order(*_: Any) -> Any:
    """Raise UnsupportedError: torch asks for the derivative of a derivative."""
    raise UnsupportedError(
        "the gradients of a block have no gradients of their own",
        found="a derivative of what create_graph=True gave",
        help="call the torch function that the block stands for where you need them",
    )


def _owned(tensor: Tensor) -> Tensor:
    """The same memory, not as a view: callers may change it in place."""
    if not tensor._is_view():
        return tensor
    own = tensor.new_empty(0)
    return own.set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def _witnessed(kept: Sequence[Tensor], returned: Sequence[Tensor]) -> list[Tensor]:
    """The saved tensors, followed by the outputs that share storage with them.

    Torch then detects if such an output is changed in place before the backward.
    """
    same = {(t.data_ptr(), t.dtype, t.shape, t.stride()): t for t in returned}
    saved = [same.get((t.data_ptr(), t.dtype, t.shape, t.stride()), t) for t in kept]
    shared = {memory_of(t) for t in kept}
    witnesses = [t for t in returned if memory_of(t) in shared]
    return saved + [t for t in witnesses if not any(t is s for s in saved)]


def _compute(plan: Plan, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(map(_owned, execute(plan.forward, inputs, plan.sizes, plan.backend)))


def _record(ctx: Any, plan: Plan, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Save what the backward reads."""
    ctx.plan, ctx.leaves = plan, leaves_of(inputs)
    ctx.block = block_of(plan.handle)  # lives until the backward
    returned = outputs[: len(plan.reached)]
    kept = plan.layout.saved(inputs, outputs)
    ctx.count = len(kept)
    ctx.save_for_backward(*(kept if is_transformed() else _witnessed(kept, returned)))
    ctx.set_materialize_grads(False)


def _unreached(plan: Plan, returned: Sequence[Tensor]) -> list[Tensor]:
    """Outputs without a gradient."""
    pairs = zip(returned, plan.reached, strict=True)
    return [t for t, reached in pairs if not (reached and t.is_floating_point())]


class _Eager(torch.autograd.Function):
    """A call outside torch's compiler."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Tensor) -> Any:
        alone()  # counted here, not within a backward
        outputs = _compute(plan, inputs)
        _record(ctx, plan, inputs, outputs)
        returned = outputs[: len(plan.reached)]
        ctx.mark_non_differentiable(*_unreached(plan, returned))
        return returned

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        return _opaque_backward(ctx, given)


class _Transformed(torch.autograd.Function):
    """A call inside a transform of `torch.func`: the saved values are among its outputs."""

    @staticmethod
    def forward(plan: Plan, *inputs: Tensor) -> Any:
        return _compute(plan, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        plan: Plan = inputs[0]
        _record(ctx, plan, inputs[1:], output)
        ctx.mark_non_differentiable(*_unreached(plan, output[: len(plan.reached)]))

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        if any(d is not None for d in given[len(ctx.plan.reached) :]):
            _refuse_second_order()
        return _run_backward(ctx, given)


def _run_backward(ctx: Any, given: Sequence[Tensor | None]) -> Any:
    """The gradients of a call."""
    plan: Plan = ctx.plan
    refuse_vmap([d for d in given if d is not None])
    if plan.backward is None or all(d is None for d in given):
        return (None,) * (1 + len(plan.layout.gradients))
    saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        kept = saved[: ctx.count] if is_transformed() else plan.layout.tracked(saved)
        arguments = plan.layout.arguments(plan.sizes, kept, given)
        return None, *plan.layout.by_argument(_Backward.apply(plan, *arguments))
    names = [i.name for i in plan.training.forward.inputs]
    held = kept_gradients(names, ctx.leaves)
    held = {n: t for n, t in held.items() if n in plan.training.requires_grad}
    targets = in_kernels(held)
    program, sums = _adding(plan, held, targets) if targets else (plan.backward, [])
    places = plan.layout.donated(program)
    donated = frozenset(places[p] for p in given_up(ctx, saved, tuple(places)))
    arguments = plan.layout.arguments(plan.sizes, saved[: ctx.count], given)
    gradients = _computed(plan, program, [*arguments, *sums], held, targets, donated)
    return None, *plan.layout.by_argument(gradients)


def _adding(
    plan: Plan, held: Mapping[str, Tensor], targets: Mapping[str, DType]
) -> tuple[Program, list[Tensor]]:
    """The backward that adds to tensors of these types, and the tensors in its order."""
    matrices = {s: joined([held[n] for n in s]) for s in plan.siblings if targets.keys() >= {*s}}
    beside = [names for names, matrix in matrices.items() if matrix is not None]
    program, order = plan.accumulating(targets, beside)
    sums = [held[n[0]] if len(n) == 1 else matrices[n] for n in order]
    return program, [t for t in sums if t is not None]


def _computed(
    plan: Plan,
    program: Program,
    arguments: Sequence[Tensor],
    held: Mapping[str, Tensor],
    targets: Collection[str],
    donated: frozenset[str],
) -> list[Tensor | None]:
    """The gradients of differentiated arguments, None for those that were added in place."""
    count = len(plan.layout.inputs)
    typed = [*plan.layout.typed(arguments[:count]), *arguments[count:]]
    gradients = execute(program, typed, plan.sizes, plan.backend, donated)
    found: list[Tensor | None] = []
    for name, gradient in zip(plan.training.requires_grad, gradients, strict=True):
        found.append(None if name in held else gradient)
        if name in held:
            add(held[name], gradient, summed=name in targets)
    return found


_opaque_backward = opaque(_run_backward)  # to a compiler of backwards


class _Backward(torch.autograd.Function):
    """The backward as an autograd function, for calls whose backward torch records."""

    @staticmethod
    def forward(plan: Plan, *arguments: Tensor) -> Any:
        assert plan.backward is not None
        typed = plan.layout.typed(arguments)
        return tuple(execute(plan.backward, typed, plan.sizes, plan.backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        _refuse_second_order()


@torch.library.custom_op("coda::train", mutates_args=())
def train_op(
    handle: str,
    inputs: list[Tensor],
    dims: list[int],
    backend: str,
    arch: str,
    memory: str,
    requires_grad: list[bool],
) -> list[Tensor]:
    """Run a block for training: its outputs, followed by the saved values."""
    options = CallOptions(handle, tuple(dims), backend, arch, False, memory, tuple(requires_grad))
    plan = plan_of(inputs, options)
    found = execute(plan.forward, inputs, plan.sizes, plan.backend)
    return [t.contiguous() for t in apart(found)]


def _training(
    handle: str, graph: Graph, sizes: Sizes, memory: str, requires_grad: Sequence[bool]
) -> Training:
    """The training of a call whose sizes torch may keep symbolic."""
    known = {s: size_hint(d) for s, d in sizes.items()}
    return block_of(handle).training_for(
        graph, names_requiring_grad(graph, requires_grad), memory, known
    )


@train_op.register_fake
def _(
    handle: str,
    inputs: list[Tensor],
    dims: list[int],
    backend: str,
    arch: str,
    memory: str,
    requires_grad: list[bool],
) -> list[Tensor]:
    graph, sizes = bind(handle, inputs, dims)
    training = _training(handle, graph, sizes, memory, requires_grad)
    return _empty(training.forward, sizes, inputs[0])


def _empty(graph: Graph, sizes: Sizes, like: Tensor) -> list[Tensor]:
    return [
        like.new_empty([d.size(sizes) for d in n.shape], dtype=n.dtype.torch) for n in graph.roots
    ]


@torch.library.custom_op("coda::train_backward", mutates_args=())
def backward_op(
    handle: str,
    tensors: list[Tensor],
    sizes: list[int],
    dtype: str,
    backend: str,
    arch: str,
    memory: str,
    requires_grad: list[bool],
) -> list[Tensor]:
    """The gradients of a block's differentiated arguments.

    Args:
        handle: from `register`.
        tensors: the backward's arguments.
        sizes: of the block's symbols, in their order.
        dtype: of arguments that are declared without a type.
        backend, arch, memory, requires_grad: as in the forward.
    """
    graph = block_of(handle).graph_of(DTYPES[dtype])
    known = dict(zip(graph.symbols, sizes, strict=True))
    options = CallOptions(handle, (), backend, arch, False, memory, tuple(requires_grad))
    plan = make_plan(graph, known, options)
    assert plan.backward is not None
    arguments = plan.layout.typed(tensors)
    gradients = execute(plan.backward, arguments, known, plan.backend)
    return [t.contiguous() for t in apart(gradients)]


@backward_op.register_fake
def _(
    handle: str,
    tensors: list[Tensor],
    sizes: list[int],
    dtype: str,
    backend: str,
    arch: str,
    memory: str,
    requires_grad: list[bool],
) -> list[Tensor]:
    graph = block_of(handle).graph_of(DTYPES[dtype])
    known = dict(zip(graph.symbols, sizes, strict=True))
    training = _training(handle, graph, known, memory, requires_grad)
    return _empty(training.backward, known, tensors[0])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    handle, tensors, dims, backend, arch, memory, requires_grad = inputs
    graph, sizes = bind(handle, tensors, dims)
    training = _training(handle, graph, sizes, memory, requires_grad)
    ctx.training, ctx.sizes, ctx.dims = training, sizes, dims
    declared = zip(graph.inputs, block_of(handle).undeclared, strict=True)
    free = [i.dtype.name for i, undeclared in declared if undeclared]
    ctx.call = handle, [sizes[s] for s in graph.symbols], (free or ["bf16"])[0]
    ctx.options = backend, arch, memory, requires_grad
    ctx.layout = SavedLayout.of(training)
    ctx.save_for_backward(*ctx.layout.saved(tensors, output))


def _gradients(ctx: Any, given: Sequence[Tensor | None]) -> Any:
    kept, training = ctx.saved_tensors, ctx.training
    found: list[Tensor | None] = [None] * len(training.forward.inputs)
    handle, sizes, dtype = ctx.call
    if training.requires_grad and any(d is not None for d in given):
        arguments = ctx.layout.arguments(ctx.sizes, kept, given)
        gradients = backward_op(handle, arguments, sizes, dtype, *ctx.options)
        found = ctx.layout.by_argument(gradients)
    nothing = None if ctx.dims else []  # torch takes an empty list for one of tensors
    return None, found, nothing, None, None, None, None


train_op.register_autograd(_gradients, setup_context=_save)
backward_op.register_autograd(_refuse_second_order)
