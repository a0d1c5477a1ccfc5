"""The main job: a Llama layer traced, lowered, explained, compiled, run and checked."""

from llama_layer import DIMS, layer
from rich.console import Console

from coda.measure import measure, random_inputs
from coda.runtime.compile import compile_program, usage_table

SMALL = {"M": 256, "D": 256, "F": 512, "H": 4, "G": 2, "d": 64}


def main():
    console = Console()
    console.rule("The block, as a graph of primitives")
    console.print(str(layer.graph), markup=False, highlight=False)
    for arch in ("sm_90a", "sm_100a"):
        console.rule(f"What it becomes on {arch}, at the sizes of Llama-3-8B")
        layer.explain(arch, **DIMS).print(console)
        program = layer.lower(arch, DIMS)
        done = {c.kernel: c for c in compile_program(program)}
        console.print(usage_table(arch, [done[k.name] for k in program.kernels]))
    console.rule("Run on random input, against float64")
    inputs = random_inputs(layer.graph, SMALL)
    report = measure(layer, layer.graph, inputs, "reference", dims=SMALL)
    console.print(report.table())
    assert all(e.coda <= e.torch for e in report.errors)


if __name__ == "__main__":
    main()
