"""Gate and up of one weight, in alternating columns or in halves: as good as two weights.

In the backward, neighbouring columns are read and written as one word for each column of the GEMM
that computes the activation's cotangent.
"""

import pytest
import torch

import coda
from coda.lowering.explain import Explanation
from coda.lowering.program.access import Alternating
from coda.measure import measure_gradients, random_inputs
from coda.runtime.simulate import device
from tests.kernels.test_kernels import ARCHS, hold

T = coda.Tensor
SLOW = pytest.mark.slow
LARGE = {"M": 8192, "D": 1024, "F": 4096}
SMALL = {"M": 200, "D": 128, "F": 192}


def clamped(gate, up):
    """gpt-oss' activation."""
    gate, up = coda.minimum(gate, 7.0), coda.maximum(coda.minimum(up, 7.0), -7.0)
    return (up + 1) * (gate * coda.sigmoid(gate * 1.702))


def alternating(y):
    return y[:, 0::2], y[:, 1::2]


def last_axis(y):
    y = y.reshape(y.shape[0], y.shape[1] // 2, 2)
    return y[:, :, 0], y[:, :, 1]


def first_axis(y):
    y = y.reshape(y.shape[0], 2, y.shape[1] // 2)
    return y[:, 0], y[:, 1]


def halves(y):
    return y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]


CUTS = (alternating, last_axis, first_axis, halves)


def mlp(cut, dtype=coda.bf16):
    @coda.block
    def block(
        x: T["M D", dtype],
        norm: T["D", dtype],
        w: T["2*F D", dtype],
        b: T["2*F", dtype],
        w_down: T["D F", dtype],
    ):
        return x + clamped(*cut(coda.rms_norm(x, norm) @ w.T + b)) @ w_down.T

    return block


@coda.block
def apart(
    x: T["M D"], norm: T["D"], g: T["F D"], u: T["F D"], bg: T["F"], bu: T["F"], w_down: T["D F"]
):
    h = coda.rms_norm(x, norm)
    return x + clamped(h @ g.T + bg, h @ u.T + bu) @ w_down.T


def test_one_weight_moves_no_more_bytes_than_two():
    two = apart.lower_training("sm_90a", LARGE)[1]
    for cut in CUTS:
        one = mlp(cut).lower_training("sm_90a", LARGE)[1]
        assert all(k.kind.code for k in one.kernels)
        read = [o.access for k in one.kernels for o in k.body.epilogue.operands]
        assert any(isinstance(a, Alternating) for a in read) == (cut in CUTS[:2])
        moved = [Explanation(p).json()["hbm_bytes"] for p in (one, two)]
        assert moved[0] <= 1.001 * moved[1]


def hostile(block):
    """Pre-activations at and beyond the limits of the clamp."""
    inputs = random_inputs(block.graph, SMALL)
    inputs[3][:8] = torch.tensor([7.0, 7.0, -7.0, -7.0, 30.0, -30.0, -30.0, 30.0])
    inputs[2][:4] = 0.0
    if inputs[0].dtype == torch.bfloat16:  # in f16, torch's derivative of rsqrt(eps) is infinite
        inputs[0][3] = 0.0
    inputs[0][5] *= 8.0
    return inputs


@pytest.mark.parametrize("cut", CUTS[:3:2], ids=lambda c: c.__name__)
def test_gradients_of_alternating_columns_are_those_of_float64(cut):
    block = mlp(cut)
    hold(measure_gradients(block, block.graph, hostile(block), "reference", dims=SMALL), spread=1.0)


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [coda.bf16, coda.f16], ids=str)
def test_kernels_of_alternating_columns_are_no_further_from_float64_than_torch(dtype, arch):
    block = mlp(alternating, dtype)
    with device(arch, checks="raise") as gpu:
        report = measure_gradients(block, block.graph, hostile(block), "sim", dims=SMALL)
        hold(report, spread=1.0)
        assert not gpu.report().findings
