"""Recorded launches -> one Python function without branches, which launches them again.

A warm call is Python alone, so what it does in a step is written out: one line makes a buffer, one
looks at a view, one launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One launch: a function that is called with some arguments.

    Or a tensor, `place` of the call, that a function makes of others.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    place: int = -1


@dataclass(frozen=True)
class View:
    """A tensor as a view of tensor `base` of a call: an argument, or a buffer after them."""

    base: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    whole: bool

    def of(self, base: Tensor) -> Tensor:
        """The view of that tensor in this call."""
        base = base if base.dtype == self.dtype else base.view(self.dtype)
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


@dataclass(frozen=True)
class Buffer:
    """Memory that a call makes: elements, type, and what it starts with, if that is read."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    start: float | None

    def make(self) -> Callable[[], Tensor]:
        """A function that gives new memory."""
        place = {"dtype": self.dtype, "device": self.device}
        empty = partial(torch.empty_strided, self.size, self.stride, **place)
        start = self.start
        return empty if start is None else lambda: empty().fill_(start)


Event = Step | tuple[int, Buffer | None]  # a launch; or memory that is made, or over


class Replay:
    """The launches of a call, and between them what memory is made and is over.

    Attributes:
        events: what was recorded; arguments of steps are views of the call's tensors: its
            arguments, and then what is made, by number.
        text: the function that `run` is: the same on other arguments.
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
    """Lines of a function, and what they name."""

    def __init__(self, inputs: int) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self.buffers: dict[int, Buffer] = {}
        self.views: dict[View, str] = {}
        self.line("".join(f"t{i}, " for i in range(inputs)) + "= inputs")

    def line(self, text: str) -> None:
        """Add a line."""
        self.lines.append(text)

    def memory(self, place: int, buffer: Buffer | None) -> None:
        """Make memory, or let go of it and of all views of it."""
        if buffer is not None:
            self.buffers[place] = buffer
            self.line(f"t{place} = {self.constant(buffer.make())}()")
            return
        over = [v for v in self.views if v.base == place]
        names = [f"t{place}", *(self.views.pop(v) for v in over)]
        self.line(" = ".join(names) + " = None")

    def constant(self, value: Any) -> str:
        """A name for a value that does not change."""
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def value(self, x: Any) -> str:
        """An argument, or what is returned."""
        if isinstance(x, dict):
            return "{" + ", ".join(f"{k!r}: {self.value(v)}" for k, v in x.items()) + "}"
        if not isinstance(x, View):
            return repr(x) if x is None or isinstance(x, int) else self.constant(x)
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
