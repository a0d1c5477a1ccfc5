"""A Program run by its own kernels: prepare what they load, allocate what they write, launch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from coda.ir.dims import Dim, product
from coda.ir.graph import Input, Node, Size, walk
from coda.ir.monoids import MONOIDS
from coda.ir.types import from_torch
from coda.kernels.gemm import quack_target
from coda.kernels.gemm.configs import cta_rows
from coda.kernels.gemm.emit import emit_gemm
from coda.kernels.gemm.source import Source, Table
from coda.kernels.gemm.weights import WeightRead, halves, weight_reads
from coda.kernels.rowwise.emit import emit_rowwise
from coda.kernels.rowwise.launch import Rows, is_padded
from coda.kernels.rowwise.pieces import is_ragged, row_parts
from coda.lowering.algebra.roles import base
from coda.lowering.program.access import (
    ColumnVector,
    Partial,
    Periodic,
    RowVector,
    Scalar,
    Tile,
)
from coda.lowering.program.body import Body
from coda.lowering.program.program import GemmKernel, Program, RowwiseKernel
from coda.runtime import settings
from coda.runtime.cache import kernel_directory, object_directory
from coda.runtime.prepare import one_below_another, packed_row, paired_rows, weight_matrix
from coda.runtime.reference import ReferenceRun, matrix
from coda.runtime.replay import Recording, Replays, Step
from coda.runtime.sources import Sources
from coda.runtime.weight_cache import Memo


@dataclass
class State:
    """What a program keeps between calls: loaded kernels, and what they load of the weights.

    `untold` are the symbols that no argument has as an axis of its own.
    """

    gemms: dict[GemmKernel, quack_target.Gemm]
    rows: dict[tuple[RowwiseKernel, bool], Rows]
    reads: dict[str, WeightRead]
    memo: Memo
    untold: tuple[str, ...]
    found: dict[tuple[frozenset[str], tuple[int, ...]], Replays] = field(default_factory=dict)

    def of(self, given: frozenset[str], sizes: Mapping[str, int]) -> Replays:
        """The replays of calls that give up these arguments, and have these sizes.

        Arguments' shapes tell most sizes, but not how a product of two is made up.
        """
        key = given, tuple(sizes.get(s, -1) for s in self.untold)
        if key not in self.found:
            self.found[key] = Replays(quack_target.run_plan)
        return self.found[key]


T = TypeVar("T")
Sizes = Mapping[str, int]
_states: weakref.WeakKeyDictionary[Program, State] = weakref.WeakKeyDictionary()


def state_of(program: Program) -> State:
    """The emitted sources and loaded kernels of a program."""
    found = _states.get(program)
    if found is None:
        reads = {r.kernel: r for r in weight_reads(program)}
        graph = program.graph
        told = {d for i in graph.inputs for d in i.shape}
        untold = [s for s in graph.symbols if Dim.of(s) not in told]
        found = State({}, {}, reads, Memo(), tuple(untold))
        _states[program] = found
    return found


def gemm_of(program: Program, kernel: GemmKernel) -> quack_target.Gemm:
    """The loaded module of a GEMM kernel."""
    state = state_of(program)
    if kernel not in state.gemms:
        source = emit_gemm(program, kernel)
        state.gemms[kernel] = quack_target.import_kernel(source, kernel.config, kernel_directory())
    return state.gemms[kernel]


def rows_of(program: Program, kernel: RowwiseKernel, padded: bool = False) -> Rows:
    """The loaded module of a pass over rows, `padded` ones or as they come."""
    state = state_of(program)
    key = kernel, padded
    if key not in state.rows:
        source = emit_rowwise(program, kernel, padded)
        once = (RowVector, Scalar)  # the same in every row
        shared = {o.name for o in kernel.body.epilogue.operands if isinstance(o.access, once)}
        shared = tuple(name in shared for _, name, _, _ in source.parameters)
        state.rows[key] = Rows(source, shared, program.arch, kernel_directory())
    return state.rows[key]


class KernelRun(ReferenceRun):
    """One call of a Program by its kernels, on tensors where a GPU (or the simulator) sees them."""

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        sizes: Sizes,
        given: frozenset[str] = frozenset(),
    ) -> None:
        self.memo = state_of(program).memo
        self.recording = Recording(inputs)
        super().__init__(program, inputs, False, sizes)
        self.raw: dict[str, Tensor] = {}
        named = {n.name: t for n, t in self.inputs.items() if isinstance(n, Input)}
        self.targets = self.updated(named)
        self.given = {name: named[name] for name in given if name in named}

    def once(self, name: Hashable, roots: Iterable[Node], make: Callable[[], T]) -> T:
        """A value made of some nodes that only weights and tables reach; kept until they change."""
        inputs = [self.inputs[n] for n in walk(roots) if isinstance(n, Input)]
        value = self.memo.get(name, inputs, make)
        self.recording.constant(value, inputs)
        return value

    def each_call(
        self, name: Hashable, nodes: Iterable[Node], make: Callable[[ReferenceRun], Tensor]
    ) -> Tensor:
        """A tensor made of some nodes: once, if weights alone reach them, else in each call.

        What is made of arguments alone is kept until these change: the layers of a model are given
        one table.
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
        found = _number_of(node.dim.size(self.sizes), next(iter(self.inputs.values())).device)
        self.recording.constant(found, [])
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
        """A tensor as a kernel can read it: changed in each call, where it has to be."""
        y = change(x)
        if not self.recording.knows(y):
            self.recording.computed(y, change, [x])
        return y

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, fill: str = "") -> Tensor:
        """Memory for what a kernel writes: "padded" rows for TMA, "zero", "nan", or as it comes."""
        device = next(iter(self.inputs.values())).device
        if fill == "padded":
            made = padded(shape[0], shape[1], dtype, device)
        else:
            made = torch.empty(shape, dtype=dtype, device=device)
        start = {"zero": 0.0, "nan": torch.nan}.get(fill)
        self.recording.made(made, start)
        return made if start is None else made.fill_(start)

    def zeros(self, x: Tensor) -> Tensor:
        """Some columns of zeros in place of none, in the layout that `x` would have with some."""
        turned = x.stride(0) == 1 and x.shape[0] * x.element_size() % 16 == 0
        shape = (16, x.shape[0]) if turned else (x.shape[0], 16)
        made = self.new(shape, x.dtype, "zero")
        return made.T if turned else made

    def updated(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Arguments, by their names, that a buffer of the program is written over."""
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
            lambda run: ReferenceRun.operand(run, body, name).contiguous(),
        )

    def gemm(self, kernel: GemmKernel) -> None:
        gemm = gemm_of(self.program, kernel)
        a = self.ready(self.value(kernel.a), matrix)
        stores, sinks = self.results(kernel, a.shape[0])
        self.buffers |= stores
        self.keep_partials(kernel, sinks)
        if a.shape[0] == 0:
            return
        b = self.matrix(kernel)
        if a.shape[1] == 0:  # a sum over no rows is one over zeros
            a, b = (self.zeros(x) for x in (a, b))
        operands = {**self.packed(kernel), **self.loaded(kernel)}
        operands |= self.tables(kernel, gemm.source)
        for masks, count in (
            (gemm.source.masks, b.shape[0]),
            (gemm.source.row_masks, a.shape[0]),
        ):
            if masks:
                ones = _ones(count, a.device)
                self.recording.constant(ones, [])
                operands |= dict.fromkeys(masks, ones)
        indices = {}
        for sink in kernel.body.epilogue.sinks:
            if sink.index is not None:
                index = self.ready(self.value(kernel.body.nodes[sink.index]), _vector)
                indices[f"{gemm.source.operands.get(sink.index, sink.index)}_index"] = index
        stores = {name: _written(x) for name, x in stores.items()}
        splits = {s.buffer: s.split for s in kernel.body.epilogue.stores}
        arguments = gemm.arguments(operands, stores, sinks, splits, indices)
        d = stores[gemm.source.d] if gemm.source.d else None
        self.launch(gemm, self.ready(a, _turned), b, d, arguments)

    def launch(
        self,
        gemm: quack_target.Gemm,
        a: Tensor,
        b: Tensor,
        d: Tensor | None,
        arguments: Mapping[str, Any],
    ) -> None:
        """Launch, or in a run that only compiles, compile."""
        plan = gemm.launch(a, b, d, arguments)
        self.recording.launched(Step("gemm", plan, (a, b, d, dict(arguments))))

    def rows(self, kernel: RowwiseKernel) -> None:
        rows = kernel.rows.size(self.sizes)
        if rows and not kernel.width:  # what torch says of no columns at all
            super().rows(kernel)
            return
        body = kernel.body
        tensors = dict(self.packed(kernel))
        for operand in body.epilogue.operands:
            if isinstance(operand.access, Partial):
                tensors[operand.name] = self.raw[operand.name]
            elif operand.name in body.nodes:
                x = self.operand(body, operand.name)
                tensors[operand.name] = _in_bytes(x)
        padded = self.padded_rows(kernel, rows, tensors)
        for store in body.epilogue.stores:
            width = product(self.program.buffers[store.buffer].shape[1:]).size(self.sizes)
            fill = "padded" if padded and width > 1 else ""
            found = self.room(store.buffer, rows, width, store.dtype.torch, fill)
            self.buffers[store.buffer], tensors[store.buffer] = found, _written(found)
        for sink in body.epilogue.sinks:
            parts = row_parts(body, kernel.width, rows)
            width = sink.span.width if sink.span else kernel.width
            found = self.new((parts, width), torch.float32, "" if rows else "zero")
            tensors[sink.buffer] = found
            self.raw[sink.buffer] = self.summands(sink.buffer, found)
        if rows:
            self.launch_rows(rows_of(self.program, kernel, padded), rows, tensors)

    def padded_rows(self, kernel: RowwiseKernel, rows: int, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a pass over rows of an odd length reads and writes them by vectors."""
        if not is_ragged(kernel.body, kernel.width):
            return False
        tiles = kernel.body.epilogue.tiles
        return all(is_padded(tensors[name].reshape(rows, kernel.width)) for name in tiles)

    def launch_rows(self, kernel: Rows, rows: int, tensors: Mapping[str, Tensor]) -> None:
        """Launch, or in a run that only compiles, compile."""
        arguments = kernel.arguments(rows, tensors, self.ready)
        compiled = kernel.compile()
        compiled(*arguments)
        self.recording.launched(Step("rows", compiled, arguments))

    def results(self, kernel: GemmKernel, rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Buffers for what the kernel writes."""
        stores: dict[str, Tensor] = {}
        for store in kernel.body.epilogue.stores:
            buffer = self.program.buffers[store.buffer]
            width = product(buffer.shape[1:]).size(self.sizes)
            stores[store.buffer] = self.room(store.buffer, rows, width, store.dtype.torch, "padded")
        parts = -(-kernel.problem(self.sizes)[1] // kernel.config.tile_n)
        sinks: dict[str, Tensor] = {}
        for sink in kernel.body.epilogue.sinks:
            if sink.rows:
                tiles = -(-rows // cta_rows(kernel.config, self.program.target))
                width = kernel.problem(self.sizes)[1]
                sinks[sink.buffer] = self.new((tiles, width), torch.float32)
            elif sink.monoid == "pick":
                sinks[sink.buffer] = self.new((rows,), torch.float32, "nan")
            else:
                dtype = torch.int64 if len(MONOIDS[sink.monoid].planes) == 2 else torch.float32
                sinks[sink.buffer] = self.new((rows, parts), dtype)
        return stores, sinks

    def keep_partials(self, kernel: GemmKernel, sinks: Mapping[str, Tensor]) -> None:
        """Partials and picked values where later kernels find them."""
        for sink in kernel.body.epilogue.sinks:
            found = sinks[sink.buffer]
            if sink.rows:
                self.raw[sink.buffer] = self.summands(sink.buffer, found)
            elif sink.monoid == "pick":
                self.buffers[sink.buffer] = found.reshape(-1, 1)
            else:
                self.raw[sink.buffer] = found.view(torch.float32)

    def summands(self, buffer: str, found: Tensor) -> Tensor:
        """Partials of sums over rows, [columns, parts]; some columns of a kernel may be parts."""
        columns = self.program.buffers[buffer].shape[1].size(self.sizes)
        return found.reshape(-1, columns).T

    def loaded(self, kernel: GemmKernel) -> dict[str, Tensor]:
        """Operands that are tensors of this call."""
        found: dict[str, Tensor] = {}
        accesses = {o.name: o.access for o in kernel.body.epilogue.operands}
        for name in kernel.body.nodes:
            if isinstance(accesses[name], Periodic):  # see `tables`
                continue
            x = _in_bytes(self.operand(kernel.body, name))
            match accesses[name]:
                case Scalar():
                    found[name] = self.ready(x, _number)
                case ColumnVector():
                    found[name] = self.ready(x, _vector)
                case Tile():
                    found[name] = self.ready(self.ready(x, matrix), aligned)
                case access:
                    raise AssertionError(access)
        return found

    def room(self, name: str, rows: int, width: int, dtype: torch.dtype, fill: str = "") -> Tensor:
        """A matrix to store into: its own, an argument, or some columns of a wider buffer."""
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
            self.buffers[whole] = self.new(shape, dtype, fill) if held is None else held
        return self.buffers[whole].narrow(axis, starts[name], width if axis else rows)

    def overwritten(
        self, name: str, shape: tuple[int, int], dtype: torch.dtype, fill: str
    ) -> Tensor | None:
        """The matrix that a buffer is written over, if one is, and if it is this call's to give."""
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

    def matrix(self, kernel: GemmKernel) -> Tensor:
        """B, [N, K]: siblings one below the other; their own memory where they lie so in it."""
        roots = [c.rhs for c in kernel.contracts]
        by_halves = halves(self.program, kernel) > 0

        def made(*values: Tensor) -> Tensor:
            whole = weight_matrix(kernel, dict(zip(roots, values, strict=True)))
            whole = whole if by_halves else paired_rows(kernel, whole)
            return aligned(whole, turned=not by_halves)

        read = state_of(self.program).reads.get(kernel.name)
        if read is None:  # of an activation
            return self.ready(self.value(roots[0]), made)
        whole = None if read.why else one_below_another([self.value(n) for n in roots])
        if whole is None or aligned(whole, not by_halves) is not whole:
            make = lambda: made(*map(self.value, roots))  # noqa: E731
            return self.once(("matrix", kernel.name), roots, make)
        self.recording.in_place([self.inputs[i] for i in read.together])
        return whole

    def packed(self, kernel: GemmKernel | RowwiseKernel) -> dict[str, Tensor]:
        """Packed row operands."""
        body = kernel.body
        like = next(iter(self.inputs.values()))
        empty = torch.empty(0, dtype=torch.float32, device=like.device)

        def make() -> dict[str, Tensor]:
            values = {n: self.value(n) for n in body.sources.values()}
            return {p.name: packed_row(p, body.sources, values, empty) for p in body.packed}

        return self.once(("packed", kernel.name), body.sources.values(), make)

    def tables(self, kernel: GemmKernel, source: Source) -> dict[str, Tensor]:
        """Packed periodic operands."""
        found: dict[str, Tensor] = {}
        rows = kernel.problem(self.sizes)[0]
        for table in source.tables:
            nodes = {o: kernel.body.nodes[o] for o in table.operands}

            def make(run: ReferenceRun, table: Table = table, nodes: Any = nodes) -> Tensor:
                values = {o: ReferenceRun.operand(run, kernel.body, o) for o in nodes}
                flat = {o: x.reshape(rows, -1) for o, x in values.items()}
                return quack_target.pack_table(table, flat)

            name = kernel.name, table.name, rows
            found[table.name] = self.each_call(name, nodes.values(), make)
        return found


def _vector(x: Tensor) -> Tensor:
    """A vector along the rows: GEMMs read it by four bytes, the last of which are its own too."""
    x = x.reshape(-1).contiguous()
    if x.nbytes % 4 == 0:
        return x
    return x.new_empty(-(-len(x) // 4) * 4)[: len(x)].copy_(x)


def _number(x: Tensor) -> Tensor:
    """A number in float32, which is how GEMMs take it."""
    return x.reshape(-1).float()


def _turned(x: Tensor) -> Tensor:
    return aligned(x, turned=True)


@lru_cache(maxsize=64)
def _number_of(count: int, device: torch.device) -> Tensor:
    """A size as kernels take it; replays of calls with it keep it."""
    return torch.full((), count, dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)


def padded(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty matrix whose rows begin at multiples of 16 bytes."""
    step = max(1, 16 // dtype.itemsize)
    wide = -(-columns // step) * step
    return torch.empty((rows, wide), dtype=dtype, device=device).narrow(1, 0, columns)


def aligned(x: Tensor, turned: bool = False) -> Tensor:
    """A matrix that TMA can read: unit stride along the columns, rows 16 bytes apart.

    With `turned`, the unit stride may be along the rows: what a GEMM multiplies. A matrix that
    is expanded (one row for all, stride 0) is copied, as any other is that TMA cannot read.
    """
    size = x.element_size()
    apart = [s > 0 and s * size % 16 == 0 for s in x.stride()]
    along = (x.stride(-1) == 1 and apart[0]) or (turned and x.stride(0) == 1 and apart[-1])
    if along and x.data_ptr() % 16 == 0:
        return x
    copy = padded(x.shape[0], x.shape[1], x.dtype, x.device)
    return copy.copy_(x)


def run_kernels(
    program: Program,
    inputs: Sequence[Tensor],
    sizes: Sizes,
    given: frozenset[str] = frozenset(),
) -> tuple[Tensor, ...]:
    """The outputs of a Program, computed by its kernels.

    The first call with arguments of some shapes prepares and launches; later ones replay it.
    Kernels may write over the arguments that are `given` up.
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


def _in_bytes(x: Tensor) -> Tensor:
    """A tensor as kernels read it: the DSL has no matrices of conditions, but of bytes."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _written(x: Tensor) -> Tensor:
    """A tensor as kernels write it."""
    kind = from_torch(x.dtype)
    return x.view(torch.uint8) if kind is not None and kind.by_bytes else x
