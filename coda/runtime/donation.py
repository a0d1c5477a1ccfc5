"""Saved tensors of a backward -> those that are donated, which the backward may write over.

Torch keeps saved tensors if the graph is to be run again; user code, or a hook that packs a saved
tensor, may hold a reference to it. A tensor is donated only if this backward holds the last ones.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from coda.errors import CallError

Holders = tuple[int, int, int]


def _holders(tensors: Sequence[Tensor], place: int) -> Holders:
    """Reference counts: of a tensor's storage, of the tensor itself, of its Python object."""
    tensor = tensors[place]
    memory = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return memory, tensor._use_count(), sys.getrefcount(tensor)  # type: ignore[attr-defined]


class _Probe(torch.autograd.Function):
    """Counts the references to a saved tensor that has no other holders."""

    found: Holders = (0, 0, 0)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x + 1)
        return x + 2

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        kept = ctx.saved_tensors
        _Probe.found = _holders(kept, 0)
        return given[0]


@cache
def alone() -> Holders:
    """The counts of a saved tensor that has no other holders, in this Python and torch.

    They are measured on a new thread, where the caller's hooks and modes are not active (a
    checkpoint counts what is saved inside it).
    """
    probe = Thread(target=lambda: _Probe.apply(torch.zeros(1, requires_grad=True)).backward())
    probe.start()
    probe.join()
    return _Probe.found


def given_up(ctx: Any, kept: Sequence[Tensor], places: Sequence[int]) -> frozenset[int]:
    """Those of `places` in `kept` that are donated to this backward.

    Only this backward holds them, and the graph is not run again.

    `kept` is `ctx.saved_tensors`, referenced by one name, since each reference counts. Raises
    CallError if an earlier backward, which failed, has written over them.
    """
    if getattr(ctx, "spent", False):
        raise CallError(
            "what was saved for a backward is gone: it has begun already, and failed",
            help="call the block again, or run each backward with retain_graph=True",
        )
    engine: Any = torch._C._autograd  # type: ignore[attr-defined]
    if not places or engine._get_current_graph_task_keep_graph():
        return frozenset()
    least = alone()
    found: set[int] = set()
    for place in places:
        holders = _holders(kept, place) if type(kept[place]) is Tensor else ()
        if holders and all(a <= b for a, b in zip(holders, least, strict=True)):
            found.add(place)
    ctx.spent = bool(found)
    return frozenset(found)
