"""One Kernel for every kind, and what a kind of kernel is: data and at most ten functions.

A kernel is a mainloop, which is its kind's (contractions side by side, the rows of a matrix, one
operation), and a body, which is the same for all: what is computed at each point, loaded for it and
stored of it. What a kernel reads and writes follows from both, so no pass asks of which kind it is:
what differs is data of the kind, or one of its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from coda.ir.dims import Dim
from coda.ir.graph import Contract, Node
from coda.ir.types import DType, bf16
from coda.lowering.program.body import NO_BODY, Body
from coda.lowering.program.target import Config

if TYPE_CHECKING:
    from coda.lowering.program.program import Program

Sizes = Mapping[str, int]


class Mainloop(Protocol):
    """What a kernel does before its body, or in place of one; each kind has a frozen class."""

    @property
    def operands(self) -> tuple[Node, ...]:
        """The nodes that it reads from memory, in order, beside those of the body."""
        ...

    @property
    def results(self) -> tuple[str, ...]:
        """The buffers that it writes itself, beside the body's stores and sinks."""
        ...

    def points(self, sizes: Sizes) -> tuple[int, int]:
        """The rows and the columns that the body is computed for; (0, 0) without a body."""
        ...


M = TypeVar("M", bound=Mainloop, covariant=True)


@dataclass(frozen=True, eq=False)
class Kernel(Generic[M]):
    """One launch: a mainloop, and what is computed at each point of its result.

    Attributes:
        name: unique in the program: the kind's name and the number of the launch.
        kind: what differs between kinds, as data and functions.
        mainloop: what the kernel does before its body.
        body: what is computed at a point.
        stored: nodes written, in the order of the body's stores: one tuple for each store.
        sunk: reductions written as partials, in the order of the body's sinks.
        nodes: all nodes that the kernel computes.
        config: tiles, if the kind has a choice of them.
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
        """The nodes that the kernel reads from memory, one that is read twice twice."""
        body = self.body
        return (*body.nodes.values(), *body.sources.values(), *self.mainloop.operands)

    def partials(self) -> tuple[str, ...]:
        """The buffers of partials that the kernel folds: these are no value of any node."""
        return tuple(self.body.epilogue.partials)

    def writes(self) -> tuple[str, ...]:
        """The buffers that the kernel writes."""
        epilogue = self.body.epilogue
        written = tuple(x.buffer for x in (*epilogue.stores, *epilogue.sinks))
        return (*self.mainloop.results, *written)


class Builder(Protocol):
    """What a kernel builder of the placement tells the kind that makes a mainloop of it."""

    @property
    def contracts(self) -> tuple[Contract, ...]:
        """The contractions that opened it, side by side in its columns."""
        ...

    @property
    def homed(self) -> Sequence[Node]:
        """The nodes that it computes."""
        ...

    @property
    def why(self) -> str:
        """Why a kernel that computes one operation does: what the kernels that fuse said."""
        ...

    @property
    def rows(self) -> Dim:
        """How many rows its points have."""
        ...

    @property
    def width(self) -> int:
        """How many columns they have."""
        ...


class Source(Protocol):
    """An emitted Python module: its text, and a name that belongs to this text alone."""

    @property
    def text(self) -> str: ...

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Flops:
    """FLOPs of a mainloop: of the tensor cores, which multiply elements of `dtype`, and others."""

    tensor: int = 0
    scalar: int = 0
    dtype: DType = bf16


@dataclass(frozen=True)
class Partials:
    """In how many parts a kernel takes its sinks.

    Attributes:
        of_rows: partial sums of each column, if it sums over the rows.
        of_columns: partial results of each row, if it reduces over the columns.
        columns: how many columns each of those has, the last one perhaps fewer.
    """

    of_rows: int = 1
    of_columns: int = 1
    columns: int = 0


@dataclass(frozen=True)
class Account:
    """What a kernel is, in words.

    Attributes:
        head: its first line in the text of a Program, behind its name.
        what: the same for the table of `explain`.
        why: why it is a kernel of its own; "" where its mainloop is reason enough.
    """

    head: str
    what: str
    why: str = ""


@dataclass(frozen=True)
class Code:
    """How a kind's kernels are written as CuTe DSL, compiled and launched.

    Attributes:
        emit: (program, kernel) -> its modules: first that for memory of any layout, last that
            for memory as the program's own kernels lay it out, which is compiled ahead of calls.
        launch: (run, kernel): bind the tensors of a call and launch.
        compile: (run, kernel): compile what `launch` would, on tensors that hold nothing.
    """

    emit: Callable[[Program, Kernel[Any]], Sequence[Source]]
    launch: Callable[[Any, Kernel[Any]], None]
    compile: Callable[[Any, Kernel[Any]], None]


def _no_configs(program: Program, kernel: Kernel[Any]) -> Sequence[Config]:
    return ()


def _one_partial(program: Program, kernel: Kernel[Any], sizes: Sizes) -> Partials:
    return Partials()


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of kernel. A new one is a folder of `coda/kernels` and a row of its list of kinds.

    Data, which the placement asks:
        name: kernels are called by it: gemm0, rows1.
        tiled: the points are those of contractions, and a CTA sees a tile of columns: what is
            reduced over them leaves the kernel as partials.
        whole_rows: the points are rows of memory, and a warp sees a whole row: its statistics
            are known to it.
        scalars: the type in which a body's operand of one element is passed; None: as it is stored.

    A kind that is neither tiled nor of whole rows computes one node from memory to memory, and has
    no body.

    Functions:
        opens: (node, sizes) -> whether a kernel of this kind computes this node from operands in
            memory. A node that nothing fuses goes to the first kind that opens it.
        mainloop: (builder, name of a node's buffer) -> the mainloop.
        flops: (kernel, sizes) -> FLOPs of the mainloop.
        explain: (program, kernel) -> the kernel in words.
        reference: (run, kernel): compute it in torch; `run` is a `kernels.protocol.Run`.
        configs: (program, kernel) -> the configs that fit, from that which a model ranks first.
        partials: (program, kernel, sizes) -> how it takes its sinks.
        code: emission, launch and compilation; None: the reference computes it on every backend.
    """

    name: str
    opens: Callable[[Node, Sizes], bool]
    mainloop: Callable[[Builder, Callable[[Node], str]], Mainloop]
    flops: Callable[[Kernel[Any], Sizes], Flops]
    explain: Callable[[Program, Kernel[Any]], Account]
    reference: Callable[[Any, Kernel[Any]], None]
    configs: Callable[[Program, Kernel[Any]], Sequence[Config]] = _no_configs
    partials: Callable[[Program, Kernel[Any], Sizes], Partials] = _one_partial
    code: Code | None = None
    tiled: bool = False
    whole_rows: bool = False
    scalars: DType | None = None

    @property
    def fuses(self) -> bool:
        """Whether its kernels have points, at which a body is computed."""
        return self.tiled or self.whole_rows
