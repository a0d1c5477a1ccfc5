"""Dynamo's graph of a model -> the same graph with its regions replaced by calls of blocks.

This is `torch.compile(model, backend="coda")`. The graph is functionalised before autograd, then
regions of it are imported and become blocks. Parameters are ordinary arguments of a block: they are
not copied, and the next call sees an optimiser's update. Blocks have their own derived backwards;
autograd differentiates the operators around them as usual.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from coda.block import Block
from coda.errors import CodaError, Reason, UnsupportedError
from coda.frontend.torch_import.importer import Imported, import_nodes, value_of
from coda.integrations.names import BY_NAME, is_named, leave_option, left_by_name, region_name
from coda.integrations.rebuild import Rebuild
from coda.integrations.regions import (
    RegionCut,
    cut,
    is_parameter,
    of_batches,
    with_all_parts,
    without_tail,
)
from coda.integrations.report import GraphReport, RegionReport, keep_report, left_operators
from coda.integrations.segments import left_alone, pieces, rebuilt
from coda.integrations.writes import hidden_writes
from coda.ir.graph import Graph, walk
from coda.ir.types import f32
from coda.lowering.algebra.roles import gemms, row_symbols
from coda.runtime import settings
from coda.runtime.bind import bind_sizes, size_hint
from coda.runtime.call import choose_backend, gpu_target
from coda.runtime.in_torch import DISABLED, disabled
from coda.runtime.progress import progress

aten = torch.ops.aten
_blocks: WeakValueDictionary[Graph, Block] = WeakValueDictionary()


Leave = tuple[str, ...]  # names of modules and regions that torch runs
Rest = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Dynamo's backend `coda`: compile a graph to a callable of the same signature.

    Args:
        gm, example_inputs: from Dynamo.
        options: of `torch.compile`. `leave` is a list of `fnmatch` patterns of the names of modules
            and of regions (as the report has them) that are left to torch.

    Raises:
        CallError: for another option, or patterns that are no list of names.
    """
    return _taken(gm, example_inputs, _rest, leave_option(options or {}))


