"""GEMMs -> tile configs.

The default config is ranked by a model: waves of tiles over the SMs, each tile's time by its
efficiency. Configs that spill registers with heavy epilogues are not in the table (quack's own
default for sm_90a, 128×192 ping-pong, does).
"""

from __future__ import annotations

from coda.lowering.program.access import Periodic
from coda.lowering.program.epilogue import held
from coda.lowering.program.program import Config, GemmKernel, Program

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


def cta_rows(config: Config, arch: str) -> int:
    """The rows of a tile that one CTA has: half where two share it."""
    shared = arch == "sm_100a" and config.cluster[0] % 2 == 0 and config.tile_m in (128, 256)
    return config.tile_m // 2 if shared else config.tile_m


def legal(config: Config, kernel: GemmKernel) -> str:
    """Why a config does not fit a kernel, or ""."""
    epilogue = kernel.body.epilogue
    for statistic in epilogue.statistics:
        if statistic.group and config.tile_n % statistic.group:
            return f"a group of {statistic.group} columns does not divide its tile"
    for operand in epilogue.operands:
        if not isinstance(operand.access, Periodic):
            continue
        columns = operand.access.period * epilogue.lanes
        if config.tile_n % columns and columns % config.tile_n:
            return f"a table of {columns} columns does not fit its tile"
    tiles = len(epilogue.tiles) + len(epilogue.stores)
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
