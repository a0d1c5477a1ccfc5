"""Batched contractions in generated kernels, from their PTX: how their operands are read."""

import pytest
import torch

import coda
from coda.kernels.gemm.kind import GEMM
from coda.measure import measure_gradients, random_inputs
from coda.runtime.simulate import device
from tests.kernels.test_kernels import ARCHS, hold, hold_against_float64

T = coda.Tensor


@coda.block
def heads(q: T["B S 4 16"], k: T["B S 4 16"], c: T["B 4 S S"], r: T["B 4 S 1"]):
    return coda.tanh(coda.einsum("b i h d, b j h d -> b h i j", q, k) * r) + c


@coda.block
def values(p: T["B 3 S S"], v: T["B S 3 24"]):
    return coda.einsum("b h i j, b j h d -> b h i d", p, v) * 0.5


@coda.block
def shared_left(x: T["1 M D"], w: T["5 N D"]):
    return coda.silu(x @ w.mT)


@coda.block
def shared_by_batches(x: T["B 2 M D"], w: T["2 N D"], r: T["B 2 M 1"]):
    return (x @ w.mT) * r


@coda.block
def shared_by_heads(x: T["B 2 M D"], w: T["B 1 N D"], g: T["N"]):
    return (x @ w.mT) * g


@coda.block
def softmax(x: T["L M D"], w: T["L N D"]):
    return coda.softmax(x @ w.mT)


@coda.block
def summed(x: T["L M D"], w: T["L D N"]):
    y = coda.exp(x @ w * 0.1)
    return y, coda.sum(coda.sum(y, 1), 0)


@coda.block
def over_rows(x: T["L M D"], y: T["L M N"]):
    return coda.einsum("l m d, l m n -> l d n", x, y)


@coda.block
def normed_groups(x: T["L M D"], w: T["L 128 D"]):
    y = (x @ w.mT).reshape("L M 128 -> L M 2 64")
    return coda.rms_norm(y, eps=1e-5).reshape("L M 2 64 -> L M 128")


@coda.block
def picked(x: T["L M D"], w: T["L N D"], i: T["L M", coda.i64]):
    return coda.cross_entropy(x @ w.mT, i, reduction="none")


@coda.block
def into_tokens(p: T["B 3 S S"], v: T["B S 3 24"], w: T["D 72"]):
    y = coda.einsum("b h i j, b j h d -> b i h d", p, v) * 0.5
    return y.reshape("B S 3 24 -> B S 72") @ w.T


@coda.block
def in_two_orders(p: T["B 3 S S"], v: T["B S 3 24"], c: T["B 3 S 24"]):
    y = coda.einsum("b h i j, b j h d -> b h i d", p, v) * 0.5 + c
    return y, coda.einsum("b h i d -> b i h d", coda.tanh(y))


@coda.block
def attention(q: T["B S 4 32"], k: T["B S 4 32"], v: T["B S 4 32"]):
    e = coda.exp(coda.einsum("b i h d, b j h d -> b h i j", q, k) * 0.125)
    p = e / coda.sum(e, keepdims=True)
    return coda.einsum("b h i j, b j h d -> b i h d", p, v)


@coda.block
def masks(
    q: T["B S 3 16"],
    k: T["B S 3 16"],
    c: T["S S"],
    h: T["3 S S"],
    m: T["B 1 S S"],
):
    s = coda.einsum("b i h d, b j h d -> b h i j", q, k)
    return coda.tanh(s * 0.25 + c) + h * m


CASES = {
    "masks": (masks, {"B": 2, "S": 72}),
    "attention": (attention, {"B": 2, "S": 67}),
    "heads": (heads, {"B": 2, "S": 72}),
    "heads of one batch": (heads, {"B": 1, "S": 136}),
    "values": (values, {"B": 2, "S": 72}),
    "into tokens": (into_tokens, {"B": 2, "S": 72, "D": 40}),
    "in two orders": (in_two_orders, {"B": 2, "S": 72}),
    "shared left": (shared_left, {"M": 70, "D": 40, "N": 24}),
    "shared by batches": (shared_by_batches, {"B": 3, "M": 67, "D": 48, "N": 40}),
    "shared by heads": (shared_by_heads, {"B": 3, "M": 67, "D": 48, "N": 40}),
    "softmax": (softmax, {"L": 3, "M": 67, "D": 40, "N": 136}),
    "sums": (summed, {"L": 3, "M": 67, "D": 40, "N": 24}),
    "picked": (picked, {"L": 3, "M": 67, "D": 40, "N": 136}),
    "groups": (normed_groups, {"L": 3, "M": 67, "D": 40}),
    "over rows": (over_rows, {"L": 3, "M": 67, "D": 40, "N": 24}),
    "one row": (softmax, {"L": 5, "M": 1, "D": 8, "N": 8}),
    "one matrix": (softmax, {"L": 1, "M": 131, "D": 200, "N": 72}),
    "no matrix": (softmax, {"L": 0, "M": 67, "D": 40, "N": 136}),
    "no row": (softmax, {"L": 3, "M": 0, "D": 40, "N": 136}),
}


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        pytest.param(n, a, marks=[] if (n, a) == ("heads", "sm_90a") else pytest.mark.slow)
        for n in CASES
        for a in ARCHS
    ],
)
def test_batches_are_no_further_from_float64_than_torch(name, arch):
    block, sizes = CASES[name]
    inputs = random_inputs(block.graph, sizes)
    assert GEMM in {k.kind for k in block.lower(arch, sizes).kernels}
    with device(arch, checks="raise") as gpu:
        if 0 in sizes.values():
            y = block(*inputs, backend="sim")
            assert y.shape == (sizes["L"], sizes["M"], sizes["N"])
        else:
            hold_against_float64(block, inputs, sizes)
        assert not gpu.report().findings


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["attention", "heads", "shared by batches", "softmax"])
def test_gradients(name, arch):
    block, sizes = CASES[name]
    inputs = random_inputs(block.graph, sizes)
    with device(arch, checks="raise") as gpu:
        hold(measure_gradients(block, block.graph, inputs, "sim", dims=sizes), spread=1.0)
        assert not gpu.report().findings


def strided(x, kind):
    """A tensor equal to x with other strides, or at another address."""
    match kind:
        case "transposed":
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        case "sliced":
            return torch.cat([x, x], -1)[..., : x.shape[-1]]
        case "misaligned":
            return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
        case "expanded":
            return x[:1].expand_as(x)
    return x.flip(0).contiguous().flip(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transposed", "sliced", "misaligned", "expanded", "flipped"])
def test_arguments_of_any_strides(kind):
    sizes = {"L": 3, "M": 67, "D": 40, "N": 136}
    x, w = (strided(t, kind) for t in random_inputs(softmax.graph, sizes))
    with device("sm_90a", checks="raise"):
        for _ in range(2):  # the second call replays the first
            y = softmax(x, w, backend="sim")
            expected = torch.softmax(x.double() @ w.double().mT, -1)
            assert (y - expected).norm() < 0.01 * expected.norm()
