"""Pipeline stages of every GEMM of the examples, at their models' sizes: the page docs/stages.md.

`python benchmarks/stages.py` writes the page; it takes half a minute, and needs no GPU.
"""

import runpy
from pathlib import Path

from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.operands import pack_tables
from coda.kernels.gemm.row_folds import split_folds
from coda.kernels.gemm.stages import stages
from coda.lowering.program.text import show_config

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
COLUMNS = "| example | kernel | M×N×K | loads, stores | config | A/B | D | C | accumulator |\n"


def rows(name, part, program):
    """The rows of a Program: `part` is inference, forward or backward."""
    found = ""
    for kernel in gemms(program):
        epilogue, _ = split_folds(kernel.body.epilogue)
        pipeline = stages(program, kernel, kernel.config)
        problem = "×".join(map(str, kernel.mainloop.problem(program.sizes)))
        loads = len(epilogue.tiles) + sum(t.by_tma for t in pack_tables(epilogue))
        cells = [name, f"{part} {kernel.name}", problem, f"{loads}, {len(epilogue.stores)}"]
        cells += [show_config(kernel.config), pipeline.ab, pipeline.d, pipeline.c]
        found += "".join(f"| {c} " for c in (*cells, pipeline.accumulator or "registers")) + "|\n"
    return found


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


def tables():
    """The tables of the page, one for each arch."""
    out = ""
    for arch in ARCHS:
        out += f"## {arch}\n\n{COLUMNS}{'|---' * COLUMNS.count(' | ')}|---|\n"
        for name in EXAMPLES:
            out += "".join(rows(name, part, program) for part, program in programs(name, arch))
        out += "\n"
    return out.rstrip("\n") + "\n"


def head():
    """The page's text before the tables."""
    return PAGE.read_text().partition("## sm_90a")[0]


if __name__ == "__main__":
    PAGE.write_text(head() + tables())
