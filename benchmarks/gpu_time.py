"""Blocks on a GPU: coda beside torch op by op, Inductor and the bare GEMMs, as ratios.

`python benchmarks/gpu_time.py [NAME ...] [--train] [--kernels] [--sweep]`. Times are medians of
calls between events, in one process; what is to be read is the ratio.
"""

import argparse
import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

from coda.ir.evaluate import evaluate
from coda.lowering.cost import kernel_seconds
from coda.lowering.program import Config, GemmKernel
from coda.lowering.schedule import legal, size_partials
from coda.measure import random_inputs
from coda.runtime.kernels import run_kernels

LLAMA = {"M": 8192, "D": 4096, "F": 14336, "H": 32, "G": 8, "d": 128}
BLOCKS = {
    "llama_layer": ("llama_layer", "layer", LLAMA),
    "llama_mlp": ("llama_mlp", "mlp", {s: LLAMA[s] for s in "MDF"}),
    "qwen3_layer": ("qwen3_layer", "layer", LLAMA),
    "gpt2_layer": ("gpt2_layer", "layer", {"M": 8192, "D": 1600, "F": 6400}),
    "small_layer": ("llama_layer", "layer", LLAMA | {"D": 2048, "F": 5632, "H": 16, "G": 4}),
    "loss": ("lm_head_loss", "loss", {"M": 8192, "D": 4096, "V": 128256}),
}
SWEPT = [
    Config(128, 256, (2, 1)),
    Config(128, 256, (1, 2)),
    Config(128, 256, (1, 1)),
    Config(256, 128, (2, 1)),
    Config(256, 128, (1, 2)),
    Config(256, 192, (2, 1)),
    Config(192, 256, (2, 1)),
    Config(128, 128, (2, 1)),
    Config(128, 128, (2, 1), True),
    Config(128, 160, (2, 1), True),
    Config(128, 192, (2, 1), True),
    Config(64, 256, (2, 1), True),
    Config(128, 192, (2, 1)),
    Config(192, 192, (2, 1)),
]


def milliseconds(call, times=20):
    """The median time of a call on the GPU."""
    for _ in range(5):
        call()
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return median(found)


