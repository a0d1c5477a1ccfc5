"""Hostile values and sizes on the reference backend, held against float64."""

import pytest
import torch

import coda
from coda.ir.evaluate import evaluate
from coda.lowering.compiler import lower
from coda.measure import random_inputs, relative
from coda.runtime.reference import run_reference


@coda.block
def normed(
    x: coda.Tensor["M D", coda.f32],
    w: coda.Tensor["D D", coda.f32],
    g: coda.Tensor["D", coda.f32],
    b: coda.Tensor["D", coda.f32],
    w2: coda.Tensor["F D", coda.f32],
):
    y = x + x @ w.T
    return {"y": y, "z": coda.layer_norm(y, g, b) @ w2.T}


@coda.block
def softmaxed(x: coda.Tensor["M D", coda.f32], w: coda.Tensor["F D", coda.f32]):
    logits = x @ w.T
    return {"p": coda.softmax(logits), "lse": coda.logsumexp(logits)}


@coda.block
def rms(x: coda.Tensor["M D"], g: coda.Tensor["D"], w: coda.Tensor["F D"], v: coda.Tensor["D F"]):
    return x + coda.silu(coda.rms_norm(x, g) @ w.T) @ v.T


def both(block, inputs, sizes):
    program = lower(block.graph, sizes)
    exact = evaluate(block.graph.roots, dict(zip(block.graph.inputs, inputs, strict=True)), sizes)
    plain = evaluate(
        block.graph.roots, dict(zip(block.graph.inputs, inputs, strict=True)), sizes, None
    )
    return run_reference(program, inputs), exact, plain


@coda.block
def normed16(
    x: coda.Tensor["M D"],
    w: coda.Tensor["D D"],
    g: coda.Tensor["D"],
    b: coda.Tensor["D"],
    w2: coda.Tensor["F D"],
):
    y = x + x @ w.T
    return {"y": y, "z": coda.layer_norm(y, g, b) @ w2.T}


@pytest.mark.parametrize(
    ("block", "mean"),
    # bf16 cannot hold 1e4 + 1: at 1e3 it still has a quarter of the deviation.
    [(normed, 1e4), (normed, -1e4), (normed16, 1e3), (normed16, -1e3)],
)
def test_a_mean_far_larger_than_the_deviation(block, mean):
    sizes = {"M": 33, "D": 96, "F": 40}
    inputs = random_inputs(block.graph, sizes)
    inputs[0] = (inputs[0].double() + mean).to(inputs[0].dtype)
    inputs[1] *= 0.0
    found, exact, plain = both(block, inputs, sizes)
    for a, e, p in zip(found, exact, plain, strict=True):
        assert relative(a, e) <= relative(p, e) * 1.05 + 1e-7


def test_rows_of_zeros_and_rows_without_deviation():
    sizes = {"M": 4, "D": 16, "F": 8}
    inputs = random_inputs(normed.graph, sizes)
    inputs[0][0] = 0.0
    inputs[0][1] = 3.0
    inputs[1] *= 0.0
    found, exact, _ = both(normed, inputs, sizes)
    for a, e in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def test_masks_of_minus_infinity_and_large_logits():
    sizes = {"M": 3, "D": 4, "F": 5}
    x = torch.eye(3, 4) * torch.tensor([1.0, 1e4, 1.0])[:, None]
    w = torch.randn(5, 4)
    w[2, 0] = float("-inf")
    inputs = [x, torch.where(w.isinf(), w, w)]
    inputs[0][:, 0] = torch.tensor([1.0, 1.0, 1.0])
    found, exact, _ = both(softmaxed, inputs, sizes)
    for a, e in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)
    assert (found[0][:, 2] == 0).all()


def test_nan_goes_where_torch_lets_it_go():
    sizes = {"M": 4, "D": 16, "F": 8}
    inputs = random_inputs(rms.graph, sizes)
    inputs[0][2, 5] = float("nan")
    found, _, plain = both(rms, inputs, sizes)
    assert torch.equal(found[0].isnan(), plain[0].isnan())
    assert found[0].isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("m", [0, 1, 2, 127, 129, 1009])
@pytest.mark.parametrize("f", [7, 97])
def test_ragged_and_prime_sizes(m, f):
    sizes = {"M": m, "D": 24, "F": f}
    inputs = random_inputs(rms.graph, sizes)
    found, exact, plain = both(rms, inputs, sizes)
    assert found[0].shape == (m, 24)
    assert relative(found[0], exact[0]) <= relative(plain[0], exact[0]) * 1.05 + 1e-9


@coda.block
def distributions(x: coda.Tensor["M D", coda.f32], w: coda.Tensor["F D", coda.f32]):
    y = x @ w.T
    return coda.softmax(x), coda.log_softmax(x), coda.softmax(y), coda.log_softmax(y)


@pytest.mark.parametrize("offset", [0.0, 300.0, -1e4])
def test_float32_logits_far_from_zero(offset):
    """What all logits of a row have in common does not cost a distribution its bits."""
    sizes = {"M": 9, "D": 64, "F": 48}
    x, w = random_inputs(distributions.graph, sizes)
    found, exact, plain = both(distributions, [x + offset, w], sizes)
    for a, e, p in zip(found, exact, plain, strict=True):
        assert relative(a, e) <= 1.5 * relative(p, e) + 1e-7


