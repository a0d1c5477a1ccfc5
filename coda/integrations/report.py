"""What became of a model: which operators are in blocks, which are torch's, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node as FxNode

from coda.block import Block
from coda.errors import CodaError
from coda.frontend.aten import VIEWS
from coda.frontend.fx import Imported
from coda.lowering.explain import Explanation


@dataclass
class RegionReport:
    """One region.

    Attributes:
        block: what it became.
        ops: names of torch's operators in it, in order, without views.
        sizes: of the symbols, when it was traced.
        explanation: the forward's Program and what it costs beside others.
    """

    block: Block
    ops: list[str]
    sizes: dict[str, int]
    explanation: Explanation

    @staticmethod
    def of(
        block: Block, imported: Imported, nodes: Sequence[FxNode], sizes: Mapping[str, int]
    ) -> RegionReport:
        """The report of a region, which is lowered for it. Raises CodaError."""
        program = block.lower(dims=dict(sizes))
        names = [operator_name(n) for n in nodes if n.target not in VIEWS]
        return RegionReport(block, names, dict(sizes), Explanation(program))

    def json(self) -> dict[str, Any]:
        """As plain data."""
        found = self.explanation.json()
        kept = ("launches", "hbm_bytes", "eager", "pointwise_fused", "unfused")
        return {"ops": dict(Counter(self.ops)), **{k: found[k] for k in kept}}


@dataclass
class GraphReport:
    """One graph that Dynamo gave.

    Attributes:
        regions: what became blocks.
        left: torch's operators that stayed torch's, with the reason.
        whole: why nothing of the graph was looked at, or "".
    """

    regions: list[RegionReport] = field(default_factory=list)
    left: dict[FxNode, str] = field(default_factory=dict)
    whole: str = ""

    @property
    def fused(self) -> int:
        """How many operators are in blocks, views not counted."""
        return sum(len(r.ops) for r in self.regions)

    @property
    def operators_left(self) -> Counter[tuple[str, str]]:
        """(operator, reason) of what torch runs, views not counted."""
        return Counter((operator_name(n), w) for n, w in self.left.items() if n.target not in VIEWS)

    def json(self) -> dict[str, Any]:
        """As plain data."""
        left = [{"op": o, "why": w, "times": n} for (o, w), n in self.operators_left.items()]
        return {
            "whole": self.whole,
            "fused": self.fused,
            "regions": [r.json() for r in self.regions],
            "left": left,
        }


@dataclass
class Report:
    """All graphs of a model, in the order in which they were compiled."""

    graphs: list[GraphReport] = field(default_factory=list)


_report = Report()


def keep_report(graph: GraphReport) -> None:
    """Add a graph to what `last_report` tells."""
    _report.graphs.append(graph)


def operator_name(node: FxNode) -> str:
    """`aten.linear`, without its overload."""
    return re.sub(r"\.[^.]*$", "", str(node.target)) if "." in str(node.target) else node.name


__all__ = ["CodaError", "GraphReport", "RegionReport", "Report"]
