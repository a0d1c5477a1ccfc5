"""A row-wise kernel -> its plan: the threads of a row, its sweeps over memory, what it holds.

The arithmetic, for rows of B bytes in their tiles (all matrices with a row for each row):

    threads of a row    the least power of two, from 32 to 512, with at most 48 registers (192
                        bytes) of tiles for each thread: 32 up to B = 6144, 512 up to 98304
    held                with more than one sweep, if 512 threads need at most 64 registers for it
                        (B ≤ 131072): then memory is read once
    else                1024 threads re-read the row for each sweep. One CTA is resident on each
                        multiprocessor, so that the L2 cache has all rows between their sweeps:
                        132 rows of 256 KB are 34 MB. A single sweep needs no cache: 256 threads
    vectors at once     those of 32 registers, at most 32 elements: loads in flight for a thread

A kernel that sums whole sequences alone (`SumRows.whole`) has a CTA for each sequence and each 32
vectors, whose warps take the rows in turn. Of sequences of 3072 columns in vectors of 8, 12 each.

A kernel with sums over rows has a vector for each thread as long as 512 threads are enough, and
walks through the rows of a block: a thread has the same columns in each, and their sums in
registers, with a row that has to be held: at most 56 of 512 threads, or 160 of 256. A row then is
read once too. Two sums of 18432 columns are 72 of 512 threads, and 144 of 256. Wider ones first
compute the statistics of a block's rows, and then its columns, which reads memory again.

RMSNorm of 4096 bf16 columns: 8192 bytes are 64 registers of a warp, and 32 of 64 threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coda.ir.dims import Dim
from coda.ir.monoids import MONOIDS
from coda.kernels.lines import parts_of
from coda.kernels.rowwise.mainloop import Rowwise
from coda.kernels.rowwise.pieces import (
    LANES,
    Piece,
    has_padded_rows,
    loads_of,
    pieces_of,
    stats_of,
    vector_length,
)
from coda.lowering.program.access import Grouped, Periodic, RowVector, Span, Tile, row_of
from coda.lowering.program.body import Body
from coda.lowering.program.epilogue import Epilogue, Expr, Operand, Statistic
from coda.lowering.program.program import Program

WARPS = 4  # rows of a CTA with a warp for each row
TALL_ROWS = 64  # rows of a CTA that sums over rows
TALL_WARPS = 8  # warps of such a CTA, or more if its rows have more
SHARED = 192  # bytes of tiles for each thread, by which the threads of a row are chosen
MOST_HELD = 64  # registers for a row that stays in them
SUMMED = 56  # registers of 512 threads for sums over rows, and for a row held beside them
SUMMED_BY_FEWER = 160  # the same of 256 threads and less, which may have twice as many
CROWDED = 128  # of these: more leave room for one vector and one element at once (ptxas 13)
AT_ONCE = 32  # registers, and elements, of the vectors that are loaded before they are used
KEPT = 96  # terms of a thread that stay in registers between two passes
KEPT_BY_MOST = 64  # the same of 512 threads, which have half as many registers
_MOST_THREADS = 512
_STREAMING = 1024  # threads of a row that is read again
_SINGLE = 256  # threads of a row that is read once, at most


@dataclass(frozen=True)
class RowPlan:
    """How the threads of a row-wise kernel share its rows.

    Attributes:
        threads: threads of a row, a multiple of 32.
        rows: rows that a CTA has at once.
        block: rows that a CTA has in all; more than `rows` if it sums over rows.
        depth: vectors of each operand that a thread loads before it uses them.
        held: whether a row is loaded into registers, for all of its sweeps.
        passes: whether statistics of a held row are computed in two passes, with terms that the
            store reads kept in registers.
        summed: whether sums over rows are kept in registers, while a CTA walks through its rows.
        sweeps: how often the tiles are read from memory, or from a cache.
        crowded: whether sums over rows leave registers for one element at once alone.
    """

    threads: int
    rows: int
    block: int
    depth: int
    held: bool
    summed: bool
    sweeps: int
    passes: bool = False
    crowded: bool = False

    @property
    def warps(self) -> int:
        """Warps of a row."""
        return self.threads // LANES


def plan(program: Program, kernel: Rowwise) -> RowPlan:
    """The plan of a row-wise kernel that does more than merge what earlier kernels left.

    It is a function of the widths and dtypes of operands, and of the statistics.
    """
    padded = has_padded_rows(program, kernel)
    pieces = pieces_of(kernel.body, kernel.mainloop.width, padded=padded)
    return plan_of(kernel.body, pieces, padded=padded)


def resident_rows(program: Program, kernel: Rowwise, registers: int = 64) -> int:
    """The rows that a GPU works on at once, with so many registers for each thread."""
    found, target = plan(program, kernel), program.target
    threads = found.threads * found.rows
    warps = min(64, target.registers // (registers * LANES))
    return found.rows * target.multiprocessors * max(1, min(32, warps * LANES // threads))


def plan_of(body: Body, pieces: tuple[Piece, ...], *, padded: bool = False) -> RowPlan:
    """The plan for a body whose columns are in these pieces."""
    epilogue = body.epilogue
    lengths = vector_lengths(epilogue, pieces, padded=padded)
    levels, late = levels_of(epilogue)
    sweeps = max(1, len(levels) + bool(wide_exprs(epilogue) or late))
    if sums_whole(epilogue):
        return RowPlan(LANES, TALL_WARPS, 1, 1, False, False, 1)
    if epilogue.sinks:
        return _tall(epilogue, pieces, lengths, sweeps)
    counts = (32, 64, 128, 256, _MOST_THREADS)
    words = row_words(epilogue, pieces, lengths)
    need = {t: held_registers(words, t) for t in counts}
    threads = next((t for t in counts if need[t] * 4 <= SHARED), _MOST_THREADS)
    held = sweeps > 1 and need[threads] <= MOST_HELD
    if not held:
        threads = min(threads, _SINGLE) if sweeps == 1 else _STREAMING
    rows = WARPS if threads == LANES else 1
    depth = at_once(epilogue, max(lengths, default=1), held=held)
    passes = held and kept_terms(epilogue, pieces, lengths, threads) <= (
        KEPT if threads < _MOST_THREADS else KEPT_BY_MOST
    )
    return RowPlan(threads, rows, rows, depth, held, False, 1 if held else sweeps, passes)


def kept_terms(
    epilogue: Epilogue, pieces: tuple[Piece, ...], lengths: tuple[int, ...], threads: int
) -> int:
    """The terms of a thread, of statistics that can be computed in two passes over a row."""
    each = [v * -(-p.count // (v * threads)) for p, v in zip(pieces, lengths, strict=True)]
    return sum(each) * len(
        {(s.monoid, s.expr) for s in epilogue.statistics if MONOIDS[s.monoid].passes}
    )


def _tall(
    epilogue: Epilogue, pieces: tuple[Piece, ...], lengths: tuple[int, ...], sweeps: int
) -> RowPlan:
    """The plan of a kernel that sums over rows."""
    vector, held = lengths[0], sweeps > 1
    vectors = max(-(-p.count // vector) for p in pieces)
    threads = LANES
    while threads < min(vectors, _MOST_THREADS):
        threads *= 2
    words = row_words(epilogue, pieces, lengths) if held else []

    def need(threads: int) -> int:
        return held_registers(words, threads) + summed_registers(epilogue, pieces, vector, threads)

    if threads == _MOST_THREADS and need(threads) > SUMMED:
        threads //= 2
    if need(threads) <= (SUMMED if threads == _MOST_THREADS else SUMMED_BY_FEWER):
        rows, crowded = max(1, TALL_WARPS * LANES // threads), need(threads) > CROWDED
        depth = 1 if crowded else at_once(epilogue, vector, held=held)
        return RowPlan(threads, rows, TALL_ROWS, depth, held, True, 1, crowded=crowded)
    rows, depth = teams(pieces, vector), at_once(epilogue, vector, held=False)
    levels, late = levels_of(epilogue)
    own = len(levels) + bool(late)
    return RowPlan(LANES, rows, TALL_ROWS, depth, False, False, own + 1)


def vector_lengths(
    epilogue: Epilogue, pieces: tuple[Piece, ...], *, padded: bool
) -> tuple[int, ...]:
    """The vector length of each piece: one for all, but in `padded` rows.

    Sums over rows of many registers take shorter vectors, if these leave fewer of them empty: two
    sums of 14336 columns are 64 for a thread of 512 in vectors of 8, and 56 in vectors of 4. Those
    of 18432 columns are too many (80, 72), and with 256 threads equally many (144) in both.
    """
    if padded:
        return tuple(vector_length(epilogue, [p]) for p in pieces)
    vector = vector_length(epilogue, pieces)

    def sums(vector: int, threads: int) -> int:
        return summed_registers(epilogue, pieces, vector, threads)

    fewer = min(sums(v, _MOST_THREADS) for v in (vector, vector // 2)) > SUMMED
    threads = _MOST_THREADS // 2 if fewer else _MOST_THREADS
    if vector > 1 and SUMMED < sums(vector, threads) > sums(vector // 2, threads):
        vector //= 2
    return (vector,) * len(pieces)


def summed_registers(
    epilogue: Epilogue, pieces: tuple[Piece, ...], vector: int, threads: int
) -> int:
    """The registers of a thread for the sums over rows of its columns, of `threads` threads."""
    found = 0
    for piece in pieces:
        sums = sum(len(s.lanes) for s in epilogue.row_sums if covers(epilogue, s.span, piece))
        found += sums * vector * -(-piece.count // max(1, vector * threads))
    return found


def teams(pieces: tuple[Piece, ...], vector: int) -> int:
    """How many warps of a CTA that sums over rows share the same columns, with different rows."""
    chunks = max(-(-p.count // (vector * LANES)) for p in pieces)
    found = 1
    while found * 2 * chunks <= TALL_WARPS:
        found *= 2
    return found


def summed_within(epilogue: Epilogue) -> Dim | None:
    """The rows of a sequence, if some sums over rows are of each alone; None if none are."""
    return next((s.within for s in epilogue.row_sums if s.within is not None), None)


def sums_whole(epilogue: Epilogue) -> bool:
    """Whether each CTA has some columns of all rows of a sequence, and sums them."""
    return any(s.whole for s in epilogue.row_sums)


def chunks_of(piece: Piece, vector: int) -> int:
    """The number of CTAs that share the columns of a sequence: a lane has one vector each."""
    return -(-piece.count // (vector * LANES))


def row_parts(body: Body, width: int, rows: int, sizes: Mapping[str, int]) -> int:
    """The number of partials of a sum over the rows of a row-wise kernel, of all its sequences."""
    found = plan_of(body, pieces_of(body, width))
    within = summed_within(body.epilogue)
    each = rows if within is None else within.size(sizes)
    if sums_whole(body.epilogue):
        return rows // max(1, each)
    return max(1, rows // max(1, each) * -(-each // found.block) * found.rows)


def covers(epilogue: Epilogue, span: Span | None, piece: Piece) -> bool:
    """Whether a tensor with such a span has the columns of a piece."""
    if span is None:
        return True
    first = span.first // epilogue.lanes
    return first <= piece.first < first + span.width // epilogue.lanes


def by_row(operand: Operand) -> bool:
    """Whether an operand has vectors of its own for each row."""
    return isinstance(row_of(operand.access), Tile | Periodic)


def registers(operand: Operand, lanes: int, vector: int) -> int:
    """The registers of one vector of an operand."""
    match row_of(operand.access):
        case Tile() | RowVector():
            return -(-lanes * vector * operand.dtype.size // 4)
        case Periodic(each=each):
            return -(-max(1, vector // each) * operand.dtype.size // 4)
        case Grouped():
            return 1
        case _:
            return 0


def row_words(
    epilogue: Epilogue, pieces: tuple[Piece, ...], lengths: tuple[int, ...]
) -> list[tuple[int, int]]:
    """(vectors, registers of one vector of each operand with rows) of each piece."""
    found: list[tuple[int, int]] = []
    exprs = every_expr(epilogue)
    for piece, vector in zip(pieces, lengths, strict=True):
        memo: dict[Expr, Expr] = {}
        names = loads_of([piece.special(e, memo) for e in exprs])
        own = [o for o in epilogue.operands if by_row(o) and o.name in names]
        words = sum(registers(o, epilogue.lanes, vector) for o in own)
        found.append((piece.count // vector, words))
    return found


def held_registers(words: list[tuple[int, int]], threads: int) -> int:
    """The registers of a thread for a whole row of each operand with rows, of `threads` threads."""
    return sum(each * -(-vectors // threads) for vectors, each in words)


def at_once(epilogue: Epilogue, vector: int, *, held: bool) -> int:
    """How many vectors of each operand a thread loads before it uses them."""
    loaded = [o for o in epilogue.operands if not (held and by_row(o))]
    words = sum(registers(o, epilogue.lanes, vector) for o in loaded)
    found = 1
    while found * 2 * max(words, vector * epilogue.lanes) <= AT_ONCE:
        found *= 2
    return min(found, 8)


def wide_exprs(epilogue: Epilogue) -> list[Expr]:
    """The expressions of stores with several columns, and of sums over rows."""
    stores = [s for s in epilogue.stores if isinstance(s.access, Tile)]
    return [e for s in (*stores, *epilogue.row_sums) for e in s.lanes]


def every_expr(epilogue: Epilogue) -> list[Expr]:
    """All expressions of an epilogue's elements."""
    stats = [s.expr for s in epilogue.statistics if s.expr is not None]
    return [*stats, *wide_exprs(epilogue)]


