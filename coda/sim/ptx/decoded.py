"""PTX text -> a decoded program with one function for each block, cached for later launches."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from coda.sim.ptx.codegen import Emitter
from coda.sim.ptx.parse import parse
from coda.sim.ptx.program import build
from coda.sim.units.registers import Layout

KEEP = 256


class Decoded:
    """A program, the layout of its registers, and its blocks' functions, made when first run."""

    def __init__(self, text: str, kernel: str) -> None:
        self.program = build(parse(text, kernel))
        self.layout = Layout(self.program.kernel)
        self.functions: list[Callable[..., None] | None] = [None] * len(self.program.blocks)

    def function(self, number: int) -> Callable[..., None]:
        """The function of a block."""
        run = self.functions[number]
        if run is None:
            run = self.functions[number] = Emitter(self.program, self.layout, number).compile()
        return run


_decoded: OrderedDict[tuple[bytes, str], Decoded] = OrderedDict()
_lock = threading.Lock()


def decode(text: str, kernel: str) -> Decoded:
    """The decoded program of a kernel, from the cache if it was decoded before."""
    key = (hashlib.sha256(text.encode()).digest(), kernel)
    with _lock:
        found = _decoded.get(key)
        if found is None:
            found = _decoded[key] = Decoded(text, kernel)
            while len(_decoded) > KEEP:
                _decoded.popitem(last=False)
        else:
            _decoded.move_to_end(key)
        return found
