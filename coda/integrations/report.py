"""Compiled graphs -> a report: operators in blocks, operators left to torch and why, costs."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from operator import getitem
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from coda.block import Block
from coda.frontend.torch_import.operators import VIEWS
from coda.integrations.weights import WeightUse, settle
from coda.ir.graph import Graph
from coda.lowering.algebra.policy import DEFAULT_POLICY
from coda.lowering.explain import Explanation
from coda.lowering.program.cost import hbm_bytes, launch_count, seconds_of
from coda.lowering.program.program import Program
from coda.runtime.bind import size_hint
from coda.runtime.call import choose_target


@dataclass
class RegionReport:
    """One region.

    Attributes:
        graph: of the block that it became; equal regions share one block.
        ops: names of its ATen operators, in order, without views.
        sizes: sizes of its symbols when it was traced.
        forward: the forward's Program (in training, the one that saves activations) and its cost.
        backward: likewise for the backward; None without gradients.
        weights: how its GEMMs read their weights.
        name: of the modules of its first and last contractions (`names.py`).
    """

    graph: Graph
    ops: tuple[str, ...]
    sizes: Mapping[str, int]
    forward: Explanation
    backward: Explanation | None
    weights: list[WeightUse] = field(default_factory=list)
    name: str = ""

    @staticmethod
    def of(
        block: Block,
        nodes: Sequence[FxNode],
        sizes: Mapping[str, int],
        requires_grad: tuple[str, ...] | None,
    ) -> RegionReport:
        """Lower a region as its calls will, and report it.

        `requires_grad`: names of the arguments with it, None without autograd. Raises CodaError.
        """
        graph, target = block.graph, choose_target("")
        ops = tuple(operator_name(n) for n in nodes if n.target not in VIEWS)
        if requires_grad is None:
            program = block.program_for(graph, target, frozen=False, sizes=sizes)
            return RegionReport(graph, ops, sizes, Explanation(program), None)
        training = block.training_for(graph, requires_grad, block.memory, sizes)
        sides = [(training.forward, DEFAULT_POLICY), (training.backward, training.policy())]
        parts = [
            Explanation(block.program_for(side, target, frozen=False, sizes=sizes, policy=policy))
            for side, policy in sides[: 2 if training.requires_grad else 1]
        ]
        return RegionReport(graph, ops, sizes, parts[0], parts[1] if len(parts) == 2 else None)

    def settle(self, given: Mapping[str, Tensor | None]) -> None:
        """Move weights that a kernel reads as one matrix into one buffer; record all reads.

        `given` has the tensor of each argument, None if it is computed in each call.
        """
        self.weights[:] = settle([e.program for e in self.sides], given)

    @property
    def sides(self) -> list[Explanation]:
        """The forward, and the backward if there is one."""
        return [e for e in (self.forward, self.backward) if e is not None]

    @property
    def copied(self) -> int:
        """Bytes of copies of weights that its kernels read."""
        return sum(w.copied for w in self.weights)

    @property
    def gain(self) -> float:
        """Estimated seconds, bytes / bandwidth + launches, that it saves of those of separate GEMMs
        with all operators between them fused.
        """
        saved = 0.0
        for side in self.sides:
            program, other = side.program, side.pointwise
            saved += seconds_of(program.target, other.hbm_bytes, other.launches)
            saved -= seconds_of(program.target, hbm_bytes(program), launch_count(program))
        return saved

    def numbers(self) -> list[str]:
        """Launches, then megabytes: of coda, torch op by op, GEMMs with fused operators between."""
        sides = self.sides
        launches = [sum(launch_count(e.program) for e in sides)]
        moved = [sum(hbm_bytes(e.program) for e in sides)]
        for name in ("eager", "pointwise"):
            launches.append(sum(getattr(e, name).launches for e in sides))
            moved.append(sum(getattr(e, name).hbm_bytes for e in sides))
        return [*map(str, launches), *(f"{m / 1e6:.3f}" for m in moved)]

    def json(self) -> dict[str, Any]:
        """As plain data."""
        kept = ("launches", "hbm_bytes", "eager", "pointwise_fused", "unfused")
        explained = {k: e.json() for k, e in zip(("forward", "backward"), self.sides, strict=False)}
        return {
            "name": self.name,
            "ops": dict(Counter(self.ops)),
            **{k: {name: v[name] for name in kept} for k, v in explained.items()},
            "weights": [w.json() for w in self.weights],
            "copied_bytes": self.copied,
        }


@dataclass(frozen=True)
class LeftToTorch:
    """Equal operators that are left to torch for one reason.

    Attributes:
        op: the operator, such as `aten.index`.
        why: the reason.
        takes: what it would take to have them in a block, or "" where nothing is known.
        times: their number.
        nbytes: bytes that they read and write, at the sizes of the call that was compiled.
    """

    op: str
    why: str
    takes: str
    times: int
    nbytes: int

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "op": self.op,
            "why": self.why,
            "takes": self.takes,
            "times": self.times,
            "bytes": self.nbytes,
        }


@dataclass
class GraphReport:
    """One graph from Dynamo.

    Attributes:
        regions: the regions that became blocks.
        rest: the operators left to torch, without views, by the bytes that they move.
        whole: why the whole graph was left to torch, or "".
    """

    regions: list[RegionReport] = field(default_factory=list)
    rest: list[LeftToTorch] = field(default_factory=list)
    whole: str = ""

    @property
    def left(self) -> Counter[tuple[str, str]]:
        """(operator, reason) -> number of operators left to torch, without views."""
        return Counter({(one.op, one.why): one.times for one in self.rest})

    @property
    def fused(self) -> int:
        """Number of operators in blocks, without views."""
        return sum(len(r.ops) for r in self.regions)

    @property
    def programs(self) -> list[Program]:
        """The distinct Programs of its regions: equal layers share one."""
        sides = [e for r in self.regions for e in r.sides]
        return list({id(e.program): e.program for e in sides}.values())

    def json(self) -> dict[str, Any]:
        """As plain data."""
        left = [one.json() for one in self.rest]
        regions = [r.json() for r in self.regions]
        return {"whole": self.whole, "fused": self.fused, "regions": regions, "left": left}


@dataclass
class CompileReport:
    """Graphs in the order in which they were compiled; `print` it, or take its `.json()`."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def fused(self) -> int:
        """Number of operators in blocks, without views."""
        return sum(g.fused for g in self.graphs)

    @property
    def copied(self) -> int:
        """Bytes of copies of weights, in addition to the model's own."""
        return sum(r.copied for g in self.graphs for r in g.regions)

    @property
    def left(self) -> Counter[tuple[str, str]]:
        """(operator, reason) -> number of operators left to torch, without views."""
        return sum((g.left for g in self.graphs), Counter())

    @property
    def rest(self) -> list[LeftToTorch]:
        """What is left to torch and what it would take, the most bytes first, without views."""
        return merged(one for g in self.graphs for one in g.rest)

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return {"graphs": [g.json() for g in self.graphs]}

    def tables(self) -> list[Table]:
        """Tables of the regions of each graph, and of the operators left to torch."""
        regions = Table(title="blocks", title_justify="left")
        columns = ("launches", "op by op", "fused between", "MB", "", "", "MB of weights copied")
        regions.add_column("graph, region", overflow="fold")
        for column in ("ops", *columns):
            regions.add_column(column, justify="right")
        for number, graph in enumerate(self.graphs):
            for region in graph.regions:
                copied, count = f"{region.copied / 1e6:.3f}", str(len(region.ops))
                regions.add_row(f"{number}, {region.name}", count, *region.numbers(), copied)
        left = left_table(self.rest, [g.whole for g in self.graphs if g.whole])
        return [regions, left, *self._copies()]

    def _copies(self) -> list[Table]:
        """A table of copied weights with reasons; no table if there are none."""
        copies = Table(title="weights that kernels read from copies", title_justify="left")
        for column in ("weights", "MB", "why"):
            copies.add_column(column, overflow="fold")
        found: Counter[tuple[str, str]] = Counter()
        for region in (r for g in self.graphs for r in g.regions):
            for use in region.weights:
                if use.copied:
                    found[", ".join(use.weights), use.why] += use.copied
        for (weights, why), copied in found.items():
            copies.add_row(weights, f"{copied / 1e6:.3f}", why)
        return [copies] if found else []

    def __str__(self) -> str:
        console = Console(width=100, force_terminal=False, no_color=True)
        with console.capture() as captured:
            console.print(*self.tables())
        return captured.get()


