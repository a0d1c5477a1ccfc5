"""Attention as Programs: forward and backward are float64's, also in rows without keys."""

from dataclasses import replace

import pytest
import torch

import coda
from coda import masks
from coda.ir.dims import product
from coda.ir.graph import Map
from coda.kernels.attention.kind import ATTENTION
from coda.kernels.torch_op.kind import TORCH
from coda.measure import measure_gradients, random_inputs
from coda.runtime.simulate import device
from coda.sim import CHECK_KINDS
from tests.kernels.test_kernels import ARCHS, hold, hold_against_float64
from tests.lowering.test_backward import check

T = coda.Tensor
SIZES = {"B": 2, "G": 2, "R": 2, "H": 4, "S": 72, "T": 40, "d": 16, "N": 8, "D": 64}


@coda.block
def plain(q: T["B (G R) S d"], k: T["B G T d"], v: T["B G T d"]):
    return coda.attention(q, k, v)


@coda.block
def causal(q: T["B (G R) S d"], k: T["B G S d"], v: T["B G S d"]):
    return coda.attention(q, k, v, mask=masks.causal, return_lse=True)


@coda.block
def documents(
    q: T["B (G R) S d"],
    k: T["B G S d"],
    v: T["B G S d"],
    ids: T["B S", coda.i64],
    slopes: T["(G R)", coda.f32],
):
    strictly = masks.every(masks.documents(ids), lambda b, h, i, j: j < i)
    return coda.attention(q, k, v, mask=strictly, score=masks.alibi(slopes))


@coda.block
def buckets(q: T["B H S d"], k: T["B H S d"], v: T["B H S d"], t: T["N H", coda.f32]):
    return coda.attention(q, k, v, score=masks.relative_bias(t, far=20), scale=1.0)


@coda.block
def sinks(q: T["B (G R) S d"], k: T["B G S d"], v: T["B G S d"], s: T["(G R)"]):
    near = masks.every(masks.sliding_window(9), masks.chunked(24))
    return coda.attention(q, k, v, mask=near, sinks=s, score=masks.softcapped(5.0))


@coda.block
def causal_sinks(q: T["B (G R) S d"], k: T["B G S d"], v: T["B G S d"], s: T["(G R)"]):
    return coda.attention(q, k, v, mask=masks.causal, sinks=s, return_lse=True)


@coda.block
def shifted(q: T["B H S d"], k: T["B H T d"], v: T["B H T d"], c: T["B S"]):
    """Weights whose sum is not 1."""
    return coda.exp(q @ k.mT * 0.25 - c[:, None, :, None]) @ v


@coda.block
def sigmoids(q: T["B H S d"], k: T["B H S d"], v: T["B H S d"]):
    return coda.sigmoid_attention(q, k, v, mask=masks.block_diffusion(36, 4))


@coda.block
def layer(
    x: T["B S D"],
    w: T["D", coda.f32],
    w_qkv: T["(3 H d) D"],
    w_o: T["D (H d)"],
    cos: coda.Constant["S d/2", coda.f32],
    sin: coda.Constant["S d/2", coda.f32],
):
    h = coda.rms_norm(x.cast(coda.f32), w).cast(x.dtype)
    heads = (h @ w_qkv.T).reshape("B S (3 H d) -> B S 3 H d")
    q, k, v = (heads[:, :, n] for n in range(3))
    c, s = (t.cast(x.dtype) for t in (cos, sin))
    q, k, v = (t.permute(0, 2, 1, 3) for t in (coda.rope(q, c, s), coda.rope(k, c, s), v))
    y = coda.attention(q, k, v, mask=masks.causal).permute(0, 2, 1, 3)
    return x + y.reshape("B S H d -> B S (H d)") @ w_o.T


BLOCKS = (plain, causal, documents, buckets, sinks, causal_sinks, shifted, sigmoids, layer)
NAMES = [b.__name__ for b in BLOCKS]


def arguments(block):
    sizes = {s: SIZES[s] for s in block.graph.symbols}
    inputs = random_inputs(block.graph, sizes)
    ids = [i for i, node in enumerate(block.graph.inputs) if node.name == "ids"]
    for i in ids:
        inputs[i] = torch.arange(72).expand(2, 72) // torch.tensor([[13], [40]])
    return sizes, inputs


@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_forward_and_backward(block):
    sizes, inputs = arguments(block)
    graph = replace(block.graph, constants=frozenset())  # of which autograd takes gradients, too
    check(graph, [x.double() if x.is_floating_point() else x for x in inputs], sizes)


def test_a_number_of_each_row_is_a_factor():
    """Sinks, or any other number that is subtracted, take no second tensor of scores."""
    for block in (sinks, causal_sinks, shifted):
        sizes, _ = arguments(block)
        program = block.lower("sm_90a", sizes)
        assert program.kernels[0].kind is ATTENTION
        assert {k.kind.name for k in program.kernels} == {"attention", "rows"}
        scores = sizes["B"] * 4 * sizes["S"] * sizes.get("T", sizes["S"])
        assert all(product(b.shape).size(sizes) < scores for b in program.buffers.values())


def test_scores_are_masked_without_torch():
    for block in (plain, causal, sinks, layer):
        sizes, _ = arguments(block)
        assert not any(k.kind is TORCH for k in block.lower("sm_90a", sizes).kernels), block


def test_numbers_of_documents_are_compared_as_they_are():
    """They are i64: attention compares all bits; torch, beside kernels that compute in float32."""

    @coda.block
    def sigmoids(q: T["B H S d"], k: T["B H S d"], v: T["B H S d"], ids: T["B S", coda.i64]):
        return coda.sigmoid_attention(q, k, v, mask=masks.documents(ids))

    (kernel,) = documents.lower("sm_90a", arguments(documents)[0]).kernels
    assert kernel.kind is ATTENTION
    program = sigmoids.lower("sm_90a", {"B": 2, "H": 4, "S": 72, "d": 16})
    by_torch = [n for k in program.kernels if k.kind is TORCH for n in k.nodes]
    assert {n.fn for n in by_torch if isinstance(n, Map)} == {"eq"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_kernels(block, arch):
    """All checks, but for one finding in the derivative, which docs/sim-checks.md argues."""
    sizes, inputs = arguments(block)
    argued = "exited" if arch == "sm_100a" else ""
    with device(arch, checks={k: "off" if k == argued else "raise" for k in CHECK_KINDS}) as gpu:
        hold_against_float64(block, inputs, sizes)
        hold(measure_gradients(block, block.graph, inputs, "sim", dims=sizes), spread=1.0)
        assert not gpu.report().findings
