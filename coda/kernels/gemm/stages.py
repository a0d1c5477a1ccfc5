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
from coda.lowering.program.access import ColumnVector, RowVector, Tile
from coda.lowering.program.epilogue import (
    Epilogue,
    Operand,
    PickColumn,
    ReduceColumns,
    SumRows,
)
from coda.lowering.program.program import Program
from coda.lowering.program.target import Config, Target

BARRIERS = 1024  # bytes for mbarriers
PADDING = 1024  # bytes that alignment may take behind an epilogue's memory (sm_90a)
ROW_OF_K = 128  # bytes of one row of a tile of A or B in a k-step
DEEPEST = 5  # stages of loaded subtiles at most (sm_90a)
NARROW = 16  # columns of subtiles of which quack keeps twice as many
ACCUMULATORS = 2  # stages in tensor memory, for tiles of up to 256 columns


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
    """

    ab: int
    loads: int
    stores: int
    once: int
    subtiles: int
    columns: int


def divide(
    need: Need, depths: tuple[int, int], capacity: int, *, tensor_memory: bool
) -> PipelineStages:
    """The stages of a GEMM whose epilogue has at least these depths.

    Args:
        need: bytes of each part.
        depths: stages of loaded and of stored subtiles; 0 for quack's own choice.
        capacity: bytes of shared memory of a CTA.
        tensor_memory: whether the accumulator is in tensor memory, on which quack's rules depend.
    """
    loads, stores = depths
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
    return PipelineStages(ab, d, c, ACCUMULATORS if tensor_memory else 0)


def stages(program: Program, kernel: Gemm, config: Config) -> PipelineStages:
    """The stages of a GEMM of a program with a config."""
    masked = masks(kernel.body.epilogue)
    return divided(need(program, kernel, config, masked), config, program.target)


def divided(needed: Need, config: Config, target: Target) -> PipelineStages:
    """The stages of a GEMM that needs so much, with the depths of a config."""
    depths = config.loads, config.stores
    return divide(needed, depths, target.shared_memory, tensor_memory=target.tensor_memory)


def need(program: Program, kernel: Gemm, config: Config, masked: Masks) -> Need:
    """The shared memory that a GEMM needs with a config, whose depths do not matter.

    `masked` are the masks of its epilogue, which are the same for all configs.
    """
    target, epilogue = program.target, kernel.body.epilogue
    rows = cta_rows(config, target)
    own, operands = by_gemm(epilogue), passed(epilogue)
    loaded = _loaded(epilogue, operands)
    high, wide = subtile(config, target, own.dtype if own else None, next(iter(loaded), None))
    other = [s for s in epilogue.stores if s is not own]
    stored = [s.dtype.nbytes(high * wide * len(s.lanes) // epilogue.lanes) for s in other]
    loads = sum(dtype.nbytes(high * wide) for dtype in loaded)
    ragged = kernel.mainloop.problem(program.sizes)[1] % config.tile_n != 0
    once = _vectors(epilogue, operands, (rows, config.tile_n))
    once += f32.nbytes(rows * masked.rows + config.tile_n * (masked.columns and ragged))
    once += _reductions(epilogue, rows, config.tile_n, _warps(config, target))
    once += padding(once + loads + sum(stored), tensor_memory=target.tensor_memory)
    share = config.tile_m // rows  # CTAs that share a tile of B
    return Need(
        ab=(rows + config.tile_n // share) * ROW_OF_K,
        loads=loads,
        stores=sum(stored) + (own.dtype.nbytes(high * wide) if own else 0),
        once=once,
        subtiles=rows * config.tile_n // (high * wide),
        columns=wide,
    )


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


def _loaded(epilogue: Epilogue, operands: list[Operand]) -> list[DType]:
    """The dtypes of the matrices that are loaded as subtiles: operands, then packed tables."""
    kinds = {o.name: o.dtype for o in epilogue.operands}
    tables = [kinds[t.operands[0]] for t in pack_tables(epilogue) if t.by_tma]
    return [o.dtype for o in operands if isinstance(o.access, Tile)] + tables


def _vectors(epilogue: Epilogue, operands: list[Operand], tile: tuple[int, int]) -> int:
    """Bytes of the vectors that are loaded, indices included."""
    rows, columns = tile
    kinds = {o.name: o for o in epilogue.operands}
    total = 0
    for operand in operands:
        match operand.access:
            case RowVector():
                total += operand.dtype.nbytes(columns)
            case ColumnVector():
                total += operand.dtype.nbytes(rows)
            case _:
                pass
    picked = [kinds[s.index].dtype for s in epilogue.sinks if isinstance(s, PickColumn)]
    return total + sum(dtype.nbytes(rows) for dtype in picked)


def _reductions(epilogue: Epilogue, rows: int, columns: int, warps: tuple[int, int]) -> int:
    """Bytes through which warps combine their sums and statistics."""
    down, across = warps
    groups = [columns // s.group for s in epilogue.statistics if s.group]
    values = sum(rows * count * across for count in groups)
    for sink in epilogue.sinks:
        match sink:
            case SumRows():
                values += columns * (down - 1)
            case ReduceColumns(monoid=monoid):
                values += rows * (across - 1) * len(MONOIDS[monoid].warp.start)
            case PickColumn():
                pass
    return f32.nbytes(values)
