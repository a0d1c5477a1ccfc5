"""Dynamo's graph -> its nodes that write to tensors unseen by autograd; torch must run these.

Examples are `weight.data.clamp_()`, an update of a detached view, one under `torch.no_grad()`.
Later reads see the new values, and their gradient flows to the original tensor. A functional graph
would differ: the new values would depend on a detached tensor, or be computed without recording,
and the gradient would be lost. So the graph is cut at such writes (`segments.py`). Writes to
tensors without requires_grad are no problem: their new values are copied into them at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Interpreter
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from coda.runtime.weight_cache import note_write, version_of

WHY = "it writes past autograd"


def hidden_writes(gm: GraphModule, fakes: Sequence[Any]) -> dict[FxNode, str]:
    """Nodes of Dynamo's graph that write past autograd -> the reason why torch must run them.

    Inserts after each a node that marks the changed arguments, because torch does not count all
    of these changes as versions. Runs the graph once on fake tensors, if it writes to any tensor.
    """
    values = [t for n in gm.graph.nodes for t in _tensors(n.meta.get("example_value"))]
    if not any(version_of(t) for t in values) or not any(t.requires_grad for t in values):
        return {}
    recorded = torch.is_grad_enabled()
    mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    shapes = getattr(mode, "shape_env", None)
    with torch.enable_grad():
        given = [_fresh(f) if isinstance(f, Tensor) else f for f in fakes]
    watch = _Watch(gm)
    try:
        with (
            mode or nullcontext(),
            shapes.ignore_fresh_unbacked_symbols() if shapes else nullcontext(),
        ):
            torch._C._set_grad_enabled(recorded)
            watch.run(*given)
    finally:
        torch._C._set_grad_enabled(recorded)
    found: dict[FxNode, str] = {}
    for node, places in watch.hidden.items():
        found |= dict.fromkeys([*watch.above(node), node], WHY)
        for place in places:
            with gm.graph.inserting_after(node):
                found[gm.graph.call_function(note_write, (place,))] = WHY
    if found:
        gm.recompile()
    return found


def _fresh(fake: Tensor) -> Tensor:
    """A copy of a fake tensor that may be written to."""
    found = fake.detach().clone().requires_grad_(fake.requires_grad)
    return found if fake.is_leaf else found.view_as(found)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (t for t in pytree.tree_leaves(value) if isinstance(t, Tensor))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Written(TorchDispatchMode):
    """Records the storages that operators write to."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        for i, declared in enumerate(func._schema.arguments):
            if declared.alias_info is not None and declared.alias_info.is_write:
                value = args[i] if i < len(args) else named.get(declared.name)
                self.memories |= {_memory(t) for t in _tensors(value)}
        return func(*args, **named)


class _Watch(Interpreter):
    """Interprets a graph and records the nodes whose writes autograd does not see.

    Attributes:
        hidden: each such node -> the arguments of the graph that it changes.
        seen: each such node -> the storages that it writes to.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.hidden: dict[FxNode, list[FxNode]] = {}
        self.seen: dict[FxNode, set[int]] = {}

    def run_node(self, n: FxNode) -> Any:
        known = [(o, t, t.grad_fn) for o, v in self.env.items() for t in _tensors(v)]
        with _Written() as written:
            result = super().run_node(n)
        if not written.memories:
            return result
        changed = [(o, t, g) for o, t, g in known if _memory(t) in written.memories]
        followed = any(t.requires_grad and t.grad_fn is not g for _, t, g in changed)
        unseen = [o for o, t, g in changed if t.requires_grad and t.grad_fn is g]
        if followed:  # through an alias: the argument itself has no history
            unseen += [o for o, t, _ in changed if o.op == "placeholder" and not t.requires_grad]
        if unseen:
            places = [o for o, _, _ in changed if o.op == "placeholder"]
            self.hidden[n], self.seen[n] = places, written.memories
        return result

    def above(self, node: FxNode) -> list[FxNode]:
        """The views without requires_grad through which a node writes."""
        found: list[FxNode] = []
        for operand in node.all_input_nodes:
            value = self.env.get(operand)
            if operand.op == "placeholder" or not isinstance(value, Tensor):
                continue
            if _memory(value) in self.seen[node] and not value.requires_grad:
                self.seen.setdefault(operand, self.seen[node])
                found += [*self.above(operand), operand]
        return found
