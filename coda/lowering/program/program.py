"""The Program: an ordered list of kernels over buffers. It is built once, complete, and frozen.

A pass over a Program returns another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coda.ir.dims import Shape, product
from coda.ir.graph import Graph, Node, Permute, Reshape, Slice
from coda.ir.types import DType
from coda.lowering.algebra.chunk import Cut
from coda.lowering.algebra.policy import Terms
from coda.lowering.algebra.rewrite import Step
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.target import Target


@dataclass(frozen=True)
class Buffer:
    """A tensor of the program.

    kind:
        "input"    an argument of the block.
        "prepared" made from weights alone, once for each version of them.
        "temp"     written by one kernel, read by later ones.
        "output"   written by a kernel, returned (a view of it may be).
        "partial"  planes of a split reduction, one partial for each tile of columns.
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

    A count of -1 is the whole buffer, in the shape of its node.
    """

    buffer: str
    first: int
    count: int


@dataclass(frozen=True)
class Unfused:
    """An operation that could not go where it would have been cheapest, and why."""

    node: Node
    why: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Program:
    """Kernels in order, over buffers. A pass returns another Program, made by `replace`.

    Attributes:
        graph: the block as it was written.
        normal: the graph after the laws, of which the kernels compute the nodes.
        sizes: the size of every symbol; the rows among them are only an estimate.
        target: the GPU that it is lowered for.
        kernels: in the order of launches.
        buffers: by name.
        places: where each node that is in memory lies.
        outputs: each output's name and its node (a view of a node in memory, or itself there).
        joined: buffers that are made of others side by side, each written by its own kernel.
        stacked: those of them whose parts are rows, one below the other.
        weights: arguments that no token reaches.
        prepared: nodes of weights alone that are computed once, by buffer name.
        steps: the laws that were applied.
        unfused: what could not be fused, and why.
        fixed: symbols whose sizes are built into the kernels; the others may change from call to
            call.
        frozen: whether weights keep their values, so that what is made of them is made once.
        terms: what the caller lets it do with memory.
        cuts: values that are made in parts.
        overwrites: buffers that are written over one that is over then, or over an argument if the
            call gives it up. The memory plan tells them; without one there are none.
        freed: for each kernel, the buffers that are over once it is done; of the memory plan.
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
    steps: tuple[Step, ...]
    unfused: tuple[Unfused, ...]
    fixed: frozenset[str]
    frozen: bool
    terms: Terms
    cuts: tuple[Cut, ...]
    overwrites: Mapping[str, str] = field(default_factory=dict)
    freed: tuple[tuple[str, ...], ...] = ()

    @property
    def arch(self) -> str:
        """What its kernels are compiled for."""
        return self.target.arch

    @property
    def updates(self) -> dict[str, str]:
        """Outputs that are written over an argument: a name, and the argument's."""
        return dict(self.terms.updates)

    def is_weight(self, node: Node) -> bool:
        """Whether a node is an argument that no token reaches, or is made of such arguments."""
        while isinstance(node, Reshape | Slice | Permute):
            node = node.arg
        return node in self.weights or node in self.prepared.values()

    @property
    def hbm_bytes(self) -> int:
        """Bytes that cross global memory in one call, weights prepared before."""
        from coda.lowering.program.cost import hbm_bytes

        return hbm_bytes(self)

    @property
    def flops(self) -> int:
        """FLOPs of the tensor cores and of the scalar units."""
        from coda.lowering.program.cost import scalar_flops, tensor_flops

        return sum(tensor_flops(self, k) + scalar_flops(self, k) for k in self.kernels)

    def text(self) -> str:
        """The program as text: kernels, what they load, compute and write."""
        from coda.lowering.program.text import show_program

        return show_program(self)

    __str__ = text

    def source(self) -> str:
        """The generated CuTe DSL of all kernels, one module after the other; each text once."""
        from coda.lowering.program.text import kernel_source

        return "\n\n".join(dict.fromkeys(kernel_source(self, k) for k in self.kernels))
