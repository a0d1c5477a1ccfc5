"""Generated epilogues beside the hand-written ones of quack's library: instructions and registers.

The same mathematics, the same tiles, compiled here for both archs; cuobjdump and nvdisasm count.
`python benchmarks/static_quality.py` needs the extra `sass` and no GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import coda
from coda.kernels.gemm.kind import GEMM
from coda.kernels.gemm.mainloop import gemms
from coda.lowering.compiler import lower
from coda.lowering.configure import size_partials
from coda.lowering.program.target import Config, find_target
from coda.runtime.compile import captured, compile_kernel, compiling_environment
from coda.runtime.dry_run import without_driver
from coda.runtime.sass import usage

ARCHS = {"sm_90a": "90", "sm_100a": "100"}
TILES = {"sm_90a": (128, 256), "sm_100a": (256, 256)}
M, N, K = 384, 512, 256
SIZES = {"M": M, "N": N, "K": K, "F": N // 2, "H": N // 128, "d": 128}
T, f32 = coda.Tensor, coda.f32


def tiles(name, arch):
    """The tiles that both are compiled for: half as wide for three matrices in and three out."""
    tile_m, tile_n = TILES[arch]
    return tile_m, 128 if (name, arch) == ("swiglu_backward", "sm_100a") else tile_n


@coda.block
def bare(x: T["M K"], w: T["N K"]):
    return x @ w.T


@coda.block
def residual(x: T["M K"], w: T["N K"], r: T["M N"]):
    return r + x @ w.T


@coda.block
def rms_boundary(x: T["M K"], w: T["N K"], r: T["M N"], g: T["N"]):
    y = r + x @ w.T
    return {"y": y, "h": y * g, "ss": coda.sum(y * y)}


@coda.block
def rstd_swiglu(x: T["M K"], gate: T["F K"], up: T["F K"], s: T["M 1", f32]):
    s = s.cast(x.dtype)
    return coda.swiglu((x @ gate.T) * s, (x @ up.T) * s)


@coda.block
def norm_gelu(x: T["M K"], w: T["N K"], s: T["M 1", f32], g: T["N"]):
    z = (x @ w.T) * s.cast(x.dtype) * g
    return {"z": z, "y": coda.gelu(z, "tanh")}


@coda.block
def layer_norm_gelu(
    x: T["M K"], w: T["N K"], s: T["M 1", f32], t: T["M 1", f32], a: T["N"], b: T["N"]
):
    z = (x @ w.T) * s.cast(x.dtype) - t.cast(x.dtype) * a + b
    return {"z": z, "y": coda.gelu(z, "tanh")}


@coda.block
def rope(x: T["M K"], w: T["(H d) K"], cos: T["M d/2"], sin: T["M d/2"]):
    return coda.rope((x @ w.T).reshape("M (H d) -> M H d"), cos, sin, interleaved=True)


@coda.block
def qk_norm(x: T["M K"], w: T["(H d) K"], g: T["d"]):
    return coda.rms_norm((x @ w.T).reshape("M (H d) -> M H d"), g, eps=1e-6)


@coda.block
def lse(x: T["M K"], w: T["N K"]):
    z = x @ w.T
    return {"z": z, "lse": coda.logsumexp(z)}


@coda.block
def rms_backward(x: T["M K"], w: T["N K"], c: T["M N"], y: T["M N"], g: T["N"], r: T["M 1", f32]):
    """The boundary of a norm: the residual's gradient, and partials of its weight's."""
    z = x @ w.T
    return {"dx": z * g + c + y * r.cast(x.dtype), "dg": coda.sum(z * y, axis=0)}


@coda.block
def gelu_backward(x: T["M K"], w: T["N K"], z: T["M N"]):
    """The derivative of GELU, GELU again for the next weight's, and partials of the bias's."""
    d = x @ w.T
    inner = 0.7978845608028654 * z * (1.0 + 0.044715 * z * z)
    t = coda.tanh(inner)
    slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * z * z)
    dz = d * (0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * slope)
    return {"dz": dz, "y": 0.5 * z * (1.0 + t), "db": coda.sum(dz, axis=0)}


@coda.block
def swiglu_backward(x: T["M K"], w: T["N K"], g: T["M N"], u: T["M N"], s: T["M 1", f32]):
    """SwiGLU behind a norm whose factor is s, from what was stored without it."""
    d, s = x @ w.T, s.cast(x.dtype)
    a, b = g * s, u * s
    q = coda.sigmoid(a)
    da, db = d * b * (q + a * q * (1.0 - q)), d * a * q
    return {"dg": da * s, "du": db * s, "y": a * q * b, "ss": coda.sum(da * g + db * u)}


def quack_arguments(tile_n):
    """The library's epilogue for each block, and its operands by name."""
    from quack.epilogue import library

    def new(*shape):
        return torch.empty((1, *shape), dtype=torch.bfloat16)

    def vector(n):
        return torch.empty(1, n)

    parts = torch.empty(1, M, -(-N // tile_n))
    sums = torch.empty(1, -(-M // 128), N)
    matrix = new(M, N)
    boundary = {"weight": vector(N), "resid_out": matrix, "sqsum": parts}
    affine = {"s": vector(M), "t": vector(M), "wg": vector(N), "wb": vector(N), "postact": matrix}
    gelu = {"rstd": vector(M), "weight": vector(N), "postact": matrix}
    swiglu = {"rstd": vector(M), "postact": new(M, N // 2)}
    norm = {"y": matrix, "w": vector(N), "corr": vector(M), "dw": sums}
    gated = {"rstd": vector(M), "postact": matrix, "dsum": parts}
    return {
        "bare": (library.identity_epi, {}, True, False),
        "residual": (library.residual_epi, {"res": matrix}, True, False),
        "rms_boundary": (library.rms_partial_epi, boundary, True, True),
        "rstd_swiglu": (library.rstd_swiglu_epi, swiglu, False, False),
        "norm_gelu": (library.norm_gelu, gelu, True, False),
        "layer_norm_gelu": (library.ln_affine_gelu_epi, affine, True, False),
        "rope": (library.rope_epi, {"table": matrix}, True, False),
        "qk_norm": (library.qknorm_epi, {"qk": 128, "w": vector(N)}, True, False),
        "lse": (library.lse_epi, {"lse": parts}, True, False),
        "rms_backward": (library.rms_bwd_apply_epi, norm, True, True),
        "gelu_backward": (library.dgelu_dbias_mod, {"postact": matrix, "dbias": sums}, True, True),
        "swiglu_backward": (library.dswiglu_rstd_preact_mod, gated, True, True),
    }


def theirs(name, arch, directory):
    """Resources of the library's kernel."""
    tile_m, tile_n = tiles(name, arch)
    mod, operands, store, with_c = quack_arguments(tile_n)[name]
    width = 2 * N if name == "swiglu_backward" else N  # gate and up side by side
    a, b, d = (torch.empty(1, *s, dtype=torch.bfloat16) for s in ((M, K), (N, K), (M, width)))
    base = Path(directory) / f"theirs_{name}"
    with captured(base):
        mod.gemm(
            *(a, b, d if store else None, d if with_c else None),
            epi_args=operands,
            tile_M=tile_m,
            tile_N=tile_n,
            _launch=False,
        )
    return usage(base.with_suffix(".cubin"))


def ours(name, arch):
    """Resources of the generated kernel, compiled for the same tiles."""
    graph = globals()[name].graph
    program = lower(graph, {s: SIZES[s] for s in graph.symbols}, arch)
    (gemm,) = gemms(program)
    gemm = replace(gemm, config=Config(*tiles(name, arch), (2, 1)))
    kernels = tuple(gemm if k.kind is GEMM else k for k in program.kernels)
    return compile_kernel(size_partials(replace(program, kernels=kernels)), gemm).usage


def child(arch):
    """Both kernels of every block for one arch, as JSON."""
    found = {}
    with tempfile.TemporaryDirectory() as directory, without_driver(find_target(arch)):
        os.environ["CODA_CACHE_DIR"] = directory  # a new one: what is found compiled has no cubin
        for name in quack_arguments(256):
            pair = theirs(name, arch, directory), ours(name, arch)
            found[name] = [[u.instructions, u.registers, u.local + u.stack] for u in pair]
    print(json.dumps(found))


def main():
    from rich.console import Console
    from rich.table import Table

    for arch in ARCHS:
        environment = {**os.environ, **compiling_environment(find_target(arch))}
        child = [sys.executable, __file__, arch]
        done = subprocess.run(child, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        table = Table(title=f"{arch}, tiles {TILES[arch][0]}×{TILES[arch][1]}, or half as wide")
        for column in (
            "epilogue",
            "quack",
            "coda",
            "ratio",
            "registers",
            "coda's",
            "spilled bytes",
        ):
            table.add_column(column, justify="left" if column == "epilogue" else "right")
        for name, (a, b) in json.loads(done.stdout.splitlines()[-1]).items():
            ratio = f"{b[0] / a[0]:.2f}"
            table.add_row(
                name, str(a[0]), str(b[0]), ratio, str(a[1]), str(b[1]), f"{a[2]} / {b[2]}"
            )
        Console(width=100).print(table)


if __name__ == "__main__":
    child(sys.argv[1]) if len(sys.argv) > 1 else main()
