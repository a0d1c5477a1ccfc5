"""Hooks of a patched layer -> whether its compiled call includes exactly them.

Torch's compiler traces the hooks that exist at compilation and by default does not guard on them.
`coda.patch` promises that a layer behaves as before. So layers with hooks are compiled separately,
with guards on the hooks, and every call compares: a layer whose hooks have changed since `patch`
runs eagerly.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.config
from torch import nn
from torch.nn.modules import module as of_all

_known: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()
NONE: frozenset[int] = frozenset()


def know_hooks(*layers: nn.Module) -> None:
    """Record the current hooks of layers and their submodules as part of their compiled calls."""
    for layer in layers:
        _known.pop(layer, None)
        if found := _keys(_with_hooks(layer)):
            _known[layer] = found


def knows_hooks(layer: nn.Module) -> bool:
    """Whether the recorded layer had hooks."""
    return layer in _known


def has_other_hooks(layer: nn.Module) -> bool:
    """Whether the hooks of a layer or its submodules have changed, or global hooks exist.

    It takes 0.5 us per submodule.
    """
    if of_all._has_any_global_hook():
        return True
    known = _known.get(layer, NONE) if _known else NONE
    found = _with_hooks(layer)
    return _keys(found) != known if found else bool(known)


@contextmanager
def guarded_by_hooks() -> Iterator[None]:
    """Let torch's compiler guard on the hooks that it has traced."""
    config: Any = torch._dynamo.config
    before = config.skip_nnmodule_hook_guards
    config.skip_nnmodule_hook_guards = False
    try:
        yield
    finally:
        config.skip_nnmodule_hook_guards = before


def _with_hooks(layer: nn.Module) -> list[dict[str, Any]]:
    """`__dict__` of each submodule that has hooks. Runs in every call, hence one loop."""
    found: list[dict[str, Any]] = []
    stack: list[Any] = [layer]
    while stack:
        held = stack.pop().__dict__
        if (
            held["_forward_hooks"]
            or held["_forward_pre_hooks"]
            or held["_backward_hooks"]
            or held["_backward_pre_hooks"]
        ):
            found.append(held)
        if held["_modules"]:
            stack += [m for m in held["_modules"].values() if m is not None]
    return found


def _keys(every: list[dict[str, Any]]) -> frozenset[int]:
    """Ids of the hooks, as in torch's handles: unique in a process."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return frozenset(key for held in every for kind in kinds for key in held[kind])
