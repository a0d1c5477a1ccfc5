"""Time to trace and lower each example: `python benchmarks/lowering.py`."""

import runpy
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from coda.block import Block
from coda.frontend.trace import trace
from coda.ir.types import bf16
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


def main():
    table = Table("block", "trace ms", "lower ms", "kernels", title="tracing and lowering")
    for path in sorted(ROOT.glob("*.py")):
        if path.stem == "demo":
            continue
        module = runpy.run_path(str(path), run_name="example")
        for name, block in module.items():
            if not isinstance(block, Block):
                continue
            every = {**module["DIMS"], **module.get("STARCODER2_DIMS", {})}
            dims = {s: every[s] for s in block.graph.symbols}
            traced = best(lambda b=block: trace(b.fn, bf16))
            lowered = best(lambda b=block, d=dims: lower(b.graph, d))
            kernels = len(lower(block.graph, dims).kernels)
            table.add_row(f"{path.stem}:{name}", f"{traced:.1f}", f"{lowered:.1f}", str(kernels))
    Console().print(table)


if __name__ == "__main__":
    main()
