"""The main job: a Llama layer traced, lowered, explained, compiled, run, simulated and checked."""

from llama_layer import DIMS, layer
from rich.console import Console

from coda.measure import ErrorReport, measure, measure_gradients, random_inputs
from coda.runtime.compile import compile_program, usage_table
from coda.runtime.simulate import device

SMALL = {"M": 256, "D": 256, "F": 512, "H": 4, "G": 2, "d": 64}
TINY = {"M": 128, "D": 128, "F": 256, "H": 2, "G": 1, "d": 64}


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
    console.rule("Run in torch, kernel by kernel, on random input")
    inputs = random_inputs(layer.graph, SMALL)
    check(console, measure(layer, layer.graph, inputs, "reference", dims=SMALL))
    for arch in ("sm_90a", "sm_100a"):
        console.rule(f"Its kernels, forward and backward, on a simulated {arch}")
        inputs = random_inputs(layer.graph, TINY)
        with device(arch) as gpu:
            check(console, measure(layer, layer.graph, inputs, dims=TINY))
            check(console, measure_gradients(layer, layer.graph, inputs, dims=TINY))
        seen = gpu.report()
        console.print(f"{len(seen.launches)} launches, {len(seen.findings)} findings")
        assert not seen.findings


def check(console: Console, report: ErrorReport) -> None:
    """Print the errors against float64; none may be larger than torch's own, op by op."""
    console.print(report.table())
    assert all(e.coda <= e.torch for e in report.errors)


if __name__ == "__main__":
    main()