def look(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """As `backend`, for its report only: the graph is returned unchanged, for torch to run."""
    _taken(gm, example_inputs, lambda piece, _: piece.forward, leave_option(options or {}))
    return gm.forward


def _taken(
    gm: GraphModule, example_inputs: Sequence[Any], rest: Rest, leave: Leave
) -> Callable[..., Any]:
    """Compile a graph, whole or in pieces; `rest` compiles the graph around the blocks."""
    if disabled():
        keep_report(GraphReport(whole=DISABLED))
        return rest(gm, _fakes(gm, example_inputs))
    fakes = _fakes(gm, example_inputs)
    try:
        alone = left_alone(gm, hidden_writes(gm, fakes))
    except Exception as e:
        why = f"torch does not run it on fake tensors: {type(e).__name__}: {e}"
        keep_report(GraphReport(whole=why))
        return rest(gm, fakes)
    if not alone:
        return rest(_examined(gm, example_inputs, leave) or gm, fakes)
    keep_report(GraphReport(rest=left_operators(alone)))
    fused: list[GraphModule] = []

    def made(piece: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        found = _examined(piece, examples, leave)
        fused.extend([found] if found else [])
        return rest(found or piece, _fakes(piece, examples))

    split = rebuilt(gm, pieces(gm, alone), example_inputs, made)
    return split.forward if fused else rest(gm, fakes)


def _examined(gm: GraphModule, example_inputs: Sequence[Any], leave: Leave) -> GraphModule | None:
    """The graph with regions replaced by blocks, or None if it has no region; adds a report."""
    report = GraphReport()
    keep_report(report)
    functional = _functional_or_why(gm, _fakes(gm, example_inputs), report)
    if functional is None:
        return None
    places = [n for n in functional.graph.nodes if n.op == "placeholder"]
    given = {n: e for n, e in zip(places, example_inputs, strict=True) if is_parameter(n)}
    try:
        split = _split(functional, report, given, leave)
    except Exception as e:  # an internal error must not stop the model
        report.regions.clear()
        report.whole = f"coda fails on it, please report it: {type(e).__name__}: {e}"
        warnings.warn(report.whole, RuntimeWarning, stacklevel=2)
        return None
    _compile_ahead(report)
    return split if report.regions else None


def _fakes(gm: GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """Fake arguments as Dynamo traced them: parameters may have moved to other memory since."""
    places = gm.graph.find_nodes(op="placeholder")
    return [n.meta.get("example_value", e) for n, e in zip(places, example_inputs, strict=True)]


def _compile_ahead(report: GraphReport) -> None:
    """Compile the kernels of a graph in parallel, before their first calls."""
    programs = report.programs
    if choose_backend("") != "cuda" or not programs:
        return
    from coda.runtime.compile import compile_ahead

    try:
        compile_ahead(programs)
    except CodaError as e:  # each call then compiles its kernels, or raises
        warnings.warn(f"kernels are not compiled ahead: {e.message}", RuntimeWarning, stacklevel=2)


def _functional_or_why(
    gm: GraphModule, fakes: Sequence[Any], report: GraphReport
) -> GraphModule | None:
    """The functional graph; None, with the reason in the report, if torch's tracer fails."""
    try:
        return _functional(gm, fakes)
    except Exception as e:
        report.whole = f"torch does not make it functional: {type(e).__name__}: {e}"
        return None


def _rest(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile the graph around the blocks: torch op by op, or Inductor."""
    usual = "inductor" if gpu_target() and not disabled() else "eager"
    chosen = settings.FALLBACK.get() or usual
    if chosen == "eager":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs))  # type: ignore[assignment]

    def call(*args: Any) -> Any:
        return compiled(*args)

    call.graph = gm  # type: ignore[attr-defined]  # it has the blocks, which operators name
    return call


def _functional(gm: GraphModule, fakes: Sequence[Any]) -> GraphModule:
    """The graph in functional ATen operators; writes to arguments become copies at the end."""
    _numbers_as_they_are(gm)
    made = aot_export_module(gm, fakes, trace_joint=False, pre_dispatch=True)
    found: Any = made[0]
    signature = made[1]
    if signature.buffers_to_mutate or signature.parameters or signature.buffers:
        raise UnsupportedError("a graph that owns tensors")
    places = [n for n in found.graph.nodes if n.op == "placeholder"]
    originals = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for new, old, fake in zip(places, originals, fakes, strict=True):
        new.meta.setdefault("val", fake)
        new.meta["coda_gradient"] = isinstance(fake, Tensor) and fake.requires_grad
        example = old.meta.get("tensor_dict") or {}
        static = "_dynamo_static_input_type" in example
        new.meta["coda_parameter"] = static or isinstance(fake, nn.Parameter)
    _write_back(found, {str(k): str(v) for k, v in signature.user_inputs_to_mutate.items()})
    for node in list(found.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            found.graph.erase_node(node)
    _copies_with_gradients(found)
    found.graph.eliminate_dead_code(lambda n: n.is_impure() or n.target is aten.copy_.default)
    return found


def _copies_with_gradients(gm: GraphModule) -> None:
    """Replace `aten.copy` (a write into a slice) by cast and expand, which have derivatives."""
    for node in list(gm.graph.nodes):
        if node.target is not aten.copy.default:
            continue
        like, source = node.args[:2]
        with gm.graph.inserting_before(node):
            cast = gm.graph.call_function(aten.to.dtype, (source, value_of(like).dtype))
            wide = gm.graph.call_function(aten.expand_as.default, (cast, like))
        cast.meta = {**node.meta, "val": value_of(source).to(value_of(like).dtype)}
        wide.meta = dict(node.meta)
        node.replace_all_uses_with(wide)
        gm.graph.erase_node(node)


def _numbers_as_they_are(gm: GraphModule) -> None:
    """Replace symbolic floats (attributes of a module) by their values, which torch guards."""
    for node in list(gm.graph.nodes):
        value = node.meta.get("example_value")
        if node.op == "call_method" and node.target == "item" and isinstance(value, torch.SymFloat):
            node.replace_all_uses_with(float(value))
            gm.graph.erase_node(node)
    gm.recompile()


def _write_back(gm: GraphModule, mutated: dict[str, str]) -> None:
    """Copy the final values of mutated arguments into them, at the end of the graph."""
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


def _split(
    gm: GraphModule, report: GraphReport, given: Mapping[FxNode, Tensor], leave: Leave
) -> GraphModule:
    """The graph with its regions replaced by calls of blocks.

    Args:
        gm: the functional graph.
        report: is filled in.
        given: the model's parameters: those that a kernel reads as one matrix share one buffer.
        leave: names of modules and regions that are left to torch.
    """
    modes = _modes(gm.graph)
    _mark_gradients(gm.graph, modes)
    outer = torch.is_grad_enabled()
    other = Reason("it runs in another mode of autograd", "one mode for the whole graph")
    found = _cut(
        gm.graph, {n: other for n, m in modes.items() if m != outer} | left_by_name(gm.graph, leave)
    )
    regions: list[_Region] = []
    names: Counter[str] = Counter()
    with progress("regions of the model", len(found.regions)) as step:
        for whole in found.regions:
            step(name := region_name(whole, names))
            region, why = (None, BY_NAME) if is_named(name, leave) else _chosen(whole)
            if region is not None:
                region.report.name = name
                regions.append(region)
            found.left |= dict.fromkeys(whole, why) if why else {}
    mine = {n for region in regions for n in region.nodes}
    report.rest = left_operators({n: why for n, why in found.left.items() if n not in mine})
    report.regions = [r.report for r in regions]
    for region in regions:
        pairs = zip(region.imported.graph.inputs, region.imported.inputs, strict=True)
        region.report.settle({i.name: given.get(n) for i, n in pairs})
    return Rebuild(gm, [(r.nodes, r.imported, r.block) for r in regions], modes).run()


def _cut(graph: FxGraph, fixed: Mapping[FxNode, str]) -> RegionCut:
    """Partition a graph, at products of batches where a region over them has no gain.

    It has none if torch runs a part of it: Inductor fuses that part with what is around it.
    """
    found = cut(graph, fixed)
    ends: set[FxNode] = set()
    for whole in found.regions:
        products = of_batches(whole)
        made = _made(whole) if products else None
        if products and not (isinstance(made, _Region) and made.in_kernels):
            ends.update(products)
    return cut(graph, fixed, ends) if ends else found


@dataclass(frozen=True)
class _Region:
    """Nodes that become one block."""

    nodes: list[FxNode]
    imported: Imported
    block: Block
    report: RegionReport

    @property
    def in_kernels(self) -> bool:
        """Whether all of it runs in generated kernels, none of it op by op in torch."""
        return all(k.kind.code is not None for e in self.report.sides for k in e.program.kernels)


def _chosen(whole: list[FxNode]) -> tuple[_Region | None, str]:
    """(region, or its part up to the last contractions, or None; why nodes are left to torch).

    If a part of the region is an operation of torch's, forward or backward, the part up to the last
    contractions is taken where that saves more time.
    """
    made = _made(whole)
    if isinstance(made, _Region) and made.in_kernels:
        return made, ""
    shorter = without_tail(whole)
    short = _made(shorter) if shorter else ""
    if isinstance(made, str):
        return (short if isinstance(short, _Region) else None), made
    if isinstance(short, _Region) and short.report.gain > made.report.gain:
        return short, Reason(PARTLY, "that part in a form that a kernel takes: `coda explain`")
    return made, ""


PARTLY = "its region stays torch's: no kernel takes a part of it"


def _made(nodes: list[FxNode]) -> _Region | str:
    """The region of some nodes, or the reason why they are left to torch."""
    nodes = with_all_parts(nodes)
    try:
        imported = _import(nodes)
        _refuse_devices(imported)
        _refuse_unknown_columns(imported)
        block = block_for(imported.graph)
        sizes, requires_grad = _sizes(imported), _requires_grad(imported)
        lowered = RegionReport.of(block, nodes, sizes, requires_grad)
        if lowered.gain <= 0:
            raise UnsupportedError("torch does it as cheaply", help="nothing, at these sizes")
    except CodaError as e:
        return Reason(f"its region stays torch's: {e.message}", e.help)
    except Exception as e:  # an internal error must not stop the model
        why = f"coda fails on its region, please report it: {type(e).__name__}: {e}"
        warnings.warn(why, RuntimeWarning, stacklevel=2)
        return why
    return _Region(nodes, imported, block, lowered)


def block_for(graph: Graph) -> Block:
    """The block of a graph: equal layers share it, and its compiled kernels.

    Compiled graphs hold their blocks. With the last of them a block is freed.
    """
    found = _blocks.get(graph)
    if found is None:
        found = _blocks[graph] = Block(None, graph)
    return found


def _import(nodes: list[FxNode]) -> Imported:
    inside = set(nodes)
    returned = [n for n in nodes if any(u not in inside for u in n.users)]
    returned = [n for n in returned if isinstance(value_of(n), Tensor)]
    return import_nodes(nodes, returned, is_parameter)


def _refuse_devices(imported: Imported) -> None:
    """Raise UnsupportedError if the backend cannot run a region on these devices and dtypes."""
    devices = {value_of(n).device for n in imported.inputs}
    if len(devices) > 1:
        raise UnsupportedError("its tensors are on several devices", help="one device")
    chosen = choose_backend("")
    if chosen == "cuda" and devices.pop().type != "cuda":
        raise UnsupportedError("its tensors are not on the GPU", help="model.cuda()")
    products = gemms(walk(imported.graph.roots))
    if chosen != "reference" and any(f32 in (n.lhs.dtype, n.rhs.dtype) for n in products):
        why = "products of float32 are not compiled for a GPU"
        raise UnsupportedError(why, help="bf16 or f16 weights, or torch.autocast")


def _refuse_unknown_columns(imported: Imported) -> None:
    """Raise UnsupportedError if a size that is constant in kernels is known only at run time."""
    rows = row_symbols(walk(imported.graph.roots))
    for node, source in zip(imported.graph.inputs, imported.inputs, strict=True):
        for dim, size in zip(node.shape, value_of(source).shape, strict=True):
            if dim.symbols - rows and free_unbacked_symbols(size):
                why = "a number of columns that is known only in the call"
                raise UnsupportedError(why, help="columns of a size that torch knows beforehand")


def _requires_grad(imported: Imported) -> tuple[str, ...] | None:
    """Names of the arguments with requires_grad; None if autograd does not record."""
    if not torch.is_grad_enabled():
        return None
    pairs = zip(imported.graph.inputs, imported.inputs, strict=True)
    return tuple(i.name for i, n in pairs if n.meta["coda_gradient"]) or None


def _sizes(imported: Imported) -> dict[str, int]:
    """Sizes of the symbols of a region: those of the traced call, or a hint for unbacked ones.

    Raises CallError.
    """
    shapes = [[size_hint(s) for s in value_of(n).shape] for n in imported.inputs]
    return bind_sizes(imported.graph, [torch.empty(s, device="meta") for s in shapes])


def _modes(graph: FxGraph) -> dict[FxNode, bool]:
    """Whether autograd records at each operator; removes the operators that switch it."""
    modes: dict[FxNode, bool] = {}
    mode = torch.is_grad_enabled()
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            mode = bool(node.args[0])
            graph.erase_node(node)
        elif node.op in ("call_function", "output"):
            modes[node] = mode
    return modes


def _mark_gradients(graph: FxGraph, modes: dict[FxNode, bool]) -> None:
    """Record on each node, in `meta`, whether autograd will compute its gradient."""
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        value = value_of(node)
        known = not isinstance(value, Tensor) or value.is_floating_point()
        recorded = known and modes.get(node, False) and node.target is not aten.detach.default
        above = any(o.meta["coda_gradient"] for o in node.all_input_nodes)
        node.meta["coda_gradient"] = recorded and above
