"""A Program and tensors -> outputs, by its kernels: prepare operands, allocate buffers, launch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from coda.ir.dims import Dim
from coda.ir.graph import Input, Node, Size, walk
from coda.kernels.gemm import quack_target
from coda.kernels.tensors import aligned, is_padded, padded
from coda.lowering.algebra.roles import base
from coda.lowering.program.body import Body
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program
from coda.runtime import settings
from coda.runtime.bounded import Bounded
from coda.runtime.cache import kernel_directory, object_directory
from coda.runtime.environment import Environment
from coda.runtime.prepare import packed_row
from coda.runtime.reference import compute_body
from coda.runtime.replay import Recording, Replays, ReplayStep
from coda.runtime.sources import Sources
from coda.runtime.weight_cache import Memo


@dataclass
class State:
    """What is cached between calls of a Program, and freed with it.

    Attributes:
        implied: the symbols that are not a dim of an argument by themselves.
        loaded: loaded kernels, and constants by size and device.
        memo: prepacked operands.
        found: replays, by donated arguments and the sizes of `implied`.
    """

    implied: tuple[str, ...]
    loaded: Bounded[Hashable, Any] = field(default_factory=Bounded)
    memo: Memo = field(default_factory=Memo)
    found: Bounded[tuple[frozenset[str], tuple[int, ...]], Replays] = field(default_factory=Bounded)

    def of(self, given: frozenset[str], sizes: Mapping[str, int]) -> Replays:
        """The replays of calls that donate these arguments and have these sizes.

        The arguments' shapes determine most sizes, but not the factors of a product such as `(H
        d)`.
        """
        key = given, tuple(sizes.get(s, -1) for s in self.implied)
        if key not in self.found:
            self.found[key] = Replays()
        return self.found[key]


T = TypeVar("T")
Sizes = Mapping[str, int]
_states: weakref.WeakKeyDictionary[Program, State] = weakref.WeakKeyDictionary()


def state_of(program: Program) -> State:
    """The State of a Program, made on first use."""
    found = _states.get(program)
    if found is None:
        graph = program.graph
        given = {d for i in graph.inputs for d in i.shape}
        implied = [s for s in graph.symbols if Dim.of(s) not in given]
        found = State(tuple(implied))
        _states[program] = found
    return found


class KernelRun(Environment):
    """One call of a Program by its kernels, on tensors that a GPU (or the simulator) can access."""

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        sizes: Sizes,
        given: frozenset[str] = frozenset(),
    ) -> None:
        self.state = state_of(program)
        self.memo = self.state.memo
        self.recording = Recording(inputs)
        super().__init__(program, inputs, exact=False, sizes=sizes)
        self.raw: dict[str, Tensor] = {}
        named = {n.name: t for n, t in self.inputs.items() if isinstance(n, Input)}
        self.targets = self.updated(named)
        self.given = {name: named[name] for name in given if name in named}

    def once(self, name: Hashable, roots: Iterable[Node], make: Callable[[], T]) -> T:
        """A value computed from weights and tables alone; cached until one of them changes."""
        inputs = [self.inputs[n] for n in walk(roots) if isinstance(n, Input)]
        value = self.memo.get(name, inputs, make)
        self.recording.constant(value, inputs)
        return value

    def each_call(
        self, name: Hashable, nodes: Iterable[Node], make: Callable[[Environment], Tensor]
    ) -> Tensor:
        """A tensor computed from nodes: once if they depend on weights alone, else in each call.

        A tensor that is computed from arguments alone is cached until they change: all layers of a
        model get the same table.
        """
        nodes = list(nodes)
        if all(self.program.is_weight(n) for n in walk(nodes) if isinstance(n, Input)):
            return self.once(name, nodes, lambda: make(self))
        sources = Sources(self, nodes)
        memo, given = self.memo, sources.tensors(self)

        def again(*tensors: Tensor) -> Tensor:
            if sources.buffers:
                return make(sources.run(tensors))
            return memo.get(name, tensors, lambda: make(sources.run(tensors)))

        value = again(*given)
        self.recording.computed(value, again, given)
        return value

    def count(self, node: Size) -> Tensor:
        size, device = node.dim.size(self.sizes), next(iter(self.inputs.values())).device

        def full() -> Tensor:
            return torch.full((), size, dtype=torch.float32, device=device)

        found = self.loaded(("size", size, device), full)
        self.constant(found)
        return found

    def value(self, node: Node) -> Tensor:
        given = node in self.inputs or node in self.prepared or isinstance(node, Size)
        if given or node in self.program.places:
            return super().value(node)
        sources = Sources(self, [node])
        given = sources.tensors(self)

        def again(*tensors: Tensor) -> Tensor:
            return sources.run(tensors).value(node)

        x = sources.run(given, self.prepared).value(node)
        if not sources.weights and not self.recording.knows(x):
            self.recording.computed(x, again, given)
        return x

    def ready(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """A tensor in the form that a kernel can read; if `change` copies it, each call does."""
        y = change(x)
        if not self.recording.knows(y):
            self.recording.computed(y, change, [x])
        return y

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, fill: str = "") -> Tensor:
        """Memory for the output of a kernel.

        Args:
            shape, dtype: of the tensor; a matrix if padded.
            fill: "padded": rows aligned for TMA; "zero" or "nan": filled with it; "":
                uninitialised.
        """
        device = next(iter(self.inputs.values())).device
        if fill == "padded":
            made = padded(shape[0], shape[1], dtype, device)
        else:
            made = torch.empty(shape, dtype=dtype, device=device)
        start = {"zero": 0.0, "nan": torch.nan}.get(fill)
        self.recording.made(made, start)
        return made if start is None else made.fill_(start)

    def updated(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arguments that output buffers update in place, by the buffer's name."""
        found: dict[str, Tensor] = {}
        for name, node in self.program.outputs:
            if name not in self.program.updates:
                continue
            place = self.program.places.get(base(node))
            held = named[self.program.updates[name]]
            if place and place.count == held.shape[-1] and aligned(held) is held:
                found[place.buffer] = held
        return found

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            self.raw.pop(name, None)
        super().release(names)
        left = [*self.buffers.values(), *self.raw.values()]
        self.recording.keep_only(left)

    def folded(self, nodes: Sequence[Node], known: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
        name = ("folded", *(n for n, node in self.program.prepared.items() if node in nodes))
        make = super().folded
        return self.once(name, nodes, lambda: make(nodes, known))

    def operand(self, body: Body, name: str) -> Tensor:
        spread = body.spread.get(name)
        if spread is None:
            return super().operand(body, name)
        lead = tuple(d.size(self.sizes) for d in spread.lead)
        return self.each_call(
            ("spread", name, spread, lead),
            [body.nodes[name]],
            lambda run: run.repeated(body, name).contiguous(),
        )

    def run(self) -> tuple[Tensor, ...]:
        """The outputs."""
        return self.each(self.kernel)

    def kernel(self, kernel: Kernel[Any]) -> None:
        """Launch one kernel; one without code is computed by torch."""
        code = kernel.kind.code
        if code is None:
            kernel.kind.reference(self, kernel)
        else:
            code.launch(self, kernel)

    def body(
        self, body: Body, acc: Tensor | None, points: tuple[int, int], tile_n: int = 0
    ) -> None:
        """Compute a body by torch: for kinds without code, and for kernels without columns."""
        compute_body(self, body, acc, points, tile_n)

    @property
    def directory(self) -> Path:
        """Where emitted modules are written."""
        return kernel_directory()

    def loaded(self, key: Hashable, load: Callable[[], T]) -> T:
        """A module, or a constant, that is loaded once for the Program; the oldest are dropped."""
        found = self.state.loaded
        if key not in found:
            found[key] = load()
        return found[key]

    def constant(self, x: Tensor) -> None:
        """Record a tensor that replays keep, for any arguments."""
        self.recording.constant(x, [])

    def in_place(self, tensors: Sequence[Tensor]) -> None:
        """Record the arguments whose memory a launch reads directly."""
        self.recording.in_place(tensors)

    def launched(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Record a launch."""
        self.recording.launched(ReplayStep(function, arguments))

    def summands(self, buffer: str, found: Tensor) -> Tensor:
        """Partials of sums over rows, [columns, parts]; some kernel columns may be parts."""
        columns = self.program.buffers[buffer].shape[1].size(self.sizes)
        return found.reshape(-1, columns).T

    def room(self, name: str, rows: int, width: int, dtype: torch.dtype, fill: str = "") -> Tensor:
        """The matrix [rows, width] that a kernel stores into.

        It is an argument that is updated in place, a dead buffer that is reused, a slice of a wider
        buffer that several kernels write, or new memory.
        """
        if name in self.targets:
            return self.targets[name]
        old = self.overwritten(name, (rows, width), dtype, fill)
        if old is not None:
            return old
        whole = next((w for w, parts in self.program.joined.items() if name in parts), None)
        if whole is None:
            return self.new((rows, width), dtype, fill)
        axis = 0 if whole in self.program.stacked else 1
        parts = self.program.joined[whole]
        lengths = [self.program.buffers[p].shape[axis].size(self.sizes) for p in parts]
        starts = dict(zip(parts, accumulate([0, *lengths]), strict=False))
        if axis and any(s * dtype.itemsize % 16 for s in starts.values()):
            return self.new((rows, width), dtype, fill)
        if whole not in self.buffers:
            shape = (sum(lengths), width) if axis == 0 else (rows, sum(lengths))
            held = self.targets.get(whole)
            fill = "padded" if shape[1] > 1 else ""
            self.buffers[whole] = self.new(shape, dtype, fill) if held is None else held.view(shape)
        return self.buffers[whole].narrow(axis, starts[name], width if axis else rows)

    def overwritten(
        self, name: str, shape: tuple[int, int], dtype: torch.dtype, fill: str
    ) -> Tensor | None:
        """The dead buffer or donated argument whose memory a buffer reuses, or None."""
        source = self.program.overwrites.get(name, "")
        old = self.buffers.get(source, self.given.get(source))
        if old is None or old.dtype != dtype or old.numel() != shape[0] * shape[1]:
            return None
        same = old if old.shape == shape else old.reshape(shape)
        fits = is_padded(same) and (fill == "padded" or same.is_contiguous())
        return same if same.data_ptr() == old.data_ptr() and fits else None

    def buffer(self, name: str) -> Tensor:
        if name in self.program.joined and name not in self.buffers:
            self.buffers[name] = super().buffer(name)
        return self.buffers[name]

    def packed(self, name: str, body: Body) -> dict[str, Tensor]:
        """The packed row vectors of the kernel `name`."""
        like = next(iter(self.inputs.values()))
        empty = torch.empty(0, dtype=torch.float32, device=like.device)

        def make() -> dict[str, Tensor]:
            values = {n: self.value(n) for n in body.sources.values()}
            return {p.name: packed_row(p, body.sources, values, empty) for p in body.packed}

        return self.once(("packed", name), body.sources.values(), make)


def run_kernels(
    program: Program,
    inputs: Sequence[Tensor],
    sizes: Sizes,
    given: frozenset[str] = frozenset(),
) -> tuple[Tensor, ...]:
    """The outputs of a Program, computed by its kernels.

    The first call with arguments of some shapes prepares and launches; later calls replay it.
    Kernels may write over the donated arguments, `given`.
    """
    replays = state_of(program).of(given, sizes)
    found = replays.find(inputs)
    if found is not None:
        return found.run(inputs)
    quack_target.use_cache(object_directory(), settings.CACHE.get() == "1")
    run = KernelRun(program, inputs, sizes, given)
    outputs = run.run()
    updates = program.updates
    replays.keep(run.recording, outputs, [n in updates for n, _ in program.outputs])
    return outputs
