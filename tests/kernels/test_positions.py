"""Numbers of rows, columns and matrices in generated kernels, from their PTX: masks of iotas."""

import pytest

import coda
from coda.lowering.program.epilogue import positions
from coda.measure import random_inputs
from coda.runtime.simulate import device
from tests.kernels.test_kernels import ARCHS, hold_against_float64

T = coda.Tensor


@coda.block
def causal(q: T["B S 2 16"], k: T["B S 2 16"]):
    s = coda.einsum("b i h d, b j h d -> b h i j", q, k)
    i, j, h = coda.iota(s.shape[2]), coda.iota(s.shape[3]), coda.iota(2, coda.f32)
    near = (j <= i[:, None] + 3) & (i[:, None] - 40 <= j)
    return coda.where(near, s * 0.25, -1e4) + h[:, None, None].cast(coda.bf16)


@coda.block
def chunks(q: T["B S 2 16"], k: T["B S 2 16"]):
    s = coda.einsum("b i h d, b j h d -> b h i j", q, k)
    i, j = coda.arange(s.shape[2])[:, None], coda.arange(s.shape[3])
    near = (j // 24 == i // 24) | ((i * 5 - j) % 7 == 0)
    return coda.where(near, s * 0.25, -1e4)


@coda.block
def causal_of_one(q: T["S D"], k: T["S D"]):
    s = q @ k.T
    i, j = coda.iota(s.shape[0]), coda.iota(s.shape[1])
    return coda.softmax(coda.where(j <= i[:, None], s, float("-inf")))


@coda.block
def rows(x: T["4 6 24"]):
    b, i, j = (coda.iota(n) for n in (*x.shape[:2], 30))
    late = coda.where(i[:, None] < b[:, None, None] + b[:, None, None], x, 0.0)
    return late, coda.sum(coda.where(j[6:] >= 9, x, 0.0), keepdims=True)


@coda.block
def one_hot(x: T["M D"], w: T["V D"], index: T["M", coda.i64]):
    y = x @ w.T
    j = coda.iota(y.shape[1])
    hot = coda.where(index[:, None].cast(coda.f32) == j.cast(coda.f32), 1.0, 0.0)
    return y - hot.cast(coda.bf16), coda.sum(coda.where(j < 20, 1.0, y.cast(coda.f32)))


CASES = {
    "causal": (causal, {"B": 2, "S": 136}),
    "chunks": (chunks, {"B": 2, "S": 136}),
    "causal of one": (causal_of_one, {"S": 72, "D": 40}),
    "rows": (rows, {}),
    "one hot": (one_hot, {"M": 70, "D": 40, "V": 72}),
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_positions(name, arch):
    block, sizes = CASES[name]
    inputs = random_inputs(block.graph, sizes)
    assert any(positions(k.body.epilogue) for k in block.lower(arch, sizes).kernels)
    with device(arch, checks="raise") as gpu:
        hold_against_float64(block, inputs, sizes)
        assert not gpu.report().findings


def test_quotients_of_positions_are_no_memory():
    (kernel,) = chunks.lower("sm_90a", {"B": 2, "S": 136}).kernels
    assert positions(kernel.body.epilogue)
    assert not kernel.body.epilogue.operands
