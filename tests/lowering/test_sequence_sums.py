"""Sums over the tokens of each sequence: pooling, response norms, gradients of modulations."""

import pytest
import torch

import coda
from coda.ir.evaluate import evaluate
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.compiler import lower
from coda.measure import measure_gradients, random_inputs
from coda.runtime.reference import run_reference
from coda.runtime.simulate import device
from tests.kernels.test_kernels import hold, hold_against_float64

SIZES = {"B": 3, "S": 75, "D": 24, "F": 40}
T = coda.Tensor


@coda.block
def pooled(x: T["B S D"], g: T["D"], w: T["F D"]):
    """The mean of the tokens, of what the kernel computes, and a sum of all of them."""
    h = coda.rms_norm(x, g)
    return (h @ w.T), coda.mean(coda.silu(x), axis=1)


@coda.block
def response(x: T["B S D"], w: T["F D"], gain: T["F"]):
    """The global response norm of ConvNeXt V2."""
    h = coda.gelu(x @ w.T)
    norm = coda.sqrt(coda.sum(h * h, axis=1, keepdims=True) + 1e-12)
    return h + gain * (h * (norm / (coda.mean(norm, keepdims=True) + 1e-6)))


@coda.block
def modulated(x: T["B S D"], c: T["B D"], w: T["F D"], b: T["F"]):
    return coda.rms_norm(x) * (1.0 + coda.tanh(c)[:, None, :]) @ w.T + b


def sizes_of(block, **more):
    return {s: {**SIZES, **more}[s] for s in block.graph.symbols}


@pytest.mark.parametrize("block", [pooled, response])
@pytest.mark.parametrize("tokens", [1, 75])
def test_they_are_sums_of_blocks_of_one_sequence(block, tokens):
    sizes = sizes_of(block, S=tokens)
    program = lower(block.graph, sizes)
    assert not any(k.kind is TORCH for k in program.kernels)
    sums = [s for k in program.kernels for s in k.body.epilogue.row_sums]
    assert [str(s.within) for s in sums] == ["S"]
    inputs = [x.double() for x in random_inputs(block.graph, sizes)]
    inputs[0][1, 0, 3] = torch.nan  # it reaches no other sequence
    known = dict(zip(block.graph.inputs, inputs, strict=True))
    exact = evaluate(block.graph.roots, known, sizes)
    for a, b in zip(run_reference(program, inputs, exact=True), exact, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-9, atol=1e-11, equal_nan=True)


def test_the_gradient_of_what_a_sequence_shares_is_a_sum_in_the_kernel_of_its_product():
    _, backward = modulated.lower_training("sm_90a", sizes_of(modulated))
    assert not any(k.kind is TORCH for k in backward.kernels)


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow)])
def test_kernels_of_sums_of_sequences(arch):
    @coda.block
    def energy(x: T["B S D"]):
        return coda.sum(x * x, axis=1)

    inputs = random_inputs(energy.graph, {"B": 3, "S": 75, "D": 24})
    with device(arch, checks="raise"):
        found = energy(*inputs, backend="sim", arch=arch)
    torch.testing.assert_close(found, (inputs[0].float() ** 2).sum(1).bfloat16(), rtol=8e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("block", [pooled, response, modulated])
def test_kernels_and_gradients_of_sums_of_sequences(block, arch):
    sizes = sizes_of(block)
    inputs = random_inputs(block.graph, sizes)
    with device(arch, checks="raise"):
        hold_against_float64(block, inputs, sizes)
        hold(measure_gradients(block, block.graph, inputs, "sim", dims=sizes), spread=1.0)
