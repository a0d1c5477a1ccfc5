"""Rows at a distance: token shifts, short causal convolutions, other tokens of a sequence."""

import pytest
import torch

import coda
from coda.ir.evaluate import evaluate
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.compiler import lower
from coda.lowering.program.cost import traffic
from coda.measure import measure_gradients, random_inputs
from coda.runtime.reference import run_reference
from coda.runtime.simulate import device
from tests.kernels.test_kernels import hold, hold_against_float64

HOSTILE = torch.tensor([torch.nan, 1e200, -1e200], dtype=torch.float64)
SIZES = {"B": 3, "S": 11, "D": 24, "F": 40, "H": 5}
T = coda.Tensor


def shifted(x, by):
    return coda.concat([x[:, :by] * 0.0, x[:, :-by]], axis=1)


@coda.block
def convolution(x: T["B S D"], w: T["4 D"]):
    y = x + x * w[3]
    for t in range(1, 4):
        y = y + shifted(x, t) * w[3 - t]
    return y


@coda.block
def gated(x: T["B S D"], w: T["2*F D"], taps: T["3 F"], v: T["D F"]):
    """A short convolution of what a GEMM makes, as in Mamba, then a gate."""
    u, gate = coda.split(x @ w.T, 2)
    c = u * taps[2] + shifted(u, 1) * taps[1] + shifted(u, 2) * taps[0]
    return (coda.silu(c) * coda.silu(gate)) @ v.T


@coda.block
def gated_twice(x: T["B S D"], g: T["D"], w: T["3*D D"], taps: T["2 D"], v: T["D D"]):
    """A short convolution between two gates, as in LFM2: other rows of a product of slices."""
    a, b, c = coda.split(coda.rms_norm(x, g) @ w.T, 3)
    u = a * c
    return x + (b * (u * taps[1] + shifted(u, 1) * taps[0])) @ v.T


@coda.block
def shifted_norm(x: T["B S D"], g: T["D"], mix: T["D"], w: T["F D"]):
    h = coda.rms_norm(x, g)
    return (h + (shifted(h, 1) - h) * mix) @ w.T


@coda.block
def with_state(x: T["B S D"], state: T["B 1 D"], w: T["D"]):
    """The last token of the chunk before is the first one's neighbour."""
    return x + coda.concat([state, x[:, :-1]], axis=1) * w


@coda.block
def rolled(x: T["B S H D"], w: T["H D"]):
    """Heads and tokens are axes of the rows; a distance of S - 1 is known in the call alone."""
    before = coda.concat([x[:, -1:], x[:, :-1]], axis=1)
    return before * w + coda.concat([x[:, :, 1:], x[:, :, :1]], axis=2)


BLOCKS = {
    convolution: 1,
    gated: 3,
    gated_twice: 4,
    shifted_norm: 3,
    with_state: 1,
    rolled: 1,
}


def sizes_of(block, **more):
    return {s: {**SIZES, **more}[s] for s in block.graph.symbols}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("tokens", [4, 11])
def test_they_are_row_wise_kernels(block, tokens):
    sizes = sizes_of(block, S=tokens)
    program = lower(block.graph, sizes)
    assert not any(k.kind is TORCH for k in program.kernels)
    assert len(program.kernels) <= BLOCKS[block]
    inputs = [x.double() for x in random_inputs(block.graph, sizes)]
    inputs[0].view(-1)[[0, 30, -1]] = HOSTILE
    known = dict(zip(block.graph.inputs, inputs, strict=True))
    exact = evaluate(block.graph.roots, known, sizes)
    for a, b in zip(run_reference(program, inputs, exact=True), exact, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-9, atol=1e-11, equal_nan=True)


def test_rows_in_the_cache_are_counted_once():
    program = lower(convolution.graph, sizes_of(convolution))
    (kernel,) = program.kernels
    matrix = 3 * 11 * 24 * 2
    assert [n for name, n in traffic(program, kernel).reads if name == "x"] == [matrix]
    assert not program.overwrites  # another row of what is written over would be read


def test_the_derivative_is_a_shift_in_the_other_direction():
    forward, backward = convolution.lower_training("sm_90a", sizes_of(convolution))
    assert len(forward.kernels) == 1
    assert [k.kind.name for k in backward.kernels] == ["rows", "rows"]  # all, and a fold
    distances = {
        step.by.constant
        for a in backward.kernels[0].body.epilogue.shifted.values()
        for step in a.steps
    }
    assert distances == {-3, -2, -1, 1, 2, 3}


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow)])
def test_kernels_of_shifted_rows(arch):
    sizes = sizes_of(convolution, S=7, D=40)
    inputs = random_inputs(convolution.graph, sizes)
    inputs[0].view(-1)[[3, 500]] = torch.tensor([torch.inf, -3e38]).bfloat16()
    with device(arch, checks="raise") as gpu:
        found = convolution(*inputs, backend="sim", arch=arch)
        moved = gpu.report().launches[0].result.per_allocation
    expected = convolution(*inputs, backend="reference", arch=arch)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    loaded = [m for name, m in moved.items() if "bfloat16" in name]
    assert sum(m.unique_loaded for m in loaded) == inputs[0].nbytes


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("width", [24, 21])
def test_kernels_and_gradients_of_shifted_rows(block, width, arch):
    sizes = sizes_of(block, D=width, F=width + 16)
    inputs = random_inputs(block.graph, sizes)
    with device(arch, checks="raise"):
        hold_against_float64(block, inputs, sizes)
        if width % 8:
            return  # sums of so few elements say little of their errors
        hold(measure_gradients(block, block.graph, inputs, "sim", dims=sizes), spread=1.0)


def test_halves_of_rows_of_two_columns():
    """Half of the rows has as many elements as there are rows: its gradient is still rows."""

    @coda.block
    def halves(x: T["8 2", coda.f32], w: T["2 2", coda.f32]):
        y = x @ w
        return y[:4] * coda.sigmoid(y[4:])

    x, w = (t.requires_grad_() for t in (torch.randn(8, 2), torch.randn(2, 2)))
    y = x @ w
    expected = torch.autograd.grad((y[:4] * torch.sigmoid(y[4:])).sum(), (x, w))
    found = torch.autograd.grad(halves(x, w, backend="reference").sum(), (x, w))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
