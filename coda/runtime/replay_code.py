"""Recorded launches -> one Python function without branches, which repeats them.

A warm call runs Python alone, so each step is written out as a line, which allocates a buffer,
makes a view, or launches. One kernel that reads two arguments and writes a buffer becomes

    def replay(inputs):
        t0, t1, = inputs
        t2 = k0()
        k1(t0, t1, t2)
        return (t2, )
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReplayStep:
    """One launch: a function and its arguments.

    Or a computation by torch: the function returns tensor number `place` of the call.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    place: int = -1


@dataclass(frozen=True)
class View:
    """A view of tensor `base` of a call: an argument, or a buffer, numbered after the arguments.

    Attributes:
        base: the number of the tensor.
        dtype: of the view.
        size, stride, offset: in elements; the offset is relative to the base.
        whole: whether the view is the base itself.
    """

    base: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    whole: bool

    def of(self, base: Tensor) -> Tensor:
        """The view, of the base tensor of this call."""
        base = base if base.dtype == self.dtype else base.view(self.dtype)
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


@dataclass(frozen=True)
class ReplayBuffer:
    """A buffer that a call allocates.

    Attributes:
        size, stride: in elements.
        dtype, device: of the tensor.
        start: the value that it is filled with; None if it is uninitialised.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    start: float | None

    def make(self) -> Callable[[], Tensor]:
        """A function that allocates the buffer."""
        place = {"dtype": self.dtype, "device": self.device}
        empty = partial(torch.empty_strided, self.size, self.stride, **place)
        start = self.start
        return empty if start is None else lambda: empty().fill_(start)


# A launch; or a buffer that is allocated, or dead (None).
Event = ReplayStep | tuple[int, ReplayBuffer | None]


class Replay:
    """The launches of a call, and between them the allocation and release of buffers.

    Attributes:
        events: as recorded. Arguments of steps are views of the call's tensors, which are numbered:
            the arguments first, then the buffers.
        text: the source of `run`.
    """

    def __init__(
        self,
        events: Sequence[Event],
        outputs: Sequence[View],
        inputs: int,
    ) -> None:
        self.events = events
        code = _Code(inputs)
        for event in events:
            if isinstance(event, tuple):
                code.memory(*event)
                continue
            arguments = [code.value(x) for x in event.arguments]
            made = f"t{event.place} = " if event.place >= 0 else ""
            code.line(f"{made}{code.constant(event.function)}({', '.join(arguments)})")
        code.line("return (" + "".join(f"{code.value(x)}, " for x in outputs) + ")")
        self.text = code.text()
        names = dict(code.constants)
        exec(compile(self.text, "<coda replay>", "exec"), names)
        self.run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = names["replay"]


class _Code:
    """The lines of the function, and the constants that they name."""

    def __init__(self, inputs: int) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self.buffers: dict[int, ReplayBuffer] = {}
        self.views: dict[View, str] = {}
        self.line("".join(f"t{i}, " for i in range(inputs)) + "= inputs")

    def line(self, text: str) -> None:
        """Add a line."""
        self.lines.append(text)

    def memory(self, place: int, buffer: ReplayBuffer | None) -> None:
        """Allocate a buffer, or drop it and all views of it."""
        if buffer is not None:
            self.buffers[place] = buffer
            self.line(f"t{place} = {self.constant(buffer.make())}()")
            return
        over = [v for v in self.views if v.base == place]
        names = [f"t{place}", *(self.views.pop(v) for v in over)]
        self.line(" = ".join(names) + " = None")

    def constant(self, value: Any) -> str:
        """A name for a constant."""
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def value(self, x: Any) -> str:
        """The text of an argument, or of an output."""
        if isinstance(x, dict):
            return "{" + ", ".join(f"{k!r}: {self.value(v)}" for k, v in x.items()) + "}"
        if type(x) is tuple:
            return "(" + "".join(f"{self.value(v)}, " for v in x) + ")"
        if not isinstance(x, View):
            return repr(x) if x is None or type(x) in (bool, int) else self.constant(x)
        if x.whole:
            return f"t{x.base}"
        if x not in self.views:
            self.views[x] = name = f"v{len(self.lines)}_{len(self.views)}"
            mine = self.buffers.get(x.base)
            if mine is not None and mine.dtype == x.dtype:
                self.line(f"{name} = t{x.base}.as_strided({x.size}, {x.stride}, {x.offset})")
            else:
                self.line(f"{name} = {self.constant(x.of)}(t{x.base})")
        return self.views[x]

    def text(self) -> str:
        """The function."""
        return "\n    ".join(["def replay(inputs):", *self.lines]) + "\n"
