"""The interface between kinds of kernel and one call of a Program.

`Run` is offered by every backend, and is all that a kind's reference uses. `LaunchRun` extends it
on a device, where the launches of a call are recorded, so that later calls replay them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from coda.ir.graph import Node
from coda.lowering.program.body import Body
from coda.lowering.program.kernel import Sizes
from coda.lowering.program.program import Program

T = TypeVar("T")


class Run(Protocol):
    """One call of a Program, kernel by kernel.

    Attributes:
        program: the Program that runs.
        sizes: the size of each symbol in this call.
        compute: the float type of all computation.
    """

    program: Program
    sizes: Sizes
    compute: torch.dtype

    def value(self, node: Node) -> Tensor:
        """The tensor of a materialised node, or of a view of one, in the node's shape."""
        ...

    def keep(self, buffer: str, x: Tensor) -> None:
        """Write `x` to a buffer, rounded to the buffer's dtype."""
        ...

    def body(
        self, body: Body, acc: Tensor | None, points: tuple[int, int], tile_n: int = 0
    ) -> None:
        """Compute a body and write its stores and sinks.

        Args:
            body: the body of a kernel.
            acc: the accumulator [rows, columns]; None for a kernel without one.
            points: the numbers of rows and columns.
            tile_n: the columns of each partial reduction over columns.
        """
        ...


class LaunchRun(Run, Protocol):
    """One call of a Program by its kernels.

    Attributes:
        inputs: the arguments, by input node.
        buffers: the buffers that kernels have written, by name.
        raw: partial reductions in the layout that kernels write, by buffer name.
    """

    inputs: dict[Node, Tensor]
    buffers: dict[str, Tensor]
    raw: dict[str, Tensor]

    @property
    def directory(self) -> Path:
        """The directory of emitted modules."""
        ...

    def operand(self, body: Body, name: str) -> Tensor:
        """The tensor of a body's operand, broadcast over row axes that it does not have."""
        ...

    def repeated(self, body: Body, name: str) -> Tensor:
        """As `operand`, but never from a cache."""
        ...

    def packed(self, name: str, body: Body) -> dict[str, Tensor]:
        """The packed row operands [N] of the kernel `name`, by operand name."""
        ...

    def once(self, name: Hashable, roots: Iterable[Node], make: Callable[[], T]) -> T:
        """A value that `make` computes of weights and tables alone; cached until they change."""
        ...

    def each_call(
        self, name: Hashable, nodes: Iterable[Node], make: Callable[[Any], Tensor]
    ) -> Tensor:
        """`make(run)`, which reads `nodes`: cached if they depend on weights alone."""
        ...

    def ready(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """`change(x)`, a layout that the kernel can read; replays of the call apply it too."""
        ...

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, fill: str = "") -> Tensor:
        """Allocate a result: `fill` is "padded" (rows for TMA), "zero", "nan" or "" (as it is)."""
        ...

    def room(self, name: str, rows: int, width: int, dtype: torch.dtype, fill: str = "") -> Tensor:
        """The matrix [rows, width] for the buffer `name`: new, or storage that the plan reuses."""
        ...

    def summands(self, buffer: str, found: Tensor) -> Tensor:
        """Partial sums over rows, [parts, width] -> [columns, partials of each column]."""
        ...

    def loaded(self, key: Hashable, load: Callable[[], T]) -> T:
        """`load()` of the first call, such as an imported module; cached for the Program."""
        ...

    def constant(self, x: Tensor) -> None:
        """Declare that a tensor does not depend on the arguments, so that replays may reuse it."""
        ...

    def in_place(self, tensors: Sequence[Tensor]) -> None:
        """Declare arguments whose memory a launch reads directly, without a copy."""
        ...

    def launched(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Record a launch; replays call `function` with the tensors of their own call."""
        ...


Tensors = Mapping[str, Tensor]
