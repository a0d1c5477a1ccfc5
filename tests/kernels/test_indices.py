"""Indices that are none: in the padding of the last tile, negative, beyond 32 bits; and -inf."""

import pytest
import torch

import coda
from coda.errors import CallError
from coda.runtime.simulate import device
from tests.kernels.edges import differ, run
from tests.kernels.test_kernels import ARCHS

T = coda.Tensor
CLASSES = 50
TARGETS = [0, 49, 50, 51, 63, 64, 100, 127, 128, 255, 256, -1, -100, 7, 8, 9, 2**31 - 1, -(2**31)]
LONG = [2**31, 2**32 + 5, 2**32, -(2**32) + 3, 2**63 - 1, -(2**63), 2**62 + 49]


def targets(dtype):
    return torch.tensor(TARGETS + (LONG if dtype == torch.int64 else []), dtype=dtype)


@coda.block
def losses(x: T["M D"], w: T["V D"], t: T["M", coda.i64]):
    logits = (x @ w.T).cast(coda.f32)
    return {
        "loss": coda.cross_entropy(logits, t, reduction="none"),
        "picked": coda.pick(logits, t),
    }


@coda.block
def losses_of_short(x: T["M D"], w: T["V D"], t: T["M", coda.i32]):
    logits = (x @ w.T).cast(coda.f32)
    return {
        "loss": coda.cross_entropy(logits, t, ignore_index=51, reduction="none"),
        "picked": coda.pick(logits, t),
        "nll": coda.nll_loss(coda.log_softmax(logits), t, ignore_index=7, reduction="none"),
    }


def factors(rows):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 16, generator=g).bfloat16() for n in (rows, CLASSES))
    return x, w


def hold(block, inputs, arch):
    found, reference, _ = run(block, inputs, arch)
    for name, y in found.items():
        wrong = differ(y, reference[name], 0.02).reshape(len(y))
        assert not wrong.any(), (name, inputs[2][wrong], y[wrong], reference[name][wrong])
    return found


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow)])
def test_a_target_that_is_no_class_gives_nan(arch):
    t = targets(torch.int64)
    found = hold(losses, (*factors(len(t)), t), arch)
    outside = (t < 0) | (t >= CLASSES)
    assert found["picked"][:, 0].isnan().tolist() == outside.tolist()
    assert found["loss"].isnan().tolist() == (outside & (t != -100)).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_a_target_of_32_bits(arch):
    t = targets(torch.int32)
    hold(losses_of_short, (*factors(len(t)), t), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_a_logit_of_minus_infinity_is_picked(arch):
    """As a class that is masked out is: its loss is infinite, and not NaN."""

    @coda.block
    def masked(x: T["M D"], w: T["V D"], b: T["V", coda.f32], t: T["M", coda.i64]):
        logits = (x @ w.T).cast(coda.f32) + b
        return {"p": coda.pick(logits, t), "l": coda.cross_entropy(logits, t, reduction="none")}

    x, w = factors(CLASSES)
    b = torch.zeros(CLASSES)
    b[[0, 7, 49]] = torch.tensor([float("-inf"), float("-inf"), float("nan")])
    b[11] = float("-inf")
    found, reference, _ = run(masked, (x, w, b, torch.arange(CLASSES)), arch)
    assert (found["p"] == float("-inf")).sum() == 3
    for name in found:
        assert not differ(found[name], reference[name], 0.02).any(), name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_where_targets_are_no_class(arch):
    """A row without a class has the gradient NaN, one that is ignored 0, in kernels as in torch."""
    t = targets(torch.int64)
    grads = {}
    for backend in ("sim", "reference"):
        x, w = (v.requires_grad_() for v in factors(len(t)))
        with device(arch, checks="raise"):
            loss = losses(x, w, t, backend=backend, arch=arch)["loss"]
            (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        grads[backend] = dx.detach()
    assert not differ(grads["sim"], grads["reference"], 0.02).any()


@coda.block
def rows_of(table: T["V D"], i: T["M", coda.i64]):
    return 2.0 * coda.take(table, i)


@pytest.mark.parametrize("index", [5, -1, 2**32 + 1])
def test_a_row_that_is_not_in_the_table_is_refused(index):
    table, i = torch.randn(5, 16).bfloat16(), torch.tensor([0, 4, index])
    with pytest.raises(CallError, match="rows are taken of a table of 5") as caught:
        rows_of(table, i, backend="reference")
    assert str(index) in caught.value.found
    assert caught.value.where is not None
