"""A block, called where torch records gradients -> outputs, and a backward by the derived Program.

Eager calls are one autograd function; what torch compiles or transforms are two operators. Both run
the same two Programs, and keep of the arguments only what the backward reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guarding_hint_or_throw

from coda.errors import UnsupportedError
from coda.ir.graph import Graph, walk
from coda.ir.types import DTYPES, DType
from coda.lowering.accumulate import accumulating
from coda.lowering.derive import Training
from coda.lowering.program import Program
from coda.runtime import settings
from coda.runtime.accumulate import add, in_kernels, kept_gradients, leaves_of
from coda.runtime.modes import is_transformed, refuse_vmap
from coda.runtime.run import (
    Runnable,
    Sizes,
    apart,
    bind,
    block_of,
    choose_backend,
    execute,
    memory_of,
    needs_dispatch,
    simulated_arch,
    target_arch,
)


@dataclass(frozen=True)
class Plan:
    """How a call with arguments of some shapes trains.

    Attributes:
        training: the two graphs.
        forward, backward: their Programs; no backward where no wanted argument is reached.
        sizes: of every symbol of the block.
        backend: by its name.
        reached: for each output of the block, whether a wanted argument reaches it.
        block: whose plan it is.
    """

    training: Training
    forward: Program
    backward: Program | None
    sizes: Sizes
    backend: str
    reached: tuple[bool, ...]
    block: Runnable

    def accumulating(self, targets: Mapping[str, DType]) -> Program:
        """The backward that adds gradients of these arguments to tensors of these types."""
        graph, updates = accumulating(self.training, targets)
        return self.block.program_for(graph, self.forward.arch, False, self.sizes, updates)


_plans: dict[tuple[Any, ...], Plan] = {}


def plan_of(
    number: int,
    inputs: Sequence[Tensor],
    dims: Sequence[int],
    backend: str,
    arch: str,
    memory: str,
    wanted: Sequence[bool],
) -> Plan:
    """The plan for these arguments, made once for each set of shapes and types."""
    environment = settings.BACKEND.get(), settings.ARCH.get(), simulated_arch()
    shapes = tuple([(t.shape, t.dtype, t.device) for t in inputs])
    key = (number, *dims, backend, arch, memory, *wanted, *environment, shapes)
    if key not in _plans:
        graph, sizes = bind(number, inputs, dims)
        if len(_plans) >= 4096:
            _plans.clear()
        _plans[key] = _plan(number, graph, sizes, backend, arch, memory, wanted)
    return _plans[key]


def _plan(
    number: int,
    graph: Graph,
    sizes: Sizes,
    backend: str,
    arch: str,
    memory: str,
    wanted: Sequence[bool],
) -> Plan:
    block, arch = block_of(number), target_arch(arch)
    training = block.training_for(graph, _names(graph, wanted), memory, sizes)
    forward = block.program_for(training.forward, arch, False, sizes)
    backward = block.program_for(training.backward, arch, False, sizes) if training.wanted else None
    asked = {i for i in graph.inputs if i.name in training.wanted}
    reached = tuple(bool(asked & set(walk([r]))) for _, r in graph.outputs)
    return Plan(training, forward, backward, sizes, choose_backend(backend), reached, block)


def _names(graph: Graph, wanted: Sequence[bool]) -> tuple[str, ...]:
    pairs = zip(graph.inputs, wanted, strict=True)
    return tuple(i.name for i, asked in pairs if asked and i.dtype.kind == "float")


def train_block(
    number: int, inputs: list[Tensor], dims: list[int], backend: str, arch: str, memory: str
) -> Sequence[Tensor]:
    """The outputs of a block, whose gradients its derived backward gives."""
    wanted = [t.requires_grad for t in inputs]
    if needs_dispatch(inputs) and not is_transformed():
        return train_op(number, inputs, dims, backend, arch, memory, wanted)
    return _Eager.apply(plan_of(number, inputs, dims, backend, arch, memory, wanted), *inputs)


def _kept(training: Training, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that the backward reads, without the cotangents."""
    known = dict(zip([i.name for i in training.forward.inputs], inputs, strict=True))
    names = [n for n, _ in training.forward.outputs]
    computed = dict(zip(names, outputs, strict=True))
    known |= {n: computed[n] for n in training.saved}
    cotangents = set(training.cotangents)
    return [known[i.name] for i in training.backward.inputs if i.name not in cotangents]


