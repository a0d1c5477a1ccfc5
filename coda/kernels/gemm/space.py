"""A Target -> the GEMM configs that its kernel library has kernels for.

sm_90a: two warpgroups compute one tile (cooperative) or alternate between tiles (ping-pong).
With tensor memory: one CTA, or a pair that shares B, computes a tile of up to 256×512.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from coda.lowering.program.target import Config, Target

Tile = tuple[int, int]
# Tiles on sm_90a, each with the most values that an epilogue may hold at a point (loaded, stored
# and reduced ones): with more, ptxas 13 spills registers in kernels of the examples. A thread's
# accumulators take 112 of 232 registers at 128×224, 128 at 256×128, 160, 192 and 208 at the others.
COOPERATIVE: dict[Tile, float] = {
    (128, 64): inf,
    (128, 128): inf,
    (128, 224): 6,
    (128, 256): 8,
    (256, 128): 8,
    (256, 160): 3,
    (256, 192): 2,
    (256, 208): 1,
}
PINGPONG: dict[Tile, float] = {
    (128, 128): 5,
    (128, 160): 3,
    (128, 192): 2,
    (192, 128): 2,
    (128, 208): 1,
}
# In tensor memory a thread loads 64 columns of it at once, or 32; with 64 it may hold so many
# values, and in tiles of more than 128 columns so many sums.
WIDE_SUBTILE = 5
SUMS = 3
WIDTHS = (16, 32, 64, 128, 160, 192, 224, 256)  # of tiles in tensor memory
WIDEST = (256, 512)  # its accumulator takes all of it
SPLITS = (2, 4, 8)
SMALL = (128, 64)  # for few columns or rows, without clusters


def space(target: Target) -> tuple[Config, ...]:
    """The configs of a target's GEMMs, with the library's own depths, from the largest tile."""
    return IN_TENSOR_MEMORY if target.tensor_memory else IN_REGISTERS


def _warpgroups() -> tuple[Config, ...]:
    clusters = ((2, 1), (1, 2))
    found = [Config(*t, c) for t in COOPERATIVE if t != SMALL for c in clusters]
    found += [Config(*t, c, pingpong=True) for t in PINGPONG for c in clusters]
    shared = [Config(*SMALL), Config(128, 128), Config(128, 128, (2, 1)), Config(128, 256, (2, 1))]
    return _from_the_largest([*found, Config(*SMALL), *_split(shared)])


def _tensor_memory() -> tuple[Config, ...]:
    alone = ((1, 1), (1, 2), (2, 1), (2, 2))
    found = [Config(128, columns, cluster) for columns in WIDTHS for cluster in alone]
    found += [Config(256, columns, cluster) for columns in WIDTHS for cluster in alone[2:]]
    shared = [Config(*SMALL), Config(128, 128), Config(256, 128, (2, 1))]
    return _from_the_largest([*found, Config(*WIDEST, (2, 1)), *_split(shared)])


def _split(configs: list[Config]) -> list[Config]:
    """The configs with K split among several CTAs, for GEMMs of few tiles."""
    return [replace(c, split_k=parts) for c in configs for parts in SPLITS]


def _from_the_largest(configs: list[Config]) -> tuple[Config, ...]:
    return tuple(sorted(configs, key=lambda c: c.tile_m * c.tile_n, reverse=True))


IN_REGISTERS, IN_TENSOR_MEMORY = _warpgroups(), _tensor_memory()  # where accumulators are


def most_held(config: Config, target: Target, *, columns: int, sums: int) -> float:
    """How many values an epilogue may hold at each point without spilling registers.

    Args:
        config, target: the tile.
        columns: of a subtile of the epilogue.
        sums: how many of the values are reduced.
    """
    if not target.tensor_memory:
        tiles = PINGPONG if config.pingpong else COOPERATIVE
        return tiles.get((config.tile_m, config.tile_n), inf)
    if config.tile_n > 128 and sums > SUMS:
        return 0
    return WIDE_SUBTILE if columns > 32 else inf
