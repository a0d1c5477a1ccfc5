"""Row-wise kernels beside the hand-written ones of quack: instructions, registers, bytes moved.

The same mathematics and widths, compiled here for both archs; nvdisasm counts instructions, and the
simulator the bytes that our kernels move in and out of their matrices. `python benchmarks/rows.py`
needs the extra `sass` and no GPU. `--json` prints the numbers alone.

Instructions an element are those that a thread executes, divided by its elements: code in a loop
counts as often as the loop turns, other code once.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch

import coda
from coda.kernels.rowwise.kind import ROWWISE
from coda.kernels.rowwise.plan import plan
from coda.lowering.program.target import find_target
from coda.runtime.compile import captured, compile_kernel, compiling_environment
from coda.runtime.dry_run import without_driver
from coda.runtime.sass import tool, usage
from coda.runtime.simulate import device, run_simulated

ARCHS = ("sm_90a", "sm_100a")
T, f32 = coda.Tensor, coda.f32
ROWS = 3  # that the simulator runs
SIZES = {"H": 48, "d": 128}  # of RoPE: 6144 columns
VOCABULARY = 128256


@coda.block
def rms_norm(x: T["M N"], w: T["N"]):
    return coda.rms_norm(x, w, eps=1e-6)


@coda.block
def layer_norm(x: T["M N"], w: T["N"], b: T["N"]):
    return coda.layer_norm(x, w, b)


@coda.block
def softmax(x: T["M N"]):
    return coda.softmax(x)


@coda.block
def logsumexp(x: T["M V"]):
    """What a cross entropy reads its logits for."""
    return coda.logsumexp(x.cast(f32))


@coda.block
def dlogits(x: T["M V"], t: T["M", coda.i64]):
    """The loss whose backward is one pass over the logits."""
    return coda.cross_entropy(x, t)


@coda.block
def rope_backward(dq: T["M (H d)"], q: T["M (H d)"], cos: T["M d/2"], sin: T["M d/2"]):
    """The gradient before a rotation, and a row's sum of it times what was rotated."""
    x = coda.rope(dq.reshape("M (H d) -> M H d"), cos, -sin).reshape("M H d -> M (H d)")
    return {"dx": x, "z": coda.sum(x.cast(f32) * q.cast(f32))}


BLOCKS = {b.__name__: b for b in (rms_norm, layer_norm, softmax, logsumexp, dlogits, rope_backward)}
WIDTHS = {"N": 4096, "V": VOCABULARY, **SIZES}


def sizes_of(block):
    return {s: WIDTHS.get(s, ROWS) for s in block.graph.symbols}


def program_of(name, arch):
    """The Program of a block; for the logits' gradient, of its backward."""
    block = BLOCKS[name]
    if block is dlogits:
        return block.lower_training(arch, sizes_of(block))[1]
    return block.lower(arch, sizes_of(block))


def width_of(name):
    sizes = sizes_of(BLOCKS[name])
    return sizes.get("N") or sizes.get("V") or SIZES["H"] * SIZES["d"]


def executed(cubin, trips):
    """(instructions, exponentials and other special functions) that a thread executes.

    A loop is a branch back; the only loops of these kernels turn `trips` times.
    """
    done = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], stdout=subprocess.PIPE, check=True)
    found, labels, loops = [], {}, []
    for line in done.stdout.decode().splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        code = re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(found)
        elif code:
            target = re.search(r"BRA.*?(\.L_x_\d+)", code[1])
            if target and target[1] in labels and labels[target[1]] < len(found):
                loops.append((labels[target[1]], len(found)))
            found.append(code[1])
    end = next((i for i, x in enumerate(found) if x.endswith("EXIT") and "@" not in x), len(found))
    times = [1] * (end + 1)
    for first, last in loops:
        if last <= end:  # the branch after the end is where a program waits for its CTA's end
            for i in range(first, last + 1):
                times[i] = trips
    code = [(n, x) for n, x in zip(times, found, strict=False) if "NOP" not in x]
    return sum(n for n, _ in code), sum(n for n, x in code if "MUFU" in x)


def ours(name, arch):
    """Numbers of the generated kernel."""
    program = program_of(name, arch)
    (kernel,) = [k for k in program.kernels if k.kind is ROWWISE]
    found = plan(program, kernel)
    compiled = compile_kernel(program, kernel)
    vector, each = 8, width_of(name) / found.threads
    if name == "rope_backward":  # pairs of columns
        vector = 16
    turns = int(width_of(name) / vector) // found.threads // found.depth
    total, special = executed(compiled.cubin, max(1, turns))
    u = compiled.usage
    return [found.threads, total / each, special / each, u.registers, u.local + u.stack]


