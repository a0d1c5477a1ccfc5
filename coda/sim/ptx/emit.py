"""An instruction -> source in a block's function, by the tables of all modules of emitters.

An opcode that no rule matches is Unsupported.
"""

from __future__ import annotations

from coda.sim.ptx import emit_async, emit_memory, emit_sync, emit_tensor, instructions
from coda.sim.ptx.codegen import Emit, Emitter, arithmetic
from coda.sim.ptx.parse import Instruction
from coda.sim.ptx.rules import Pattern
from coda.sim.types import Unsupported

RULES: dict[str, list[tuple[Pattern, Emit]]] = {}
for _module in (instructions, emit_async, emit_memory, emit_sync, emit_tensor):
    for _head, _entries in _module.TABLE.entries.items():
        RULES.setdefault(_head, []).extend(_entries)


def emit(e: Emitter, ins: Instruction) -> None:
    """Emit one instruction; Unsupported where it is not modelled."""
    if arithmetic(e, ins):
        return
    for one, run in RULES.get(ins.op.split(".")[0], ()):
        fields = one.match(ins.op)
        if fields is not None:
            run(e, ins, fields)
            return
    raise Unsupported(f"the instruction {ins.op} is not modelled")
