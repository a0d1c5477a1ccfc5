"""`torch.compile(model, backend="coda")`: Dynamo's graph with its regions replaced by blocks.

Dynamo's graph is made functional before autograd sees it, regions are cut out of it and imported,
and each becomes a block that is called with the tensors of the call: parameters are its arguments
like any other, so nothing of the model is copied, and an optimiser's step is seen by the next call.
Autograd goes through the blocks by their own derived backwards, and through what is left as
through any torch code.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from coda.block import Block
from coda.errors import CodaError
from coda.frontend.fx import Imported, import_nodes, value_of
from coda.integrations.regions import cut, is_parameter
from coda.integrations.report import GraphReport, RegionReport, keep_report
from coda.ir.graph import Graph
from coda.runtime import settings
from coda.runtime.bind import bind_sizes
from coda.runtime.run import gpu_arch

aten = torch.ops.aten
_blocks: dict[Graph, Block] = {}


def backend(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """Dynamo's backend `coda`: a callable that does what the graph does."""
    arguments = [n for n in gm.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta.get("example_value", e) for n, e in zip(arguments, example_inputs, strict=True)]
    why = _untouchable(gm)
    if not why:
        try:
            functional = _functional(gm, fakes)
        except Exception as e:  # torch's own tracer refuses: the model runs as it is
            why = f"torch does not make it functional: {type(e).__name__}: {e}"
    if why:
        keep_report(GraphReport(whole=why))
        return _rest(gm, example_inputs)
    report = GraphReport()
    split = _split(functional, report)
    keep_report(report)
    return _rest(split if report.regions else gm, example_inputs)


def _rest(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """What runs the graph around the blocks: torch op by op, or Inductor."""
    chosen = settings.FALLBACK.get() or ("inductor" if gpu_arch() else "eager")
    if chosen == "eager":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs))  # type: ignore[return-value]


def _untouchable(gm: GraphModule) -> str:
    """Why a graph is left alone: what it does beside computing, which has to keep its place."""
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if "autocast" in name:
            return "autocast begins or ends inside the graph"
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"the operator `{name}` holds graphs of its own"
    return ""


