"""Gradients that the backward's own kernels add to `.grad` and `main_grad`."""

import pytest
import torch

import coda
from coda.ir.types import bf16, f32
from coda.lowering.accumulate import accumulating
from coda.lowering.cost import hbm_bytes
from coda.lowering.derive import derive
from coda.lowering.pipeline import lower
from coda.measure import random_inputs, relative
from coda.runtime.simulate import device
from tests.runtime.test_call import SIZES, mlp

T = coda.Tensor
STEPS = 3


def microbatches(inputs, rows=9):
    generator = torch.Generator().manual_seed(3)
    shape = (STEPS, rows, inputs[0].shape[1])
    return torch.randn(shape, generator=generator).to(inputs[0].dtype)


def weights_of(inputs):
    return [x.clone().requires_grad_() for x in inputs[1:]]


def train(weights, xs, accumulate, **options):
    for x in xs:
        loss = mlp(x.clone().requires_grad_(), *weights, **options).float().square().sum()
        if accumulate:
            with coda.accumulate_gradients():
                loss.backward()
        else:
            loss.backward()
    return weights


@pytest.fixture
def inputs():
    return [x.double() for x in random_inputs(mlp.graph, SIZES)]


def test_gradients_are_added_in_place(inputs):
    xs = microbatches(inputs)
    plain, mine = (train(weights_of(inputs), xs, a) for a in (False, True))
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    held = [w.grad for w in mine]
    versions = [g._version for g in held]
    train(mine, xs, True)
    for w, g, version in zip(mine[1:], held[1:], versions[1:], strict=True):
        assert w.grad is g
        assert g._version > version
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a.grad, 2 * b.grad)


def test_sums_in_float32_round_once_each_step(inputs):
    """bf16 weights with float32 `main_grad`: nearer to float64 than sums in bf16."""
    narrow = [x.bfloat16() for x in inputs]
    xs = microbatches(narrow).repeat(32, 1, 1)
    exact = train(weights_of([x.double() for x in narrow]), xs.double(), False)
    rounded = train(weights_of(narrow), xs, True)
    mine = weights_of(narrow)
    for w in mine:
        w.main_grad = torch.zeros(w.shape)
    train(mine, xs, True)
    for w, r, e in zip(mine, rounded, exact, strict=True):
        assert w.grad is None
        assert w.main_grad.dtype == torch.float32
        assert relative(w.main_grad, e.grad) < 0.4 * relative(r.grad, e.grad)


def test_one_weight_in_two_places_and_torch_beside_the_block(inputs):
    x, g, w, _, v = (x.clone().requires_grad_() for x in inputs)

    def loss():
        return mlp(x, g, w, w, v).sum() + (w * w).sum()

    loss().backward()
    theirs = w.grad.clone()
    with coda.accumulate_gradients():
        loss().backward()
    torch.testing.assert_close(w.grad, 2 * theirs)


def test_hooks_see_gradients(inputs):
    mine, seen = weights_of(inputs), []
    mine[1].register_post_accumulate_grad_hook(lambda p: seen.append(p))
    mine[2].register_hook(lambda g: seen.append(g))
    train(mine, microbatches(inputs), True)
    assert len(seen) == 2 * STEPS


def test_outside_nothing_is_added(inputs):
    x, *weights = weights_of([inputs[0], *inputs])
    for w in weights:
        w.grad = torch.ones_like(w)
    torch.autograd.grad(mlp(x, *weights).sum(), weights)
    assert all(bool((w.grad == 1).all()) for w in weights)


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_no_pass_reads_the_gradients_again(dtype):
    """Each sum is read and written once, by the GEMM that makes the gradient."""
    sizes = {"M": 8192, "D": 4096, "F": 14336}
    training = derive(mlp.graph, sizes)
    names = ("w_gate", "w_up", "w_down")
    graph, updates = accumulating(training, dict.fromkeys(names, dtype))
    program, plain = (lower(g, sizes) for g in (graph, training.backward))
    assert [n for n, _ in updates] == [f"d{n}" for n in names]
    matrix = sizes["D"] * sizes["F"]
    added = len(names) * matrix * (2 * dtype.size - bf16.size)
    again = 2 * sizes["M"] * sizes["D"] + 4 * sizes["D"]  # gate and up load x and its gain each
    assert hbm_bytes(program) == hbm_bytes(plain) + added + again
    assert len(program.kernels) == len(plain.kernels) + 1


@coda.block
def linear(x: T["M D"], w: T["F D"]):
    return x @ w.T


def test_a_kernel_adds_in_place():
    x, w = random_inputs(linear.graph, {"M": 40, "D": 64, "F": 72})
    w.requires_grad_()
    w.main_grad = torch.ones(w.shape)
    with device("sm_90a", checks="raise"), coda.accumulate_gradients():
        for _ in range(2):
            linear(x, w, backend="sim").backward(x.new_ones(40, 72))
    theirs = 1 + 2 * x.float().sum(0).expand(w.shape)
    torch.testing.assert_close(w.main_grad, theirs, rtol=1e-6, atol=1e-5)
    assert w.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_kernels_add_in_place(arch):
    inputs = random_inputs(mlp.graph, {"M": 40, "D": 64, "F": 96})
    xs = microbatches(inputs, 40)[:2]
    exact = train(weights_of([x.double() for x in inputs]), xs.double(), False)
    mine = weights_of(inputs)
    mine[3].main_grad = torch.zeros(mine[3].shape)
    with device(arch, checks="raise") as gpu:
        train(mine[:], xs, True, backend="sim")
        held = [w.grad for w in mine[:3]]
        train(mine, xs, True, backend="sim")
        assert not gpu.report().findings
    for w, g in zip(mine[1:3], held[1:], strict=True):
        assert w.grad is g
    sums = [*(w.grad for w in mine[:3]), mine[3].main_grad]
    for found, e in zip(sums, exact, strict=True):
        assert relative(found, 2 * e.grad) < 2e-2
