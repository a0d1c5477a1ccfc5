"""What is refused of a value that is being traced, each with what works instead.

A value of a block has no data until its kernels run: Python cannot branch on it or print a number
of it, and the functions of torch and numpy cannot take it.

    if x.sum() > 0:    TraceError: ... coda.where(condition, a, b) chooses element by element
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

from coda.errors import TraceError

# torch's methods and functions -> their equivalents in coda, for error messages.
INSTEAD = {
    **dict.fromkeys(("float", "half", "bfloat16", "to", "type", "double"), "x.cast(coda.f32)"),
    **dict.fromkeys(("view", "flatten", "unflatten", "squeeze"), 'x.reshape("M (H d) -> M H d")'),
    **dict.fromkeys(("transpose", "swapaxes", "t"), "x.T, x.mT or x.permute(1, 0, 2)"),
    **dict.fromkeys(("chunk", "unbind"), "coda.split(x, 2)"),
    **dict.fromkeys(("amax", "amin"), "x.max() and x.min()"),
    **dict.fromkeys(("matmul", "mm", "bmm"), "x @ w.T"),
    "einsum": 'coda.einsum("m k, n k -> m n", x, w)',
    "arange": "coda.iota(x.shape[0])",
    **dict.fromkeys(("cat", "concatenate"), "coda.concat([a, b])"),
    **dict.fromkeys(("clamp", "clip"), "coda.clamp(x, low, high)"),
    "unsqueeze": "x[:, None]",
    "size": "x.shape[0]",
    "dim": "x.ndim",
    "gather": "coda.pick(x, index), coda.take(table, index)",
    "masked_fill": "coda.where(mask, value, x)",
    "pow": "x ** 2",
}


class Valueless:
    """The operations that need a value, which a block does not have: each raises TraceError."""

    __slots__ = ()

    def __bool__(self) -> NoReturn:
        raise TraceError(
            "Python cannot branch on a value of the block: it is known only when the kernel runs",
            found=repr(self),
            help="coda.where(condition, a, b) chooses element by element",
        )

    def __iter__(self) -> NoReturn:
        raise TraceError(
            "a tensor of the block is not a sequence",
            found=repr(self),
            help="coda.split(x, parts, axis=) gives a tuple of tensors",
        )

    def __len__(self) -> NoReturn:
        raise TraceError("a tensor of the block has no length", help="x.shape[0] is a dim")

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TraceError(
            "a tensor of the block cannot be written in place",
            help="coda.where or coda.concat make a new one",
        )

    def _number(self) -> NoReturn:
        raise TraceError("a tensor of the block has no value while it is traced", found=repr(self))

    __float__ = __int__ = __index__ = item = _number

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        near = difflib.get_close_matches(name, [n for n in dir(type(self)) if n[0] != "_"], 1, 0.7)
        raise TraceError(
            f"a tensor of the block has no `{name}`",
            found=repr(self),
            help=INSTEAD.get(name)
            or (f"x.{near[0]}" if near else "coda's functions and operators"),
        )

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TraceError(
            "numpy cannot compute with a tensor of the block", help="use coda's own functions"
        )

    @classmethod
    def __torch_function__(cls, fn: Callable[..., Any], types: Any, args: Any = (), kw: Any = None):  # noqa: ANN206
        name = getattr(fn, "__name__", "this function")
        if len(args) == 2 and any(isinstance(a, torch.Tensor) for a in args):
            raise foreign(next(a for a in args if isinstance(a, torch.Tensor)))
        raise TraceError(
            f"torch.{name} cannot compute with a tensor of the block",
            help=INSTEAD.get(name) or f"use coda.{name} where it exists, or coda's primitives",
        )


def foreign(value: Any) -> TraceError:
    """The error for an operand that is no value of the block."""
    return TraceError(
        "only tensors of the block and Python numbers can be computed with",
        found=kind(value),
        help="pass other tensors to the block as arguments",
    )


def kind(value: Any) -> str:
    """The type of a value, for a message: `torch.Tensor`, `float`."""
    if isinstance(value, Valueless):
        return repr(value)
    module = type(value).__module__.split(".")[0]
    return type(value).__name__ if module == "builtins" else f"{module}.{type(value).__name__}"


def kinds(values: Iterable[Any]) -> str:
    """The types of several values, for a message."""
    return ", ".join(map(kind, values))
