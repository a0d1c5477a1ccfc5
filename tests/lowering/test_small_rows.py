"""Rows of a few numbers, as mixing matrices of streams: what they become, and that it is right."""

import pytest
import torch

import coda
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.compiler import lower
from coda.lowering.program.cost import hbm_bytes
from coda.measure import measure_gradients, random_inputs
from coda.runtime.launcher import run_kernels
from coda.runtime.simulate import device
from tests.kernels.test_kernels import hold, hold_against_float64
from tests.lowering.paper_blocks import PAPER, hyper_connections
from tests.lowering.test_backward import check
from tests.lowering.test_unusual_blocks import lowered

T = coda.Tensor


def normalised(mix, times):
    """Sinkhorn's iterations."""
    for _ in range(times):
        mix = mix / coda.sum(mix, axis=-1, keepdims=True)
        mix = mix / coda.sum(mix, axis=-2, keepdims=True)
    return mix


@coda.block
def sinkhorn(x: T["M D"], w: T["16 D"]):
    """More operations after each other than a kernel has; one of the numbers is read."""
    mix = normalised(coda.exp(x @ w.T).reshape("M 16 -> M 4 4"), 20)
    return mix, x * mix[:, 0, 1][:, None]


@coda.block
def in_logarithms(x: T["M D"], w: T["9 D"]):
    z = (x @ w.T).reshape("M 9 -> M 3 3")
    z = z - coda.logsumexp(z, axis=-1, keepdims=True)
    z = z - coda.logsumexp(z, axis=-2, keepdims=True)
    return x * z[:, 1, 2][:, None], coda.exp(z)


@coda.block
def every_reduction(x: T["M D"], w: T["12 D"]):
    z = (x @ w.T).reshape("M 12 -> M 4 3")
    a = z / coda.max(coda.abs(z), axis=-2, keepdims=True)
    b = z - coda.mean(z, axis=-1, keepdims=True)
    c = coda.var(z, axis=-2, keepdims=True) * coda.prod(z, axis=-1, keepdims=True)
    return a * b + c * coda.min(z, axis=-1, keepdims=True), coda.sum(a, axis=-2)


@coda.block
def routed(x: T["M 4*D"], w: T["16 4*D"]):
    """Streams that are mixed by a softmax of each row of a small matrix."""
    p = coda.softmax((x @ w.T).reshape("M 16 -> M 4 4"))
    s = coda.split(x, 4)
    return coda.concat([sum(p[:, i, j][:, None] * s[j] for j in range(4)) for i in range(4)])


@coda.block
def summed(x: T["M 4*D"], w: T["12 4*D"], g: T["4 D"]):
    """Streams that are mixed by a sum of products, with a gain of each stream."""
    p = coda.exp(x @ w.T).reshape("M 12 -> M 3 4 1")
    s = x.reshape("M (4 D) -> M 1 4 D") * g
    return coda.sum(p * s, axis=-2), coda.mean(x.reshape("M (4 D) -> M 4 D"), axis=-2)


@coda.block
def multiplied(x: T["M 4*D"], w: T["16 4*D"]):
    """The same as a product of a small matrix for each row, twice."""
    p = coda.softmax((x @ w.T).reshape("M 16 -> M 4 4"))
    s = x.reshape("M (4 D) -> M 4 D")
    return p @ s, p @ coda.silu(s)


MIXED = {summed: 72, multiplied: 72}
BLOCKS = {
    sinkhorn: 8,
    in_logarithms: 8,
    every_reduction: 8,
    routed: 8,
    hyper_connections: 16,
} | MIXED


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_small_reductions_are_kernels_of_their_numbers_alone(block):
    program = lowered(block, {"M": 5, "D": BLOCKS[block]})
    assert not any(k.kind is TORCH for k in program.kernels)
    if block in (routed, multiplied):  # reduced along one axis: the price may say otherwise
        return
    rows = {str(k.mainloop.points(program.sizes)[0]) for k in program.kernels}
    assert rows == {"5"}, "no kernel has a row for each row of a small matrix"


