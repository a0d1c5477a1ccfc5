"""Operands that depend on some of the row axes only: batches that share a table or a vector."""

import pytest
import torch

import coda
from coda.ir.evaluate import evaluate
from coda.kernels.gemm.kind import GEMM
from coda.kernels.tensors import expanded
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.compiler import lower
from coda.lowering.program.cost import operand_bytes
from coda.measure import random_inputs
from coda.runtime.reference import run_reference
from coda.runtime.simulate import device
from tests.kernels.test_kernels import hold_against_float64

SIZES = {"B": 3, "S": 10, "D": 64, "H": 2, "G": 1, "d": 32, "F": 96}
T = coda.Tensor


@coda.block
def rotated(
    x: T["B S D"], g: T["D"], w: T["(H d) D"], v: T["(G d) D"], cos: T["S d/2"], sin: T["S d/2"]
):
    h = coda.rms_norm(x, g)
    q = coda.rope((h @ w.T).reshape("B S (H d) -> B S H d"), cos, sin)
    return {"q": q, "k": coda.rope((h @ v.T).reshape("B S (G d) -> B S G d"), cos, sin)}


@coda.block
def modulated(x: T["B S D"], scale: T["B D"], shift: T["B D"], gate: T["B F"], w: T["F D"]):
    h = coda.layer_norm(x) * (1.0 + scale[:, None, :]) + shift[:, None, :]
    return (h @ w.T) * gate[:, None, :]


@coda.block
def positions(x: T["B S D"], w: T["F D"], table: T["S F"], weight: T["S 1"], head: T["H d"]):
    y = (x @ w.T + table) * weight
    z = (x @ w.T)[..., : head.shape[0] * head.shape[1]].reshape("B S (H d) -> B S H d")
    return {"y": y, "z": z * head}


@coda.block
def gated(x: T["B S D"], c: T["B D"], w: T["F D"], v: T["F D"]):
    """The product over all tokens comes first, then the one of a row for each sequence."""
    y = x @ w.T
    return y * coda.sigmoid(c @ v.T)[:, None, :]


@coda.block
def film(x: T["B S D"], c: T["B 1 D"], v: T["2*D D"], w: T["F D"], gate: T["B 1"]):
    scale, shift = coda.split(c @ v.T, 2)
    h = coda.rms_norm(x) * (1.0 + scale) + shift
    return (h @ w.T) * coda.tanh(gate)[:, None, :]


@coda.block
def row_wise(x: T["B S D"], scale: T["B D"], gate: T["B 1"]):
    return coda.rms_norm(x * scale[:, None, :]) * coda.tanh(gate)[:, None, :]


@pytest.mark.parametrize(
    ("block", "kernels"),
    [(rotated, 2), (modulated, 2), (positions, 2), (gated, 2), (film, 4)],
)
def test_they_are_repeated_over_the_other_rows(block, kernels):
    sizes = {s: SIZES[s] for s in block.graph.symbols}
    sizes |= {"F": 64} if block is positions else {}
    program = lower(block.graph, sizes)
    assert not any(k.kind is TORCH for k in program.kernels)
    assert len(program.kernels) <= kernels
    inputs = [x.double() for x in random_inputs(block.graph, sizes)]
    known = dict(zip(block.graph.inputs, inputs, strict=True))
    found = run_reference(program, inputs, exact=True)
    for a, b in zip(found, evaluate(block.graph.roots, known, sizes), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_what_is_repeated_is_counted():
    sizes = {s: SIZES[s] for s in modulated.graph.symbols}
    program = lower(modulated.graph, sizes)
    gemm = next(k for k in program.kernels if k.kind is GEMM)
    (name,) = gemm.body.spread
    assert operand_bytes(gemm, name, program) == 3 * 10 * 96 * 2


def test_a_square_batch_is_not_guessed():
    """[N, N, D]: a vector [N, 1, D] and a table [N, D] differ, though rows and sizes agree."""

    @coda.block
    def square(x: T["N N D"], a: T["N D"], b: T["N D"]):
        return x * a + x * b[:, None, :]

    sizes = {"N": 3, "D": 4}
    inputs = [x.double() for x in random_inputs(square.graph, sizes)]
    known = dict(zip(square.graph.inputs, inputs, strict=True))
    (found,) = run_reference(lower(square.graph, sizes), inputs, exact=True)
    (exact,) = evaluate(square.graph.roots, known, sizes)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [64, 21, 1])
def test_a_row_wise_kernel_reads_them_with_strides_of_0(columns):
    x = torch.arange(3 * 2 * columns).reshape(3, 2 * columns).bfloat16()[:, columns:]
    whole = expanded(x[:, None], (3, 5), 1)
    assert whole.shape == (5, 3, columns)
    assert whole.stride(0) == 0
    assert torch.equal(whole, x[:, None].expand(3, 5, columns).transpose(0, 1))
    sizes = {s: SIZES[s] for s in modulated.graph.symbols}
    program = lower(modulated.graph, sizes)
    norm = program.kernels[0]
    assert [operand_bytes(norm, name, program) for name in norm.body.spread] == [3 * 64 * 2] * 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(("tokens", "width"), [(47, 64), (150, 136), (5, 21)])
def test_kernels_of_what_a_sequence_shares(arch, tokens, width):
    every = {"B": 3, "S": tokens, "D": width, "F": 96}
    for block in (modulated, film) if width % 8 == 0 else (row_wise,):
        sizes = {s: every[s] for s in block.graph.symbols}
        inputs = random_inputs(block.graph, sizes)
        with device(arch, checks="raise"):
            hold_against_float64(block, inputs, sizes)
