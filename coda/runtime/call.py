"""A Program and torch tensors -> outputs: the backends, and the torch operator `coda::block`."""

from __future__ import annotations

import hashlib
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from coda.errors import ArchError, CallError, UnsupportedError
from coda.ir.graph import Graph
from coda.ir.text import show
from coda.ir.types import DType, bf16
from coda.lowering.algebra.policy import DEFAULT_POLICY, MemoryPolicy
from coda.lowering.algebra.training import Training
from coda.lowering.program.program import Program
from coda.lowering.program.target import ONE_OF_ARCHS, Target, find_target, of_device
from coda.runtime import settings
from coda.runtime.bind import bind_sizes, check_tensors
from coda.runtime.bounded import Bounded
from coda.runtime.modes import is_transformed
from coda.runtime.reference import run_reference
from coda.version import __version__

Sizes = Mapping[str, int]
Given = frozenset[str]  # names of donated arguments: kernels may write over them
Backend = Callable[[Program, Sequence[Tensor], Sizes, Given], tuple[Tensor, ...]]


def _reference(
    program: Program, inputs: Sequence[Tensor], sizes: Sizes, _: Given
) -> tuple[Tensor, ...]:
    return run_reference(program, inputs, sizes=sizes)


def _cuda(
    program: Program, inputs: Sequence[Tensor], sizes: Sizes, given: Given
) -> tuple[Tensor, ...]:
    """Run the kernels on the GPU. quack and the DSL are imported here, on first use."""
    from coda.runtime.launcher import run_kernels

    return run_kernels(program, inputs, sizes, given)


def _sim(
    program: Program, inputs: Sequence[Tensor], sizes: Sizes, given: Given
) -> tuple[Tensor, ...]:
    """Run the kernels on a simulated GPU, from their PTX."""
    from coda.runtime.simulate import run_simulated

    return run_simulated(program, inputs, sizes, given)


BACKENDS: dict[str, Backend] = {"reference": _reference, "sim": _sim, "cuda": _cuda}


def simulated_arch() -> str | None:
    """The arch of the active simulated GPU, or None."""
    sim = sys.modules.get("coda.sim")  # a simulated GPU exists only if it is imported
    gpu = sim.active() if sim is not None else None
    return None if gpu is None else gpu.arch


def gpu_target() -> Target | None:
    """The Target of the GPU.

    None if coda does not compile for the GPU, there is none, or a simulated one is active.
    """
    if simulated_arch() or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties()
    return of_device(found.name, (found.major, found.minor), found.multi_processor_count)


def choose_backend(name: str) -> str:
    """The backend of this name, else that of `CODA_BACKEND`, else the best that works here.

    Raises:
        UnsupportedError: for an unknown name.
        ArchError: for "cuda" without a Hopper or Blackwell GPU.
    """
    chosen = name or settings.BACKEND.get()
    if not chosen:
        chosen = "sim" if simulated_arch() else "cuda" if gpu_target() else "reference"
    if chosen not in BACKENDS:
        raise UnsupportedError(
            "there is no such backend", found=repr(chosen), help=" or ".join(BACKENDS)
        )
    if chosen == "cuda" and gpu_target() is None:
        raise ArchError(
            "backend cuda needs a Hopper or Blackwell GPU",
            found="none here",
            help='backend="reference"',
        )
    return chosen


def choose_target(arch: str) -> Target:
    """The Target of this arch, else that of the (simulated) GPU, else that of `CODA_ARCH`.

    Raises ArchError for an unknown arch.
    """
    if not isinstance(arch, str):
        raise ArchError("an arch is a name", found=repr(arch), help=ONE_OF_ARCHS)
    asked = arch or simulated_arch()
    return find_target(asked) if asked else gpu_target() or find_target(settings.ARCH.get())


