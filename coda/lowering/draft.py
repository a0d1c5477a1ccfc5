"""A kernel in the making: what the partition has placed in it so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from coda.ir.graph import Contract, Node
from coda.lowering.columns import Space
from coda.lowering.values import Value

Order = tuple[int, int]  # the GEMM that came last, running number
LAST = 1 << 30  # behind all GEMMs: sums that are only returned are folded together


@dataclass(eq=False)
class Draft:
    """A kernel in the making.

    Attributes:
        kind: "gemm", "row" or "torch".
        order: its place among the kernels.
        space: its columns (a torch kernel has none).
        contracts: a GEMM's contractions.
        homed: nodes that are computed here first.
        sinks: reductions and picks that are taken in a GEMM's epilogue, with their values.
        over_rows: those of them that sum over the rows.
        why: why a torch kernel's node is there.
        symbols: those that the number of columns of a pass over rows depends on.
    """

    kind: str
    order: Order
    space: Space
    contracts: tuple[Contract, ...] = ()
    homed: list[Node] = field(default_factory=list)
    sinks: dict[Node, Value] = field(default_factory=dict)
    over_rows: set[Node] = field(default_factory=set)
    why: str = ""
    symbols: frozenset[str] = frozenset()
