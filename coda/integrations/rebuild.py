"""An fx graph and its regions -> the same graph with each region as one call of a block."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from coda.block import Block
from coda.frontend.torch_import.importer import Imported
from coda.frontend.torch_import.operators import VIEWS

aten = torch.ops.aten


class Region(nn.Module):
    """A block as an fx module, in place of a region."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, *tensors: Tensor) -> Any:
        found = self.block(*tensors)
        return found if isinstance(found, tuple) else (found,)


class Rebuild:
    """Builds the new graph, in an order in which each region is one call.

    Attributes:
        unit: the region that a node belongs to, or the node itself.
        new: old node -> its node in the new graph.
    """

    def __init__(
        self,
        gm: GraphModule,
        regions: Sequence[tuple[list[FxNode], Imported, Block]],
        modes: Mapping[FxNode, bool],
    ) -> None:
        self.gm, self.regions, self.modes = gm, regions, modes
        self.unit: dict[FxNode, Any] = {n: n for n in gm.graph.nodes}
        for i, (nodes, _, _) in enumerate(regions):
            self.unit |= dict.fromkeys(nodes, i)
        self.graph = FxGraph()
        self.new: dict[FxNode, Any] = {}

    def run(self) -> GraphModule:
        mode = torch.is_grad_enabled()
        modules = {self.name(i): Region(b) for i, (_, _, b) in enumerate(self.regions)}
        for unit in self.order():
            first = self.regions[unit][0][0] if isinstance(unit, int) else unit
            wanted = self.modes.get(first, mode)
            if wanted != mode:
                self.graph.call_function(torch._C._set_grad_enabled, (wanted,))
                mode = wanted
            if isinstance(unit, int):
                self.call(unit)
            else:
                self.new[unit] = self.graph.node_copy(unit, lambda n: self.new[n])
        self.graph.eliminate_dead_code(lambda n: n.target not in VIEWS)
        attributes = {
            n.target: getattr(self.gm, n.target) for n in self.graph.find_nodes(op="get_attr")
        }
        root = nn.Module()
        for name, value in {**modules, **attributes}.items():
            setattr(root, name, value)
        return GraphModule(root, self.graph)

    def name(self, number: int) -> str:
        """A region's name, unique to its meaning: torch caches compiled graphs by their text."""
        return f"region{number}_{self.regions[number][2].handle}"

    def order(self) -> list[Any]:
        """Nodes and regions in topological order, as near to the original order as possible."""
        places = {n: i for i, n in enumerate(self.gm.graph.nodes)}
        at: dict[Any, int] = {}
        waits: dict[Any, set[Any]] = {}
        readers: dict[Any, set[Any]] = {}
        for node, place in places.items():
            unit = self.unit[node]
            at.setdefault(unit, place)
            before = {self.unit[o] for o in node.all_input_nodes} - {unit}
            waits.setdefault(unit, set()).update(before)
            for one in before:
                readers.setdefault(one, set()).add(unit)
        ready = [(at[u], u) for u, w in waits.items() if not w]
        heap = [p for p, _ in ready]
        by_place = {p: u for u, p in at.items()}
        heapq.heapify(heap)
        out: list[Any] = []
        while heap:
            unit = by_place[heapq.heappop(heap)]
            out.append(unit)
            for reader in readers.get(unit, ()):
                waits[reader].discard(unit)
                if not waits[reader]:
                    heapq.heappush(heap, at[reader])
        return out

    def call(self, number: int) -> None:
        """Add the call of a region's block, and permute its results to torch's order of axes."""
        _, imported, _ = self.regions[number]
        arguments = tuple(self.new[n] for n in imported.inputs)
        called = self.graph.call_module(self.name(number), arguments)
        for node, (index, order) in imported.outputs.items():
            found = self.graph.call_function(operator.getitem, (called, index))
            if order != tuple(range(len(order))):
                found = self.graph.call_function(aten.permute.default, (found, order))
            self.new[node] = found