def kernel_times(call, times=5):
    """(name, microseconds) of every kernel of a call, in order of launch, the median of `times`."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type.name == "CUDA"]
    events = [e for e in events if not e.name.startswith(("Mem", "Activity"))]
    count = len(events) // times
    ordered = sorted(events, key=lambda e: e.time_range.start)
    rounds = [ordered[i * count : (i + 1) * count] for i in range(times)]
    return [
        (one[0].name, median(e.time_range.elapsed_us() for e in one))
        for one in zip(*rounds, strict=True)
    ]


def flat(found):
    return tuple(found.values()) if isinstance(found, dict) else found


def forward_rows(block, inputs, program):
    """(what, ms) of a forward."""
    graph, sizes = block.graph, program.sizes

    def eager(*xs):
        return evaluate(graph.roots, dict(zip(graph.inputs, xs, strict=True)), sizes, None)

    compiled = torch.compile(make_fx(eager)(*inputs))
    products = bare_gemms(program)
    with torch.no_grad():
        yield "coda", milliseconds(lambda: block(*inputs, backend="cuda"))
        yield "its GEMMs alone, by torch", milliseconds(products)
        yield "torch op by op", milliseconds(lambda: eager(*inputs))
        yield "Inductor", milliseconds(lambda: compiled(*inputs))


def training_rows(block, inputs, programs):
    """(what, ms) of a forward and a backward."""
    graph, sizes = block.graph, programs[0].sizes
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]

    def eager(*xs):
        return evaluate(graph.roots, dict(zip(graph.inputs, xs, strict=True)), sizes, None)

    compiled = torch.compile(make_fx(eager)(*inputs))
    cotangents = [torch.randn_like(o) for o in eager(*leaves)]

    def both(call):
        outputs = flat(call(*leaves))
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)

    parts = [bare_gemms(p) for p in programs]
    yield "coda", milliseconds(lambda: both(lambda *xs: block(*xs, backend="cuda")))
    with torch.no_grad():
        yield "its GEMMs alone, by torch", milliseconds(lambda: [p() for p in parts])
    yield "torch op by op", milliseconds(lambda: both(eager))
    yield "Inductor", milliseconds(lambda: both(compiled))


def bare_gemms(program):
    """A call of torch's own products with the problems of a program's GEMMs."""
    problems = [k.problem(program.sizes) for k in program.gemms()]
    matrices = [
        (torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16())
        for m, n, k in problems
    ]
    return lambda: [a @ b.T for a, b in matrices]


def show(title, rows):
    table = Table(title=title, title_justify="left")
    for column in ("what", "ms", "× coda"):
        table.add_column(column, justify="left" if column == "what" else "right")
    first = None
    for what, ms in rows:
        first = first or ms
        table.add_row(what, f"{ms:.3f}", f"{ms / first:.2f}")
    Console(width=100).print(table)


def show_kernels(title, program, times):
    """Each launch beside its roofline; GPU kernels beyond the Program's are torch's."""
    print(f"{title}: {len(times)} GPU kernels, {sum(t for _, t in times):.0f} us")
    for (name, us), kernel in zip(times, [*program.kernels, *[None] * len(times)], strict=False):
        if kernel is None or len(times) != len(program.kernels):
            print(f"  {us:9.1f} us  {name[:90]}")
            continue
        bound, why = kernel_seconds(program, kernel)
        what = kernel.config if isinstance(kernel, GemmKernel) else ""
        print(f"  {us:9.1f} us  {bound * 1e6 / us:5.2f} of {why:12s} {kernel.name} {what}")


def sweep(block, inputs, program):
    """Every GEMM of a program at other configs, microseconds."""
    for number, kernel in enumerate(program.kernels):
        if not isinstance(kernel, GemmKernel):
            continue
        m, n, k = kernel.problem(program.sizes)
        print(f"{kernel.name} {m}×{n}×{k}, now {kernel.config}")
        bare = bare_gemms(replace_kernels(program, (kernel,)))
        print(f"  {kernel_times(bare)[0][1]:9.1f} us  torch's own product")
        for config in SWEPT:
            changed = list(program.kernels)
            changed[number] = replace(kernel, config=config)
            other = size_partials(replace_kernels(program, tuple(changed)))
            try:
                times = kernel_times(lambda other=other: run_kernels(other, inputs, other.sizes))
                us = times[number][1] if len(times) == len(changed) else float("nan")
                print(f"  {us:9.1f} us  {config} {legal(config, kernel)}", flush=True)
            except Exception as e:
                print(f"  {type(e).__name__}: {str(e)[:80]!r} {config}", flush=True)


def replace_kernels(program, kernels):
    return replace(program, kernels=kernels, buffers=dict(program.buffers))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--kernels", action="store_true", help="the time of each kernel")
    parser.add_argument("--sweep", action="store_true", help="each GEMM at other configs")
    asked = parser.parse_args()
    for name in asked.names or BLOCKS:
        file, attribute, dims = BLOCKS[name]
        path = Path(__file__).parents[1] / f"examples/{file}.py"
        block = runpy.run_path(str(path))[attribute]
        dims = {s: dims[s] for s in block.graph.symbols}
        inputs = [x.cuda() for x in random_inputs(block.graph, dims)]
        program = block.lower("sm_90a", dims, frozen=True)
        if asked.sweep:
            with torch.no_grad():
                sweep(block, inputs, program)
            continue
        show(f"{name}, forward", forward_rows(block, inputs, program))
        if asked.kernels:
            with torch.no_grad():
                times = kernel_times(partial(block, *inputs, backend="cuda"))
            show_kernels(name, program, times)
        if asked.train:
            programs = block.lower_training("sm_90a", dims)
            show(f"{name}, forward and backward", training_rows(block, inputs, programs))


if __name__ == "__main__":
    main()
