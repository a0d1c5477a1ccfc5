"""The model of time beside what was measured: points, fits and errors.

`python benchmarks/model_page.py` writes them into docs/model.md. Times are in benchmarks/times:

    h200.csv       what coda, cuBLAS, Inductor and quack took on an H200
    gemms.csv      the GEMMs of it that the fit sees, with all that the model reads of them: bytes
                   in all, bytes, instructions and special functions of the epilogue for each
                   element, config, stages of A and B
    published.csv  what others published, each with its source

What is fitted here goes into coda/lowering/program/target.py by hand.
"""

import csv
import math
import statistics
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from coda.kernels.gemm.stages import PipelineStages
from coda.kernels.gemm.time import Work, time_of
from coda.lowering.program import cublas
from coda.lowering.program.target import Config, find_target

ROOT = Path(__file__).parents[1]
TIMES = ROOT / "benchmarks/times"
H200 = find_target("H200")


@dataclass(frozen=True)
class Point:
    """A measured GEMM: what the model reads of it, and its time in µs."""

    name: str
    work: Work
    config: Config
    pipeline: PipelineStages
    us: float

    def modelled(self, target=H200):
        """Its modelled time, µs."""
        time = time_of(self.work, self.config, self.pipeline, target)
        return time.seconds * 1e6

    def error(self, target=H200):
        """Modelled over measured, less one."""
        return self.modelled(target) / self.us - 1


@cache
def points(which):
    """The GEMMs of a set of gemms.csv: "8b" and "1b" are layers' training, "tiles" are quack's."""
    found = []
    for row in csv.DictReader((TIMES / "gemms.csv").open()):
        if row["set"] == which:
            m, n, k, moved, *tile, ab = (int(row[x]) for x in INTEGERS)
            carried, instructions, special, us = (float(row[x]) for x in NUMBERS)
            work = Work((m, n, k), 1, 16, moved, carried, instructions, special)
            config = Config(tile[0], tile[1], (tile[2], tile[3]), bool(tile[4]))
            found.append(Point(row["name"], work, config, PipelineStages(ab, 2, 2), us))
    return tuple(found)


INTEGERS = ["m", "n", "k", "moved", "tile_m", "tile_n", "cluster_m", "cluster_n", "pingpong", "ab"]
NUMBERS = ("carried", "instructions", "special", "us")


def layer(model):
    """The twelve GEMMs of a Llama layer's training."""
    return points(model)


def tiles():
    """quack's bare GEMM in seven tiles, at five problems."""
    return points("tiles")


def of_problem(text):
    """The tiles at one problem."""
    return [p for p in tiles() if p.name.startswith(text + " ")]


def fit_tiles():
    """The tiles at the layer's own problem, and at few rows: what the fit sees."""
    return [*of_problem("8192×4096×4096"), *of_problem("64×4096×4096")]


# Fits.


@dataclass(frozen=True)
class Constants:
    """What is fitted on the H200; the rest of its rates is assumed or derived."""

    tensor: float
    feed: float
    two: float
    start: float
    latency: float

    def target(self):
        """The H200 with these constants."""
        rates = replace(
            H200.rates,
            tensor=((16, self.tensor), H200.rates.tensor[1]),
            feed=self.feed,
            start=self.start,
            latency=self.latency,
        )
        return replace(H200, rates=rates, pipeline=((2, self.two), *H200.pipeline[1:]))


def present():
    """The constants of the H200's row."""
    rates = H200.rates
    return Constants(rates.tensor_of(16), rates.feed, H200.speed(2), rates.start, rates.latency)


def loss(constants):
    """The mean square of log errors."""
    target, points = constants.target(), (*layer("8b"), *fit_tiles())
    return statistics.mean(math.log(p.modelled(target) / p.us) ** 2 for p in points)


def fitted(constants, names=("tensor", "feed", "two", "start", "latency")):
    """The constants of least loss."""
    return descended(loss, constants, names, 0.1, 0.002)


def descended(loss, constants, names, step, least):
    """Constants of less loss: each in turn, by steps (as shares) that get smaller."""
    best = loss(constants)
    while step > least:
        moved = False
        for name in names:
            for factor in (1 + step, 1 / (1 + step)):
                other = replace(constants, **{name: getattr(constants, name) * factor})
                if (found := loss(other)) < best:
                    best, constants, moved = found, other, True
        step = step if moved else step / 2
    return constants


# Published times.


@dataclass(frozen=True)
class Published:
    """A published time of cuBLAS, in µs; the median of all that have one shape."""

    gpu: str
    m: int
    n: int
    k: int
    us: float


