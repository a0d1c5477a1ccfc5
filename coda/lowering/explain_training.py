"""A block's forward and backward Programs -> report of its training and its saved activations.

Two baselines: eager torch saves every value that the derivative of an operation, as the user wrote
it, reads; full checkpointing saves the arguments alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.table import Table

from coda.ir.dims import product
from coda.ir.graph import Const, Expand, Graph, Input, Iota, Node, Size, walk
from coda.lowering.algebra.roles import base, row_symbols, weight_nodes
from coda.lowering.algebra.vjp import vjp
from coda.lowering.explain import Explanation
from coda.lowering.program.cost import hbm_bytes, label, launch_count
from coda.lowering.program.memory import temporary_bytes
from coda.lowering.program.program import Program


@dataclass(frozen=True)
class Saved:
    """A saved activation: its name, its bytes, and whether it is an argument of the block."""

    name: str
    nbytes: int
    argument: bool


class TrainingExplanation:
    """The result of `explain_training`: `str()` is a readable report, `.json()` plain data.

    Args:
        graph: the block as the user wrote it.
        forward, backward: its Programs, as `Block.lower_training` returns them.
    """

    def __init__(self, graph: Graph, forward: Program, backward: Program) -> None:
        self.graph = graph
        self.forward, self.backward = Explanation(forward), Explanation(backward)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every symbol."""
        return {**self.forward.program.sizes, **self.backward.program.sizes}

    @cached_property
    def tokens(self) -> int:
        """The number of rows of the block."""
        symbols = row_symbols(walk(self.graph.roots))
        for node in self.graph.inputs:
            lead = [d for d in node.shape if d.symbols and d.symbols <= symbols]
            if lead:
                return max(1, product(lead).size(self.sizes))
        return 1

    @cached_property
    def saved(self) -> tuple[Saved, ...]:
        """The saved activations, without weights; each buffer once."""
        program = self.forward.program
        read = {i.name for i in self.backward.program.graph.inputs}
        found: dict[str, Saved] = {}
        weights = weight_nodes(list(walk(self.graph.roots)))
        for node in self.graph.inputs:
            if node.name in read and node not in weights:
                found[node.name] = Saved(node.name, node.nbytes(self.sizes), True)
        for name, node in program.outputs:
            if name in read:
                buffer = label(node, program)
                if buffer in program.buffers:
                    nbytes = program.buffers[buffer].nbytes(program.sizes)
                    kept = program.buffers[buffer].kind == "input"
                    found.setdefault(buffer, Saved(buffer, nbytes, kept))
        return tuple(found.values())

    @property
    def differentiated(self) -> tuple[str, ...]:
        """The names of the arguments whose gradients the backward returns."""
        return tuple(name[1:] for name, _ in self.backward.program.outputs)

    def _others(self) -> str:
        """The other float arguments: constants, and those without a gradient."""
        names = [i.name for i in self.graph.inputs if i.dtype.kind == "float"]
        rest = [n for n in names if n not in self.differentiated]
        constant = [n for n in rest if n in self.graph.constants]
        frozen = [n for n in rest if n not in constant]
        text = f"; constant: {', '.join(constant)}" if constant else ""
        return text + (f"; none of {', '.join(frozen)}" if frozen else "")

    @cached_property
    def eager_bytes(self) -> int:
        """Bytes that eager torch saves: every value that an operation's derivative reads."""
        wanted = self.differentiated
        roots = [r for r in dict.fromkeys(self.graph.roots) if r.dtype.kind == "float"]
        cotangents: dict[Node, Node] = {
            r: Input(f" d{i}", r.shape, r.dtype) for i, r in enumerate(roots)
        }
        gradients = vjp(cotangents, [i for i in self.graph.inputs if i.name in wanted])
        inside = set(walk(self.graph.roots))
        made = [n for n in walk(gradients.values()) if n not in inside]
        return self._kept({o for n in made for o in n.operands if o in inside})

    @cached_property
    def checkpointed_bytes(self) -> int:
        """Bytes that full checkpointing saves: the arguments, without weights."""
        return self._kept(self.graph.inputs)

    def _kept(self, nodes: Iterable[Node]) -> int:
        """Bytes of the tensors that hold some nodes, under views and expands, without weights."""
        weights = weight_nodes(list(walk(self.graph.roots)))
        under = {base(n) for n in nodes}
        while any(isinstance(n, Expand) for n in under):
            under = {base(n.arg) if isinstance(n, Expand) else n for n in under}
        free = Const | Size | Iota
        return sum(
            n.nbytes(self.sizes) for n in under if n not in weights and not isinstance(n, free)
        )

    @property
    def saved_bytes(self) -> dict[str, int]:
        """Bytes saved between forward and backward: by coda, eager torch, full checkpointing."""
        return {
            "coda": sum(s.nbytes for s in self.saved),
            "eager": self.eager_bytes,
            "checkpointed": self.checkpointed_bytes,
        }

    def json(self) -> dict[str, Any]:
        """The report as plain data; sizes in bytes, times in µs."""
        return {
            "forward": self.forward.json(),
            "backward": self.backward.json(),
            "differentiated": list(self.differentiated),
            "constants": [i.name for i in self.graph.inputs if i.name in self.graph.constants],
            "tokens": self.tokens,
            "saved": [vars(s) for s in self.saved],
            "saved_bytes": self.saved_bytes,
            "saved_bytes_per_token": {k: n / self.tokens for k, n in self.saved_bytes.items()},
        }

    def html(self, measured: Mapping[str, float] | None = None) -> str:
        """The report as a page of HTML, as `Explanation.html`.

        Args:
            measured: seconds of kernels that were timed, by `forward gemm0` or `backward gemm0`.
        """
        from coda.lowering.page import training_page

        return training_page(self, measured or {})

    def __str__(self) -> str:
        out = io.StringIO()
        self.print(Console(file=out, width=140, color_system=None))
        return out.getvalue()

    def print(self, console: Console) -> None:
        """Write the report to a console."""
        program = self.forward.program
        sizes = " ".join(f"{k}={v}" for k, v in self.sizes.items())
        where = f"{program.arch} (times modelled for {program.target.name})"
        console.print(f"training {self.graph.name} on {where}, {sizes}")
        console.print(f"gradients of {', '.join(self.differentiated)}{self._others()}")
        for name, one in (("forward", self.forward), ("backward", self.backward)):
            console.print(one.kernels(f"kernels of the {name}"))
        console.print(self._totals())
        console.print(self._memory())
        both = (self.forward, self.backward)
        most = [f"{temporary_bytes(e.program) / 1e6:.1f} MB" for e in both]
        console.print(
            f"memory for what is neither kept nor returned: at most {most[0]} in the forward and "
            f"{most[1]} in the backward"
        )
        for one in (self.forward, self.backward):
            one.print_slower(console)
            one.print_weights(console)
            one.print_passes(console)

    def _totals(self) -> Table:
        table = Table(title="totals of forward and backward", title_justify="left")
        for column in ("program", "launches", "HBM MB", "of coda's"):
            table.add_column(column, justify="left" if column == "program" else "right")
        both = (self.forward, self.backward)
        own = sum(hbm_bytes(e.program) for e in both)
        rows = (
            ("coda", sum(launch_count(e.program) for e in both), own),
            (
                "pointwise and norms fused, GEMMs apart",
                sum(e.pointwise.launches for e in both),
                sum(e.pointwise.hbm_bytes for e in both),
            ),
            (
                "op by op",
                sum(e.eager.launches for e in both),
                sum(e.eager.hbm_bytes for e in both),
            ),
        )
        for name, count, moved in rows:
            ratio = f"{moved / own:.2f}×" if own else ""
            table.add_row(name, str(count), f"{moved / 1e6:.1f}", ratio)
        return table

    def _memory(self) -> Table:
        table = Table(title="kept from forward to backward, weights apart", title_justify="left")
        for column in ("what", "MB", "bytes per token"):
            table.add_column(column, justify="left" if column == "what" else "right")
        names = {
            "coda": "coda: " + ", ".join(s.name for s in self.saved),
            "eager": "op by op: what each derivative reads",
            "checkpointed": "full checkpointing: the arguments",
        }
        for key, nbytes in self.saved_bytes.items():
            table.add_row(names[key], f"{nbytes / 1e6:.1f}", f"{nbytes / self.tokens:.0f}")
        return table
