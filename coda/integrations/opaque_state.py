"""Compiled call of a layer -> one that leaves stateful arguments (KV caches) untraced.

If such an object were traced, the compiled code would index it by the number of its layer, and
every layer would need its own compilation. So its methods run eagerly, as graph breaks between a
layer's compiled parts: they contain no operators to fuse, and equal layers share one compilation
whatever their state.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn

from coda.integrations.hooks import guarded_by_hooks, has_other_hooks, knows_hooks

PLAIN = (
    Tensor,
    nn.Module,
    int,
    float,
    complex,
    str,
    bytes,
    tuple,
    list,
    dict,
    set,
    enum.Enum,
    type,
)


def holding(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the compiled call of a layer so that stateful arguments are not traced.

    A layer whose hooks differ from those of its compiled call runs eagerly.
    """

    def entry(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return call(layer, *args, **kwargs)
        if has_other_hooks(layer):
            return layer._call_impl(*args, **kwargs)
        with guarded_by_hooks() if knows_hooks(layer) else nullcontext():
            return around(layer, *args, **kwargs)

    def around(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        every = (*args, *kwargs.values())
        kept = {id(a): a for a in every if a is not None and keeps_state(a)}
        if not kept:
            return call(layer, *args, **kwargs)
        held = {i: hold(a) for i, a in kept.items()}
        with _broken_where_needed():
            found = call(
                layer,
                *[held.get(id(a), a) for a in args],
                **{k: held.get(id(a), a) for k, a in kwargs.items()},
            )
        given = {id(h): kept[i] for i, h in held.items()}
        if type(found) in (tuple, list):
            return type(found)(given.get(id(x), x) for x in found)
        return given.get(id(found), found)

    return entry


def keeps_state(value: Any) -> bool:
    """Whether an object is mutable state: an instance of a user's class with attributes that are
    tensors, lists, dictionaries or objects.
    """
    if isinstance(value, PLAIN) or type(value).__module__.partition(".")[0] in (
        "torch",
        "builtins",
    ):
        return False
    inside = getattr(value, "__dict__", {}).values()
    return any(isinstance(x, Tensor | list | dict) or hasattr(x, "__dict__") for x in inside)


def hold(value: Any) -> Any:
    """An alias of an object (same `__dict__`) whose methods are not traced."""
    found = object.__new__(_untraced(type(value)))
    found.__dict__ = value.__dict__
    return found


@lru_cache(maxsize=256)
def _untraced(cls: type) -> type:
    """A subclass whose methods are excluded from torch's compiler."""
    functions = {
        name: torch.compiler.disable(fn)
        for base in reversed(cls.__mro__[:-1])
        for name, fn in vars(base).items()
        if isinstance(fn, FunctionType) and not name.startswith("__")
    }
    return type(cls.__name__, (cls,), {**functions, "__module__": cls.__module__})


@contextmanager
def _broken_where_needed() -> Iterator[None]:
    """Allow graph breaks inside nested calls, in case torch compiles the layer now."""
    config: Any = torch._dynamo.config
    before = config.nested_graph_breaks
    config.nested_graph_breaks = True
    try:
        yield
    finally:
        config.nested_graph_breaks = before