class Runnable(Protocol):
    """The part of a block that the torch operators use."""

    @property
    def undeclared(self) -> Sequence[bool]:
        """For each argument, whether it is declared without an element type."""
        ...

    def graph_of(self, dtype: DType) -> Graph:
        """The graph, with `dtype` for arguments that are declared without a type."""
        ...

    def under_autocast(self, types: str) -> Runnable:
        """The block with autocast's element types; `types` as in `Block.under_autocast`."""
        ...

    def graph_for(self, inputs: Sequence[Tensor]) -> Graph:
        """The graph for arguments with the dtypes of these."""
        ...

    def program_for(
        self,
        graph: Graph,
        target: Target,
        *,
        frozen: bool,
        sizes: Sizes,
        policy: MemoryPolicy = DEFAULT_POLICY,
    ) -> Program:
        """A Program of the block, or of its training's forward or backward, for these sizes."""
        ...

    def training_for(
        self, graph: Graph, requires_grad: tuple[str, ...], memory: str, sizes: Sizes
    ) -> Training:
        """The graphs of the forward, which also returns what is saved, and of the backward."""
        ...


class CallOptions(NamedTuple):
    """The options of a call. Calls with equal options and shapes share one Program and its sizes.

    Attributes:
        handle: of the block, from `register`.
        dims: sizes of the graph's symbols in their order, -1 where the shapes give them; or empty.
        backend, arch: names, or "" for the default.
        frozen: whether weights keep their values.
        memory: "min", "balanced" or "speed": what training saves.
        requires_grad: of each argument: its gradient is computed; empty without a backward.
    """

    handle: str
    dims: tuple[int, ...] = ()
    backend: str = ""
    arch: str = ""
    frozen: bool = False
    memory: str = "balanced"
    requires_grad: tuple[bool, ...] = ()

    def key(self) -> tuple[Any, ...]:
        """The options, with the settings of the environment that complete them."""
        return self, settings.BACKEND.get(), settings.ARCH.get(), simulated_arch()