LIMIT = 256  # graphs kept; older ones are dropped
_graphs: deque[GraphReport] = deque(maxlen=LIMIT)


def keep_report(graph: GraphReport) -> None:
    """Add a graph to the report that `last_report` returns."""
    _graphs.append(graph)


def last_report() -> CompileReport:
    """The report of all graphs compiled since `forget_report`, or since the start."""
    return CompileReport(list(_graphs))


def forget_report() -> None:
    """Start a new, empty report."""
    _graphs.clear()


def left_operators(left: Mapping[FxNode, str]) -> list[LeftToTorch]:
    """The operators left to torch for these reasons, without views; the most bytes first."""
    return merged(
        LeftToTorch(operator_name(n), str(why), getattr(why, "takes", ""), 1, moved_bytes(n))
        for n, why in left.items()
        if n.target not in VIEWS
    )


def merged(found: Iterable[LeftToTorch]) -> list[LeftToTorch]:
    """One row for each operator and reason; the most bytes first."""
    rows: dict[tuple[str, str], LeftToTorch] = {}
    for one in found:
        key = one.op, one.why
        known = rows.get(key, replace(one, times=0, nbytes=0))
        total = known.nbytes + one.nbytes
        rows[key] = replace(known, times=known.times + one.times, nbytes=total)
    return sorted(rows.values(), key=lambda one: -one.nbytes)


GATHERS = ("embedding", "index", "index_select", "gather")  # which read as much as they write


def moved_bytes(node: FxNode) -> int:
    """Bytes that an operator of torch reads and writes, each tensor once."""
    if node.target is getitem:
        return 0
    read = node.all_input_nodes
    read = [node, *read[1:]] if operator_name(node).rsplit(".", 1)[-1] in GATHERS else read
    values = [n.meta.get("val", n.meta.get("example_value")) for n in (*read, node)]
    tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
    return sum(t.element_size() * prod(size_hint(s) for s in t.shape) for t in tensors)


def left_table(rest: Sequence[LeftToTorch], whole: Sequence[str] = ()) -> Table:
    """A table of what is left to torch; `whole` has the reasons of whole graphs."""
    table = Table(title="left to torch, by the bytes that it moves", title_justify="left")
    table.add_column("operator", no_wrap=True)
    table.add_column("times", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("why, and what it would take", overflow="fold")
    for one in rest:
        takes = f"\n→ {one.takes}" if one.takes else ""
        table.add_row(one.op, str(one.times), f"{one.nbytes / 1e6:.3f}", one.why + takes)
    for why in whole:
        table.add_row("a graph", "1", "", str(why))
    return table


def operator_name(node: FxNode) -> str:
    """Name of a node's operator without its overload, such as `aten.linear`."""
    name = str(node.target)
    return name.rsplit(".", 1)[0] if "." in name else getattr(node.target, "__name__", name)
