"""Opcode strings -> functions on arrays of lanes: the table of all arithmetic instructions.

An opcode that is not in TABLE is Unsupported: no modifier is ever ignored. The functions expect
`np.errstate(all="ignore")` around them; the machine enters it once for a whole launch. NaN results
of f32 and f64 arithmetic have an arbitrary payload; those of at most 16 bits are canonical.
"""

from __future__ import annotations

from coda.sim.alu import comparisons, convert, halves, integers, reals
from coda.sim.alu.opcodes import DTYPE, Alu, Array, Table

__all__ = ["DTYPE", "TABLE", "Alu", "Array", "lookup"]

TABLE: Table = {}
for _module in (integers, comparisons, reals, halves, convert):
    _module.fill(TABLE)


def lookup(op: str, sources: int, *, pair: bool = False) -> Alu | None:
    """The entry for an opcode written with that many sources; `pair`: it has results `p|q`.

    Vectors among the operands count by their elements. None: there is no such instruction.
    """
    key = op + "|" if pair else op
    for name in (key, f"{key}:{sources}"):
        entry = TABLE.get(name)
        if entry is not None and len(entry.sources) - entry.sources.count("cc") == sources:
            return entry
    return None
