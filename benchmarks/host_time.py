"""Host time of a warm call beside quack's own warm calls of the same kernels, as a ratio.

Kernels are compiled for sm_90a and launched into the void: what is measured is the host's Python,
on any machine. `python benchmarks/host_time.py`.
"""

import os
import tempfile
import time

os.environ |= {"QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a", "CODA_ARCH": "sm_90a"}
os.environ.setdefault("CODA_CACHE_DIR", tempfile.mkdtemp())

import runpy
from pathlib import Path

import quack.gemm_runtime.host
import torch

from coda.kernels.gemm import quack_target
from coda.kernels.gemm.kind import GEMM
from coda.kernels.rowwise import launch as rowwise_target
from coda.lowering.program.target import find_target
from coda.measure import random_inputs
from coda.runtime import call as run
from coda.runtime import launcher as kernels
from coda.runtime.dry_run import without_driver

DIMS = {"M": 128, "D": 128, "F": 256, "H": 4, "G": 2, "d": 64}


def microseconds(*calls, rounds=20, times=200):
    """The mean of the fastest round of each call; rounds take turns, for the machine's sake."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(times):
                call()
            best[i] = min(best[i], (time.perf_counter() - start) / times)
    return [b * 1e6 for b in best]


def launch_into_the_void():
    """Replace the driver's part: plans and compiled row kernels do nothing when they are called."""
    quack.gemm_runtime.host.launch_gemm = lambda *_, **__: None
    compiled = rowwise_target.Module.compile
    rowwise_target.Module.compile = lambda self: compiled(self) and (lambda *_: None)
    run.choose_backend = lambda _: "cuda"


def main():
    launch_into_the_void()
    path = Path(__file__).parents[1] / "examples/llama_layer.py"
    block = runpy.run_path(str(path))["layer"]
    inputs = random_inputs(block.graph, DIMS)
    seen = []
    original = quack_target.Gemm.launch
    quack_target.Gemm.launch = lambda self, *a: seen.append((self, a)) or original(self, *a)
    with torch.no_grad():
        block(*inputs)
        quack_target.Gemm.launch = original
        block(*inputs)

    def theirs():
        for gemm, (a, b, d, arguments) in seen:
            config = gemm.config
            made = [n for n, _, _ in gemm.source.outputs] + list(gemm.source.sinks)
            arguments = arguments | {n: torch.empty_like(arguments[n]) for n in made}
            d = d if d is None else torch.empty_like(d)
            gemm.module.KERNEL.gemm(
                a,
                b,
                d,
                epi_args=arguments,
                tile_M=config.tile_m,
                tile_N=config.tile_n,
                cluster_M=config.cluster[0],
                cluster_N=config.cluster[1],
            )

    with torch.no_grad():
        theirs()
        ours, quacks = microseconds(lambda: block(*inputs), theirs)
    (program,) = block._programs.values()
    gemms = sum(k.kind is GEMM for k in program.kernels)
    replays = kernels.state_of(program).found.values()
    print(f"{len(program.kernels)} kernels, {sum(len(r.found) for r in replays)} replay")
    print(f"coda, the whole call      {ours:7.1f} µs")
    print(f"quack, its {gemms} GEMMs alone {quacks:7.1f} µs, results allocated as coda does")
    print(f"ratio                     {ours / quacks:7.2f}")


if __name__ == "__main__":
    with without_driver(find_target("sm_90a")):
        main()
