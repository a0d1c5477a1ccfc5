"""A row-wise kernel -> its modelled time.

    seconds = ramp + overlapped(bytes / bandwidth, instructions / issue, special functions)

Each sweep but the first finds the row in L2, or reads it from memory again: in L2 are half of its
bytes' worth of the rows that a GPU works on at once (each half of an H100's L2 keeps a copy of what
its SMs read), and from there to a whole L2's worth, a growing part of each row is missing.
"""

from __future__ import annotations

from coda.ir.scalars import SCALARS
from coda.kernels.rowwise.mainloop import Rowwise
from coda.kernels.rowwise.pieces import pieces_of
from coda.kernels.rowwise.plan import every_expr, plan, resident_rows
from coda.lowering.program.access import Periodic, Tile
from coda.lowering.program.cost import operand_bytes, traffic
from coda.lowering.program.epilogue import Expr, calls
from coda.lowering.program.program import Program
from coda.lowering.program.time import MOVE, Time, by_rows


def rowwise_time(program: Program, kernel: Rowwise) -> Time:
    """The modelled time of a row-wise kernel."""
    moved = traffic(program, kernel)
    sweeps = plan(program, kernel).sweeps
    again = (sweeps - 1) * _missing(program, kernel) * _swept(program, kernel) if sweeps > 1 else 0
    issued, special = _instructions(program, kernel, sweeps)
    nbytes = moved.read_bytes + moved.write_bytes + again
    return by_rows(program.target, nbytes, issued, special)


def _swept(program: Program, kernel: Rowwise) -> int:
    """Bytes of the operands with elements of their own in each row."""
    body = kernel.body
    wide = [o for o in body.epilogue.operands if isinstance(o.access, Tile | Periodic)]
    return sum(operand_bytes(kernel, o.name, program) for o in wide if o.name in body.nodes)


def _missing(program: Program, kernel: Rowwise) -> float:
    """The share of a row's bytes that L2 no longer has when the row is read again."""
    rows = kernel.mainloop.points(program.sizes)[0]
    at_once = min(rows, resident_rows(program, kernel))
    resident = at_once * _swept(program, kernel) / max(1, rows)
    return min(1.0, max(0.0, 2 * resident / program.target.l2 - 1))


def _instructions(program: Program, kernel: Rowwise, sweeps: int) -> tuple[float, float]:
    """Instructions of threads, and those for the special-function unit, of what has columns.

    A piece of the columns computes its own formula alone.
    """
    epilogue = kernel.body.epilogue
    exprs = every_expr(epilogue)
    if not exprs:  # it only merges what earlier kernels left
        return 0.0, 0.0
    rows, columns = kernel.mainloop.points(program.sizes)
    moves = MOVE * epilogue.lanes * (len(epilogue.tiles) * sweeps + len(epilogue.stores))
    issued, special = rows * columns / epilogue.lanes * moves, 0.0
    for piece in pieces_of(kernel.body, columns):
        memo: dict[Expr, Expr] = {}
        functions = [SCALARS[c.fn] for c in calls(piece.special(e, memo) for e in exprs)]
        issued += rows * piece.count * sum(f.flops for f in functions)
        special += rows * piece.count * sum(f.special for f in functions)
    return issued, special