def shapes_of(inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """The shape, dtype and device of each argument."""
    return tuple([(t.shape, t.dtype, t.device) for t in inputs])


@dataclass(eq=False)
class Calls:
    """What is cached for the calls of a handle; dropped with the last block that has the handle.

    Attributes:
        blocks: equal blocks; any of them can serve a call.
        programs: (Program, sizes, backend), by options and the arguments' shapes, dtypes and
            devices.
        plans: the Plan of a call that trains, by the same key.
        replays: those of the Program that ran last, by options.
    """

    blocks: weakref.WeakSet[Runnable] = field(default_factory=weakref.WeakSet)
    programs: Bounded[Any, Any] = field(default_factory=Bounded)
    plans: Bounded[Any, Any] = field(default_factory=Bounded)
    replays: Bounded[Any, Any] = field(default_factory=Bounded)


_calls: dict[str, Calls] = {}


def register(block: Runnable, origin: str) -> str:
    """A handle for a block: the first argument of the torch operators.

    Torch keeps compiled code between processes, so a handle is a digest of the block's meaning:
    equal blocks of one `origin` (module and name of the function) have the same handle, others
    never do.
    """
    content = __version__, origin, show(block.graph_of(bf16)), tuple(block.undeclared)
    handle = hashlib.sha256(repr(content).encode()).hexdigest()[:24]
    _enter(handle, block)
    return handle


def _enter(handle: str, block: Runnable) -> Calls:
    """Let a block serve the calls of a handle as long as it is alive."""
    calls = _calls.setdefault(handle, Calls())
    calls.blocks.add(block)
    weakref.finalize(block, _forget, handle).atexit = False
    return calls


def _forget(handle: str) -> None:
    """Drop what is cached for a handle if no block has it any more."""
    calls = _calls.get(handle)
    if calls is not None and next(iter(calls.blocks), None) is None:
        del _calls[handle]


def calls_of(handle: str) -> Calls:
    """What is cached for the calls of a handle, which may end in autocast's element types.

    Raises CallError if no block that is alive has the handle.
    """
    calls = _calls.get(handle)
    block, _, types = handle.partition("/")
    if calls is None and types:
        return _enter(handle, block_of(block).under_autocast(types))
    if calls is None:
        raise CallError(
            "compiled code calls a block that this process has not made",
            found=handle,
            help="make the block before what calls it",
        )
    return calls


def block_of(handle: str) -> Runnable:
    """A block with this handle. Raises CallError if none is alive."""
    return next(iter(calls_of(handle).blocks))


def bind(handle: str, inputs: Sequence[Tensor], dims: Sequence[int]) -> tuple[Graph, Sizes]:
    """The graph for these arguments, and the size of every symbol. Raises CallError."""
    block = block_of(handle)
    graph = block.graph_for(inputs)
    check_tensors(graph, inputs, block.undeclared)
    given = {s: d for s, d in zip(graph.symbols, dims, strict=False) if d >= 0}
    return graph, bind_sizes(graph, inputs, given)


def run_block(inputs: Sequence[Tensor], options: CallOptions) -> Sequence[Tensor]:
    """Run a block: the body of the operator, without torch's dispatch.

    The Program and the sizes are found once for each set of shapes and dtypes. Outputs may be views
    of one buffer.
    """
    key, calls = options.key(), calls_of(options.handle)
    recent = calls.replays.get(key)
    if recent is not None:
        replay = recent.find(inputs)
        if replay is not None:
            return replay.run(inputs)
    shaped = key, shapes_of(inputs)
    known = calls.programs.get(shaped)
    if known is None:
        graph, sizes = bind(options.handle, inputs, options.dims)
        chosen, target = choose_backend(options.backend), choose_target(options.arch)
        program = block_of(options.handle).program_for(
            graph, target, frozen=options.frozen, sizes=sizes
        )
        known = calls.programs[shaped] = program, sizes, chosen
    program, sizes, chosen = known
    if chosen == "cuda":
        from coda.runtime.launcher import state_of

        calls.replays[key] = state_of(program).of(frozenset(), sizes)
    return execute(program, inputs, sizes, chosen)


def execute(
    program: Program,
    inputs: Sequence[Tensor],
    sizes: Sizes,
    backend: str,
    given: Given = frozenset(),
) -> Sequence[Tensor]:
    """Run a Program. An output aliases no argument, except the argument that it updates in place.

    `given` names donated arguments: nothing reads them after the call, so kernels may write over
    them. Autocast is off inside: torch computes in the types that the Program has.
    """
    device = inputs[0].device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return execute(program, inputs, sizes, backend, given)
    found = BACKENDS[backend](program, inputs, sizes, given)
    taken = {memory_of(t) for t in inputs}
    copied = [name not in program.updates for name, _ in program.outputs]
    pairs = zip(found, copied, strict=True)
    return [t.clone() if c and memory_of(t) in taken else t for t, c in pairs]


def memory_of(tensor: Tensor) -> int:
    """The address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()


@torch.library.custom_op("coda::block", mutates_args=())
def block_op(
    handle: str, inputs: list[Tensor], dims: list[int], backend: str, arch: str, frozen: bool
) -> list[Tensor]:
    """Run a block.

    Args:
        handle: from `register`.
        inputs: the block's arguments.
        dims: sizes of the graph's symbols in their order, -1 where the shapes give them; or empty.
        backend, arch: names, or "" for the default.
        frozen: whether weights keep their values.
    """
    found = run_block(inputs, CallOptions(handle, tuple(dims), backend, arch, frozen))
    return [t.contiguous() for t in apart(found)]


def apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values, no two in one storage: torch requires this of an operator's outputs."""
    seen: set[int] = set()
    out: list[Tensor] = []
    for tensor in tensors:
        address = memory_of(tensor)
        out.append(tensor.clone() if address in seen else tensor)
        seen.add(address)
    return out


PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(tensors: Sequence[Any]) -> bool:
    """Whether all are `Tensor` or `nn.Parameter` themselves, not subclasses."""
    return all([type(t) in PLAIN for t in tensors])


def needs_dispatch(inputs: Sequence[Tensor]) -> bool:
    """Whether torch has to see the call.

    It does if it compiles or transforms, a dispatch mode is active, or a tensor is of a subclass.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or is_transformed()
        or not is_plain(inputs)
    )


@block_op.register_fake
def _(
    handle: str, inputs: list[Tensor], dims: list[int], backend: str, arch: str, frozen: bool
) -> list[Tensor]:
    graph, sizes = bind(handle, inputs, dims)
    like = inputs[0]
    return [
        like.new_empty([d.size(sizes) for d in node.shape], dtype=node.dtype.torch)
        for node in graph.roots
    ]
