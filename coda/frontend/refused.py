"""What is refused of a value that is being traced, each with what works instead.

A value of a block has no data until its kernels run: Python cannot branch on it or print a number
of it, and the functions of torch and numpy cannot take it.

    if x.sum() > 0:    TraceError: ... coda.where(condition, a, b) chooses element by element
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

from coda.errors import TraceError
from coda.frontend.instead import instead_of


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

    def _number(self, *_: Any) -> NoReturn:
        raise TraceError(
            "a tensor of the block has no value while it is traced",
            found=repr(self),
            help="coda's functions compute with it; its numbers are in the result of a call",
        )

    __float__ = __int__ = __index__ = __complex__ = __round__ = __trunc__ = _number
    __floor__ = __ceil__ = item = _number

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        known = [n for n in dir(type(self)) if n[0] != "_"]
        raise TraceError(
            f"a tensor of the block has no `{name}`",
            found=repr(self),
            help=instead_of(name, known),
        )

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TraceError(
            "numpy cannot compute with a tensor of the block",
            found=repr(self),
            help="coda's function of that name, or numpy on the result of a call",
        )

    def __array_function__(self, fn: Callable[..., Any], *_: Any) -> NoReturn:
        raise TraceError(
            f"numpy.{fn.__name__} cannot compute with a tensor of the block",
            help=instead_of(fn.__name__),
        )

    @classmethod
    def __torch_function__(cls, fn: Callable[..., Any], types: Any, args: Any = (), kw: Any = None):  # noqa: ANN206
        name = getattr(fn, "__name__", "this function")
        if len(args) == 2 and any(isinstance(a, torch.Tensor) for a in args):
            raise foreign(next(a for a in args if isinstance(a, torch.Tensor)))
        raise TraceError(
            f"torch.{name} cannot compute with a tensor of the block", help=instead_of(name)
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