def theirs(name, arch, directory):
    """Numbers of the library's kernel, whose loops are all unrolled."""
    from cutlass import BFloat16, Float32, Int64
    from quack.rmsnorm_config import RmsNormFwdConfig

    norm, soft, cross = (
        import_module(f"quack.{n}") for n in ("rmsnorm", "softmax", "cross_entropy")
    )
    width, cluster = width_of(name), 1
    base = Path(directory) / f"theirs_{name}"
    with captured(base):
        if name in ("rms_norm", "layer_norm"):
            is_layer = name == "layer_norm"
            config = RmsNormFwdConfig.from_analytical_heuristic(width, 16, 9, is_layer)
            bias = Float32 if is_layer else None
            types = (BFloat16, BFloat16, None, Float32, bias, None)
            compile = norm._compile_rmsnorm_fwd.__wrapped__
            compile(*types, width, False, False, is_layer, False, 0.0, config)
            threads = config.threads_per_row
        elif name == "softmax":
            soft.Softmax.compile.__wrapped__(BFloat16, BFloat16, width)
            threads = soft.Softmax(BFloat16, width)._threads_per_row()
        elif name in ("logsumexp", "dlogits"):
            given = (BFloat16, Int64, None, width, True, name == "dlogits", None, None)
            cross.CrossEntropy.compile.__wrapped__(*given)
            threads, cluster = cross.CrossEntropy(BFloat16, width)._threads_per_row(), 8
        else:
            return None
    found = base.with_suffix(".cubin")
    each = -(-width // (threads * cluster * 8)) * 8
    total, special = executed(found, 1)
    u = usage(found)
    return [threads * cluster, total / each, special / each, u.registers, u.local + u.stack]


def moved(name, arch):
    """Bytes moved / unique bytes of the matrices of our kernel, loaded and stored."""
    program, generator = program_of(name, arch), torch.Generator().manual_seed(0)
    sizes, inputs = sizes_of(BLOCKS[name]), []
    for node in program.graph.inputs:
        shape = [d.size(sizes) for d in node.shape]
        x = (
            torch.randn(shape, generator=generator)
            if node.dtype.kind == "float"
            else torch.zeros(shape)
        )
        inputs.append(x.to(node.dtype.torch))
    with device(arch) as gpu:
        outs = run_simulated(program, inputs, sizes)
        (launch,) = gpu.report().launches
    large = max(x.numel() * x.element_size() for x in (*inputs, *outs))
    ratios = [
        max(b.loaded / max(1, b.unique_loaded), b.stored / max(1, b.unique_stored))
        for b in launch.result.per_allocation.values()
        if max(b.unique_loaded, b.unique_stored) >= large * 0.9
    ]
    return max(ratios)


def child(arch):
    """All numbers of one arch, as JSON."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        with without_driver(find_target(arch)):
            os.environ["CODA_CACHE_DIR"] = directory  # a new one: cached kernels have no cubin
            pairs = {name: (theirs(name, arch, directory), ours(name, arch)) for name in BLOCKS}
        for name, pair in pairs.items():
            found[name] = {"quack": pair[0], "coda": pair[1], "moved": moved(name, arch)}
    print(json.dumps(found))


def measure(arch):
    """The numbers of one arch, from a fresh process."""
    environment = {**os.environ, **compiling_environment(find_target(arch))}
    command = [sys.executable, __file__, "--child", arch]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(arch, found):
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{arch}: quack / coda")
    heads = ("kernel", "columns", "threads a row", "instructions", "MUFU", "registers", "spilled")
    for head in (*heads, "moved / unique"):
        table.add_column(head, justify="left" if head == "kernel" else "right")
    for name, row in found.items():
        ends = zip(row["quack"] or ["–"] * 5, row["coda"], strict=True)
        cells = [
            " / ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in p) for p in ends
        ]
        table.add_row(name, str(width_of(name)), *cells, f"{row['moved']:.2f}")
    Console(width=110).print(table)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=ARCHS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    found = {arch: measure(arch) for arch in ARCHS}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for arch in ARCHS:
        show(arch, found[arch])


if __name__ == "__main__":
    main()
