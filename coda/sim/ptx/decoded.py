"""PTX text -> a decoded program with one function for each block, cached for later launches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache

from coda.sim.ptx.codegen import Emitter
from coda.sim.ptx.parse import parse
from coda.sim.ptx.program import build
from coda.sim.units.registers import RegisterLayout


class Decoded:
    """A program, the layout of its registers, and its blocks' functions, made when first run."""

    def __init__(self, text: str, kernel: str) -> None:
        self.program = build(parse(text, kernel))
        self.layout = RegisterLayout(self.program.kernel)
        self.functions: list[Callable[..., None] | None] = [None] * len(self.program.blocks)

    def function(self, number: int) -> Callable[..., None]:
        """The function of a block."""
        run = self.functions[number]
        if run is None:
            run = self.functions[number] = Emitter(self.program, self.layout, number).compile()
        return run


_lock = threading.Lock()
_decoded = lru_cache(maxsize=256)(Decoded)


def decode(text: str, kernel: str) -> Decoded:
    """The decoded program of a kernel, from the cache if it was decoded before."""
    with _lock:
        return _decoded(text, kernel)