def reads(epilogue: Epilogue, exprs: list[Expr]) -> set[str]:
    """The statistics that expressions read, directly or through statistics of groups."""
    groups = {s.name: s.expr for s in epilogue.statistics if s.group}
    found: set[str] = set()
    stack = [s for e in exprs for s in stats_of(e)]
    while stack:
        name = stack.pop()
        if name not in found:
            found.add(name)
            stack += stats_of(groups.get(name))
    return found


def levels_of(epilogue: Epilogue) -> tuple[list[list[Statistic]], list[Statistic]]:
    """Statistics of the row in levels, then those that no stored column and no other one reads.

    Those of one level are independent of each other; the last ones can be taken in the sweep that
    stores.
    """
    own = [s for s in epilogue.statistics if s.expr is not None and not s.group]
    known = {s.name for s in epilogue.statistics if s.operand or s.group}
    read = _early(epilogue)
    left = [s for s in own if s.name in read]
    found = list[list[Statistic]]()
    while left:
        now = [s for s in left if s.expr is None or reads(epilogue, [s.expr]) <= known]
        found.append(now)
        known |= {s.name for s in now}
        left = [s for s in left if s not in now]
    return found, [s for s in own if s.name not in read]


def _early(epilogue: Epilogue) -> set[str]:
    """The statistics that a stored column or another statistic reads, or computed with such a one.

    A variance also gives the mean of the same values.
    """
    read = reads(epilogue, every_expr(epilogue))
    of = {s.name: (first_part(s), MONOIDS[s.monoid].also) for s in epilogue.statistics}
    own = {s.name: (s.expr, s.monoid) for s in epilogue.statistics}
    for one, pair in of.items():
        for other in own:
            if own[other] == pair and {one, other} & read:
                read |= {one, other}
    return read


def first_part(stat: Statistic) -> Expr | None:
    """The expression that a statistic reduces; of pairs, the score."""
    return stat.expr and parts_of(stat.expr)[0]


def has_planes(stat: Statistic) -> bool:
    """Whether a statistic's state takes several values in one step."""
    return len(MONOIDS[stat.monoid].warp.start) > 1
