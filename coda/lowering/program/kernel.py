"""`Kernel`, one class for every launch, and `Kind`: a kind's data and its functions.

A kernel is a mainloop, whose class depends on the kind (contractions with stacked weights, the rows
of a matrix, one operation), and a body, which has one form for all kinds: an Epilogue and its
operands. Reads and writes follow from mainloop and body, so no pass tests the kind: everything that
differs is data of the kind or one of its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from coda.ir.dims import Dim
from coda.ir.graph import Contract, Node
from coda.ir.types import DType, bf16
from coda.lowering.program.body import NO_BODY, Body
from coda.lowering.program.target import Config, Target
from coda.lowering.program.time import Sketch, Time, roofline

if TYPE_CHECKING:
    from coda.lowering.program.program import Program

Sizes = Mapping[str, int]


class Mainloop(Protocol):
    """The part of a kernel before its body, or all of it; a frozen class per kind."""

    @property
    def operands(self) -> tuple[Node, ...]:
        """The nodes that the mainloop reads from memory, in order; without the body's."""
        ...

    @property
    def results(self) -> tuple[str, ...]:
        """The buffers that the mainloop writes; without the body's stores and sinks."""
        ...

    def points(self, sizes: Sizes) -> tuple[int, int]:
        """(rows, columns) of the matrix over which the body is computed; (0, 0) without a body."""
        ...


@dataclass(frozen=True)
class OneNode:
    """The mainloop of a kernel that computes one operation from memory to memory, without a body.

    Attributes:
        parts: the results that are read: one node, or several with the same operands.
        results: the buffer of each, in the node's shape.
    """

    parts: tuple[Node, ...]
    results: tuple[str, ...]

    @classmethod
    def of(cls, builder: Builder, name: Callable[[Node], str]) -> Self:
        """The mainloop of a kernel builder; `name` gives the buffer of each of its nodes."""
        parts = tuple(builder.homed)
        return cls(parts, tuple(map(name, parts)))

    @property
    def node(self) -> Node:
        """The operation, as the node of its first result."""
        return self.parts[0]

    @property
    def operands(self) -> tuple[Node, ...]:
        """The operation's operands."""
        return self.node.operands

    def points(self, sizes: Sizes) -> tuple[int, int]:
        """(0, 0): there is no body."""
        return 0, 0


M = TypeVar("M", bound=Mainloop, covariant=True)


@dataclass(frozen=True, eq=False)
class Kernel(Generic[M]):
    """One launch: a mainloop, and a body that is computed at each element of its result.

    Attributes:
        name: unique in the Program: the kind's name and a number, such as "gemm0".
        kind: data and functions of the kind.
        mainloop: of the class that belongs to the kind.
        body: the epilogue and its operands.
        stored: for each store of the body, in order, the nodes that it writes.
        sunk: for each sink of the body, in order, the reduction whose partials it writes.
        nodes: all nodes that the kernel computes.
        config: the tile config; None if the kind has no choice.
    """

    name: str
    kind: Kind
    mainloop: M
    body: Body = NO_BODY
    stored: tuple[tuple[Node, ...], ...] = ()
    sunk: tuple[Node, ...] = ()
    nodes: tuple[Node, ...] = ()
    config: Config | None = None

    def reads(self) -> tuple[Node, ...]:
        """The nodes that the kernel reads from memory, once for each read."""
        body = self.body
        return (*body.nodes.values(), *body.sources.values(), *self.mainloop.operands)

    def partials(self) -> tuple[str, ...]:
        """The buffers of partials that the kernel folds; no node stands for them."""
        return tuple(self.body.epilogue.partials)

    def writes(self) -> tuple[str, ...]:
        """The buffers that the kernel writes."""
        epilogue = self.body.epilogue
        written = tuple(x.buffer for x in (*epilogue.stores, *epilogue.sinks))
        return (*self.mainloop.results, *written)


