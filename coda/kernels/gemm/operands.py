"""An epilogue -> what a GEMM passes to quack for it: operands, packed tables, the store by itself.

RoPE in a kernel of column pairs, with cos and sin [M, 64] and a gain [N]:

    operands cos, sin, gain    tables (cos, sin) [M, 128];  passed gain
"""

from __future__ import annotations

from coda.kernels.gemm.source import Table
from coda.kernels.lines import NUMBER
from coda.lowering.program.access import Partial, Periodic
from coda.lowering.program.epilogue import (
    Epilogue,
    Load,
    Operand,
    PickColumn,
    Position,
    StoreExpr,
    leaves,
    positions,
)


def pack_tables(epilogue: Epilogue) -> tuple[Table, ...]:
    """Tables of periodic operands of one period: two in each in a kernel of pairs."""
    found: list[Table] = []
    lanes = epilogue.lanes
    by_period: dict[int, list[str]] = {}
    for operand in epilogue.operands:
        if isinstance(operand.access, Periodic):
            by_period.setdefault(operand.access.period, []).append(operand.name)
    for period, same in by_period.items():
        for i in range(0, len(same), lanes):
            names = tuple(same[i : i + lanes])
            found.append(Table(f"table{len(found)}", names, lanes, lanes * period))
    return tuple(found)


def passed(epilogue: Epilogue) -> list[Operand]:
    """Operands that are parameters of the epilogue, not lanes of a table."""
    chosen = [s.index for s in epilogue.sinks if isinstance(s, PickColumn)]
    used = _loads(epilogue)
    own = [o for o in epilogue.operands if not isinstance(o.access, Periodic | Partial)]
    return [o for o in own if o.name in used or o.name not in chosen]


def numbered(epilogue: Epilogue) -> dict[Position, str]:
    """The names of the parameters that are positions."""
    return {at: f"{NUMBER}{at.axis}{i}" for i, at in enumerate(positions(epilogue))}


def by_gemm(epilogue: Epilogue) -> StoreExpr | None:
    """The store by the GEMM itself: of all columns; of pairs, preferably not 16 bits."""
    stores, lanes = epilogue.stores, epilogue.lanes
    whole = [s for s in stores if len(s.lanes) == lanes and not epilogue.split]
    odd = [s for s in whole if epilogue.pair and s.dtype.size != 2]
    return next(iter(odd or whole), None)


def _loads(epilogue: Epilogue) -> set[str]:
    """The names of the operands that an epilogue's expressions load."""
    return {e.operand for e in leaves(epilogue.exprs) if isinstance(e, Load)}
