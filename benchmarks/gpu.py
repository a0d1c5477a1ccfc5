"""coda on the GPU of this machine -> one JSON file of errors and times, `make bench-gpu`.

    python benchmarks/gpu.py --out FILE --only layers tiles --limit 540

Kernels are compiled first, side by side, and nothing else runs beside what is timed. Every section
writes what it has found at once, so that a run that ends early keeps it. Ratios within one run are
to be compared, not times of two runs: clocks differ by 10 %.

`--rehearse` goes the same ways without a GPU, at small sizes and on backend `reference`; its times
say nothing.
"""

import argparse
import functools
import json
import platform
import runpy
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F

import coda
from coda.lowering.program.cost import hbm_bytes
from coda.measure import measure, measure_gradients, random_inputs
from coda.runtime.call import gpu_target
from coda.runtime.compile import compile_ahead

ROOT = Path(__file__).parents[1]
SECTIONS = ("ceilings", "errors", "layers", "losses", "rows", "decode", "tiles")
LAYERS = {
    "llama-3-8b": {"D": 4096, "F": 14336, "H": 32, "G": 8, "d": 128},
    "llama-3.2-1b": {"D": 2048, "F": 8192, "H": 32, "G": 8, "d": 64},
}
SMALL = {"D": 128, "F": 192, "H": 4, "G": 2, "d": 32}
LOSS = {"M": 4096, "D": 4096, "V": 128256}
PROBLEMS = ((8192, 4096, 4096), (8192, 28672, 4096), (8192, 1600, 1600), (64, 4096, 4096))
TILES = (  # tile, cluster, whether ping-pong
    *(((m, n), (2, 1), False) for m, n in ((128, 256), (256, 128), (128, 128))),
    *(((m, n), (2, 1), True) for m, n in ((128, 192), (128, 160), (192, 128))),
)


@coda.block
def rms(x: coda.Tensor["M D"], w: coda.Tensor["D"]):
    return coda.rms_norm(x, w, eps=1e-6)


def rope(x, cos, sin):
    """RoPE of [M, heads, d], interleaved."""
    a, b = x[..., 0::2], x[..., 1::2]
    c, s = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)


def layer(attention, x, w_out, w_norm1, w_gate, w_up, w_down, w_norm2, w_q, w_k, w_v, cos, sin):
    """examples/llama_layer.py, op by op in torch."""
    rows, width = x.shape[0], 2 * cos.shape[1]
    x = x + F.linear(attention, w_out)
    h = F.rms_norm(x, (x.shape[1],), w_norm1, 1e-5)
    x = x + F.linear(F.silu(F.linear(h, w_gate)) * F.linear(h, w_up), w_down)
    h = F.rms_norm(x, (x.shape[1],), w_norm2, 1e-5)
    q, k, v = (F.linear(h, w).view(rows, -1, width) for w in (w_q, w_k, w_v))
    return x, rope(q, cos, sin), rope(k, cos, sin), v


def loss(x, w, target):
    """examples/lm_head_loss.py, op by op in torch."""
    return F.cross_entropy(F.linear(x, w).float(), target, reduction="none")


