"""The Program: an ordered list of kernels over buffers, as the partition leaves it.

Three kinds of kernel: a GEMM with an epilogue, one fused pass over rows, and a torch operator for
what neither can do. Each knows the nodes that it loads, computes and stores, so that it can be run
in torch, emitted as CuTe DSL, costed and explained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from coda.ir.dims import Dim, Shape, product
from coda.ir.graph import Contract, Graph, Node, Permute, Reshape, Slice
from coda.ir.types import DType
from coda.lowering.algebra.chunk import Cut
from coda.lowering.algebra.policy import NO_TERMS, Terms
from coda.lowering.algebra.rewrite import Step
from coda.lowering.program.body import Body
from coda.lowering.program.target import Config, Target


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
class Place:
    """Where a node's value lies: columns [first, first + count) of a buffer of rows."""

    buffer: str
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class GemmKernel:
    """Sibling contractions of one activation, and everything that its epilogue does.

    Attributes:
        name: unique in the program.
        contracts: the contractions, side by side in the accumulator's columns.
        body: the epilogue at a point, with the order of the columns.
        stored: nodes written, in the order of the epilogue's stores: one tuple for each store.
        sunk: reductions written as partials, in the order of the epilogue's sinks.
        nodes: all nodes that the kernel computes.
        config: tiles.
    """

    name: str
    contracts: tuple[Contract, ...]
    body: Body
    stored: tuple[tuple[Node, ...], ...]
    sunk: tuple[Node, ...]
    nodes: tuple[Node, ...]
    config: Config

    @property
    def a(self) -> Node:
        """The activation, [..., K]."""
        return self.contracts[0].lhs

    def problem(self, sizes: Mapping[str, int]) -> tuple[int, int, int]:
        """M, N and K."""
        one = self.contracts[0]
        m = product(one.lhs.shape[:-1]).size(sizes)
        n = sum(c.shape[-1].size(sizes) for c in self.contracts)
        return m, n, one.lhs.shape[-1].size(sizes)


@dataclass(frozen=True, eq=False)
class RowwiseKernel:
    """One fused pass over rows: statistics of a row, and what is made of them.

    `rows` is the number of rows and `width` of columns; `folds` are the reductions whose partials
    are folded, `sunk` sums over the rows that are written as partials, one for each block of rows.
    """

    name: str
    body: Body
    stored: tuple[tuple[Node, ...], ...]
    folds: tuple[Node, ...]
    sunk: tuple[Node, ...]
    nodes: tuple[Node, ...]
    rows: Dim
    width: int


@dataclass(frozen=True, eq=False)
class TorchKernel:
    """One operation that neither a GEMM's epilogue nor a row kernel can do, run by torch."""

    name: str
    node: Node
    why: str

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The one node."""
        return (self.node,)


Kernel = GemmKernel | RowwiseKernel | TorchKernel


@dataclass(frozen=True)
class Unfused:
    """An operation that could not go where it would have been cheapest, and why."""

    node: Node
    why: str


@dataclass(eq=False)
class Program:
    """Kernels in order, over buffers.

    Attributes:
        graph: the block as it was written.
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
        normal: the graph after the laws, of which the kernels compute the nodes.
        fixed: symbols whose sizes are built into the kernels; the others may change from call to
            call.
        frozen: whether weights keep their values, so that what is made of them is made once.
        terms: what the caller lets it do with memory.
        overwrites: buffers that are written over one that is over then, or over an argument if the
            call gives it up.
        cuts: values that are made in parts.
        freed: for each kernel, the buffers that are over once it is done.
    """

    graph: Graph
    sizes: dict[str, int]
    target: Target
    kernels: tuple[Kernel, ...] = ()
    buffers: dict[str, Buffer] = field(default_factory=dict)
    places: dict[Node, Place] = field(default_factory=dict)
    outputs: tuple[tuple[str, Node], ...] = ()
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)
    weights: frozenset[Node] = frozenset()
    prepared: dict[str, Node] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    unfused: list[Unfused] = field(default_factory=list)
    normal: Graph | None = None
    fixed: frozenset[str] = frozenset()
    frozen: bool = False
    terms: Terms = NO_TERMS
    overwrites: dict[str, str] = field(default_factory=dict)
    freed: tuple[tuple[str, ...], ...] = ()
    cuts: tuple[Cut, ...] = ()

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
        from coda.lowering.program.cost import gemm_flops, scalar_flops

        return sum(gemm_flops(self, k) + scalar_flops(self, k) for k in self.kernels)

    def text(self) -> str:
        """The program as text: kernels, what they load, compute and write."""
        from coda.lowering.program.text import show_program

        return show_program(self)

    __str__ = text

    def source(self) -> str:
        """The generated CuTe DSL of all kernels, one module after the other; each text once."""
        from coda.kernels.gemm.emit import emit_gemm
        from coda.kernels.rowwise.emit import emit_rowwise

        texts = []
        for kernel in self.kernels:
            if isinstance(kernel, GemmKernel):
                texts.append(emit_gemm(self, kernel).text)
            elif isinstance(kernel, RowwiseKernel):
                texts.append(emit_rowwise(self, kernel).text)
            else:
                texts.append(f'"""{kernel.name}: torch, since {kernel.why}."""\n')
        return "\n\n".join(dict.fromkeys(texts))

    def gemms(self) -> Iterator[GemmKernel]:
        """The GEMM kernels."""
        return (k for k in self.kernels if isinstance(k, GemmKernel))
