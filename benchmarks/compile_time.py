"""Cold compiles: a generated gate/up GEMM beside quack's hand-written one, as a ratio in one run.

Both have the same tiles and the same mathematics (SwiGLU of pairs of columns, scaled by rows).
`python benchmarks/compile_time.py`.
"""

import os
import statistics
import tempfile
import time

os.environ |= {"QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a", "QUACK_CACHE_ENABLED": "0"}
os.environ.setdefault("CODA_CACHE_DIR", tempfile.mkdtemp())

import runpy
from pathlib import Path

import torch

from coda.kernels.gemm import quack_target
from coda.kernels.gemm.emit import emit_gemm
from coda.kernels.gemm.mainloop import gemms
from coda.lowering.compiler import lower
from coda.lowering.program.target import Config, find_target
from coda.runtime.cache import kernel_directory
from coda.runtime.dry_run import without_driver

DIMS = {"M": 256, "D": 256, "F": 512}
TILES = (128, 192, 256)


def clock(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def arguments():
    bf16 = torch.bfloat16
    a, b = torch.empty(256, 256, dtype=bf16), torch.empty(1024, 256, dtype=bf16)
    return a, b, torch.empty(256, 512, dtype=bf16), torch.empty(256)


def theirs(tile):
    from quack.epilogue.library import norm_swiglu_mod

    a, b, y, rstd = arguments()
    epilogue = {"rstd": rstd[None], "bias": torch.zeros(1, 1024), "postact": y[None]}
    norm_swiglu_mod.gemm(a[None], b[None], None, epi_args=epilogue, tile_N=tile, _launch=False)


def ours(block, tile):
    program = lower(block.graph, DIMS, "sm_90a")
    kernel = next(gemms(program))
    gemm = quack_target.import_kernel(
        emit_gemm(program, kernel), Config(128, tile, (2, 1)), kernel_directory()
    )
    a, b, y, rstd = arguments()
    (name,) = gemm.source.operands
    (out,) = [s.buffer for s in kernel.body.epilogue.stores]
    gemm.plan(a, b, None, gemm.arguments({name: rstd}, {out: y}, {}, {out: 0}, {}))


def main():
    path = Path(__file__).parents[1] / "examples/llama_mlp.py"
    block = runpy.run_path(str(path))["mlp"]
    theirs(64), ours(block, 64)  # imports and the DSL's own start
    pairs = [(clock(lambda t=t: ours(block, t)), clock(lambda t=t: theirs(t))) for t in TILES]
    for tile, (mine, hand) in zip(TILES, pairs, strict=True):
        print(f"128×{tile}: coda {mine:.2f} s, quack {hand:.2f} s, ratio {mine / hand:.2f}")
    print(f"median ratio {statistics.median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    with without_driver(find_target("sm_90a")):
        main()
