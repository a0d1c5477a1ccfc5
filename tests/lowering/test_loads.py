"""A row-wise kernel loads the fewest bytes from which it can compute what it writes."""

import pytest
import torch

import coda
from coda.ir.evaluate import evaluate
from coda.lowering.compiler import lower
from coda.runtime.reference import run_reference

SIZES = {"M": 6, "D": 64, "H": 4, "d": 32}
T = coda.Tensor


@coda.block
def functions_of_one_value(x: T["M D"], w: T["D D"]):
    """Two functions of the product, each needed beside a softmax that a GEMM does not compute."""
    z = x @ w.T
    return coda.softmax(coda.silu(z)) * coda.tanh(z)


@coda.block
def gated_heads(x: T["M D"], a: T["(H d) D"], b: T["(H d) D"], g: T["d"]):
    """A norm of heads reads the heads, times its weight, and their squares."""
    heads = coda.swiglu(x @ a.T, x @ b.T).reshape("M (H d) -> M H d")
    return coda.rms_norm(heads, g, eps=0.5).reshape("M H d -> M (H d)")


@pytest.mark.parametrize("block", [functions_of_one_value, gated_heads], ids=lambda b: b.__name__)
def test_functions_of_one_value_are_computed_where_they_are_read(block):
    sizes = {s: SIZES[s] for s in block.graph.symbols}
    program = lower(block.graph, sizes)
    gemm, _ = program.kernels
    assert [k.kind.name for k in program.kernels] == ["gemm", "rows"]
    assert len(gemm.stored) == 1
    torch.manual_seed(0)
    inputs = block.graph.inputs
    given = [torch.randn([d.size(sizes) for d in i.shape]).to(i.dtype.torch) for i in inputs]
    (exact,) = evaluate(block.graph.roots, dict(zip(inputs, given, strict=True)), sizes)
    (found,) = run_reference(program, given, exact=True)
    torch.testing.assert_close(found.double(), exact.double())


@coda.block
def also_returned(x: T["M D"], w: T["D D"]):
    z = x @ w.T
    y = coda.silu(z)
    return coda.softmax(y), y


def test_what_is_returned_is_loaded_and_nothing_else_is_stored_for_it():
    gemm, rows = lower(also_returned.graph, {"M": 6, "D": 64}).kernels
    assert len(gemm.stored) == 1
    assert rows.kind.whole_rows


@coda.block
def many_addends(
    x: T["M D"], w: T["D D"], a: T["M D"], b: T["M D"], c: T["M D"], d: T["M D"],
    e: T["M D"], f: T["M D"], g: T["M D"], h: T["M D"],
):  # fmt: skip
    z = x @ w.T + a + b + c + d + e + f + g + h
    return coda.softmax(coda.silu(z)) * coda.tanh(z)


@pytest.mark.parametrize(("arch", "stored"), [("sm_90a", 2), ("sm_100a", 1)])
def test_an_epilogue_that_fills_the_registers_keeps_its_stores(arch, stored):
    """Nine values and the accumulator do not fit, unless the accumulator is in tensor memory."""
    gemm, _ = lower(many_addends.graph, {"M": 6, "D": 64}, arch).kernels
    assert len(gemm.body.epilogue.tiles) == 8
    assert len(gemm.stored) == stored
