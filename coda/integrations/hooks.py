"""Hooks of a patched layer: those that its compiled call runs, and those that it does not know.

Torch's compiler traces the hooks that it finds and does not look again. `coda.patch` promises that
a layer behaves as before. So layers with hooks are compiled apart from those without, guarded by
them, and each call looks: a layer whose hooks are not those that were there runs as torch runs it.
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


def know_hooks(layer: nn.Module) -> None:
    """Take the hooks that a layer and its modules have now as those that its compiled call runs."""
    _known.pop(layer, None)
    if found := _keys(_with_hooks(layer)):
        _known[layer] = found


def knows_hooks(layer: nn.Module) -> bool:
    """Whether there were hooks."""
    return layer in _known


def has_other_hooks(layer: nn.Module) -> bool:
    """Whether a layer and its modules have other hooks than there were, or all modules have some.

    It takes half a microsecond for each module.
    """
    if of_all._has_any_global_hook():
        return True
    known = _known.get(layer, NONE) if _known else NONE
    found = _with_hooks(layer)
    return _keys(found) != known if found else bool(known)


@contextmanager
def guarded_by_hooks() -> Iterator[None]:
    """Let torch's compiler look at the hooks that it has traced, before each call."""
    config: Any = torch._dynamo.config
    before = config.skip_nnmodule_hook_guards
    config.skip_nnmodule_hook_guards = False
    try:
        yield
    finally:
        config.skip_nnmodule_hook_guards = before


def _with_hooks(layer: nn.Module) -> list[dict[str, Any]]:
    """Attributes of the modules that have hooks. Every call asks, so it is one loop."""
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
    """What torch's handles call the hooks; each number is given once in a process."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return frozenset(key for held in every for kind in kinds for key in held[kind])