@cache
def published(gpu):
    """The published times of cuBLAS for operands in bf16 on an "H100 SXM" or a "B200"."""
    found = {}
    for row in csv.DictReader((TIMES / "published.csv").open()):
        ours = row["gpu"].startswith(gpu[:4]) and "cuBLAS" in row["kernel"]
        if not ours or row["dtype"] != "bf16" or "a user's" in row["gpu"]:
            continue
        m, n, k = (int(part.partition("=")[2]) for part in row["shapes"].split(";"))
        us = row["time_us"] or 2 * m * n * k / float(row["tflops"]) / 1e6
        found.setdefault((m, n, k), []).append(float(us))
    return [Published(gpu, *shape, statistics.median(us)) for shape, us in found.items()]


def errors(rates, points):
    """Modelled over measured, less one, of published GEMMs."""
    return [cublas.modelled(rates, p.m, p.n, p.k) * 1e6 / p.us - 1 for p in points]


def refitted(rates, points, names=("tensor", "bandwidth", "start", "latency")):
    """The constants of cuBLAS of least mean absolute log error."""

    def loss(rates):
        return statistics.mean(abs(math.log1p(e)) for e in errors(rates, points))

    return descended(loss, rates, names, 0.2, 0.02)


def held_out(gpu):
    """(N and K, errors there) by the constants fitted without these, from a data sheet's."""
    points = published(gpu)
    start = replace(cublas.RATES[gpu], **FROM[gpu])
    for shape in sorted({(p.n, p.k) for p in points}):
        rest = [p for p in points if (p.n, p.k) != shape]
        mine = [p for p in points if (p.n, p.k) == shape]
        yield shape, errors(refitted(start, rest), mine)


# Where the fits of cuBLAS begin: 0.8 of the peak, 0.9 of the bandwidth, a microsecond.
FROM = {
    "H100 SXM": {"tensor": 6e12, "bandwidth": 3e12, "start": 1e-6, "latency": 1e-7},
    "B200": {"tensor": 12.2e12, "bandwidth": 7.2e12, "start": 1e-6, "latency": 1e-7},
}


def spearman(a, b):
    """The rank correlation of two lists; equal values share their mean rank."""

    def ranks(values):
        order = sorted(values)
        return [order.index(v) + (order.count(v) - 1) / 2 for v in values]

    return statistics.correlation(ranks(a), ranks(b))


# Attention: two constants for each kernel, from the shortest and the longest sequence.
FAMILIES = (
    ("FlashAttention-3 fwd", 128),
    ("FlashAttention-3 fwd", 256),
    ("FlashAttention-3 bwd", 128),
    ("FlashAttention-3 bwd", 64),
    ("cuDNN fwd", 128),
    ("cuDNN bwd", 128),
)


def attention(kernel, width):
    """(length, measured µs, modelled µs) of a kernel on an H100, at 16384 tokens.

    With 16384 tokens and 2048 columns there are as many tiles at all lengths: a tile takes a
    constant time, and one in proportion to the length.
    """
    times = {}
    for row in csv.DictReader((TIMES / "published.csv").open()):
        sizes = dict(part.split("=") for part in row["shapes"].split(";"))
        if row["kernel"] != kernel or sizes.get("D") != str(width) or "arXiv" not in row["source"]:
            continue
        b, h, s = (int(sizes[x]) for x in "BHS")
        flops = 4 * b * h * s * s * width * (2.5 if kernel.endswith("bwd") else 1)
        times[s] = flops / float(row["tflops"]) / 1e6
    short, long = min(times), max(times)
    slope = (times[long] - times[short]) / (long - short)
    return [(s, us, times[short] + slope * (s - short)) for s, us in sorted(times.items())]


# Row-wise kernels on an H200: what, MB that they read and write, MB read again, µs.
ROWS = (
    ("RMSNorm 8192×4096, two sweeps", 134.2, 67.1, 60.3),
    ("RMSNorm 65536×4096, two sweeps", 1073.7, 536.9, 381.3),
    ("RMSNorm 65536×4096, quack", 1073.7, 0, 264.2),
    ("RMSNorm 8192×4096, quack", 134.2, 0, 40.1),
    ("RMSNorm 8192×4096, Inductor", 134.2, 0, 41.0),
    ("SwiGLU 8192×14336, Inductor", 704.6, 0, 161.8),
    ("SwiGLU backward 8192×14336, Inductor", 1174.4, 0, 269.5),
    ("RoPE backward, 8192×6144, two sweeps", 306.3, 100.7, 109.2),
    ("RoPE backward, 8192×3072, two sweeps", 153.2, 50.3, 51.0),
    ("dlogits 4096×128256", 2101.3, 0, 597.5),
    ("fold of 16 partials, 8192 rows", 0.6, 0, 2.8),
)


def row_time(moved, again):
    """The modelled µs of a row-wise kernel that instructions do not bound."""
    return (H200.rates.ramp + (moved + again) * 1e6 / H200.rates.bandwidth) * 1e6
