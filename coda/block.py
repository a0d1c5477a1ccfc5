"""The face: `@coda.block` ties tracing, lowering and running together."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coda.errors import CallError
from coda.frontend.tensor import Spec
from coda.frontend.trace import trace
from coda.ir.graph import Graph
from coda.ir.types import DType, bf16, from_torch
from coda.lowering.derive import derive
from coda.lowering.explain import Explanation
from coda.lowering.pipeline import check_dims, lower
from coda.lowering.program import Program
from coda.runtime.run import (
    Trained,
    block_op,
    needs_dispatch,
    register,
    run_block,
    target_arch,
)
from coda.runtime.train import train_block


class Block:
    """A block of mathematics: traced once for each element type, lowered for each set of sizes.

    Call it with torch tensors. `fn` (and `__wrapped__`) is the traced function, None for a block
    that was written as text; `graph` is what it means.
    """

    def __init__(self, fn: Callable[..., Any] | None, graph: Graph | None = None) -> None:
        self.fn = fn
        self._graphs: dict[DType, Graph] = {}
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._fixed: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self._trained: dict[tuple[Any, ...], Trained] = {}
        self._given = graph
        self._undeclared = [False] * (len(graph.inputs) if graph else 0)
        if fn is not None:
            functools.update_wrapper(self, fn)  # type: ignore[arg-type]
            hints = typing.get_type_hints(fn)
            specs = [hints.get(name) for name in inspect.signature(fn).parameters]
            self._undeclared = [isinstance(s, Spec) and s.dtype is None for s in specs]
        self.__name__ = self.graph.name
        self._number = register(self)
        self._names = [name for name, _ in self.graph.outputs]
        self._symbols = self.graph.symbols
        self._untold = [-1] * len(self._symbols)

    @property
    def graph(self) -> Graph:
        """The graph, with bf16 for arguments that are declared without a type."""
        return self.graph_of(bf16)

    def graph_of(self, dtype: DType) -> Graph:
        """The graph, with `dtype` for arguments that are declared without a type."""
        if self._given is not None:
            return self._given
        if dtype not in self._graphs:
            assert self.fn is not None
            self._graphs[dtype] = trace(self.fn, dtype)
        return self._graphs[dtype]

    def __repr__(self) -> str:
        return f"coda.block {self.__name__}({', '.join(i.name for i in self.graph.inputs)})"

    def lower(
        self,
        arch: str | None = None,
        dims: Mapping[str, int] | None = None,
        dtype: DType = bf16,
        frozen: bool = False,
    ) -> Program:
        """The Program for these sizes.

        Args:
            arch: "sm_90a" or "sm_100a"; by default that of the GPU, else `CODA_ARCH`.
            dims: the size of every symbol.
            dtype: of arguments that are declared without a type.
            frozen: whether weights keep their values (inference).
        """
        arch, graph = target_arch(arch or ""), self.graph_of(dtype)
        key = (graph, arch, frozen, "lower", tuple(sorted((dims or {}).items())))
        if key not in self._programs:
            self._programs[key] = lower(graph, dims or {}, arch, frozen)
        return self._programs[key]

    def explain(
        self,
        arch: str | None = None,
        dtype: DType = bf16,
        frozen: bool = False,
        **dims: int,
    ) -> Explanation:
        """What the Program does and why; `print` it, or take its `.json()`."""
        return Explanation(self.lower(arch, dims, dtype, frozen))

    def lower_training(
        self,
        arch: str | None = None,
        dims: Mapping[str, int] | None = None,
        dtype: DType = bf16,
        wanted: Sequence[str] | None = None,
        memory: str = "balanced",
    ) -> tuple[Program, Program]:
        """The Programs of the forward that saves and of the backward.

        Args:
            arch, dims, dtype: as in `lower`.
            wanted: names of the arguments to differentiate; by default all floats.
            memory: "min" saves arguments alone, "balanced" moves the fewest bytes, "speed"
                computes nothing again.
        """
        arch, sizes = target_arch(arch or ""), check_dims(self.graph_of(dtype), dims or {})
        training = derive(self.graph_of(dtype), sizes, wanted, memory=memory)
        return _lowered(training.forward, sizes, arch), _lowered(training.backward, sizes, arch)

    def source(
        self,
        arch: str | None = None,
        dtype: DType = bf16,
        frozen: bool = False,
        **dims: int,
    ) -> str:
        """The generated CuTe DSL, readable."""
        return self.lower(arch, dims, dtype, frozen).source()

    def __call__(
        self,
        *tensors: Tensor,
        backend: str | None = None,
        arch: str | None = None,
        dims: Mapping[str, int] | None = None,
    ) -> Any:
        """The outputs: a tensor, a tuple of tensors or a dict, as the function returns them.

        Args:
            tensors: the arguments.
            backend: "reference", "sim" or "cuda".
            arch: to lower for, where the backend leaves it open.
            dims: sizes that the tensors' shapes do not tell.

        Raises:
            CallError: where the tensors do not fit the block.
        """
        for node, tensor in zip(self.graph.inputs, tensors, strict=False):
            if not isinstance(tensor, Tensor):
                raise CallError(f"`{node.name}` is a torch tensor", found=type(tensor).__name__)
        given = [dims.get(s, -1) for s in self._symbols] if dims else self._untold
        arguments = list(tensors), given, backend or "", arch or ""
        if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
            found = train_block(self._number, *arguments)[: len(self._names)]
        else:
            frozen = not any([t.requires_grad for t in tensors])
            run = block_op if needs_dispatch(tensors) else run_block
            found = run(self._number, *arguments, frozen)
        if self._names == ["out"]:
            return found[0]
        if self._names[0] == "out0":
            return tuple(found)
        return dict(zip(self._names, found, strict=True))

    def graph_for(self, inputs: Sequence[Tensor]) -> Graph:
        """The graph for arguments of these types."""
        for tensor, free in zip(inputs, self._undeclared, strict=False):
            if free:
                return self.graph_of(from_torch(tensor.dtype) or bf16)
        return self.graph

    def program_for(
        self, graph: Graph, arch: str, frozen: bool, sizes: Mapping[str, int]
    ) -> Program:
        """A Program that serves these sizes: one for all sizes of symbols that are not built in."""
        variant = (graph, arch, frozen)
        fixed = self._fixed.get(variant)
        if fixed is not None:
            key = (*variant, tuple((s, sizes[s]) for s in fixed))
            if key in self._programs:
                return self._programs[key]
        program = lower(graph, sizes, arch, frozen)
        self._fixed[variant] = fixed = tuple(sorted(program.fixed))
        self._programs[(*variant, tuple((s, sizes[s]) for s in fixed))] = program
        return program

    def trained_for(
        self, graph: Graph, arch: str, wanted: tuple[str, ...], sizes: Mapping[str, int]
    ) -> Trained:
        """The forward that saves and the backward, lowered for these sizes."""
        variant = (graph, arch, wanted)
        fixed = self._fixed.get(variant)
        if fixed is not None:
            key = (*variant, tuple((s, sizes[s]) for s in fixed))
            if key in self._trained:
                return self._trained[key]
        training = derive(graph, sizes, wanted)
        forward = _lowered(training.forward, sizes, arch)
        backward = _lowered(training.backward, sizes, arch) if training.wanted else None
        symbols = forward.fixed | (backward.fixed if backward else frozenset())
        self._fixed[variant] = fixed = tuple(sorted(symbols))
        found = self._trained[(*variant, tuple((s, sizes[s]) for s in fixed))] = Trained(
            training, forward, backward
        )
        return found


def _lowered(graph: Graph, sizes: Mapping[str, int], arch: str) -> Program:
    return lower(graph, {s: sizes[s] for s in graph.symbols}, arch)


def block(fn: Callable[..., Any]) -> Block:
    """Make a block of a function whose arguments are annotated `coda.Tensor[...]`."""
    return Block(fn)


def parse(text: str, file: str = "<text>") -> Block:
    """A block from its text form. Raises TextError where it cannot be read."""
    from coda.ir.text import parse as parse_graph

    return Block(None, parse_graph(text, file))
