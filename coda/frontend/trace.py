"""A Python function -> a Graph, by one call of the function with symbolic tensors.

    def scale(x: coda.Tensor["M D"]):     block scale(%x: [M, D] bf16) {
        return {"y": x * 2.0}        ->     %1 = const 2.0 bf16
                                            %2 = mul %x, %1
                                            return y = %2
                                          }

The outputs of a tuple are named out0, out1, ...; a single tensor is named out.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any

from coda.errors import CodaError, DimError, TraceError, Where
from coda.frontend import library
from coda.frontend.casts import seen
from coda.frontend.instead import instead_of
from coda.frontend.tensor import Spec, Tensor
from coda.ir.graph import Graph, Input, Node, walk
from coda.ir.node import origin
from coda.ir.types import DType


def trace(fn: Callable[..., Any], default: DType) -> Graph:
    """Trace a block.

    Args:
        fn: a function whose arguments are annotated `coda.Tensor[...]`. It returns a tensor, a
            tuple of tensors, or a dict from names to tensors.
        default: the element type of arguments that are declared without one.

    Raises:
        TraceError: if `fn` cannot be traced, or returns anything else.
        CodaError: of the kind of each mistake in the body of `fn`, with the user's line.
    """
    where = _place(fn)
    inputs = _inputs(fn, default, where)
    try:
        values = call_in_order(fn, [Tensor(i) for i in inputs])
    except TypeError as e:
        raise _misused(e) from None
    except AttributeError as e:
        raise _unknown(e) from None
    outputs = _outputs(values, where)
    name = fn.__name__ if fn.__name__.isidentifier() else "unnamed"  # for a lambda
    constants = frozenset(n for n, spec in declared(fn).items() if spec.constant)
    return Graph(name, tuple(inputs), outputs, constants)


def call_in_order(fn: Callable[..., Any], given: Sequence[Any]) -> Any:
    """Call a function with all arguments in signature order, keyword-only ones by name."""
    parameters = inspect.signature(fn).parameters.values()
    named = {p.name: g for p, g in zip(parameters, given, strict=True) if p.kind is p.KEYWORD_ONLY}
    return fn(*given[: len(given) - len(named)], **named)


def _place(fn: Callable[..., Any]) -> Where | None:
    code: CodeType | None = getattr(fn, "__code__", None)
    return None if code is None else Where(code.co_filename, code.co_firstlineno)


def declared(fn: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of each argument by name, None without one. Raises TraceError."""
    if not inspect.isfunction(fn):
        raise TraceError(
            "a block is made of a function",
            found=repr(fn),
            help="write @coda.block above a def",
        )
    _check_signature(fn)
    try:
        hints = typing.get_type_hints(fn)
    except CodaError as e:
        where = _place(fn)  # typing evaluated it in a frame of its own
        raise type(e)(e.message, found=e.found, help=e.help, where=where) from None
    except Exception as e:  # an annotation may hold any expression
        raise TraceError(
            f"an annotation of `{fn.__name__}` cannot be read",
            found=str(e),
            help="annotations name what the file defines at its top level",
            where=_place(fn),
        ) from None
    return {name: hints.get(name) for name in inspect.signature(fn).parameters}


def _check_signature(fn: Callable[..., Any]) -> None:
    """Raise TraceError unless a plain function takes a fixed list of arguments without defaults."""
    where = _place(fn)
    if (
        inspect.iscoroutinefunction(fn)
        or inspect.isgeneratorfunction(fn)
        or inspect.isasyncgenfunction(fn)
    ):
        raise TraceError(
            "a block is a plain function",
            found=f"`{fn.__name__}` is async or yields",
            help="def and return",
            where=where,
        )
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TraceError(
                "a block takes a fixed list of tensors",
                found="*" * (1 + (parameter.kind is parameter.VAR_KEYWORD)) + name,
                help="one argument for each tensor",
                where=where,
            )
        if parameter.default is not parameter.empty:
            raise TraceError(
                f"the argument `{name}` of `{fn.__name__}` has a default",
                found=f"{name} = {parameter.default!r}",
                help="all arguments of a block are tensors that each call gives: make a block with "
                "it and one without; constants are bound by a closure",
                where=where,
            )
        if name in OPTIONS and parameter.kind is parameter.KEYWORD_ONLY:
            raise TraceError(
                f"`{name}` is an option of every call, and names no argument that calls name",
                found=f"a keyword-only argument of `{fn.__name__}`",
                help="another name",
                where=where,
            )


OPTIONS = ("backend", "arch", "dims", "memory")  # of `Block.__call__`


def _misused(error: TypeError) -> Exception:
    """The TraceError of a TypeError that was raised on a line of the block; else the TypeError."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    where = None if step is None else Where.of(step.tb_frame, step.tb_lasti)
    if where is None or where.is_ours:
        return error
    name = re.match(r"(?:Tensor\.)?(\w+)\(\)", str(error))
    fn = name and (getattr(Tensor, name[1], None) or getattr(library, name[1], None))
    text = f"{name[1]}({', '.join(_shown_parameters(fn))})" if name and callable(fn) else ""
    return TraceError("Python refuses this call", found=str(error), help=text, where=where)


def _unknown(error: AttributeError) -> Exception:
    """The TraceError of a name that coda does not have, on a line of the block; else the error."""
    if getattr(error.obj, "__name__", "") != "coda":
        return error
    where = _innermost(error)
    text = f"there is no coda.{error.name}"
    return TraceError(text, help=instead_of(error.name or ""), where=where)


def _innermost(error: Exception) -> Where | None:
    """The user's innermost line of an error that was raised in a block."""
    step, found = error.__traceback__, None
    while step is not None:
        at = Where.of(step.tb_frame, step.tb_lasti)
        found = found if at.is_ours else at
        step = step.tb_next
    return found


def _shown_parameters(fn: Callable[..., Any]) -> Iterator[str]:
    """The parameters of a function as written in a call: `x`, `axis=-1`."""
    for name, p in inspect.signature(fn).parameters.items():
        if name != "self":
            yield name if p.default is p.empty else f"{name}={p.default!r}"


def _inputs(fn: Callable[..., Any], default: DType, where: Where | None) -> list[Input]:
    hints = declared(fn)
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
    nodes = seen([v.node for v in named.values()])
    outputs = tuple(zip(map(str, named), nodes, strict=True))
    bad = [name for name, _ in outputs if not name.isidentifier()]
    if bad:
        raise TraceError("an output's name is an identifier", found=repr(bad[0]), where=where)
    if not any(isinstance(n, Input) for n in walk(n for _, n in outputs)):
        raise TraceError("a block's outputs depend on its arguments", where=where)
    return outputs
