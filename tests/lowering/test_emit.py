"""Emitted modules: what must hold of every text, whatever the block."""

import ast

import pytest
from hypothesis import given

from coda.errors import UnsupportedError
from coda.ir.types import bf16, f32
from coda.kernels.gemm.configs import legal
from coda.kernels.gemm.emit import emit_gemm
from coda.kernels.gemm.kind import GEMM
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.ragged import vanishes
from coda.kernels.lines import safe
from coda.kernels.rowwise.emit import emit_rowwise
from coda.kernels.rowwise.kind import ROWWISE
from coda.lowering.compiler import lower
from coda.lowering.program.access import ColumnVector, RowVector, Tile
from coda.lowering.program.epilogue import Acc, Call, Literal, Load, Operand
from coda.lowering.program.target import Config
from coda.lowering.program.text import program_source
from tests.lowering.test_random_blocks import SETTINGS, SIZES, blocks

ROW, COL = Load("row"), Load("col")
KINDS = {"row": Operand("row", f32, RowVector()), "col": Operand("col", f32, ColumnVector())}


def call(fn, *args):
    return Call(fn, args)


@pytest.mark.parametrize(
    ("expr", "zero"),
    [
        (Acc(), True),
        (ROW, True),
        (COL, False),
        (call("square", Acc()), True),
        (call("mul", Acc(), COL), False),
        (call("mul", Acc(), ROW), True),
        (call("sub", call("exp", Acc()), Literal(1.0)), True),
        (call("add", Acc(), COL), False),
        (call("add", Acc(), ROW), True),
        (call("exp", Acc()), False),
        (call("add", Acc(), Literal(1.0)), False),
        (call("where", COL, Acc(), ROW), True),
        (call("where", COL, Acc(), COL), False),
        (call("div", Acc(), ROW), False),
    ],
)
def test_what_vanishes_outside_the_matrix(expr, zero):
    """A column sum of a ragged tile may take it unmasked only if it does."""
    assert vanishes(expr, KINDS) is zero


def waits_for_the_kernel_before(text):
    """Whether a row-wise kernel may start early, and first waits for the results that it reads."""
    module = ast.parse(text)
    body = next(f.body for f in module.body if isinstance(f, ast.FunctionDef))
    first = [ast.unparse(line).removeprefix("cute.arch.") for line in body[:2]]
    waits = first == ["griddepcontrol_wait()", "griddepcontrol_launch_dependents()"]
    return waits and "use_pdl=True" in text


@SETTINGS
@given(blocks(dtype=bf16))
def test_every_text_is_python_and_names_its_kernel_alone(graph):
    used = {s for i in graph.inputs for d in i.shape for s in d.symbols}
    program = lower(graph, {s: n for s, n in SIZES.items() if s in used})
    texts = {}
    for kernel in program.kernels:
        if kernel.kind is GEMM:
            source = emit_gemm(program, kernel)
        elif kernel.kind is ROWWISE:
            source = emit_rowwise(program, kernel)
            assert waits_for_the_kernel_before(source.text)
        else:
            continue
        ast.parse(source.text)
        assert texts.setdefault(source.name, source.text) == source.text
    assert len(set(texts.values())) == len(texts)


def test_names_that_quack_or_python_keep_for_themselves():
    assert [safe(n) for n in ("acc", "c", "D", "lambda", "x")] == [
        "acc_",
        "c_",
        "D_",
        "lambda_",
        "x",
    ]


def test_an_illegal_config_says_why():
    import runpy
    from pathlib import Path

    path = Path(__file__).parents[2] / "examples/qwen3_layer.py"
    module = runpy.run_path(str(path))
    program = module["layer"].lower("sm_90a", module["DIMS"])
    kernel = list(gemms(program))[-1]
    assert legal(program, kernel, kernel.config) == ""
    assert "group of 128 columns" in legal(program, kernel, Config(128, 192))
    assert "room for 1 stages" in legal(program, kernel, Config(128, 256, loads=9, stores=8))


def test_what_is_not_compiled_is_refused_by_name():
    import coda

    @coda.block
    def wide(x: coda.Tensor["M D", coda.f32], w: coda.Tensor["F D", coda.f32]):
        return x @ w.T

    program = wide.lower("sm_90a", {"M": 8, "D": 16, "F": 32})
    with pytest.raises(UnsupportedError, match="8 or 16 bits"):
        program_source(program)


def test_a_factor_that_is_infinite_outside_the_matrix_is_masked():
    """In rows outside, x / r is 0 · ∞: such sums over the rows need their mask."""
    kinds = {"x": Operand("x", bf16, Tile()), "r": Operand("r", f32, ColumnVector())}
    x, r = Load("x"), Load("r")
    shifted = Call("rsqrt", (Call("add", (r, Literal(1e-5))),))
    assert vanishes(Call("mul", (x, r)), kinds, rows=True)
    assert vanishes(Call("mul", (x, shifted)), kinds, rows=True)
    for factor in (Call("recip", (r,)), Call("rsqrt", (r,)), Call("div", (x, r))):
        assert not vanishes(Call("mul", (x, Call("neg", (factor,)))), kinds, rows=True)