@pytest.mark.parametrize(
    "block",
    [in_logarithms, routed, *MIXED, pytest.param(hyper_connections, marks=pytest.mark.slow)],
)
def test_gradients_of_small_rows(block):
    sizes = {"M": 5, "D": BLOCKS[block]}
    backward = check(block.graph, random_inputs(block.graph, sizes), sizes)
    assert not any(k.kind is TORCH for k in backward.kernels)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_hyper_connections_read_the_streams_three_times(arch):
    """For the statistic, for the GEMM, and by one kernel that makes all that is wide."""
    sizes = PAPER[hyper_connections]
    program = lower(hyper_connections.graph, sizes, arch)
    assert [k.kind.name for k in program.kernels] == ["rows", "gemm", "rows", "rows"]
    streams, y = 4 * (one := 2 * sizes["M"] * sizes["D"]), one
    assert hbm_bytes(program) <= 1.01 * (3 * streams + y + streams + one)
    forward, backward = hyper_connections.lower_training(arch, sizes)
    assert len(forward.kernels) == 4
    assert hbm_bytes(forward) <= 1.002 * hbm_bytes(program)
    assert len(backward.kernels) <= 13
    assert not any(k.kind is TORCH for k in backward.kernels)


@pytest.mark.slow
def test_columns_of_a_matrix_are_read_where_they_are(monkeypatch):
    """No operation of torch's copies the numbers of a row apart before a kernel reads them."""
    copied, contiguous = [], torch.Tensor.contiguous

    def copy(x):
        if not x.is_contiguous():
            copied.append(x.shape)
        return contiguous(x)

    sizes = {"M": 37, "D": 64}
    program = hyper_connections.lower("sm_90a", sizes)
    inputs = random_inputs(hyper_connections.graph, sizes)
    with device("sm_90a", checks="raise"):
        monkeypatch.setattr(torch.Tensor, "contiguous", copy)
        run_kernels(program, inputs, sizes)
    assert not copied


@pytest.mark.parametrize("block", MIXED, ids=lambda block: block.__name__)
def test_sums_over_a_small_axis_are_spelled_out(block):
    """One kernel reads each stream once; nothing is as large as the products that are summed."""
    sizes = {"M": 8192, "D": 2048}
    program = lower(block.graph, sizes)
    assert [k.kind.name for k in program.kernels][:2] == ["gemm", "rows"]
    assert len(program.kernels) == 2 + (block is multiplied)
    x = 2 * 4 * sizes["M"] * sizes["D"]
    written = sum(n.nbytes(sizes) for n in program.graph.roots)
    assert hbm_bytes(program) <= 1.01 * (2 * x + written)
    _, backward = block.lower_training("sm_90a", sizes)
    assert not any(k.kind is TORCH for k in backward.kernels)


def test_a_product_with_a_column_is_no_part_of_a_narrow_gemm():
    """It would be written by a GEMM of 8 columns, once for each column of the other factor."""

    @coda.block
    def scaled(x: T["M D"], w: T["8 D"]):
        p = coda.sigmoid(x @ w.T)
        return p[:, 0:1] * x, p[:, 1:2] * x + p[:, 2:3]

    program = lowered(scaled, {"M": 5, "D": 64})
    assert [k.kind.name for k in program.kernels] == ["gemm", "rows"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_kernels_of_small_rows(block, arch):
    sizes = {"M": 37, "D": 4 * BLOCKS[block]}
    inputs = random_inputs(block.graph, sizes)
    with device(arch, checks="raise"):
        hold_against_float64(block, inputs, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_gradients_by_kernels_of_small_rows(arch):
    sizes = {"M": 37, "D": 64}
    inputs = random_inputs(hyper_connections.graph, sizes)
    with device(arch, checks="raise"):
        found = measure_gradients(
            hyper_connections, hyper_connections.graph, inputs, "sim", dims=sizes
        )
        hold(found, spread=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_a_kernel_of_numbers_apart(arch):
    @coda.block
    def balanced(m: T["M 9"]):
        return normalised(coda.exp(m).reshape("M 9 -> M 3 3"), 1)

    inputs = random_inputs(balanced.graph, {"M": 7})
    with device(arch, checks="raise"):
        found = balanced(*inputs, backend="sim", arch=arch)
    m = inputs[0].float().exp().reshape(7, 3, 3)
    m = m / m.sum(-1, keepdim=True)
    torch.testing.assert_close(found.float(), m / m.sum(-2, keepdim=True), rtol=8e-3, atol=0)
