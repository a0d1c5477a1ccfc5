"""A GEMM's shape -> the time that cuBLAS takes for it: the baseline, frozen.

What was measured is taken as it was measured: on an H200, kernels of cuBLAS inside training steps
of two Llama layers, and alone. All else is modelled: the fastest tile of a list, with a split of K,
by constants that were fitted on published times of cuBLAS, apart from all of coda's own rates. This
file does not change when those do: what coda is compared with has to stay.

    seconds = start + norm(waves · (k-steps · step + store), bytes / bandwidth)
    step    = norm(FLOPs / rate of an SM, operand bytes / feed of an SM, latency of memory)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product


@dataclass(frozen=True)
class CublasRates:
    """The constants of cuBLAS on a GPU, for operands of 16 bits.

    Attributes:
        tensor: FLOP/s of an SM in a mainloop.
        bandwidth: of global memory, bytes/s.
        feed: bytes/s into an SM.
        start: seconds in which nothing overlaps.
        latency: seconds of a k-step whose operand comes from memory.
        multiprocessors: SMs.
    """

    tensor: float
    bandwidth: float
    feed: float
    start: float
    latency: float
    multiprocessors: int


# Fitted on 21 shapes on an H100 (five of N and K) and 26 on a B200 (three), benchmarks/times. The
# SM of an H200 is the H100's, and its memory was measured with a copy.
H100 = CublasRates(6.10e12, 2.95e12, 79e9, 0.5e-6, 0.04e-6, 132)
H200 = CublasRates(6.10e12, 4.24e12, 79e9, 0.5e-6, 0.04e-6, 132)
B200 = CublasRates(12.3e12, 7.29e12, 118e9, 1.1e-6, 0.09e-6, 148)
RATES = {"H100 SXM": H100, "H200": H200, "B200": B200, "B300": B200}

# (M, N, K): µs on an H200, the median where there are several. Those with 8192 are from training
# steps of two Llama layers, forward, gradients of inputs, and of weights (K = 8192 rows).
MEASURED = {
    (8192, 4096, 4096): 378.6,
    (4096, 4096, 8192): 374.7,
    (8192, 14336, 4096): 1291.9,
    (8192, 4096, 14336): 1280.5,
    (14336, 4096, 8192): 1286.7,
    (4096, 14336, 8192): 1276.0,
    (8192, 1024, 4096): 97.2,
    (8192, 4096, 1024): 106.2,
    (1024, 4096, 8192): 94.8,
    (8192, 2048, 2048): 95.2,
    (2048, 2048, 8192): 90.4,
    (8192, 8192, 2048): 376.2,
    (8192, 2048, 8192): 345.9,
    (2048, 8192, 8192): 351.6,
    (8192, 512, 2048): 26.7,
    (8192, 2048, 512): 30.9,
    (512, 2048, 8192): 26.2,
    (8192, 28672, 4096): 2712.2,
    (8192, 1600, 1600): 78.3,
    (4096, 128256, 4096): 6143.5,
    (64, 4096, 4096): 15.1,
    (1, 4096, 14336): 37.2,
}

TILES = tuple(product((64, 128, 192, 256), (16, 32, 64, 128, 160, 192, 256)))
SPLITS = (1, 2, 4, 8)
_PAIR = 2  # CTAs that share a tile of B
_K_STEP = 64
_SHARES = 2


@lru_cache(maxsize=4096)
def cublas_seconds(gpu: str, m: int, n: int, k: int) -> float:
    """The seconds of cuBLAS for an [m, k] by a [k, n] matrix of 16 bits on a GPU of `RATES`."""
    if gpu == "H200" and (m, n, k) in MEASURED:
        return MEASURED[m, n, k] * 1e-6
    return modelled(RATES[gpu], m, n, k)


def modelled(rates: CublasRates, m: int, n: int, k: int) -> float:
    """The seconds of the fastest tile and split of K."""
    tiles = [t for t in TILES if t[0] * t[1] <= 128 * 256]
    shapes = ((m, n), (n, m))  # a tile may be high or wide
    return min(
        _seconds(rates, (*shape, k), tile, split)
        for tile in tiles
        for shape in shapes
        for split in SPLITS
    )


def _seconds(
    rates: CublasRates, problem: tuple[int, int, int], tile: tuple[int, int], split: int
) -> float:
    m, n, k = problem
    high, wide = tile
    rows, columns = max(1, -(-m // high)), max(1, -(-n // wide))
    pair = _PAIR if rows > 1 else 1
    clusters = -(-rows // pair) * columns * split
    waves = -(-clusters // (rates.multiprocessors // pair))
    steps = -(-max(1, -(-k // _K_STEP)) // split)
    tensor = 2 * high * wide * _K_STEP / rates.tensor
    fed = 2 * _K_STEP * (high + wide / pair) / rates.feed
    step = _norm(tensor, fed, rates.latency / min(-(-rows // pair), columns))
    share = rates.bandwidth / rates.multiprocessors
    stored = (2 if split == 1 else 4) * high * wide / share
    moved = 2 * (m * k + n * k + m * n) + (split > 1) * 8 * split * m * n
    busy = min(clusters * pair, rates.multiprocessors)
    memory = moved / min(rates.bandwidth, _SHARES * share * busy)
    return rates.start * (1 + (split > 1) / 2) + _norm(waves * (steps * step + stored), memory)


def _norm(*parts: float) -> float:
    longest = max(parts)
    return longest * sum((p / longest) ** 6 for p in parts) ** (1 / 6)
