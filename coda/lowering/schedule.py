"""GEMMs -> tile configs, and what follows from them: how many partials a split reduction has.

The default config is ranked by a model: waves of tiles over the SMs, each tile's time by its
efficiency. Configs that spill registers with heavy epilogues are not in the table (quack's own
default for sm_90a, 128×192 ping-pong, does).
"""

from __future__ import annotations

from dataclasses import replace

from coda.ir.dims import ONE, Dim, product
from coda.ir.monoids import MONOIDS
from coda.ir.types import f32
from coda.lowering.assemble import Assembled
from coda.lowering.epilogue import Epilogue, SinkExpr, Statistic, held
from coda.lowering.program import (
    Buffer,
    Config,
    GemmKernel,
    Kernel,
    Program,
    RowwiseKernel,
)
from coda.lowering.row_pieces import row_parts

SMS = {"sm_90a": 132, "sm_100a": 148}

# (config, efficiency of the mainloop against the best), from the larger to the smaller.
CONFIGS: dict[str, tuple[tuple[Config, float], ...]] = {
    "sm_90a": (
        (Config(128, 256, (2, 1)), 1.0),
        (Config(256, 128, (2, 1)), 0.98),
        (Config(128, 128, (2, 1)), 0.85),
        (Config(128, 64, (1, 1)), 0.6),
    ),
    "sm_100a": (
        (Config(256, 256, (2, 1)), 1.0),
        (Config(256, 128, (2, 1)), 0.9),
        (Config(128, 128, (1, 1)), 0.75),
        (Config(128, 64, (1, 1)), 0.5),
    ),
}


def schedule(program: Program) -> Program:
    """Choose a config for every GEMM and size the partials."""
    kernels: list[Kernel] = []
    for kernel in program.kernels:
        if isinstance(kernel, GemmKernel):
            kernel = replace(kernel, config=choose(program, kernel))
        kernels.append(kernel)
    program.kernels = tuple(kernels)
    return size_partials(program)


def cta_rows(config: Config, arch: str) -> int:
    """The rows of a tile that one CTA has: half where two share it."""
    shared = arch == "sm_100a" and config.cluster[0] % 2 == 0 and config.tile_m in (128, 256)
    return config.tile_m // 2 if shared else config.tile_m


def legal(config: Config, kernel: GemmKernel) -> str:
    """Why a config does not fit a kernel, or ""."""
    epilogue = kernel.assembled.epilogue
    for statistic in epilogue.statistics:
        if statistic.group and config.tile_n % statistic.group:
            return f"a group of {statistic.group} columns does not divide its tile"
    for operand in epilogue.operands:
        columns = operand.period * (2 if epilogue.pair else 1)
        if columns and config.tile_n % columns and columns % config.tile_n:
            return f"a table of {columns} columns does not fit its tile"
    tiles = sum(o.kind == "tile" for o in epilogue.operands) + len(epilogue.stores)
    if tiles > 5 and config.tile_m * config.tile_n > 128 * 128:
        return f"shared memory does not hold {tiles} tiles of the epilogue"
    values = held(epilogue)
    if values > 5 and config.tile_m * config.tile_n > 256 * 128:
        return f"registers do not hold {values} values of the epilogue for each point"
    return ""


def choose(program: Program, kernel: GemmKernel) -> Config:
    """The config that the model ranks first among the legal ones."""
    m, n, _ = kernel.problem(program.sizes)
    legal_ones = [(c, e) for c, e in CONFIGS[program.arch] if not legal(c, kernel)]
    if not legal_ones:
        return CONFIGS[program.arch][-1][0]

    def time(item: tuple[Config, float]) -> float:
        config, efficiency = item
        rows, columns = config.tile_m, config.tile_n
        two_cta = program.arch == "sm_100a" and config.tile_m == 256
        tiles = max(1, -(-m // rows)) * -(-n // columns)
        slots = SMS[program.arch] // (2 if two_cta else 1)
        return -(-tiles // slots) * rows * columns / efficiency / (2 if two_cta else 1)

    return min(legal_ones, key=time)[0]


def size_partials(program: Program) -> Program:
    """Fill in how many partials each split reduction has, and of how many values."""
    makers: dict[str, GemmKernel] = {}
    for gemm in program.gemms():
        for sink in gemm.assembled.epilogue.sinks:
            if sink.monoid == "pick":
                continue
            old = program.buffers[sink.buffer]
            if sink.rows:
                m = gemm.problem(program.sizes)[0]
                parts = -(-m // cta_rows(gemm.config, program.arch))
                size_sum(program, sink, max(parts, 1), gemm.problem(program.sizes)[1])
                continue
            makers[sink.buffer] = gemm
            planes = Dim.of(len(MONOIDS[sink.monoid].planes))
            parts = -(-gemm.problem(program.sizes)[1] // gemm.config.tile_n)
            shape = (planes, product(old.shape[:1]), Dim.of(parts))
            program.buffers[sink.buffer] = Buffer(sink.buffer, "partial", shape, f32)
    kernels: list[Kernel] = []
    for kernel in program.kernels:
        if isinstance(kernel, RowwiseKernel):
            kernel = replace(kernel, assembled=_counted(program, kernel.assembled, makers))
            for sink in kernel.assembled.epilogue.sinks:
                parts = row_parts(kernel.assembled, kernel.width, kernel.rows.size(program.sizes))
                size_sum(program, sink, parts, kernel.width)
        kernels.append(kernel)
    program.kernels = tuple(kernels)
    return program


def size_sum(program: Program, sink: SinkExpr, parts: int, width: int) -> None:
    """Size the partials of a sum over rows: a column may be a part of another's sum."""
    columns = program.buffers[sink.buffer].shape[1]
    parts *= (sink.span[1] if sink.span else width) // columns.size(program.sizes)
    shape = (ONE, columns, Dim.of(parts))
    program.buffers[sink.buffer] = Buffer(sink.buffer, "partial", shape, f32)


def _counted(program: Program, assembled: Assembled, makers: dict[str, GemmKernel]) -> Assembled:
    """Folds with the number of values in each partial."""

    def count(statistic: Statistic) -> Statistic:
        gemm = makers.get(statistic.operand or "")
        if gemm is None:
            return statistic
        width = gemm.problem(program.sizes)[1]
        return replace(statistic, count=gemm.config.tile_n * statistic.width // width)

    epilogue: Epilogue = assembled.epilogue
    statistics = tuple(count(s) for s in epilogue.statistics)
    return replace(assembled, epilogue=replace(epilogue, statistics=statistics))