class Builder(Protocol):
    """The view of a kernel builder (placement) from which a kind constructs its mainloop."""

    @property
    def contracts(self) -> tuple[Contract, ...]:
        """The contractions that opened the kernel, concatenated along its columns."""
        ...

    @property
    def homed(self) -> Sequence[Node]:
        """The nodes that the kernel computes."""
        ...

    @property
    def why(self) -> str:
        """The refusals of the kinds that fuse, for a kernel that computes a single operation."""
        ...

    @property
    def rows(self) -> Dim:
        """The number of rows of the kernel."""
        ...

    @property
    def width(self) -> int:
        """The number of columns of the kernel."""
        ...


class Source(Protocol):
    """An emitted Python module: its text, and a name that is unique to this text."""

    @property
    def text(self) -> str: ...

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Flops:
    """FLOPs of a mainloop: on tensor cores, with operands of `dtype`, and elsewhere."""

    tensor: int = 0
    scalar: int = 0
    dtype: DType = bf16


@dataclass(frozen=True)
class Partials:
    """The number of partials that a kernel's sinks write.

    Attributes:
        of_rows: partials per column of a sum over rows.
        of_columns: partials per row of a reduction over columns.
        columns: columns of each of those; the last one may have fewer.
    """

    of_rows: int = 1
    of_columns: int = 1
    columns: int = 0


@dataclass(frozen=True)
class Scratch:
    """Memory that a launch takes for itself, beside the buffers that the kernel reads and writes.

    Attributes:
        held: bytes that are allocated for the launch, and dead after it.
        read, written: bytes that its CTAs read and write there, to pass them to each other.
    """

    held: int = 0
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class Account:
    """A kernel described in words.

    Attributes:
        head: its first line in the text of a Program, after its name.
        what: its entry in the table of `explain`.
        why: the reason that it is a separate kernel; "" if it follows from its mainloop.
        pipeline: the stages of its pipelines in shared memory; "" if it has none.
        choice: from how many configs its own was chosen, and how many others were dropped by which
            reason; "" if it has no config.
    """

    head: str
    what: str
    why: str = ""
    pipeline: str = ""
    choice: str = ""


@dataclass(frozen=True)
class Code:
    """Emission, compilation and launch of a kind's kernels in CuTe DSL.

    Attributes:
        emit: (program, kernel) -> its modules: the first takes tensors of any strides, the last
            takes those of the Program's own buffers and is compiled ahead of calls.
        launch: (run, kernel): bind the tensors of a call and launch.
        compile: (run, kernel): compile the kernel that `launch` needs, on tensors without data.
    """

    emit: Callable[[Program, Kernel[Any]], Sequence[Source]]
    launch: Callable[[Any, Kernel[Any]], None]
    compile: Callable[[Any, Kernel[Any]], None]


def _no_configs(program: Program, kernel: Kernel[Any]) -> Sequence[Config]:
    return ()


def _own_order(node: Node, order: tuple[int, ...], sizes: Sizes) -> str:
    return "its kernels store their rows in their own order"


def _expanded(builder: Builder, body: Body, operands: Sequence[Node], sizes: Sizes) -> str:
    return "its kernels read an element for each row"


def _no_folds(program: Program, kernel: Kernel[Any]) -> str:
    return "its kernels take over no folds of others"


def _only_blocks(program: Program, kernel: Kernel[Any]) -> str:
    return "its CTAs have blocks of rows, which do not end where a sequence does"


def _no_scratch(program: Program, kernel: Kernel[Any]) -> Scratch:
    return Scratch()


def _one_launch(program: Program, kernel: Kernel[Any]) -> int:
    return 1


