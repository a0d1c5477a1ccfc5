"""A GEMM's epilogue and its tile -> bytes of shared memory, and the pipeline stages that fit.

A CTA's shared memory holds a ring of tiles of A and B (the mainloop), a ring of loaded and one of
stored subtiles (the epilogue), and what the epilogue holds once: vectors, sums. quack gives the
epilogue its depths first, as many stages as then fit to A and B, and the rest to the epilogue. The
arithmetic here is quack's, with the depths as parameters. A tile of 128×256 on an H100, of a norm's
backward: two loaded matrices and one stored in bf16, a gain, a factor of each row, a sum over rows:

    stage of A and B     (128 + 256) · 128 bytes of K                       49152
    loaded, stored       subtiles of 128 × 32: 2 · 128 · 32 · 2, and half   16384, 8192
    once                 256 · 4 + 128 · 4 + 7 warps · 256 · 4              8704
    4 loads, 2 stores    232448 − 2048 − 8704 − 4 · 16384 − 2 · 8192        139776, A/B 2
    2 loads, 2 stores    232448 − 2048 − 8704 − 2 · 16384 − 2 · 8192        172544, A/B 3
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from coda.ir.monoids import MONOIDS
from coda.ir.types import DType, bf16, f32
from coda.kernels.gemm.mainloop import Gemm
from coda.kernels.gemm.operands import by_gemm, pack_tables, passed
from coda.kernels.gemm.ragged import needs_mask
from coda.kernels.gemm.row_folds import split_folds
from coda.lowering.program.access import Alternating, ColumnVector, RowVector, Tile
from coda.lowering.program.epilogue import Epilogue, Operand, PickColumn, ReduceColumns, SumRows
from coda.lowering.program.program import Program
from coda.lowering.program.target import Config, Target

BARRIERS = 1024  # bytes for mbarriers
PADDING = 1024  # bytes that alignment may take behind an epilogue's memory (sm_90a)
ROW_OF_K = 128  # bytes of one row of a tile of A or B in a k-step
DEEPEST = 5  # stages of loaded subtiles at most (sm_90a)
NARROW = 16  # columns of subtiles of which quack keeps twice as many


@dataclass(frozen=True)
class PipelineStages:
    """Pipeline stages of a GEMM.

    Attributes:
        ab: of A and B.
        d: of stored subtiles; unused if nothing is stored by TMA.
        c: of loaded subtiles; 0 if nothing is loaded by TMA.
        accumulator: in tensor memory; 0 if it is in registers.
    """

    ab: int
    d: int
    c: int
    accumulator: int = 0

    def __str__(self) -> str:
        first = f"accumulator {self.accumulator}, " if self.accumulator else ""
        return f"{first}A/B {self.ab}, D {self.d}, C {self.c}"


@dataclass(frozen=True)
class Need:
    """Bytes of shared memory of a GEMM's CTA.

    Attributes:
        ab: of a stage of A and B.
        loads, stores: of a stage of all loaded subtiles, and of all stored ones.
        once: of what has one stage: vectors, sums, statistics; and of the padding behind them.
        subtiles: the number of subtiles of the tile.
        columns: columns of a subtile.
        accumulators: stages of the accumulator in tensor memory; 0 if it is in registers.
    """

    ab: int
    loads: int
    stores: int
    once: int
    subtiles: int
    columns: int
    accumulators: int = 0


def divide(need: Need, depths: tuple[int, int], capacity: int) -> PipelineStages:
    """The stages of a GEMM whose epilogue has at least these depths.

    Args:
        need: bytes of each part. quack's rules depend on where the accumulator is.
        depths: stages of loaded and of stored subtiles; 0 for quack's own choice.
        capacity: bytes of shared memory of a CTA.
    """
    loads, stores = depths
    tensor_memory = need.accumulators > 0
    usual = 4 if need.columns <= NARROW else 2
    d, c = stores or usual, loads or (usual if tensor_memory else 4)
    if not tensor_memory:
        d, c = min(d, need.subtiles), min(c, need.subtiles)
    c = c if need.loads else 0
    room = capacity - BARRIERS - need.once - d * need.stores - c * need.loads
    ab = room // need.ab
    rest = room - ab * need.ab
    if c and not tensor_memory:
        more = max(0, min(rest // need.loads, min(DEEPEST, need.subtiles) - c))
        c, rest = c + more, rest - more * need.loads
    d += rest // need.stores if need.stores else 0
    return PipelineStages(ab, d, c, need.accumulators)


def stages(program: Program, kernel: Gemm, config: Config) -> PipelineStages:
    """The stages of a GEMM of a program with a config."""
    n = kernel.mainloop.problem(program.sizes)[1]
    needed = need(demand(kernel.body.epilogue), n, config, program.target)
    return divided(needed, config, program.target)


def divided(needed: Need, config: Config, target: Target) -> PipelineStages:
    """The stages of a GEMM that needs so much, with the depths of a config."""
    return divide(needed, (config.loads, config.stores), target.shared_memory)


@dataclass(frozen=True)
class Demand:
    """What an epilogue keeps in shared memory, for any tile.

    Attributes:
        loaded: dtypes of the matrices that are loaded as subtiles.
        own: the dtype that the GEMM itself stores; None if only its operators store.
        stored: bits per element of the tile of each other store.
        row, column: bytes for each row and for each column of a tile, of vectors and row masks.
        mask: whether a mask of the columns is needed where they are ragged.
        groups: columns of each statistic over groups.
        sums: the number of sums over rows.
        planes: float32 planes of all reductions over columns.
    """

    loaded: tuple[DType, ...]
    own: DType | None
    stored: tuple[int, ...]
    row: int
    column: int
    mask: bool
    groups: tuple[int, ...]
    sums: int
    planes: int


def demand(epilogue: Epilogue) -> Demand:
    """What an epilogue keeps in shared memory."""
    epilogue, _ = split_folds(epilogue)
    own, operands, masked = by_gemm(epilogue), passed(epilogue), masks(epilogue)
    kinds = {o.name: o.dtype for o in epilogue.operands}
    tables = [kinds[t.operands[0]] for t in pack_tables(epilogue) if t.by_tma]
    other = [s for s in epilogue.stores if s is not own]
    picked = [kinds[s.index] for s in epilogue.sinks if isinstance(s, PickColumn)]
    rows = [o.dtype for o in operands if isinstance(o.access, ColumnVector)] + picked
    columns = [o.dtype for o in operands if isinstance(o.access, RowVector)]
    reduced = [MONOIDS[s.monoid] for s in epilogue.sinks if isinstance(s, ReduceColumns)]
    return Demand(
        loaded=(
            *(_loaded(o) for o in operands if isinstance(o.access, Tile | Alternating)),
            *tables,
        ),
        own=own.dtype if own else None,
        stored=tuple(s.dtype.bits * len(s.lanes) // epilogue.lanes for s in other),
        row=sum(d.nbytes(1) for d in rows) + f32.nbytes(masked.rows),
        column=sum(d.nbytes(1) for d in columns),
        mask=masked.columns,
        groups=tuple(s.group for s in epilogue.statistics if s.group),
        sums=len(epilogue.row_sums),
        planes=sum(len(m.warp.start) for m in reduced),
    )


def _loaded(operand: Operand) -> DType:
    """The dtype in which an operand is loaded: two neighbours of 16 bits are one word."""
    return f32 if isinstance(operand.access, Alternating) else operand.dtype


def need(wanted: Demand, columns: int, config: Config, target: Target) -> Need:
    """The shared memory that a GEMM of so many columns needs with a config of any depths."""
    rows = cta_rows(config, target)
    high, wide = subtile(config, target, wanted.own, next(iter(wanted.loaded), None))
    points = high * wide
    loads = sum(dtype.bits for dtype in wanted.loaded) * points // 8
    stored = sum(wanted.stored) * points // 8
    ragged = wanted.mask and columns % config.tile_n != 0
    once = wanted.row * rows + (wanted.column + f32.nbytes(ragged)) * config.tile_n
    once += _reductions(wanted, rows, config.tile_n, _warps(config, target))
    once += padding(once + loads + stored, tensor_memory=target.tensor_memory)
    share = config.tile_m // rows  # CTAs that share a tile of B
    return Need(
        ab=(rows + config.tile_n // share) * ROW_OF_K,
        loads=loads,
        stores=stored + (wanted.own.bits * points // 8 if wanted.own else 0),
        once=once,
        subtiles=rows * config.tile_n // points,
        columns=wide,
        accumulators=accumulators(config.tile_n) if target.tensor_memory else 0,
    )


def accumulators(columns: int) -> int:
    """Stages of an accumulator in tensor memory, which has 512 columns."""
    return 2 if columns <= 256 else 1


@dataclass(frozen=True)
class Masks:
    """Whether sinks of an epilogue need a mask of the rows, and one of the columns (if ragged)."""

    rows: bool
    columns: bool


def masks(epilogue: Epilogue) -> Masks:
    """The masks of an epilogue, for any tile."""
    kinds = {o.name: o for o in epilogue.operands}
    rows = [s for s in epilogue.sinks if isinstance(s, SumRows)]
    columns = [s for s in epilogue.sinks if not isinstance(s, SumRows)]
    return Masks(
        *(any(needs_mask(s, e, kinds) for s in some for e in s.lanes) for some in (rows, columns))
    )


def padding(operators: int, *, tensor_memory: bool) -> int:
    """Bytes that quack adds for alignment, if its operators have `operators` bytes."""
    return PADDING if operators and not tensor_memory else 0


def cta_rows(config: Config, target: Target) -> int:
    """The rows of a tile that one CTA computes: half of them if a CTA pair shares the tile."""
    shared = target.cta_pairs and config.cluster[0] % 2 == 0 and config.tile_m in (128, 256)
    return config.tile_m // 2 if shared else config.tile_m


def subtile(
    config: Config, target: Target, stored: DType | None, loaded: DType | None
) -> tuple[int, int]:
    """Rows and columns of the subtiles in which an epilogue loads and stores its tile.

    Args:
        config, target: the tile of a CTA, or of a pair.
        stored: the dtype that the GEMM itself stores; None if only its operators store.
        loaded: the dtype of the first loaded matrix; None if there is none.
    """
    rows, columns = cta_rows(config, target), config.tile_n
    if target.tensor_memory:
        bits = max((stored or bf16).bits, loaded.bits if loaded else 0)
        high = min(rows, 32 * _warps(config, target)[0])
        if loaded is None:
            wide = (8192 if bits == 4 else 4096) // high
        else:
            small = {32: 16 if rows > 64 and columns <= 128 else 32}
            wide = small.get(bits, 32 if bits == 16 and columns <= 128 else 64)
        return high, math.gcd(wide, columns)
    groups = _warpgroups(config)[0]
    for unit in (128, 192):
        if rows % unit == 0 and groups > 1:
            return math.gcd(unit, rows), math.gcd(32, columns)
    return math.gcd(64, rows), math.gcd(64 if stored and stored.bits == 8 else 32, columns)


def _warpgroups(config: Config) -> tuple[int, int]:
    """The warpgroups over the rows and over the columns of a tile (sm_90a)."""
    if config.pingpong:
        return 1, 1
    match config.tile_m:
        case 320:
            return 1, 2
        case 192:
            return (3, 1) if config.tile_n <= 128 else (1, 2)
        case rows:
            return min(rows // 64, 2), 1


def _warps(config: Config, target: Target) -> tuple[int, int]:
    """The warps of an epilogue over the rows and over the columns of a tile."""
    if target.tensor_memory:
        rows = cta_rows(config, target)
        return (2, 2) if rows == 64 and rows < config.tile_m else (4, 1)
    down, across = _warpgroups(config)
    return 4 * down, across


def narrowest(config: Config, target: Target, bits: int) -> int:
    """The fewest columns of a tile whose subtiles have elements of so many bits.

    The warps of an epilogue in tensor memory each copy 16 bytes of a row.
    """
    return 128 // bits * _warps(config, target)[1] if target.tensor_memory else 0


def _reductions(wanted: Demand, rows: int, columns: int, warps: tuple[int, int]) -> int:
    """Bytes through which warps combine their sums and statistics."""
    down, across = warps
    values = sum(rows * (columns // group) * across for group in wanted.groups)
    values += wanted.sums * columns * (down - 1) + wanted.planes * rows * (across - 1)
    return f32.nbytes(values)
