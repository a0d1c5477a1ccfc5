"""A GEMM and a config -> its modelled time.

    seconds = start + overlapped(waves · (k-steps · step + exposed epilogue), bytes / bandwidth)
    step    = overlapped(FLOPs / rate of an SM, operand bytes / feed of an SM, latency) / stages

- waves: tiles, in whole clusters, over the SMs: ragged tiles and clusters cost as full ones.
- operand bytes: of the tile's A and B from L2, each shared by the CTAs of a cluster (multicast).
- latency: of a k-step whose operand comes from memory and not from L2: all of it where no other CTA
  reads the same one (few rows), nothing where many do.
- stages: the mainloop's speed with so many stages of A and B.
- epilogue: its bytes at the SM's share of the bandwidth, since all SMs are in it at once; or its
  instructions, or special functions; and before it the partials of its rows that it folds, from L2.
  A mainloop hides it in ping-pong and in tensor memory, but for the last tile's.
- bandwidth: of memory, or of the SMs that have a tile.
- start: with K split among CTAs also the launch that clears their flags; and one after the other
  they write the sums of a tile, which the last one reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coda.ir.scalars import SCALARS
from coda.ir.types import f32
from coda.kernels.gemm.mainloop import Gemm
from coda.kernels.gemm.row_folds import split_folds
from coda.kernels.gemm.split_k import k_steps
from coda.kernels.gemm.stages import ROW_OF_K, PipelineStages, cta_rows, stages
from coda.lowering.program.cost import memory_bytes, tensor_traffic
from coda.lowering.program.epilogue import calls
from coda.lowering.program.program import Program
from coda.lowering.program.target import Config, Target
from coda.lowering.program.time import Time, overlapped

SHARES = 2  # an SM alone may take so many of its shares of the bandwidth
TURN = 1e-6  # seconds from a CTA's flag to the next one's first sums (assumed)
MOVES = 3  # instructions for each element that an epilogue loads or stores, beside its functions


@dataclass(frozen=True)
class Work:
    """A GEMM, as far as its time depends on it; the same for all configs.

    Attributes:
        problem: (M, N, K) of each matrix.
        matrices: the number of matrices.
        bits: of an element of A and B.
        moved: bytes of global memory that it reads and writes.
        carried: those of them that its epilogue moves, for each element of the accumulator.
        instructions: of its epilogue at an element, without loads and stores.
        special: those of them that are for the special-function unit.
        folded: bytes of partials that it folds for each row of a tile.
    """

    problem: tuple[int, int, int]
    matrices: int
    bits: int
    moved: int
    carried: float
    instructions: float = 0.0
    special: float = 0.0
    folded: int = 0

    def split(self, parts: int) -> Work:
        """The work if K is split among so many CTAs: more tiles, each of fewer k-steps."""
        m, n, k = self.problem
        return replace(self, problem=(m, n, -(-k // parts)), matrices=parts * self.matrices)


def work(program: Program, kernel: Gemm) -> Work:
    """The work of a GEMM of a program."""
    epilogue, folds = split_folds(kernel.body.epilogue)  # what rows have is computed once a row
    moved = tensor_traffic(program, kernel)
    functions = [SCALARS[c.fn] for c in calls(epilogue.exprs)]
    rows, columns = kernel.mainloop.points(program.sizes)
    total = moved.read_bytes + moved.write_bytes
    operands = sum(memory_bytes(o, program) for o in kernel.mainloop.operands)
    return Work(
        kernel.mainloop.problem(program.sizes),
        max(1, kernel.mainloop.matrices(program.sizes)),
        kernel.mainloop.a.dtype.bits,
        total,
        (total - operands) / max(1, rows * columns),
        sum(f.flops for f in functions) / epilogue.lanes,
        sum(f.special for f in functions) / epilogue.lanes,
        sum(f.bytes_of_row for f in folds),
    )


def gemm_time(program: Program, kernel: Gemm, config: Config) -> Time:
    """The modelled time of a GEMM of a program with a config."""
    pipeline = stages(program, kernel, config)
    return time_of(work(program, kernel), config, pipeline, program.target)


def time_of(work: Work, config: Config, pipeline: PipelineStages, target: Target) -> Time:
    """The modelled time of a GEMM with a config, which has these stages."""
    work = work.split(config.split_k)
    rates, sms, grid = target.rates, target.multiprocessors, TileGrid.of(work, config, target)
    rows, columns = cta_rows(config, target), config.tile_n
    steps = max(1, k_steps(work.problem[2], work.bits))
    tensor = 2 * rows * columns * 8 * ROW_OF_K / work.bits / rates.tensor_of(work.bits)
    fed = ROW_OF_K * (rows / config.cluster[1] + columns / config.cluster[0]) / rates.feed
    latency = rates.latency * grid.fresh
    step = overlapped(tensor, fed, latency) / target.speed(pipeline.ab)
    mainloop, tile = steps * step, rows * columns
    epilogue = _epilogue(work, tile, target) + rows * work.folded / rates.feed
    hidden = pipeline.accumulator > 1 or config.pingpong
    if hidden:
        exposed = epilogue + (grid.waves - 1) * max(0.0, epilogue - mainloop)
    else:
        exposed = grid.waves * epilogue
    busy = grid.waves * mainloop + exposed
    memory = work.moved / min(rates.bandwidth, SHARES * rates.bandwidth / sms * grid.busy)
    least = grid.waves * steps * tensor
    shared = _sharing(config, tile, target) if config.split_k > 1 else 0.0
    parts = {
        "memory": memory,
        "tensor cores": least,
        "operand feed": grid.waves * steps * fed,
        "latency of a k-step": grid.waves * steps * latency,
        "epilogue": exposed,
    }
    return Time(
        launch=rates.start + shared,
        mainloop=least,
        feed=grid.waves * mainloop - least,
        epilogue=exposed,
        memory=overlapped(busy, memory) - busy,
        bound=max(parts, key=lambda part: parts[part]),
    )


def _sharing(config: Config, tile: int, target: Target) -> float:
    """Seconds that CTAs take to share tiles of so many elements, beside their parts of K."""
    rates, turns = target.rates, config.split_k - 1
    passed = f32.nbytes(tile) / rates.feed
    return rates.ramp + turns * (TURN + passed) + passed


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a GEMM on a GPU.

    Attributes:
        waves: how many tiles an SM computes one after the other, at most.
        busy: SMs that have a tile.
        fresh: the share of a k-step's bytes, of A or of B, that no other cluster reads.
    """

    waves: int
    busy: int
    fresh: float

    @staticmethod
    def of(work: Work, config: Config, target: Target) -> TileGrid:
        """The tiles of a GEMM with a config; clusters that reach over an edge are computed too."""
        (m, n, _), (down, across) = work.problem, config.cluster
        rows = max(1, -(-m // (cta_rows(config, target) * down)))
        columns = max(1, -(-n // (config.tile_n * across)))
        clusters, size = work.matrices * rows * columns, down * across
        at_once = max(1, target.multiprocessors // size)
        busy = size * min(clusters, at_once)
        return TileGrid(-(-clusters // at_once), busy, 1 / min(rows, columns))


def _epilogue(work: Work, tile: int, target: Target) -> float:
    """Seconds of the epilogue of a CTA's tile of so many elements."""
    rates, share = target.rates, target.rates.bandwidth / target.multiprocessors
    issued = work.instructions + MOVES * (1 + work.carried / 2)
    return tile * max(
        work.carried / share,
        issued / rates.issue,
        work.special / rates.special,
    )