def _arguments(
    training: Training, sizes: Sizes, kept: Sequence[Tensor], given: Sequence[Tensor | None]
) -> list[Tensor]:
    """The backward's arguments, with zeros for cotangents that nobody gave."""
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


def _typed(training: Training, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The backward's arguments in the types that it declares."""
    like = zip(training.backward.inputs, tensors, strict=True)
    return [t if t.dtype == i.dtype.torch else t.to(i.dtype.torch) for i, t in like]


def _by_argument(training: Training, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """One gradient for each argument of the block, or None."""
    known = dict(zip(training.wanted, gradients, strict=True))
    return [known.get(i.name) for i in training.forward.inputs]


def _refuse_second_order(*_: Any) -> Any:
    """Raise UnsupportedError: torch asks for the derivative of a derivative."""
    raise UnsupportedError(
        "the gradients of a block have no gradients of their own",
        found="a derivative of what create_graph=True gave",
        help="call the torch function that the block stands for where you need them",
    )


def _owned(tensor: Tensor) -> Tensor:
    """The same memory as a view of nothing: callers may change it in place."""
    if not tensor._is_view():
        return tensor
    own = tensor.new_empty(0)
    return own.set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def _witnessed(kept: Sequence[Tensor], returned: Sequence[Tensor]) -> list[Tensor]:
    """What is saved, and after it the outputs that share memory with it.

    Torch then notices where somebody changes such an output in place before the backward.
    """
    same = {(t.data_ptr(), t.dtype, t.shape, t.stride()): t for t in returned}
    saved = [same.get((t.data_ptr(), t.dtype, t.shape, t.stride()), t) for t in kept]
    shared = {memory_of(t) for t in kept}
    witnesses = [t for t in returned if memory_of(t) in shared]
    return saved + [t for t in witnesses if not any(t is s for s in saved)]


class _Eager(torch.autograd.Function):
    """A call outside torch's compiler: its outputs, and what is saved of it."""

    @staticmethod
    def forward(plan: Plan, *inputs: Tensor) -> Any:
        return tuple(map(_owned, execute(plan.forward, inputs, plan.sizes, plan.backend)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        plan: Plan = inputs[0]
        ctx.plan, ctx.leaves = plan, leaves_of(inputs[1:])
        kept = _kept(plan.training, inputs[1:], output)
        ctx.count = len(kept)
        returned = output[: len(plan.reached)]
        ctx.save_for_backward(*(kept if is_transformed() else _witnessed(kept, returned)))
        ctx.set_materialize_grads(False)
        fixed = [t for t, reached in zip(returned, plan.reached, strict=True) if not reached]
        fixed += [t for t in returned if not t.is_floating_point()]
        ctx.mark_non_differentiable(*fixed, *output[len(plan.reached) :])

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        return _opaque_backward(ctx, given)


def _run_backward(ctx: Any, given: Sequence[Tensor | None]) -> Any:
    """The gradients of a call."""
    plan: Plan = ctx.plan
    refuse_vmap([d for d in given if d is not None])
    if plan.backward is None or all(d is None for d in given):
        return (None,) * (1 + len(plan.training.forward.inputs))
    kept = ctx.saved_tensors[: ctx.count]
    arguments = _arguments(plan.training, plan.sizes, kept, given)
    if torch.is_grad_enabled():
        return None, *_by_argument(plan.training, _Backward.apply(plan, *arguments))
    held = kept_gradients([i.name for i in plan.training.forward.inputs], ctx.leaves)
    if held:
        return None, *_by_argument(plan.training, _accumulate(plan, arguments, held))
    return None, *_by_argument(plan.training, _Backward.forward(plan, *arguments))


def _accumulate(
    plan: Plan, arguments: Sequence[Tensor], held: Mapping[str, Tensor]
) -> list[Tensor | None]:
    """The wanted gradients, None for those that were added to what is held."""
    held = {n: t for n, t in held.items() if n in plan.training.wanted}
    targets = in_kernels(held)
    program = plan.accumulating(targets)
    typed = [
        *_typed(plan.training, arguments),
        *(held[n] for n in plan.training.wanted if n in targets),
    ]
    gradients = execute(program, typed, plan.sizes, plan.backend)
    found: list[Tensor | None] = []
    for name, gradient in zip(plan.training.wanted, gradients, strict=True):
        found.append(None if name in held else gradient)
        if name in held:
            add(held[name], gradient, name in targets)
    return found


_opaque_backward: Any = torch.compiler.disable(_run_backward)  # to whoever compiles a backward


class _Backward(torch.autograd.Function):
    """The backward of such a call, where torch records what it computes."""

    @staticmethod
    def forward(plan: Plan, *arguments: Tensor) -> Any:
        assert plan.backward is not None
        typed = _typed(plan.training, arguments)
        return tuple(execute(plan.backward, typed, plan.sizes, plan.backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        _refuse_second_order()


@torch.library.custom_op("coda::train", mutates_args=())
def train_op(
    number: int,
    inputs: list[Tensor],
    dims: list[int],
    backend: str,
    arch: str,
    memory: str,
    wanted: list[bool],
) -> list[Tensor]:
    """Run a block for training: its outputs, then what is saved."""
    plan = plan_of(number, inputs, dims, backend, arch, memory, wanted)
    found = execute(plan.forward, inputs, plan.sizes, plan.backend)
    return [t.contiguous() for t in apart(found)]


def _training(
    number: int, graph: Graph, sizes: Sizes, memory: str, wanted: Sequence[bool]
) -> Training:
    """The training of a call whose sizes torch may hold open."""
    known = {s: _hint(d) for s, d in sizes.items()}
    return block_of(number).training_for(graph, _names(graph, wanted), memory, known)


def _hint(size: Any) -> int:
    """A size as it is in the call that torch compiles."""
    return guarding_hint_or_throw(size) if isinstance(size, torch.SymInt) else size


@train_op.register_fake
def _(
    number: int,
    inputs: list[Tensor],
    dims: list[int],
    backend: str,
    arch: str,
    memory: str,
    wanted: list[bool],
) -> list[Tensor]:
    graph, sizes = bind(number, inputs, dims)
    training = _training(number, graph, sizes, memory, wanted)
    return _empty(training.forward, sizes, inputs[0])


def _empty(graph: Graph, sizes: Sizes, like: Tensor) -> list[Tensor]:
    return [
        like.new_empty([d.size(sizes) for d in n.shape], dtype=n.dtype.torch) for n in graph.roots
    ]


@torch.library.custom_op("coda::train_backward", mutates_args=())
def backward_op(
    number: int,
    tensors: list[Tensor],
    sizes: list[int],
    dtype: str,
    backend: str,
    arch: str,
    memory: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of a block's wanted arguments.

    Args:
        number: from `register`.
        tensors: the backward's arguments.
        sizes: of the block's symbols, in their order.
        dtype: of arguments that are declared without a type.
        backend, arch, memory, wanted: as in the forward.
    """
    graph = block_of(number).graph_of(DTYPES[dtype])
    known = dict(zip(graph.symbols, sizes, strict=True))
    plan = _plan(number, graph, known, backend, arch, memory, wanted)
    assert plan.backward is not None
    arguments = _typed(plan.training, tensors)
    gradients = execute(plan.backward, arguments, known, plan.backend)
    return [t.contiguous() for t in apart(gradients)]


@backward_op.register_fake
def _(
    number: int,
    tensors: list[Tensor],
    sizes: list[int],
    dtype: str,
    backend: str,
    arch: str,
    memory: str,
    wanted: list[bool],
) -> list[Tensor]:
    graph = block_of(number).graph_of(DTYPES[dtype])
    known = dict(zip(graph.symbols, sizes, strict=True))
    training = _training(number, graph, known, memory, wanted)
    return _empty(training.backward, known, tensors[0])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    number, tensors, dims, backend, arch, memory, wanted = inputs
    graph, sizes = bind(number, tensors, dims)
    training = _training(number, graph, sizes, memory, wanted)
    ctx.training, ctx.sizes = training, sizes
    declared = zip(graph.inputs, block_of(number).undeclared, strict=True)
    free = [i.dtype.name for i, undeclared in declared if undeclared]
    ctx.call = number, [sizes[s] for s in graph.symbols], (free or ["bf16"])[0]
    ctx.options = backend, arch, memory, wanted
    ctx.save_for_backward(*_kept(training, tensors, output))


def _gradients(ctx: Any, given: Sequence[Tensor | None]) -> Any:
    kept, training = ctx.saved_tensors, ctx.training
    found: list[Tensor | None] = [None] * len(training.forward.inputs)
    number, sizes, dtype = ctx.call
    if training.wanted and any(d is not None for d in given):
        arguments = _arguments(training, ctx.sizes, kept, given)
        gradients = backward_op(number, arguments, sizes, dtype, *ctx.options)
        found = _by_argument(training, gradients)
    return None, found, None, None, None, None, None


train_op.register_autograd(_gradients, setup_context=_save)
backward_op.register_autograd(_refuse_second_order)