@coda.block
def narrow(x: coda.Tensor["M D"], g: coda.Tensor["D"], b: coda.Tensor["D"], w: coda.Tensor["F D"]):
    y = coda.layer_norm(x, g, b)
    return y, coda.rms_norm(x, g) @ w.T, x + coda.rms_norm(x @ w.T[:, :1], g)


@pytest.mark.parametrize("m", [1, 3])
def test_one_column(m):
    """A vector of one element is one number for all rows, not one for each."""
    sizes = {"M": m, "D": 1, "F": 7}
    inputs = random_inputs(narrow.graph, sizes)
    found, exact, _ = both(narrow, inputs, sizes)
    for a, e in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-2, atol=2e-2)


@coda.block
def projected(
    x: coda.Tensor["M D"],
    g: coda.Tensor["D"],
    c: coda.Tensor["D"],
    w: coda.Tensor["F D"],
    b: coda.Tensor["F"],
):
    return coda.linear(coda.layer_norm(x, g, c), w, b)


@pytest.mark.parametrize("far", ["mean", "bias of the norm", "bias of the projection"])
def test_a_layer_norms_gradients_are_as_close_as_torchs_with_100_deviations(far):
    """What a mean adds to a weight's gradient is subtracted as it was added, in bf16 too."""
    m, d, f = 256, 128, 192
    generator = torch.Generator().manual_seed(0)
    x, g, c, w, b, dy = (
        torch.randn(s, generator=generator) for s in ((m, d), d, d, (f, d), f, (m, f))
    )
    x, c, b = (
        v + 100 * (far == name)
        for v, name in zip(
            (x, c, b), ("mean", "bias of the norm", "bias of the projection"), strict=True
        )
    )
    args = [v.bfloat16() for v in (x, 1 + g / 10, c, w / d**0.5, b)]

    def run(how, kind):
        given = [v.to(kind).requires_grad_() for v in args]
        return torch.autograd.grad(how(*given), given, dy.bfloat16().to(kind))

    def eager(x, g, c, w, b):
        normed = torch.nn.functional.layer_norm(x, (d,), g, c)
        return torch.nn.functional.linear(normed, w, b)

    exact, plain = run(eager, torch.float64), run(eager, torch.bfloat16)
    found = run(lambda *a: projected(*a, backend="reference", arch="sm_90a"), torch.bfloat16)
    for mine, theirs, true in zip(found, plain, exact, strict=True):
        ours, torchs = ((v.double() - true).norm() / true.norm() for v in (mine, theirs))
        assert ours <= 1.1 * torchs + 1e-4


@coda.block
def weighed(x: coda.Tensor["M D"], w: coda.Tensor["F D"], v: coda.Tensor["F D"]):
    p = coda.softmax(x @ w.T)
    return p, p @ v


@coda.block
def normed_after(x: coda.Tensor["M D"], w: coda.Tensor["F D"], g: coda.Tensor["F"]):
    return coda.layer_norm(x @ w.T, g, 0 * g) @ w


@pytest.mark.parametrize("logits", [1, 10, 1000])
def test_a_softmaxs_derivative_of_saturated_logits_is_as_close_as_torchs(logits):
    """Where P is 0 or 1 nothing is left of dP - sum P dP, in bf16 too."""
    m, d, f = 64, 32, 48
    generator = torch.Generator().manual_seed(0)
    shapes = ((f, d), (f, d), (m, f), (m, d))
    w, v, dp, dy = (torch.randn(s, generator=generator) for s in shapes)
    x = logits / d * w[torch.arange(m) % f]  # one product of a row is far larger than the others
    args = [t.bfloat16() for t in (x, w, v)]

    def run(how, kind):
        given = [t.to(kind).requires_grad_() for t in args]
        return torch.autograd.grad(how(*given), given, [t.bfloat16().to(kind) for t in (dp, dy)])

    def eager(x, w, v):
        p = torch.softmax(x @ w.T, -1)
        return p, p @ v

    exact, plain = run(eager, torch.float64), run(eager, torch.bfloat16)
    found = run(lambda *a: weighed(*a, backend="reference", arch="sm_90a"), torch.bfloat16)
    for mine, theirs, true in zip(found, plain, exact, strict=True):
        ours, torchs = ((t.double() - true).norm() for t in (mine, theirs))
        assert ours <= 1.1 * torchs + 1e-4 * true.norm()


def test_a_norm_of_equal_values_that_a_product_gives_is_zero():
    m, d, f = 5, 32, 48
    generator = torch.Generator().manual_seed(0)
    x, w = 10 * torch.randn(m, d, generator=generator), torch.randn(1, d, generator=generator)
    args = [t.bfloat16() for t in (x, w.expand(f, d), torch.ones(f))]
    assert (normed_after(*args, backend="reference", arch="sm_90a") == 0).all()
