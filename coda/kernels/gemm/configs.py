"""A GEMM of a Program -> its legal tile configs, ranked by estimated time.

The estimate is the number of waves of tiles over the multiprocessors, times the area of a tile,
divided by the config's relative efficiency.
"""

from __future__ import annotations

from coda.kernels.gemm.mainloop import Gemm
from coda.lowering.program.access import Periodic
from coda.lowering.program.epilogue import held
from coda.lowering.program.program import Program
from coda.lowering.program.target import Config, Target


def cta_rows(config: Config, target: Target) -> int:
    """The rows of a tile that one CTA computes: half of them if a CTA pair shares the tile."""
    shared = target.cta_pairs and config.cluster[0] % 2 == 0 and config.tile_m in (128, 256)
    return config.tile_m // 2 if shared else config.tile_m


def legal(config: Config, kernel: Gemm) -> str:
    """The reason why a config is illegal for a kernel; "" if it is legal."""
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


def ranked(program: Program, kernel: Gemm) -> tuple[Config, ...]:
    """The legal configs by increasing estimated time; the smallest config if none is legal."""
    m, n, _ = kernel.mainloop.problem(program.sizes)
    matrices = kernel.mainloop.matrices(program.sizes)
    target = program.target
    legal_ones = [(c, e) for c, e in target.configs if not legal(c, kernel)]
    if not legal_ones:
        return (target.configs[-1][0],)

    def time(item: tuple[Config, float]) -> float:
        config, efficiency = item
        rows, columns = config.tile_m, config.tile_n
        two_cta = target.cta_pairs and config.tile_m == 256
        tiles = max(1, matrices * -(-m // rows)) * -(-n // columns)
        slots = target.multiprocessors // (2 if two_cta else 1)
        return -(-tiles // slots) * rows * columns / efficiency / (2 if two_cta else 1)

    return tuple(config for config, _ in sorted(legal_ones, key=time))
