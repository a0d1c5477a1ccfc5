"""Sums over the tokens of each sequence: pooling, response norms, gradients of modulations."""

import pytest
import torch

import coda
from coda.ir.evaluate import evaluate
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.compiler import lower
from coda.lowering.program.cost import hbm_bytes
from coda.measure import measure_gradients, random_inputs
from coda.runtime.launcher import run_kernels
from coda.runtime.reference import run_reference
from coda.runtime.simulate import device
from tests.kernels.test_kernels import hold, hold_against_float64
from tests.lowering.paper_blocks import PAPER, grn

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


MANY = {"B": 600, "S": 11}  # four CTAs for each multiprocessor


@coda.block
def energies(x: T["B S D"], y: T["B S D"]):
    return coda.sum((x * x).cast(coda.f32), axis=1), coda.sum((x * y).cast(coda.f32), axis=1)


@pytest.mark.parametrize("block", [pooled, response, energies])
@pytest.mark.parametrize("tokens", [1, 11])
def test_many_sequences_are_summed_by_a_cta_for_each(block, tokens):
    """Where it leaves no kernel that folds: a mean over the tokens is a multiple of a sum."""
    sizes = sizes_of(block, **MANY | {"S": tokens})
    program = lower(block.graph, sizes)
    sums = [s for k in program.kernels for s in k.body.epilogue.row_sums]
    assert {s.whole for s in sums} == {block is not pooled}
    assert all((program.buffers[s.buffer].kind == "partial") == (not s.whole) for s in sums)
    assert any(k.body.epilogue.partials for k in program.kernels) == (block is pooled)
    inputs = [x.double() for x in random_inputs(block.graph, sizes)]
    inputs[0][1, 0, 3] = torch.nan  # it reaches no other sequence
    known = dict(zip(block.graph.inputs, inputs, strict=True))
    exact = evaluate(block.graph.roots, known, sizes)
    for a, b in zip(run_reference(program, inputs, exact=True), exact, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_a_response_norm_reads_what_it_scales_twice(arch):
    """Once for the sums over the tokens, once to scale; the sums are written once, not folded."""
    sizes = PAPER[grn]
    program = lower(grn.graph, sizes, arch)
    assert len(program.kernels) == 6
    tokens = sizes["B"] * sizes["S"]
    x, h, sums = 2 * tokens * sizes["D"], 2 * tokens * sizes["F"], 4 * sizes["B"] * sizes["F"]
    weights = 2 * 2 * sizes["D"] * sizes["F"]
    assert hbm_bytes(program) <= 1.001 * (4 * x + 5 * h + 3 * sums + weights)


def test_few_sequences_are_summed_by_blocks():
    program = lower(response.graph, sizes_of(response, S=4096))
    assert not any(s.whole for k in program.kernels for s in k.body.epilogue.row_sums)


@coda.block
def some_modulated(x: T["B S D"], c: T["B D"], wm: T["4*D D"], bm: T["4*D"], w: T["D D"]):
    """Some parts of a modulation with a bias: its gradient sums sums of sequences."""
    scale, _, gate, _ = coda.split(coda.silu(c) @ wm.T + bm, 4)
    return x + gate[:, None, :] * ((coda.rms_norm(x) * (1 + scale[:, None, :])) @ w.T)


def test_the_gradient_of_parts_of_a_modulation_is_joined_of_its_parts():
    sizes = {"B": 3, "S": 75, "D": 48}
    _, backward = some_modulated.lower_training("sm_90a", sizes)
    assert not any(k.kind is TORCH for k in backward.kernels)
    inputs = random_inputs(some_modulated.graph, sizes)
    hold(measure_gradients(some_modulated, some_modulated.graph, inputs, "reference", dims=sizes))


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
@pytest.mark.parametrize("columns", [24, 264])
def test_kernels_of_whole_sequences(arch, columns):
    """Two sums in one kernel; the last lanes of the last CTA of a sequence have no columns."""
    program = energies.lower(arch, {**MANY, "D": columns})
    assert len(program.kernels) == 1
    with device(arch, checks="raise"):
        for few in ({"B": 3, "S": 1}, {"B": 2, "S": 21}):  # it serves any number of rows
            sizes = {**few, "D": columns}
            x, y = random_inputs(energies.graph, sizes)
            found = run_kernels(program, [x, y], sizes)
            x, y = x.double(), y.double()
            for a, b in zip(found, ((x * x).sum(1), (x * y).sum(1)), strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("block", [pooled, response, modulated])
def test_kernels_and_gradients_of_sums_of_sequences(block, arch):
    sizes = sizes_of(block)
    inputs = random_inputs(block.graph, sizes)
    with device(arch, checks="raise"):
        hold_against_float64(block, inputs, sizes)
        hold(measure_gradients(block, block.graph, inputs, "sim", dims=sizes), spread=1.0)
