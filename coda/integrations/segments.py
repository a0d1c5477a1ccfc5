"""A graph with operators that must keep their places -> a sequence of pieces, each a graph.

Such operators are the switches of autocast and autograd, higher-order operators, operators inside a
transform of torch.func, and writes that autograd does not see. Torch runs them unchanged; the
pieces between them are compiled in the modes (autocast, autograd) in which torch will run them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.utils.checkpoint import checkpoint

from coda.errors import Reason
from coda.integrations.report import operator_name

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


@dataclass
class Segment:
    """A contiguous sequence of nodes of a graph.

    Attributes:
        nodes: in graph order.
        why: why torch runs them unchanged; "" for a piece that is compiled.
        inputs: nodes outside that they read.
        outputs: those of them that are read outside.
    """

    nodes: list[FxNode]
    why: str
    inputs: list[FxNode]
    outputs: list[FxNode]

    def module(self, root: GraphModule) -> GraphModule:
        """The piece as a graph that takes its inputs and returns a tuple."""
        graph, copies = FxGraph(), dict[FxNode, FxNode]()
        for node in self.inputs:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        for node in self.nodes:
            for held in node.all_input_nodes:
                if held.op == "get_attr" and held not in copies:
                    copies[held] = graph.node_copy(held)
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(tuple(copies[n] for n in self.outputs))
        return GraphModule(root, graph)


def left_alone(gm: GraphModule, writes: Mapping[FxNode, str]) -> dict[FxNode, str]:
    """Nodes that torch must run unchanged -> the reason; empty for most graphs.

    `writes` are those found by `hidden_writes`.
    """
    found = dict(writes)
    depth = 0
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        name = getattr(node.target, "__name__", str(node.target))
        depth += name.endswith("increment_nesting")
        if depth or str(getattr(node.target, "__module__", "")).startswith("torch._functorch"):
            found[node] = Reason("it is inside a transform of torch.func", "a call outside of it")
        elif node.target is getitem and node.args[0] in found:
            found[node] = found[node.args[0]]
        elif node.target in (_enter_autocast, _exit_autocast):
            found[node] = Reason("autocast begins or ends here", "autocast around the whole call")
        elif node.target is CHECKPOINT and not _chooses(getattr(gm, str(node.args[0].target))):
            why = "a checkpoint, whose own graph is reported separately"
            found[node] = Reason(why, "nothing: see the rows of its graph")
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            why = f"the operator `{operator_name(node)}` holds graphs of its own"
            found[node] = Reason(why, "operators instead of it: the body without it")
        depth -= name.endswith("decrement_nesting")
    switches = gm.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    here = Reason("autograd is switched here", "one mode for the whole graph")
    return found | dict.fromkeys(switches, here) if found else {}


def pieces(gm: GraphModule, alone: Mapping[FxNode, str]) -> list[Segment]:
    """Cut a graph before and after each run of nodes that torch must run unchanged."""
    found: list[Segment] = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        why = alone.get(node, "")
        if not found or found[-1].why != why:
            found.append(Segment([], why, [], []))
        found[-1].nodes.append(node)
    for piece in found:
        mine = set(piece.nodes)
        above = dict.fromkeys(o for n in piece.nodes for o in n.all_input_nodes if o not in mine)
        piece.inputs = [o for o in above if o.op != "get_attr"]
        piece.outputs = [n for n in piece.nodes if any(u not in mine for u in n.users)]
    return found


def rebuilt(
    gm: GraphModule,
    found: Sequence[Segment],
    example_inputs: Sequence[Any],
    made: Callable[[GraphModule, Sequence[Any]], Callable[..., Any]],
) -> GraphModule:
    """The graph with each piece to compile replaced by `made(piece, its arguments)`."""
    places = gm.graph.find_nodes(op="placeholder")
    given = dict(zip(places, example_inputs, strict=True))
    graph, root = FxGraph(), nn.Module()
    copies = {n: graph.node_copy(n) for n in places}

    def example(value: Any) -> Any:
        if not isinstance(value, FxNode):
            return value
        return given[value] if value in given else _leaf(value)

    with _Modes() as modes:
        for number, piece in enumerate(found):
            if piece.why:
                modes.follow(piece.nodes)
                part = piece.module(gm)
                calls = [n for n in piece.nodes if n.target is CHECKPOINT]
                _with_blocks(part, made, [[example(a) for a in n.args[1:]] for n in calls])
                module: nn.Module = part
            else:
                module = _Made(made(piece.module(gm), [example(n) for n in piece.inputs]))
            root.add_module(f"piece{number}", module)
            call = graph.call_module(f"piece{number}", tuple(copies[n] for n in piece.inputs))
            for i, node in enumerate(piece.outputs):
                copies[node] = graph.call_function(getitem, (call, i))
    (output,) = gm.graph.find_nodes(op="output")
    for held in output.all_input_nodes:
        if held.op == "get_attr":
            copies[held] = graph.node_copy(held)
            setattr(root, str(held.target), getattr(gm, str(held.target)))
    graph.node_copy(output, lambda n: copies[n])
    return GraphModule(root, graph)


def _with_blocks(
    module: GraphModule,
    made: Callable[[GraphModule, Sequence[Any]], Callable[..., Any]],
    examples: Sequence[Sequence[Any]],
) -> None:
    """Compile the bodies of checkpoints, which are recomputed in the backward.

    torch's operator only marks its graph for a joint partition of forward and backward, which is
    not made here: so it becomes a call of `checkpoint`. One that selects what is saved
    (`context_fn`) is left unchanged.
    """
    calls = module.graph.find_nodes(op="call_function", target=CHECKPOINT)
    for call, arguments in zip(calls, examples, strict=True):
        held = str(call.args[0].target)
        body = getattr(module, held)
        if isinstance(body, GraphModule):
            if _chooses(body):
                continue
            setattr(module, held, _Made(made(body, arguments)))
        call.target = _checkpointed
    module.recompile()


def _chooses(body: GraphModule) -> bool:
    """Whether a checkpoint selects the tensors that it saves (`context_fn`)."""
    return body.meta.get("_checkpoint_context_fn") is not None


def _checkpointed(body: nn.Module, *args: Any, **options: Any) -> Any:
    keep = options.get("preserve_rng_state", True)
    return checkpoint(body, *args, use_reentrant=False, preserve_rng_state=keep)


class _Made(nn.Module):
    """A callable as a module, which fx requires."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


class _Modes:
    """Context that follows a graph's switches of autocast and autograd, and restores them."""

    def __enter__(self) -> _Modes:
        self.recorded = torch.is_grad_enabled()
        self.entered: dict[FxNode, Any] = {}
        return self

    def follow(self, nodes: Sequence[FxNode]) -> None:
        """Apply the switches among some nodes."""
        for node in nodes:
            if node.target is _enter_autocast:
                self.entered[node] = _enter_autocast(*node.args)
            elif node.target is _exit_autocast:
                before = self.entered.pop(node.args[0], None)  # type: ignore[arg-type]
                if before is not None:
                    _exit_autocast(before)
            elif node.target is torch._C._set_grad_enabled:
                torch._C._set_grad_enabled(bool(node.args[0]))

    def __exit__(self, *_: object) -> None:
        for context in reversed(self.entered.values()):
            _exit_autocast(context)
        torch._C._set_grad_enabled(self.recorded)


def _leaf(node: FxNode) -> Any:
    """Example of a value that crosses pieces: a leaf tensor, or the value itself."""
    value = node.meta.get("example_value")
    if isinstance(value, Tensor):
        value = value.detach().requires_grad_(value.requires_grad)
        node.meta["example_value"] = value
    return value
