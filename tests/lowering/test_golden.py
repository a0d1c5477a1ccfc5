"""What the passes make of the examples, as text: graphs after the laws, Programs, sources."""

import importlib
import re
import runpy
from pathlib import Path

import pytest

from coda.ir.text import show
from coda.lowering.compiler import lower
from coda.lowering.program.text import program_source

ROOT = Path(__file__).parents[2] / "examples"
SMALL = {"M": 256, "D": 128, "F": 512, "H": 4, "G": 2, "d": 32, "V": 1000}
BLOCKS = {
    "llama_layer": "layer",
    "qwen3_layer": "layer",
    "gpt2_layer": "layer",
    "neox_parallel": "layer",
    "gemma2_layer": "layer",
    "unnamed_norm": "mlp",
    "lm_head_loss": "logits_and_loss",
}


@pytest.fixture(params=BLOCKS)
def program(request):
    block = runpy.run_path(str(ROOT / f"{request.param}.py"))[BLOCKS[request.param]]
    sizes = {s: SMALL[s] for s in block.graph.symbols}
    return request.param, lower(block.graph, sizes, "sm_90a")


def test_normal_form(program, golden):
    golden(f"{program[0]}.coda", show(program[1].normal))


def test_program(program, golden):
    golden(f"{program[0]}.program", str(program[1]))
    assert "M" not in program[1].fixed


def test_source(program, golden):
    golden(f"{program[0]}.py.txt", program_source(program[1]))


def test_what_emitted_modules_import_is_there():
    texts = [p.read_text() for p in Path(__file__).parent.glob("golden/*.py.txt")]
    named = {n for text in texts for n in re.findall(r"^from (coda\S*) import (.*)$", text, re.M)}
    assert named
    for module, names in named:
        for name in names.split(", "):
            found = importlib.import_module(module)
            own = getattr(getattr(found, name), "__module__", module) == module
            assert own or name in getattr(found, "__all__", ()), (
                f"{module}.{name} is another module's"
            )
