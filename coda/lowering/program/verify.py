"""Program -> InternalError if a kernel reads a buffer before it is written, or of a wrong size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from coda.errors import InternalError
from coda.ir.dims import product
from coda.ir.graph import Cast, Const, Expand, Input, Iota, Node, Size
from coda.lowering.algebra.roles import is_view
from coda.lowering.program.access import Line, Partial
from coda.lowering.program.epilogue import SumRows, positions
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program


def verify_program(program: Program, after: str) -> None:
    """Raise InternalError if a kernel or an output reads a value that is not in memory.

    Checks that every value read is an argument, prepacked, or written by an earlier kernel, and
    that every operand has as many elements as the kernel loads, and that the kernel's kind computes
    its sinks. `after` names the last stage.
    """
    _Check(program, after, set(program.prepared.values())).run()


@dataclass
class _Check:
    program: Program
    after: str
    prepared: set[Node]
    written: set[str] = field(default_factory=set[str])

    def run(self) -> None:
        for kernel in self.program.kernels:
            for node in kernel.reads():
                self.known(node, f"the kernel `{kernel.name}`")
            self.operands(kernel)
            self.positions(kernel)
            self.sinks(kernel)
            self.written.update(kernel.writes())
        for name, node in self.program.outputs:
            self.known(node, f"the output `{name}`")

    def known(self, node: Node, who: str) -> None:
        """Check that a value is in memory, or a view, cast or expansion of one that is."""
        stack = [node]
        while stack:
            one = stack.pop()
            place = self.program.places.get(one)
            if place is not None:
                parts = self.program.joined.get(place.buffer, (place.buffer,))
                if not self.written.issuperset(parts):
                    raise self.fault(f"{who} reads `{place.buffer}` before it is written")
            elif one in self.prepared or isinstance(one, Input | Const | Size | Iota):
                continue
            elif isinstance(one, Cast | Expand) or is_view(one):
                stack += one.operands
            else:
                raise self.fault(f"{who} reads a `{type(one).__name__}` that no kernel stores")

    def operands(self, kernel: Kernel[Any]) -> None:
        """Check that each operand of an epilogue has as many elements as the kernel loads."""
        sizes, who = self.program.sizes, f"the kernel `{kernel.name}`"
        rows, width = kernel.mainloop.points(sizes)
        lanes = kernel.body.epilogue.lanes
        for operand in kernel.body.epilogue.operands:
            name, node = operand.name, kernel.body.nodes.get(operand.name)
            if isinstance(operand.access, Partial) and name not in self.written:
                raise self.fault(f"{who} folds `{name}` before it is written")
            if node is None or name in kernel.body.spread:
                continue
            if isinstance(operand.access, Line | Partial):
                continue
            down, along = operand.access.shape(rows, width // lanes, lanes)
            elements = product(node.shape).size(sizes)
            if elements != down * along:
                found = f"{elements} elements where it loads {down} x {along}"
                raise self.fault(f"{who} reads `{name}`, which has {found}")

    def positions(self, kernel: Kernel[Any]) -> None:
        """Check that no kernel of column pairs reads numbers of single columns."""
        epilogue = kernel.body.epilogue
        if epilogue.pair and any(p.axis == "column" for p in positions(epilogue)):
            raise self.fault(f"the kernel `{kernel.name}` of column pairs reads a column's number")

    def sinks(self, kernel: Kernel[Any]) -> None:
        """Check that reductions and picks of columns are in a kernel that has tiles."""
        for sink in kernel.body.epilogue.sinks:
            if not (kernel.kind.tiled or isinstance(sink, SumRows)):
                found = f"the kernel `{kernel.name}` reduces columns into `{sink.buffer}`"
                raise self.fault(f"{found}, and its kind `{kernel.kind.name}` has no tiles")

    def fault(self, message: str) -> InternalError:
        return InternalError(
            f"after `{self.after}` of `{self.program.graph.name}`: {message}",
            help="this is a fault of coda, not of the block: please report it",
        )
