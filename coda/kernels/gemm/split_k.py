"""A GEMM whose K is split among CTAs -> the flags and sums through which they share a tile.

Of a tile, CTA i of `split_k` multiplies the i-th part of K. It waits until the tile's flag is i,
adds its sums to those in memory (the first one stores them) and sets the flag to i + 1. The last
one loads them, adds its own, runs the epilogue and sets the flag to 0. So the order is fixed.

    16×4096 in tiles of 128×64, split-K 4    flags [1, 64], sums [1, 64, 8192]: 2 MB, written three
                                             times and read once
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from coda.ir.types import f32
from coda.kernels.gemm.mainloop import Gemm
from coda.kernels.gemm.stages import ROW_OF_K, cta_rows
from coda.lowering.program.kernel import Scratch, Sizes
from coda.lowering.program.program import Program
from coda.lowering.program.target import Config, Target

FLAG = 4  # bytes of a flag


class SharedTiles(NamedTuple):
    """The tiles of a GEMM, each of one CTA, or of several that share it.

    Attributes:
        matrices: the number of matrices.
        rows, columns: how many tiles are below and beside each other, in whole clusters.
        elements: of the accumulator of a tile.
    """

    matrices: int
    rows: int
    columns: int
    elements: int

    @staticmethod
    def of(kernel: Gemm, sizes: Sizes, config: Config, target: Target) -> SharedTiles:
        """The tiles of a GEMM at these sizes."""
        (m, n, _), (down, across) = kernel.mainloop.problem(sizes), config.cluster
        rows, columns = cta_rows(config, target), config.tile_n
        below, beside = (
            -(-count // (size * some)) * some
            for count, size, some in ((m, rows, down), (n, columns, across))
        )
        return SharedTiles(kernel.mainloop.matrices(sizes), below, beside, rows * columns)


def k_steps(k: int, bits: int) -> int:
    """The k-steps of a GEMM whose operands have so many bits per element."""
    return -(-k * bits // (8 * ROW_OF_K))


def parts_of(kernel: Gemm, sizes: Sizes, config: Config) -> int:
    """How many CTAs share a tile at these sizes: 1 where K has not a k-step for each of them.

    K may be a number of rows, which each call has its own of.
    """
    steps = k_steps(kernel.mainloop.problem(sizes)[2], kernel.mainloop.a.dtype.bits)
    return config.split_k if steps >= config.split_k else 1


def scratch(program: Program, kernel: Gemm) -> Scratch:
    """The memory of a GEMM's flags and sums, and the bytes of sums that its CTAs pass on."""
    config = kernel.config
    if config is None or parts_of(kernel, program.sizes, config) == 1:
        return Scratch()
    tiles = SharedTiles.of(kernel, program.sizes, config, program.target)
    sums = f32.nbytes(prod(tiles))
    return Scratch(sums + FLAG * prod(tiles[:3]), read=sums, written=(config.split_k - 1) * sums)
