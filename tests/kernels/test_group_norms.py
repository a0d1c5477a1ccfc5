"""Norms of groups of columns that are wider than a GEMM's tile, and LayerNorm of heads.

A row-wise kernel has a statistic for each of a few wide groups. Heads of other widths than parts of
a tile are rows of a kernel, which then computes what follows their statistic too.
"""

import pytest

import coda
from coda.kernels.rowwise.kind import ROWWISE
from coda.measure import measure, measure_gradients, random_inputs
from coda.runtime.simulate import device
from tests.kernels.test_kernels import ARCHS, hold

T = coda.Tensor
SLOW = pytest.mark.slow


def gated(groups):
    @coda.block
    def gated_norm(y: T["M I"], z: T["M I"], gain: T["I"], x: T["M D"], w: T["D I"]):
        """Mamba-2's gated RMSNorm over groups of columns, then the projection."""
        parts = (y * coda.silu(z)).reshape(y.shape[0], groups, y.shape[1] // groups)
        return x + (coda.rms_norm(parts).reshape(*y.shape) * gain) @ w.T

    return gated_norm


@coda.block
def group_norm(x: T["M I"], gain: T["I"], bias: T["I"], w: T["D I"]):
    parts = x.reshape(x.shape[0], 2, x.shape[1] // 2)
    return (coda.layer_norm(parts).reshape(*x.shape) * gain + bias) @ w.T


@coda.block
def heads(x: T["M D"], norm: T["D"], w: T["H*d D"], gain: T["d"], bias: T["d"]):
    q = (coda.rms_norm(x, norm) @ w.T).reshape(x.shape[0], "H", "d")
    return coda.layer_norm(q, gain, bias)


@coda.block
def odd_heads(x: T["M H*d"], gain: T["d"]):
    return coda.rms_norm(x.reshape(x.shape[0], "H", "d"), gain)


CASES = {  # block, sizes, launches forward
    "gated": (gated(3), {"M": 70, "I": 3 * 320, "D": 64}, 2),
    "sixteen": (gated(16), {"M": 9, "I": 16 * 264, "D": 64}, 2),
    "group_norm": (group_norm, {"M": 70, "I": 1024, "D": 64}, 2),
    "heads": (heads, {"M": 70, "D": 64, "H": 4, "d": 64}, 3),
    "odd_heads": (odd_heads, {"M": 35, "H": 3, "d": 96}, 1),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_launches_and_bytes_of_norms_of_groups(name, arch):
    block, sizes, launches = CASES[name]
    program = block.lower(arch, sizes)
    assert len(program.kernels) == launches
    assert all(k.kind.code for k in program.kernels)
    rows = [k for k in program.kernels if k.kind is ROWWISE]
    assert len(rows) == launches - 1 or launches == 1
    forward, backward = block.lower_training(arch, sizes)
    assert all(k.kind.code for p in (forward, backward) for k in p.kernels)


def hostile(block, sizes):
    """Groups of far different sizes, a row of zeros, and a mean far above the deviation."""
    inputs = random_inputs(block.graph, sizes)
    x = inputs[0]
    half = x.shape[1] // 2
    x[1, :half] *= 1000.0
    x[2, half:] *= 0.001
    x[3] = 0.0
    x[4] += 64.0
    return inputs


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_norms_of_groups_are_no_further_from_float64_than_torch(name, arch):
    block, sizes, _ = CASES[name]
    inputs = hostile(block, sizes)
    with device(arch, checks="raise") as gpu:
        hold(measure(block, block.graph, inputs, "sim", dims=sizes))
        assert not gpu.report().findings


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_norms_of_groups_are_no_further_from_float64_than_torch_s(name, arch):
    block, sizes, _ = CASES[name]
    inputs = random_inputs(block.graph, sizes)
    with device(arch, checks="raise") as gpu:
        hold(measure_gradients(block, block.graph, inputs, "sim", dims=sizes), spread=1.0)
        assert not gpu.report().findings
