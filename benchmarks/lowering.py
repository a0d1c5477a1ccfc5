"""Time to trace and lower each example, and CPU time by the number of layers, as ratios.

python benchmarks/lowering.py
"""

import runpy
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from coda.block import Block
from coda.frontend.library import rms_norm, swiglu
from coda.frontend.tensor import Tensor
from coda.frontend.trace import trace
from coda.ir.dims import Dim
from coda.ir.graph import Graph, Input
from coda.ir.types import bf16, f32
from coda.lowering.compiler import lower

ROOT = Path(__file__).parents[1] / "examples"


def best(call, times=5):
    """The shortest of some runs, in ms."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found) * 1e3


def mlps(count):
    """A chain of gated MLPs, each with its norm and residual."""
    inputs = [Input("x", (Dim.of("M"), Dim.of("D")), f32)]
    x = Tensor(inputs[0])
    for i in range(count):
        shapes = {"g": ("D",), "a": ("F", "D"), "b": ("F", "D"), "c": ("D", "F")}
        mine = [Input(f"{n}{i}", tuple(map(Dim.of, s)), f32) for n, s in shapes.items()]
        inputs += mine
        g, a, b, c = map(Tensor, mine)
        h = rms_norm(x, g, 1e-5)
        x = x + swiglu(h @ a.T, h @ b.T) @ c.T
    return Graph("mlps", tuple(inputs), (("out", x.node),))


def layers(counts=(1, 2, 4, 8, 16, 32, 64)):
    """A table of the CPU time of 1 to 64 layers, each beside that of half as many."""
    table = Table("layers", "ms", "of half as many", title="lowering by the number of layers")
    before = None
    for count in counts:
        graph, start = mlps(count), time.process_time()
        lower(graph, {"M": 256, "D": 128, "F": 192})
        took = time.process_time() - start
        table.add_row(str(count), f"{took * 1e3:.0f}", f"{took / before:.2f}" if before else "")
        before = took
    return table


def main():
    table = Table("block", "trace ms", "lower ms", "kernels", title="tracing and lowering")
    for path in sorted(ROOT.glob("*.py")):
        if path.stem == "demo":
            continue
        module = runpy.run_path(str(path), run_name="example")
        for name, block in module.items():
            if (
                not isinstance(block, Block) or "DIMS" not in module
            ):  # a script with sizes of its own
                continue
            every = {**module["DIMS"], **module.get("STARCODER2_DIMS", {})}
            dims = {s: every[s] for s in block.graph.symbols}
            traced = best(lambda b=block: trace(b.fn, bf16))
            lowered = best(lambda b=block, d=dims: lower(b.graph, d))
            kernels = len(lower(block.graph, dims).kernels)
            table.add_row(f"{path.stem}:{name}", f"{traced:.1f}", f"{lowered:.1f}", str(kernels))
    Console().print(table)
    Console().print(layers())


if __name__ == "__main__":
    main()