def _functional(gm: GraphModule, fakes: Sequence[Any]) -> GraphModule:
    """The graph in ATen operators that write to no argument; writes come at the end."""
    _numbers_as_they_are(gm)
    found, signature = aot_export_module(gm, fakes, trace_joint=False, pre_dispatch=True)
    if signature.buffers_to_mutate or signature.parameters or signature.buffers:
        raise NotImplementedError("a graph that owns tensors")
    places = [n for n in found.graph.nodes if n.op == "placeholder"]
    originals = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for new, old, fake in zip(places, originals, fakes, strict=True):
        new.meta.setdefault("val", fake)
        example = old.meta.get("tensor_dict") or {}
        static = "_dynamo_static_input_type" in example
        new.meta["coda_parameter"] = static or isinstance(fake, nn.Parameter)
    _write_back(found, signature.user_inputs_to_mutate)
    for node in list(found.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            found.graph.erase_node(node)
    found.graph.eliminate_dead_code(lambda n: n.is_impure() or n.target is aten.copy_.default)
    return found


def _numbers_as_they_are(gm: GraphModule) -> None:
    """Numbers that Dynamo keeps open (a float of a module) as their values, guarded by torch."""
    for node in list(gm.graph.nodes):
        value = node.meta.get("example_value")
        if node.op == "call_method" and node.target == "item" and isinstance(value, torch.SymFloat):
            node.replace_all_uses_with(float(value))
            gm.graph.erase_node(node)
    gm.recompile()


def _write_back(gm: GraphModule, mutated: dict[str, str]) -> None:
    """Copy what an argument is to become into it, after everything else."""
    if not mutated:
        return
    places = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    values = list(output.args[0])
    new, values = values[: len(mutated)], values[len(mutated) :]
    with gm.graph.inserting_before(output):
        for value in new:
            target = places[mutated[value.name]]
            copied = gm.graph.call_function(aten.copy_.default, (target, value))
            copied.meta["val"] = value_of(target)
    output.args = (tuple(values),)


class Region(nn.Module):
    """A block in the place of a part of a graph."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, *tensors: Tensor) -> Any:
        found = self.block(*tensors)
        return found if isinstance(found, tuple) else (found,)


def _split(gm: GraphModule, report: GraphReport) -> GraphModule:
    """The graph with calls of blocks in the place of its regions."""
    modes = _modes(gm.graph)
    outer = torch.is_grad_enabled()
    found = cut(gm.graph, [n for n, m in modes.items() if m != outer])
    regions: list[tuple[list[FxNode], Imported, Block]] = []
    for nodes in found.regions:
        try:
            imported = _import(nodes)
            block = _blocks.setdefault(imported.graph, Block(None, imported.graph))
            report.regions.append(RegionReport.of(block, imported, nodes, _sizes(imported)))
            regions.append((nodes, imported, block))
        except CodaError as e:
            found.left |= dict.fromkeys(nodes, f"its region cannot be lowered: {e.message}")
    report.left = found.left
    return _Rebuild(gm, regions, modes).run()


def _import(nodes: list[FxNode]) -> Imported:
    inside = set(nodes)
    returned = [n for n in nodes if any(u not in inside for u in n.users)]
    returned = [n for n in returned if isinstance(value_of(n), Tensor)]
    return import_nodes(nodes, returned, is_parameter)


def _sizes(imported: Imported) -> dict[str, int]:
    """Sizes of the symbols of a region, as they were when it was traced. Raises CallError."""
    shapes = [torch.empty([_hint(s) for s in value_of(n).shape], device="meta") for n in imported.inputs]
    return bind_sizes(imported.graph, shapes)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _modes(graph: FxGraph) -> dict[FxNode, bool]:
    """Whether autograd records, at each operator; the switches themselves are taken away."""
    modes: dict[FxNode, bool] = {}
    mode = torch.is_grad_enabled()
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            mode = bool(node.args[0])
            graph.erase_node(node)
        elif node.op in ("call_function", "output"):
            modes[node] = mode
    return modes


class _Rebuild:
    """The graph again, in an order in which a region is one call.

    Attributes:
        unit: the region that a node belongs to, or the node itself.
        new: the node of the new graph for each that is still there.
    """

    def __init__(
        self,
        gm: GraphModule,
        regions: Sequence[tuple[list[FxNode], Imported, Block]],
        modes: dict[FxNode, bool],
    ) -> None:
        self.gm, self.regions, self.modes = gm, regions, modes
        self.unit: dict[FxNode, Any] = {n: n for n in gm.graph.nodes}
        for i, (nodes, _, _) in enumerate(regions):
            self.unit |= dict.fromkeys(nodes, i)
        self.graph = FxGraph()
        self.new: dict[FxNode, Any] = {}

    def run(self) -> GraphModule:
        mode = torch.is_grad_enabled()
        modules = {f"region{i}": Region(b) for i, (_, _, b) in enumerate(self.regions)}
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
        attributes = {n.target: getattr(self.gm, n.target) for n in self.graph.find_nodes(op="get_attr")}
        root = nn.Module()
        for name, value in {**modules, **attributes}.items():
            setattr(root, name, value)
        return GraphModule(root, self.graph)

    def order(self) -> list[Any]:
        """Nodes and regions, each after what it reads, otherwise as they were."""
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
        """The call of a region's block, and its results under the axes that torch has them in."""
        _, imported, _ = self.regions[number]
        arguments = tuple(self.new[n] for n in imported.inputs)
        called = self.graph.call_module(f"region{number}", arguments)
        for node, (index, order) in imported.outputs.items():
            found = self.graph.call_function(operator.getitem, (called, index))
            if order != tuple(range(len(order))):
                found = self.graph.call_function(aten.permute.default, (found, order))
            self.new[node] = found
