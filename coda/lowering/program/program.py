"""`Program`: kernels in launch order over named buffers; frozen, and complete when it is built.

    y = silu(x wᵀ)      kernels (gemm0,);  buffers x, w "input", y "output"

A pass over a Program returns a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coda.ir.dims import Shape, product
from coda.ir.graph import Graph, Node, Permute, Reshape, Slice
from coda.ir.types import DType
from coda.lowering.algebra.chunk import ChunkedValue
from coda.lowering.algebra.policy import MemoryPolicy
from coda.lowering.algebra.rewrite import LawApplication
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.target import Target


@dataclass(frozen=True)
class Buffer:
    """A tensor of the Program.

    kind:
        "input"    an argument of the block.
        "prepared" prepacked: a function of weights alone, computed once per version of them.
        "temp"     written by one kernel, read by later ones.
        "output"   written by a kernel and returned, itself or a view of it.
        "partial"  planes of a split reduction, float32, one partial per tile.
    """

    name: str
    kind: str
    shape: Shape
    dtype: DType

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Size in bytes."""
        return self.dtype.nbytes(product(self.shape).size(sizes))


@dataclass(frozen=True)
class ColumnSlice:
    """A column slice of a buffer: `buffer[:, first : first + count]`.

    A count of -1 stands for the whole buffer, in the shape of its node.
    """

    buffer: str
    first: int
    count: int


@dataclass(frozen=True)
class Unfused:
    """An operation that could not be fused where it would be cheapest, and the reason."""

    node: Node
    why: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Program:
    """Kernels in order, over buffers. A pass returns another Program, made by `replace`.

    Attributes:
        graph: the block as the user wrote it.
        normal: the graph in normal form, whose nodes the kernels compute.
        sizes: the size of every symbol; for token symbols it is only an estimate.
        target: the GPU that it is lowered for.
        kernels: in launch order.
        buffers: by name.
        places: node -> column slice of a buffer, for each materialised node.
        outputs: (name, node) of each output; the node is materialised or a view of one that is.
        joined: buffer -> its parts, each written by its own kernel, concatenated.
        stacked: those joined buffers whose parts are concatenated along rows, not columns.
        weights: inputs without a token dim.
        prepared: buffer name -> function of weights alone that is prepacked.
        steps: the applications of laws.
        unfused: operations that could not be fused, with reasons.
        fixed: symbols whose sizes are compiled into the kernels; others may change between calls.
        frozen: whether weights keep their values, so that prepacking happens once.
        policy: the memory policy.
        cuts: values that are computed in chunks.
        overwrites: output buffer -> dead buffer, or donated argument, whose storage it reuses. Set
            by the memory plan; empty before it.
        freed: for each kernel, the buffers that are dead after it. Set by the memory plan.
    """

    graph: Graph
    normal: Graph
    sizes: Mapping[str, int]
    target: Target
    kernels: tuple[Kernel[Any], ...]
    buffers: Mapping[str, Buffer]
    places: Mapping[Node, ColumnSlice]
    outputs: tuple[tuple[str, Node], ...]
    joined: Mapping[str, tuple[str, ...]]
    stacked: frozenset[str]
    weights: frozenset[Node]
    prepared: Mapping[str, Node]
    steps: tuple[LawApplication, ...]
    unfused: tuple[Unfused, ...]
    fixed: frozenset[str]
    frozen: bool
    policy: MemoryPolicy
    cuts: tuple[ChunkedValue, ...]
    overwrites: Mapping[str, str] = field(default_factory=dict[str, str])
    freed: tuple[tuple[str, ...], ...] = ()

    @property
    def arch(self) -> str:
        """The arch that its kernels are compiled for, such as "sm_90a"."""
        return self.target.arch

    @property
    def updates(self) -> dict[str, str]:
        """Output name -> name of the argument that it updates in place."""
        return dict(self.policy.updates)

    def is_weight(self, node: Node) -> bool:
        """Whether a node is a weight, prepacked, or a view of either."""
        while isinstance(node, Reshape | Slice | Permute):
            node = node.arg
        return node in self.weights or node in self.prepared.values()

    def __str__(self) -> str:
        """The Program as text: each kernel's loads, expressions, stores and sinks."""
        from coda.lowering.program.text import show_program  # it imports this module

        return show_program(self)
