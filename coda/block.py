"""A Python function, or a text, -> a Block, whose calls are traced, lowered and run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from coda.errors import CallError
from coda.frontend.tensor import Spec
from coda.frontend.tensor import Tensor as Symbolic
from coda.frontend.torch_import.autocast import autocast_graph, only_multiplied
from coda.frontend.trace import call_in_order, declared, trace
from coda.ir.graph import Graph, walk
from coda.ir.types import DTYPES, DType, bf16, dtype_of, from_torch
from coda.lowering.algebra.policy import DEFAULT_POLICY, MemoryPolicy
from coda.lowering.algebra.roles import row_symbols
from coda.lowering.algebra.training import Training, check_memory, derive
from coda.lowering.compiler import check_dims, is_taken, lower
from coda.lowering.program.program import Program
from coda.lowering.program.target import Target
from coda.lowering.program.text import program_source
from coda.runtime.bind import arrange, given_sizes
from coda.runtime.bounded import Bounded
from coda.runtime.call import (
    CallOptions,
    block_of,
    block_op,
    choose_target,
    is_plain,
    needs_dispatch,
    register,
    run_block,
)
from coda.runtime.in_torch import disabled, run_in_torch
from coda.runtime.modes import cast_arguments, refuse_transforms
from coda.runtime.settings import stages
from coda.runtime.sharded import any_sharded, call_sharded
from coda.runtime.train import train_block

if TYPE_CHECKING:  # `explain` imports them, and rich with them
    from coda.lowering.explain import Explanation
    from coda.lowering.explain_training import TrainingExplanation


class Block:
    """A block of mathematics: traced once for each element type, lowered for each set of sizes.

    Call it with torch tensors.

    Attributes:
        fn: the traced function (also `__wrapped__`); None for a block that was written as text.
        memory: how calls train by default: "min", "balanced" or "speed".
        undeclared: for each argument, whether it is declared without an element type.
        handle: a digest of the graph, by which torch's operators name the block.
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None,
        graph: Graph | None = None,
        memory: str = "balanced",
    ) -> None:
        self.fn = fn
        self.memory = check_memory(memory)
        self._graphs: dict[DType, Graph] = {}
        self._programs: Bounded[tuple[Any, ...], Program] = Bounded()
        self._fixed: Bounded[tuple[Any, ...], tuple[str, ...]] = Bounded()
        self._trainings: Bounded[tuple[Any, ...], Training] = Bounded()
        self._given = graph
        self.undeclared = [False] * (len(graph.inputs) if graph else 0)
        if fn is not None:
            specs = declared(fn).values()
            functools.update_wrapper(self, fn)  # type: ignore[arg-type]
            self.undeclared = [isinstance(s, Spec) and s.dtype is None for s in specs]
        self.__name__ = self.graph.name
        self._multiplied = only_multiplied(self.graph)
        self._casts: Bounded[str, Block] = Bounded()
        self.handle = register(self, "" if fn is None else f"{fn.__module__}.{fn.__qualname__}")
        self._names = [name for name, _ in self.graph.outputs]

    @property
    def graph(self) -> Graph:
        """The graph, with bf16 for arguments that are declared without a type."""
        return self.graph_of(bf16)

    def graph_of(self, dtype: DType) -> Graph:
        """The graph, with `dtype` for arguments that are declared without a type."""
        if self._given is not None:
            return self._given
        dtype = dtype_of(dtype)
        if dtype not in self._graphs:
            assert self.fn is not None
            self._graphs[dtype] = trace(self.fn, dtype)
        return self._graphs[dtype]

    def under_autocast(self, types: str) -> Block:
        """The block with the element types that autocast gives it.

        Args:
            types: names of types, separated by spaces: autocast's, then one for each argument: its
                dtype, or "-" if it is declared with one.
        """
        if types not in self._casts:
            narrow, *given = (DTYPES.get(name) for name in types.split())
            assert narrow is not None
            fn = self.fn
            assert fn is not None
            graph = autocast_graph(lambda dtype: trace(fn, dtype), given, narrow)
            self._casts[types] = Block(None, graph, self.memory)
        return self._casts[types]

    def __copy__(self) -> Block:
        return self  # like a function, so that a copied module calls the same block

    def __deepcopy__(self, _: Any) -> Block:
        return self

    def __reduce__(self) -> Any:
        return self.fn.__qualname__ if self.fn else (parse, (str(self._given),))

    def __repr__(self) -> str:
        return f"coda.block {self.__name__}({', '.join(i.name for i in self.graph.inputs)})"

    def lower(
        self,
        arch: str | None = None,
        dims: Mapping[str, int] | None = None,
        dtype: DType = bf16,
        *,
        frozen: bool = False,
    ) -> Program:
        """The Program for these sizes.

        Args:
            arch: "sm_90a", "sm_100a" or "sm_103a", or a GPU by its name in docs/targets.md; by
                default that of the GPU, else `CODA_ARCH`.
            dims: the size of every symbol.
            dtype: of arguments that are declared without a type.
            frozen: whether weights keep their values, so that copies derived from them may stay in
                memory: what calls with `memory="speed"` run if nothing requires a gradient.

        Raises:
            ArchError: for an unknown arch.
            DimError: for a missing, superfluous or non-positive size.
        """
        target, graph = choose_target(arch or ""), self.graph_of(dtype)
        key = (graph, target, frozen, "lower", tuple(sorted((dims or {}).items())))
        if key not in self._programs:
            self._programs[key] = lower(graph, dims or {}, target, frozen=frozen, stages=stages())
        return self._programs[key]

    def explain(
        self,
        arch: str | None = None,
        dtype: DType = bf16,
        *,
        frozen: bool = False,
        **dims: int,
    ) -> Explanation:
        """The Program's kernels, traffic and decisions; `print` it, or use its `.json()`.

        Args:
            arch, dtype, frozen, dims: as in `lower`.
        """
        from coda.lowering.explain import Explanation

        return Explanation(self.lower(arch, dims, dtype, frozen=frozen))

    def explain_training(
        self,
        arch: str | None = None,
        dtype: DType = bf16,
        wanted: Sequence[str] | None = None,
        memory: str | None = None,
        **dims: int,
    ) -> TrainingExplanation:
        """The kernels of forward and backward, and the bytes saved between them, as in `explain`.

        Args:
            arch, dtype, dims: as in `explain`.
            wanted, memory: as in `lower_training`.
        """
        from coda.lowering.explain_training import TrainingExplanation

        forward, backward = self.lower_training(arch, dims, dtype, wanted, memory)
        return TrainingExplanation(self.graph_of(dtype), forward, backward)

    def lower_training(
        self,
        arch: str | None = None,
        dims: Mapping[str, int] | None = None,
        dtype: DType = bf16,
        wanted: Sequence[str] | None = None,
        memory: str | None = None,
    ) -> tuple[Program, Program]:
        """The Programs of the forward, which also returns what is saved, and of the backward.

        Args:
            arch, dims, dtype: as in `lower`.
            wanted: names of the arguments to differentiate; by default all floats except constants.
            memory: "min" saves arguments and row statistics alone; "balanced" also values that take
                fewer bytes to write and read than to recompute; "speed" also values that the
                forward stores anyway and the backward would have to store again. By default the
                block's.

        Raises:
            UnsupportedError: for another `memory`.
        """
        target, graph = choose_target(arch or ""), self.graph_of(dtype)
        sizes = check_dims(graph, dims or {})
        training = derive(graph, sizes, wanted, memory=memory or self.memory, takes=is_taken)
        forward, backward = (
            lower(g, {s: sizes[s] for s in g.symbols}, target, policy=policy, stages=stages())
            for g, policy in (
                (training.forward, DEFAULT_POLICY),
                (training.backward, training.policy()),
            )
        )
        return forward, backward

    def source(
        self,
        arch: str | None = None,
        dtype: DType = bf16,
        *,
        frozen: bool = False,
        **dims: int,
    ) -> str:
        """The generated CuTe DSL code. Arguments as in `lower`."""
        return program_source(self.lower(arch, dims, dtype, frozen=frozen))

    def __call__(
        self,
        *tensors: Tensor,
        backend: str | None = None,
        arch: str | None = None,
        dims: Mapping[str, int] | None = None,
        memory: str | None = None,
        **named: Tensor,
    ) -> Any:
        """The outputs: a tensor, a tuple of tensors or a dict, as the function returns them.

        Under `torch.autocast` contractions have autocast's type, and losses and statistics are
        float32, as in torch (`coda/frontend/torch_import/autocast.py`); types that the block
        declares stay, and float64 is left alone.

        Args:
            tensors, named: the arguments, in order and by name; inside another block, its tensors.
            backend: "reference", "sim" or "cuda"; by default `CODA_BACKEND`, else the best that
                works.
            arch: to lower for, if the backend does not determine it.
            dims: sizes that the tensors' shapes do not determine.
            memory: what is saved for the backward, "min", "balanced" or "speed", as in
                `lower_training`; by default the block's. Without gradients, "speed" lets the gains
                of norms be folded into copies of the weights.

        Raises:
            CallError: if the tensors do not fit the block.
            UnsupportedError: under `torch.func.vmap` and forward-mode derivatives.
        """
        if named:
            tensors = arrange(self.graph, tensors, named)
        plain = is_plain(tensors)
        for node, tensor in () if plain else zip(self.graph.inputs, tensors, strict=False):
            if not isinstance(tensor, Tensor):
                if isinstance(tensor, Symbolic) and self.fn is not None:
                    return call_in_order(self.fn, tensors)
                raise CallError(f"`{node.name}` takes a torch tensor", found=type(tensor).__name__)
        refuse_transforms(tensors)
        device = tensors[0].device.type if tensors else "meta"
        handle = self.handle
        if device != "meta" and torch.is_autocast_enabled(device):
            given = self.graph, self.undeclared, self._multiplied, tensors
            tensors, types = cast_arguments(*given)
            handle = f"{handle}/{types}" if types else handle
        kept = self.memory if memory is None else check_memory(memory)
        options = CallOptions(handle, (), backend or "", arch or "", memory=kept)
        if not plain and any_sharded(tensors):
            graph = block_of(handle).graph_for(tensors)
            found = call_sharded(
                graph, tensors, dict(dims or {}), lambda t, d: self._run(t, d, options)
            )
        else:
            found = self._run(list(tensors), dims, options)
        if self._names == ["out"]:
            return found[0]
        if self._names[0] == "out0":
            return tuple(found)
        return dict(zip(self._names, found, strict=True))

    def _run(
        self, tensors: list[Tensor], dims: Mapping[str, int] | None, options: CallOptions
    ) -> Sequence[Tensor]:
        """The outputs, with a backward if torch records gradients."""
        given = given_sizes(self.graph, dims) if dims else []
        handle, _, backend, arch, _, memory, _ = options
        if disabled():
            return run_in_torch(handle, tensors, given)
        learned = [t.requires_grad for t in tensors]
        if torch.is_grad_enabled() and any(learned):
            trained = CallOptions(
                handle, tuple(given), backend, arch, False, memory, tuple(learned)
            )
            return train_block(tensors, trained)[: len(self._names)]
        frozen = memory == "speed" and not any(learned)
        if needs_dispatch(tensors):
            return block_op(handle, tensors, given, backend, arch, frozen)
        return run_block(tensors, CallOptions(handle, tuple(given), backend, arch, frozen))

    def graph_for(self, inputs: Sequence[Tensor]) -> Graph:
        """The graph for arguments with the dtypes of these."""
        for tensor, free in zip(inputs, self.undeclared, strict=False):
            if free:
                return self.graph_of(from_torch(tensor.dtype) or bf16)
        return self.graph

    def program_for(
        self,
        graph: Graph,
        target: Target,
        *,
        frozen: bool,
        sizes: Mapping[str, int],
        policy: MemoryPolicy = DEFAULT_POLICY,
    ) -> Program:
        """A Program that serves these sizes; it serves all sizes of symbols that are not built in.

        Args:
            graph: the block's, or the forward or backward of its training.
            target: the GPU.
            frozen: whether weights keep their values.
            sizes: of every symbol.
            policy: the memory policy of the Program.
        """
        variant = (graph, target, frozen, policy)
        fixed = self._fixed.get(variant)
        if fixed is not None:
            key = (*variant, tuple((s, sizes[s]) for s in fixed))
            if key in self._programs:
                return self._programs[key]
        known = {s: sizes[s] for s in graph.symbols}
        program = lower(graph, known, target, frozen=frozen, policy=policy, stages=stages())
        self._fixed[variant] = fixed = tuple(sorted(program.fixed))
        self._programs[(*variant, tuple((s, sizes[s]) for s in fixed))] = program
        return program

    def training_for(
        self, graph: Graph, requires_grad: tuple[str, ...], memory: str, sizes: Mapping[str, int]
    ) -> Training:
        """The graphs of the forward that saves and of the backward, for any number of rows.

        The saved values are chosen once, for the number of rows of the first call, and serve all
        others.
        """
        tokens = row_symbols(walk(graph.roots))
        fixed = [(s, int(sizes[s])) for s in graph.symbols if s not in tokens] if tokens else []
        key = (graph, requires_grad, memory, tuple(fixed))
        if key not in self._trainings:
            self._trainings[key] = derive(
                graph, sizes, requires_grad, memory=memory, takes=is_taken
            )
        return self._trainings[key]


@overload
def block(fn: Callable[..., Any], /) -> Block: ...


@overload
def block(*, memory: str = "balanced") -> Callable[[Callable[..., Any]], Block]: ...


def block(
    fn: Callable[..., Any] | None = None, /, *, memory: str = "balanced"
) -> Block | Callable[[Callable[..., Any]], Block]:
    """Make a block of a function whose arguments are annotated `coda.Tensor[...]`.

    Args:
        fn: the function; or use `@coda.block(memory=...)`.
        memory: what a call that trains saves for its backward. "min" saves arguments and row
            statistics, and recomputes the rest; "balanced" saves what takes fewer bytes to write
            and read than to recompute; "speed" also saves what the forward stores anyway and the
            backward would have to store again.

    Raises:
        UnsupportedError: for another `memory`.
    """
    check_memory(memory)
    return (lambda f: Block(f, memory=memory)) if fn is None else Block(fn, memory=memory)


def parse(text: str, file: str = "<text>") -> Block:
    """A block from its text form. Raises TextError if it cannot be read."""
    from coda.ir.text import parse as parse_graph

    return Block(None, parse_graph(text, file))