def _one_partial(program: Program, kernel: Kernel[Any], sizes: Sizes) -> Partials:
    return Partials()


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of kernel. A new one is a folder of `coda/kernels` and a row of its list of kinds.

    Data, which the placement reads:
        name: the prefix of its kernels' names: gemm0, rows1.
        tiled: a CTA holds a tile of the result of contractions: reductions over columns leave the
            kernel as partials.
        whole_rows: a warp holds a whole row from memory: row statistics are available to the body.
        scalars: the dtype in which an operand of one element is passed; None for its own.

    A kind that is neither tiled nor of whole rows computes one operation from memory to memory, and
    has no body. `Node.parts` says which nodes are its results.

    Functions:
        refuses: (node, sizes that are compiled in) -> the reason why no kernel of this kind can
            compute this node from operands in memory; "" if one can. A node that no kernel fuses
            goes to the first kind that does not refuse it.
        mainloop: (builder, node -> name of its buffer) -> the mainloop.
        flops: (kernel, sizes) -> FLOPs of the mainloop.
        time: (program, kernel) -> the modelled time, with the kernel's config.
        sketched: (sketch, target) -> the modelled time of a kernel before its placement.
        explain: (program, kernel) -> the kernel in words.
        reference: (run, kernel): compute it in torch; `run` is a `kernels.protocol.Run`.
        configs: (program, kernel) -> the configs that fit, the best by the kind's model first.
        partials: (program, kernel, sizes) -> the number of partials of its sinks.
        reorders: (contraction or, in a row-wise kernel, node; order of its axes; sizes that are
            compiled in) -> the reason why a kernel cannot store it with its axes in this order; ""
            if it can.
        shares: (builder, body, matrices that lack some row axes, sizes that are compiled in) -> the
            reason why a kernel cannot read all of them as they are; "" if it can.
        folds: (program, kernel that folds partials of its rows) -> the reason why kernels of this
            kind cannot; "" if they can.
        sums_whole: (program, kernel that sums the rows of each sequence) -> the reason why its CTAs
            cannot sum whole sequences, or should not; "" if they can.
        scratch: (program, kernel) -> the memory that a launch takes for itself.
        launches: (program, kernel) -> the number of its launches.
        code: emission, compilation and launch; None if every backend runs the reference.
    """

    name: str
    refuses: Callable[[Node, Sizes], str]
    mainloop: Callable[[Builder, Callable[[Node], str]], Mainloop]
    flops: Callable[[Kernel[Any], Sizes], Flops]
    time: Callable[[Program, Kernel[Any]], Time]
    explain: Callable[[Program, Kernel[Any]], Account]
    reference: Callable[[Any, Kernel[Any]], None]
    sketched: Callable[[Sketch, Target], Time] = roofline
    configs: Callable[[Program, Kernel[Any]], Sequence[Config]] = _no_configs
    partials: Callable[[Program, Kernel[Any], Sizes], Partials] = _one_partial
    reorders: Callable[[Node, tuple[int, ...], Sizes], str] = _own_order
    shares: Callable[[Builder, Body, Sequence[Node], Sizes], str] = _expanded
    folds: Callable[[Program, Kernel[Any]], str] = _no_folds
    sums_whole: Callable[[Program, Kernel[Any]], str] = _only_blocks
    scratch: Callable[[Program, Kernel[Any]], Scratch] = _no_scratch
    launches: Callable[[Program, Kernel[Any]], int] = _one_launch
    code: Code | None = None
    tiled: bool = False
    whole_rows: bool = False
    scalars: DType | None = None

    def takes(self, node: Node, sizes: Sizes) -> bool:
        """Whether a kernel of this kind can compute a node from operands in memory."""
        return not self.refuses(node, sizes)

    @property
    def fuses(self) -> bool:
        """Whether its kernels have a body, into which other nodes can be fused."""
        return self.tiled or self.whole_rows


def kind_of(kinds: Sequence[Kind], node: Node, sizes: Sizes) -> Kind:
    """The first kind whose kernels can compute a node from memory; the last one takes every node.

    Args:
        kinds: in order of preference.
        node: any operation.
        sizes: those of symbols that are compiled in.
    """
    return next(k for k in kinds if k.takes(node, sizes))
