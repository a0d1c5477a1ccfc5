"""What a kind is given of one call of a Program: to compute a kernel in torch, or to launch it.

`Run` is what every backend has, and all that the reference of a kind may ask for. `LaunchRun` is
the same on a device, where what a call does is recorded, so that later calls replay it.
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
        program: what is run.
        sizes: of its symbols in this call.
        compute: the float type in which the call computes.
    """

    program: Program
    sizes: Sizes
    compute: torch.dtype

    def value(self, node: Node) -> Tensor:
        """A node in memory, or a view of one, in its own shape."""
        ...

    def keep(self, buffer: str, x: Tensor) -> None:
        """Write a buffer, rounded as it is stored."""
        ...

    def body(
        self, body: Body, acc: Tensor | None, points: tuple[int, int], tile_n: int = 0
    ) -> None:
        """Compute a body and write what it stores.

        Args:
            body: of a kernel.
            acc: the accumulator [rows, columns], if the kernel has one.
            points: rows and columns.
            tile_n: how many columns a partial reduction over the columns has.
        """
        ...


class LaunchRun(Run, Protocol):
    """One call of a Program by its kernels.

    Attributes:
        inputs: the arguments, by their nodes.
        buffers: what kernels have written, by name.
        raw: partials as kernels write them, by name.
    """

    inputs: dict[Node, Tensor]
    buffers: dict[str, Tensor]
    raw: dict[str, Tensor]

    @property
    def directory(self) -> Path:
        """Where emitted modules are written."""
        ...

    def operand(self, body: Body, name: str) -> Tensor:
        """What an operand of a body loads, repeated over the row axes where it has to be."""
        ...

    def repeated(self, body: Body, name: str) -> Tensor:
        """The same, made anew."""
        ...

    def packed(self, name: str, body: Body) -> dict[str, Tensor]:
        """The packed row operands of the kernel `name`."""
        ...

    def once(self, name: Hashable, roots: Iterable[Node], make: Callable[[], T]) -> T:
        """A value made of nodes that only weights and tables reach; kept until they change."""
        ...

    def each_call(
        self, name: Hashable, nodes: Iterable[Node], make: Callable[[Any], Tensor]
    ) -> Tensor:
        """A tensor that `make(run)` makes of nodes: once if weights alone reach them."""
        ...

    def ready(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """A tensor as a kernel can read it: `change(x)`, also in replays of the call."""
        ...

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, fill: str = "") -> Tensor:
        """Memory for what a kernel writes: "padded" rows for TMA, "zero", "nan", or as it comes."""
        ...

    def room(self, name: str, rows: int, width: int, dtype: torch.dtype, fill: str = "") -> Tensor:
        """A matrix to store the buffer `name` into: its own, or memory that it reuses."""
        ...

    def summands(self, buffer: str, found: Tensor) -> Tensor:
        """Partials of sums over rows, [columns, parts]; some columns of a kernel may be parts."""
        ...

    def loaded(self, key: Hashable, load: Callable[[], T]) -> T:
        """What is loaded once for the Program, as a module: `load()` of the first call."""
        ...

    def constant(self, x: Tensor) -> None:
        """Tell that a replay may keep a tensor, whatever its arguments."""
        ...

    def in_place(self, tensors: Sequence[Tensor]) -> None:
        """Tell of which arguments a launch reads the memory itself."""
        ...

    def launched(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Record a launch: replays call `function` with their own tensors in place of these."""
        ...


Tensors = Mapping[str, Tensor]