class Clock:
    """Times of calls on a device: the GPU's, or of a rehearsal on the CPU."""

    def __init__(self, device):
        self.device = device

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def call(self, fn, times=20):
        """The median milliseconds of a call, with its host time where that is longer."""
        for _ in range(3):
            fn()
        found = []
        for _ in range(times if self.device == "cuda" else 1):
            self.wait()
            start = time.perf_counter()
            fn()
            self.wait()
            found.append(time.perf_counter() - start)
        return round(1e3 * sorted(found)[len(found) // 2], 4)

    def graph(self, fn, times=20):
        """The same of a replayed CUDA graph: the GPU's time alone."""
        if self.device != "cuda":
            return self.call(fn, times)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                fn()
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            fn()
        return self.call(recorded.replay, times)

    def kernels(self, fn, calls=5):
        """(kernel, mean microseconds) of one call, in order of launches, by torch's profiler."""
        from torch.profiler import ProfilerActivity, profile

        if self.device != "cuda":
            return []
        fn()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            for _ in range(calls):
                fn()
            self.wait()
        events = [e for e in record.events() if str(e.device_type).endswith("CUDA")]
        each, rest = divmod(len(events), calls)
        if rest:
            raise RuntimeError(f"{len(events)} kernels in {calls} calls")
        sums = [sum(e.device_time for e in events[i::each]) for i in range(each)]
        return [(events[i].name[-60:], round(sums[i] / calls, 1)) for i in range(each)]

    def peak(self, fn):
        """MB that a call allocates at its peak."""
        if self.device != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6)


def example(file, name):
    return runpy.run_path(str(ROOT / "examples" / f"{file}.py"))[name]


def gradients(fn, inputs, given):
    """A function that runs a forward and its backward."""
    asked = [x for x in inputs if x.requires_grad]

    def step():
        out = fn(*inputs)
        out = tuple(out.values()) if isinstance(out, dict) else out
        return torch.autograd.grad(out, asked, given)

    return step


class Bench:
    """All sections. Each returns plain data."""

    def __init__(self, rehearse):
        self.device, self.backend = ("cpu", "reference") if rehearse else ("cuda", "cuda")
        self.rehearse, self.clock = rehearse, Clock(self.device)
        self.target = None if rehearse else gpu_target()
        self.llama = example("llama_layer", "layer")
        self.loss = example("lm_head_loss", "loss")

    def dims(self, model, rows):
        return {"M": 24, **SMALL} if self.rehearse else {"M": rows, **LAYERS[model]}

    def sized(self, dims):
        return dict.fromkeys(dims, 64) if self.rehearse else dims

    def inputs(self, block, dims, asked=()):
        names = [i.name for i in block.graph.inputs]
        found = [x.to(self.device) for x in random_inputs(block.graph, dims)]
        return [x.requires_grad_(n in asked) for n, x in zip(names, found, strict=True)]

    def wanted(self, block):
        floats = [i.name for i in block.graph.inputs if i.dtype.kind == "float"]
        return [n for n in floats if n not in ("cos", "sin")]

    def ours(self, block, dims, memory=None):
        return functools.partial(block, backend=self.backend, dims=dims, memory=memory)

    def inductor(self, fn):
        return fn if self.rehearse else torch.compile(fn, dynamic=False)

    def prepare(self):
        """Compile the kernels of all sections, side by side."""
        if self.target is None:
            return {}
        programs, name = [], self.target.name
        for model in LAYERS:
            programs += self.llama.lower_training(name, self.dims(model, 8192))
            programs += [self.llama.lower(name, self.dims(model, m)) for m in (1, 16, 64, 8192)]
        programs += [*self.loss.lower_training(name, LOSS), self.loss.lower(name, LOSS)]
        start = time.perf_counter()
        done = compile_ahead(programs)
        spilled = [c.kernel for c in done if c.usage and (c.usage.stack or c.usage.local)]
        seconds = round(time.perf_counter() - start, 1)
        return {"kernels": len(done), "seconds": seconds, "spilled": spilled}

    def ceilings(self):
        size, count = (256, 1 << 16) if self.rehearse else (8192, 1 << 31)
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        x = torch.empty(count, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        product, copy = self.clock.call(lambda: a @ b), self.clock.call(lambda: y.copy_(x))
        return {"tflops": 2e-9 * size**3 / product, "copy_tb_per_s": 2e-9 * count / copy}

    def errors(self):
        dims = self.dims("llama-3-8b", 8192)
        inputs = self.inputs(self.llama, dims)
        forward = measure(self.llama, self.llama.graph, inputs, self.backend, dims=dims)
        backward = measure_gradients(self.llama, self.llama.graph, inputs, self.backend, dims=dims)
        return [forward.json(), backward.json()]

    def layers(self):
        return {name: self.one_layer(self.dims(name, 8192)) for name in LAYERS}

    def one_layer(self, dims):
        block, clock = self.llama, self.clock
        ways = {"coda": self.ours(block, dims), "eager": layer, "inductor": self.inductor(layer)}
        inputs = self.inputs(block, dims)
        with torch.no_grad():
            calls = {name: functools.partial(fn, *inputs) for name, fn in ways.items()}
            calls["gemms alone"] = self.gemms(inputs)
            forward = {name: clock.graph(call) for name, call in calls.items()}
            kernels = {name: clock.kernels(calls[name]) for name in ("coda", "inductor")}
        leaves = self.inputs(block, dims, self.wanted(block))
        given = [torch.randn_like(o) for o in layer(*leaves)]
        ways["coda, speed"] = self.ours(block, dims, "speed")
        steps = {name: gradients(fn, leaves, given) for name, fn in ways.items()}
        parts = block.lower_training(self.target and self.target.name, dims)
        return {
            "dims": dims,
            "launches": [len(p.kernels) for p in parts],
            "MB": [round(hbm_bytes(p) / 1e6, 1) for p in parts],
            "forward ms": forward,
            "forward kernels us": kernels,
            "step ms": {name: clock.call(step, 12) for name, step in steps.items()},
            "step peak MB": {name: clock.peak(step) for name, step in steps.items()},
            "step kernels us": {n: clock.kernels(steps[n]) for n in ("coda", "inductor")},
        }

    def gemms(self, inputs):
        """A call of the four GEMMs of a layer's forward by cuBLAS, with nothing between them."""
        attention, x, w_out, _, w_gate, w_up, w_down, _, w_q, w_k, w_v, _, _ = inputs
        y = torch.randn(len(x), w_down.shape[1], device=self.device).to(x.dtype)
        gate_up, qkv = torch.cat([w_gate, w_up]), torch.cat([w_q, w_k, w_v])
        pairs = (attention, w_out), (x, gate_up), (y, w_down), (x, qkv)
        return lambda: [F.linear(a, w) for a, w in pairs]

    def losses(self):
        block, dims, clock = self.loss, self.sized(LOSS), self.clock
        leaves = self.inputs(block, dims, ("x", "w_head"))
        ways = {f"coda, {m}": self.ours(block, dims, m) for m in ("balanced", "min")}
        ways |= {"eager": loss, "inductor": self.inductor(loss)}
        given = [torch.ones_like(loss(*leaves))]
        steps = {n: gradients(fn, leaves, given[0].to(torch.float32)) for n, fn in ways.items()}
        with torch.no_grad():
            alone = clock.graph(lambda: F.linear(leaves[0], leaves[1]), 8)
            forward = clock.graph(lambda: self.ours(block, dims)(*leaves), 8)
        return {
            "dims": dims,
            "step ms": {n: clock.call(s, 8) for n, s in steps.items()},
            "step peak MB": {n: clock.peak(s) for n, s in steps.items()},
            "step kernels us": clock.kernels(steps["coda, balanced"]),
            "inference ms": {"coda": forward, "gemm alone": alone},
        }

    def rows(self):
        found = []
        for m in (64, 96) if self.rehearse else (8192, 65536):
            x = torch.randn(m, 64 if self.rehearse else 4096, device=self.device).bfloat16()
            w = torch.ones_like(x[0])
            ways = {
                "coda": lambda x=x, w=w: rms(x, w, backend=self.backend),
                "torch": lambda x=x, w=w: F.rms_norm(x, x.shape[1:], w, 1e-6),
            }
            if not self.rehearse:
                from quack import rmsnorm

                ways["quack"] = lambda x=x, w=w: rmsnorm(x, w, eps=1e-6)
            with torch.no_grad():
                times = {name: self.clock.graph(way) for name, way in ways.items()}
            found.append({"shape": list(x.shape), "rms_norm ms": times})
        return found

    def decode(self):
        found = []
        for m in (1, 16, 64):
            dims = {**self.dims("llama-3-8b", m), "M": m}
            inputs = self.inputs(self.llama, dims)
            block = coda.parse(str(self.llama.graph))  # a block is lowered for its first call
            ways = {"coda": self.ours(block, dims), "eager": layer}
            ways["inductor"] = self.inductor(layer)
            with torch.no_grad():
                calls = {n: functools.partial(fn, *inputs) for n, fn in ways.items()}
                graphs = {n: self.clock.graph(call, 60) for n, call in calls.items()}
                hosts = {n: self.clock.call(call, 60) for n, call in calls.items()}
            found.append({"M": m, "graph ms": graphs, "call ms": hosts})
        return found

    def tiles(self):
        """quack's bare GEMM at several tiles beside cuBLAS."""
        found = []
        for m, n, k in ((32, 64, 64),) if self.rehearse else PROBLEMS:
            a, b = (torch.randn(s, k, device=self.device).bfloat16() for s in (m, n))
            times = {"cublas": self.clock.graph(lambda a=a, b=b: a @ b.T)}
            for (rows, columns), cluster, pingpong in () if self.rehearse else TILES:
                from quack.gemm import gemm

                d = torch.empty(1, m, n, device=self.device, dtype=a.dtype)
                arguments = a[None], b[None], d, None, None, rows, columns, *cluster
                run = functools.partial(gemm, *arguments, pingpong=pingpong, persistent=True)
                label = f"{rows}x{columns}{' ping-pong' if pingpong else ''}"
                times[label] = self.clock.graph(run)
            found.append({"problem": [m, n, k], "ms": times})
        return found


def environment(device):
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["coda"] = coda.__version__
    return found | {"gpu": torch.cuda.get_device_name() if device == "cuda" else "none"}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench-gpu.json")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for all")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, at small sizes")
    options = parser.parse_args(arguments)
    if not options.rehearse and gpu_target() is None:
        parser.error("there is no Hopper or Blackwell GPU here; --rehearse needs none")
    start, bench = time.perf_counter(), Bench(options.rehearse)
    found = {"environment": environment(bench.device), "failed": {}, "skipped": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in ("prepare", *options.only):
        if time.perf_counter() - start > options.limit:
            found["skipped"].append(name)
            continue
        try:
            found[name] = getattr(bench, name)()
        except Exception:  # the other sections are still worth their time
            found["failed"][name] = traceback.format_exc()[-2000:]
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{time.perf_counter() - start:6.1f} s  {name}", flush=True)
    for name, why in found["failed"].items():
        print(f"{name} failed: {why}")
    print(f"written to {options.out}")
    return bool(found["failed"])


if __name__ == "__main__":
    raise SystemExit(main())
