"""Stages, resources and modelled time of every kernel of the examples: the page docs/stages.md.

`python benchmarks/stages.py` writes the page, at the sizes of the examples' models, without a GPU.
It compiles the kernels whose other cells have changed, and with `--all` every kernel, which takes
half an hour of two cores.
"""

import runpy
import sys
from pathlib import Path

from coda.kernels.gemm.kind import GEMM
from coda.kernels.gemm.operands import pack_tables
from coda.kernels.gemm.row_folds import split_folds
from coda.kernels.gemm.stages import stages
from coda.kernels.rowwise.kind import ROWWISE
from coda.kernels.rowwise.plan import plan
from coda.lowering.program.cost import kernel_time
from coda.lowering.program.text import show_config
from coda.runtime.compile import base_of, beside, compile_ahead, compile_kernel
from coda.runtime.sass import complaints, usage
from coda.runtime.simulate import device
from coda.sim.host import kept

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/stages.md"
ARCHS = ("sm_90a", "sm_100a")
# Name in the table: file, block, the name of its sizes.
EXAMPLES = {
    "llama_mlp": ("llama_mlp", "mlp", "DIMS"),
    "llama_layer": ("llama_layer", "layer", "DIMS"),
    "qwen3_layer": ("qwen3_layer", "layer", "DIMS"),
    "gpt2_layer": ("gpt2_layer", "layer", "DIMS"),
    "starcoder2": ("gpt2_layer", "starcoder2_layer", "STARCODER2_DIMS"),
    "neox_parallel": ("neox_parallel", "layer", "DIMS"),
    "gemma2_layer": ("gemma2_layer", "layer", "DIMS"),
    "unnamed_norm": ("unnamed_norm", "mlp", "DIMS"),
    "loss": ("lm_head_loss", "loss", "DIMS"),
    "logits_and_loss": ("lm_head_loss", "logits_and_loss", "DIMS"),
}
PLANNED = ["example", "kernel", "size", "loads, stores", "config", "A/B", "D", "C", "µs"]
COMPILED = ["registers", "stack", "C75xx"]


def rows(name, part, program):
    """(kernel, its cells that are known before it is compiled) of each kernel with generated code.

    `part` is inference, forward or backward.
    """
    for kernel in program.kernels:
        if kernel.kind.code is not None:
            cells = {GEMM: gemm_cells, ROWWISE: row_cells}[kernel.kind](program, kernel)
            time = f"{kernel_time(program, kernel).seconds * 1e6:.4g}"
            yield kernel, [name, f"{part} {kernel.name}", *cells, time]


def gemm_cells(program, kernel):
    """Size M×N×K, loaded and stored matrices, config, and stages of a GEMM."""
    epilogue, _ = split_folds(kernel.body.epilogue)
    pipeline = stages(program, kernel, kernel.config)
    problem = "×".join(map(str, kernel.mainloop.problem(program.sizes)))
    loads = len(epilogue.tiles) + sum(t.by_tma for t in pack_tables(epilogue))
    moved = f"{loads}, {len(epilogue.stores)}"
    return [
        problem,
        moved,
        show_config(kernel.config),
        *map(str, (pipeline.ab, pipeline.d, pipeline.c)),
    ]


def row_cells(program, kernel):
    """Rows×columns, loaded and stored matrices, and threads of a row-wise kernel."""
    epilogue, size = kernel.body.epilogue, kernel.mainloop.points(program.sizes)
    moved = f"{len(epilogue.tiles)}, {len(epilogue.stores)}"
    if epilogue.tiles:
        found = plan(program, kernel)
        shape = f"{found.threads} threads a row" + ", in registers" * found.held
    else:
        shape = "folds partials"
    return ["×".join(map(str, size)), moved, shape, "", "", ""]


def resources(arch, found):
    """Registers, bytes of stack, and complaints of ptxas of each (program, kernel), as cells.

    Kernels of the same source and config are compiled once.
    """
    compile_ahead(list({id(program): program for program, _ in found}.values()))
    known = {}
    for program, kernel in found:
        base = base_of(program, kernel)
        if base not in known:
            if not kept.intact(beside(base, ".cubin")):
                with device(arch):
                    compile_kernel(program, kernel)
            used, said = usage(beside(base, ".cubin")), complaints(beside(base, ".ptx"), arch)
            spilled = used.stack + used.local
            known[base] = [str(used.registers), str(spilled), ", ".join(said) or "none"]
        yield list(known[base])


def table(arch):
    """The rows of the page's table of an arch: (example, kernel) -> cells."""
    text = PAGE.read_text().partition(f"## {arch}\n")[2].partition("\n## ")[0]
    lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in lines[2:]]
    return {tuple(cells[:2]): cells for cells in lines}


def programs(name, arch, **sizes):
    """(part, Program) of an example's inference, and of its training, perhaps with other sizes."""
    file, block, dims = EXAMPLES[name]
    module = runpy.run_path(str(ROOT / f"examples/{file}.py"))
    block, dims = module[block], module[dims] | sizes
    floats = [i.name for i in block.graph.inputs if i.dtype.kind == "float"]
    wanted = [n for n in floats if n not in ("cos", "sin")]
    forward, backward = block.lower_training(arch, dims, wanted=wanted)
    yield "inference", block.lower(arch, dims)
    yield "forward", forward
    yield "backward", backward


def lines(arch, *, renewed):
    """The lines of an arch's table; `renewed` compiles all kernels, not only those that changed."""
    known = {} if renewed else table(arch)
    found, changed = [], []
    for name in EXAMPLES:
        for part, program in programs(name, arch):
            for kernel, cells in rows(name, part, program):
                old = known.get(tuple(cells[:2]), [])
                found.append(old if old[: len(cells)] == cells else cells)
                if found[-1] is cells:
                    changed.append((program, kernel, cells))
    for (*_, cells), more in zip(changed, resources(arch, [c[:2] for c in changed]), strict=True):
        cells += more
    return [PLANNED + COMPILED, ["---"] * len(PLANNED + COMPILED), *found]


def page(*, renewed=False):
    """The text of the page: what it says before the tables, and a table for each arch."""
    text = PAGE.read_text().partition("## sm_90a")[0]
    for arch in ARCHS:
        shown = "".join(f"| {' | '.join(cells)} |\n" for cells in lines(arch, renewed=renewed))
        text += f"## {arch}\n\n{shown}\n"
    return text.rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(renewed="--all" in sys.argv))
