"""An arch or a GPU's name -> `Target`: resources, peaks, GEMM configs and capabilities of a GPU.

Passes ask the target for a figure or a capability, never for its arch. A new GPU is a new row here.

Users name an arch, which stands for its first row (`find_target("sm_90a")` is the H100 SXM), or a
GPU. For a GPU in the machine, `of_device` chooses the row by the driver's answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from coda.errors import ArchError
from coda.ir.types import DType


@dataclass(frozen=True)
class Config:
    """A GEMM config: CTA tiles of `tile_m` × `tile_n` elements, clusters of (m, n) CTAs.

    With `pingpong`, two consumer warpgroups of a CTA alternate between tiles (sm_90a). `loads` and
    `stores` are the least pipeline stages of an epilogue's loaded and stored subtiles, 0 for the
    kernel library's own: what they leave of shared memory are stages of A and B. With `dynamic`,
    CTAs take tiles from a queue of the hardware (cluster launch control) and not in a fixed order.
    `split_k` CTAs share a tile, each a part of K; they add their sums in order, and the last one
    runs the epilogue. Results do not differ from run to run.
    """

    tile_m: int
    tile_n: int
    cluster: tuple[int, int] = (1, 1)
    pingpong: bool = False
    loads: int = 0
    stores: int = 0
    dynamic: bool = False
    split_k: int = 1


@dataclass(frozen=True)
class Rates:
    """What a GPU achieves in kernels, as the model of time sees it; `docs/model.md` has the fits.

    Attributes:
        tensor: (bits of an operand's element, FLOP/s of an SM's tensor cores in mainloops).
        bandwidth: of global memory, bytes/s.
        feed: of an SM, bytes/s from L2 into shared memory.
        start: seconds of a GEMM in which nothing overlaps: its launch, first loads, last stores.
        ramp: the same of any other kernel.
        latency: seconds of a k-step whose operand no other CTA has read before.
        issue: instructions of a thread that an SM issues, per second.
        special: special functions of a thread that an SM computes, per second.
    """

    tensor: tuple[tuple[int, float], ...]
    bandwidth: float
    feed: float
    start: float
    ramp: float
    latency: float
    issue: float
    special: float

    def tensor_of(self, bits: int) -> float:
        """FLOP/s of an SM for operands of so many bits, as `Target.peak`."""
        return dict(self.tensor)[8 if bits <= 8 else 16]


@dataclass(frozen=True)
class Target:
    """A GPU, for which Programs are lowered, costed and compiled.

    Attributes:
        name: the GPU's name; its first word occurs in the driver's name of the GPU.
        arch: the arch that its kernels are compiled for.
        capability: CUDA's compute capability, (major, minor).
        multiprocessors: the number of SMs.
        shared_memory: bytes of shared memory per CTA at most.
        registers: 32-bit registers per SM.
        l2: bytes of the L2 cache.
        peaks: (bits of an operand's element, FLOP/s of the tensor cores), dense.
        bandwidth: of global memory, bytes/s.
        launch: least time of a launch, seconds.
        rates: what its kernels achieve.
        pipeline: (stages, speed): the mainloop's speed with so many stages of A and B, as a
            fraction of its best, by increasing stages; between two entries, the lower one's.
        cta_pairs: whether two CTAs of a cluster can share one tile of a GEMM.
        tensor_memory: whether accumulators are in tensor memory, from which an epilogue's thread
            loads 32 columns at once.
        launch_control: whether running clusters can take over those that have not started.
        packed_arithmetic: whether an instruction adds or multiplies two pairs of float32.
        sources: (field, source) of each figure.
    """

    name: str
    arch: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    registers: int
    l2: int
    peaks: tuple[tuple[int, float], ...]
    bandwidth: float
    launch: float
    rates: Rates
    pipeline: tuple[tuple[int, float], ...]
    cta_pairs: bool
    tensor_memory: bool
    launch_control: bool
    packed_arithmetic: bool
    sources: tuple[tuple[str, str], ...] = field(repr=False)

    def peak(self, dtype: DType) -> float:
        """FLOP/s of the tensor cores for operands of a dtype.

        Torch computes contractions of dtypes wider than 16 bits; they are costed as 16-bit ones.
        """
        return dict(self.peaks)[8 if dtype.size == 1 else 16]

    def speed(self, stages: int) -> float:
        """The mainloop's speed with so many stages of A and B, as a fraction of its best."""
        found = (speed for least, speed in reversed(self.pipeline) if stages >= least)
        return next(found, self.pipeline[0][1])


PIPELINE = ((2, 0.577), (3, 1.0))
# Five figures were fitted on 26 GEMMs on an H200 (docs/model.md): two stages, the tensor cores, the
# feed, the start and the latency. Of an H100, its bandwidth alone: cuBLAS on both has the same SM.
# Issue and special functions: 4 · 32 and 16 a clock, at 1.75 GHz.
HOPPER_RATES = Rates(
    tensor=((16, 6.24e12), (8, 10e12)),
    bandwidth=2.95e12,
    feed=77e9,
    start=8.6e-6,
    ramp=3e-6,
    latency=0.24e-6,
    issue=128 * 1.75e9,
    special=16 * 1.75e9,
)
# Tensor cores and bandwidth were fitted on cuBLAS; the feed is 64 bytes a clock, at 1.85 GHz; start
# and latency are assumed to be an H200's.
BLACKWELL_RATES = Rates(
    tensor=((16, 12.3e12), (8, 24.6e12)),
    bandwidth=7.29e12,
    feed=118e9,
    start=8.6e-6,
    ramp=3e-6,
    latency=0.24e-6,
    issue=128 * 1.85e9,
    special=16 * 1.85e9,
)

HOPPER_TUNING = "NVIDIA Hopper tuning guide: 227 KB a block, 64 K registers a multiprocessor"
BLACKWELL_TUNING = "NVIDIA Blackwell tuning guide: 227 KB a block, 64 K registers a multiprocessor"
LAUNCH = "assumed; folds of a few KB took 2.4 to 3.3 µs each on an H200 (measured by coda, 2026)"
MEASURED = (
    "measured by coda on an H200: seven kernels of a Llama-3-8B layer, 128×256, 2 to 4 stages"
)

RATES = "fitted: docs/model.md"

HOPPER_H100 = Target(
    name="H100 SXM",
    arch="sm_90a",
    capability=(9, 0),
    multiprocessors=132,
    shared_memory=227 << 10,
    registers=64 << 10,
    l2=50 << 20,
    peaks=((16, 989e12), (8, 1979e12)),
    bandwidth=3.35e12,
    launch=2e-6,
    rates=HOPPER_RATES,
    pipeline=PIPELINE,
    cta_pairs=False,
    tensor_memory=False,
    launch_control=False,
    packed_arithmetic=False,
    sources=(
        ("multiprocessors", "NVIDIA H100 architecture white paper"),
        ("shared_memory", HOPPER_TUNING),
        ("registers", HOPPER_TUNING),
        ("l2", "NVIDIA H100 architecture white paper"),
        ("peaks", "NVIDIA H100 data sheet, half of its figures with sparsity"),
        ("bandwidth", "NVIDIA H100 data sheet"),
        ("launch", LAUNCH),
        ("rates", RATES),
        ("pipeline", f"{MEASURED}; not on this GPU"),
    ),
)
HOPPER_H200 = replace(
    HOPPER_H100,
    name="H200",
    l2=60 << 20,
    bandwidth=4.8e12,
    rates=replace(HOPPER_RATES, bandwidth=4.24e12),
    sources=(
        ("multiprocessors", "as the driver reports; kernels of coda ran on one in November 2026"),
        ("shared_memory", HOPPER_TUNING),
        ("registers", HOPPER_TUNING),
        ("l2", "as the driver reports (cudaDeviceProp, public device reports)"),
        (
            "peaks",
            "NVIDIA H200 data sheet, half of its figures with sparsity; measured by coda: "
            "806 TFLOP/s (8192³ in bf16, cuBLAS)",
        ),
        ("bandwidth", "NVIDIA H200 data sheet; measured by coda: 4.24 TB/s (a copy)"),
        ("launch", LAUNCH),
        ("rates", RATES),
        ("pipeline", MEASURED),
    ),
)
BLACKWELL_B200 = Target(
    name="B200",
    arch="sm_100a",
    capability=(10, 0),
    multiprocessors=148,
    shared_memory=227 << 10,
    registers=64 << 10,
    l2=132_644_864,
    peaks=((16, 2250e12), (8, 4500e12)),
    bandwidth=8e12,
    launch=2e-6,
    rates=BLACKWELL_RATES,
    pipeline=PIPELINE,
    cta_pairs=True,
    tensor_memory=True,
    launch_control=True,
    packed_arithmetic=True,
    sources=(
        ("multiprocessors", "as the driver reports (cudaDeviceProp, public device reports)"),
        ("shared_memory", BLACKWELL_TUNING),
        ("registers", BLACKWELL_TUNING),
        ("l2", "as the driver reports (cudaDeviceProp, public device reports)"),
        ("peaks", "NVIDIA HGX B200 data sheet, an eighth of the board, dense"),
        ("bandwidth", "NVIDIA DGX B200 data sheet, an eighth of the system"),
        ("launch", LAUNCH),
        ("rates", RATES),
        ("pipeline", f"{MEASURED}; not on this GPU"),
    ),
)
BLACKWELL_B300 = replace(
    BLACKWELL_B200,
    name="B300",
    arch="sm_103a",
    capability=(10, 3),
    sources=(
        ("multiprocessors", "as the driver reports (cudaDeviceProp, public device reports)"),
        ("shared_memory", BLACKWELL_TUNING),
        ("registers", BLACKWELL_TUNING),
        ("l2", "as the driver reports (cudaDeviceProp, public device reports)"),
        ("peaks", "NVIDIA HGX B300 data sheet, an eighth of the board, dense"),
        ("bandwidth", "NVIDIA HGX B300 data sheet"),
        ("launch", LAUNCH),
        ("rates", RATES),
        ("pipeline", f"{MEASURED}; not on this GPU"),
    ),
)

TARGETS = (HOPPER_H100, HOPPER_H200, BLACKWELL_B200, BLACKWELL_B300)
ARCHS = tuple(dict.fromkeys(t.arch for t in TARGETS))
ONE_OF_ARCHS = f"{', '.join(ARCHS[:-1])} or {ARCHS[-1]}"
DEFAULT = TARGETS[0]


def find_target(name: str) -> Target:
    """The first row of an arch ("sm_90a"), or the row of a GPU by its name ("H200").

    Raises ArchError where there is none.
    """
    for target in TARGETS:
        if name in (target.arch, target.name):
            return target
    raise ArchError("coda does not compile for this arch", found=name, help=ONE_OF_ARCHS)


def of_device(name: str, capability: tuple[int, int], multiprocessors: int) -> Target | None:
    """The row of the GPU that a driver reports; None if coda does not compile for it.

    Args:
        name: the driver's name, such as "NVIDIA H200" or "NVIDIA H100 80GB HBM3".
        capability: (major, minor).
        multiprocessors: the number of SMs; it replaces the row's (MIG slices have fewer).
    """
    alike = [t for t in TARGETS if t.capability == capability]
    words = re.split(r"\W+", name)
    named = [t for t in alike if t.name.split()[0] in words]
    found = next(iter([*named, *alike]), None)
    if found is None or found.multiprocessors == multiprocessors:
        return found
    return replace(found, multiprocessors=multiprocessors)
