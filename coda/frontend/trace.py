"""A Python function -> a Graph: the function is called once with symbolic tensors."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from types import CodeType
from typing import Any

from coda.errors import DimError, TraceError, Where
from coda.frontend.tensor import Spec, Tensor
from coda.ir.graph import Graph, Input, Node, origin, walk
from coda.ir.types import DType


def trace(fn: Callable[..., Any], default: DType) -> Graph:
    """The graph of a block.

    Args:
        fn: a function whose arguments are annotated `coda.Tensor[...]`. It returns a tensor, a
            tuple of tensors, or a dict from names to tensors.
        default: the element type of arguments that are declared without one.
    """
    where = _place(fn)
    inputs = _inputs(fn, default, where)
    values = fn(*(Tensor(i) for i in inputs))
    outputs = _outputs(values, where)
    return Graph(fn.__name__, tuple(inputs), outputs)


def _place(fn: Callable[..., Any]) -> Where | None:
    code: CodeType | None = getattr(fn, "__code__", None)
    return None if code is None else Where(code.co_filename, code.co_firstlineno)


def _inputs(fn: Callable[..., Any], default: DType, where: Where | None) -> list[Input]:
    try:
        hints = typing.get_type_hints(fn)
    except NameError as e:
        raise TraceError(f"an annotation cannot be read: {e}", where=where) from None
    found: list[Input] = []
    for name, parameter in inspect.signature(fn).parameters.items():
        spec = hints.get(name)
        if not isinstance(spec, Spec):
            raise TraceError(
                f"the argument `{name}` of `{fn.__name__}` is not declared as a tensor",
                found=repr(parameter),
                help=f'write {name}: coda.Tensor["M D"]; constants are bound by a closure',
                where=where,
            )
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TraceError("a block takes a fixed list of tensors", found=name, where=where)
        with origin(where):
            found.append(Input(name, spec.shape, spec.dtype or default))
    symbols = {s for i in found for d in i.shape for s in d.symbols}
    for node in found:
        if node.name in symbols:
            raise DimError(
                f"`{node.name}` names an argument and a dim",
                help="give one of them another name",
                where=where,
            )
    return found


def _outputs(values: Any, where: Where | None) -> tuple[tuple[str, Node], ...]:
    if isinstance(values, Tensor):
        named = {"out": values}
    elif isinstance(values, tuple | list) and values:
        named = {f"out{i}": v for i, v in enumerate(values)}
    else:
        named = values
    tensors = named.values() if isinstance(named, dict) else ()
    if not tensors or not all(isinstance(v, Tensor) for v in tensors):
        raise TraceError(
            "a block returns a tensor, a tuple of tensors or a dict of tensors",
            found=type(values).__name__,
            where=where,
        )
    assert isinstance(named, dict)
    outputs = tuple((str(name), v.node) for name, v in named.items())
    bad = [name for name, _ in outputs if not name.isidentifier()]
    if bad:
        raise TraceError("an output's name is an identifier", found=repr(bad[0]), where=where)
    if not any(isinstance(n, Input) for n in walk(n for _, n in outputs)):
        raise TraceError("a block's outputs depend on its arguments", where=where)
    return outputs
