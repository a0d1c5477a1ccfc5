"""Gradients that the backward's own kernels add to `.grad` and `main_grad`."""

import pytest
import torch

import coda
from coda.ir.types import bf16, f32
from coda.kernels.gemm.mainloop import gemms
from coda.lowering.algebra.accumulate import accumulating, siblings
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower
from coda.lowering.program.cost import hbm_bytes
from coda.measure import random_inputs, relative
from coda.runtime import accumulate as module
from coda.runtime import call as run
from coda.runtime import train as train_module
from coda.runtime.accumulate import joined
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
    assert siblings(training) == (("w_gate", "w_up"),)
    matrix = sizes["D"] * sizes["F"]
    added = len(names) * matrix * (2 * dtype.size - bf16.size)
    again = 2 * sizes["M"] * sizes["D"] + 4 * sizes["D"]  # gate and up load x and its gain each
    plain = lower(training.backward, sizes)
    for beside, more, launches in ((siblings(training), 0, 0), ((), again, 1)):
        found = accumulating(training, dict.fromkeys(names, dtype), beside)
        assert [n for n, _ in found.updates] == [f"d{n}" for n in names]
        program = lower(found.graph, sizes)
        assert hbm_bytes(program) == hbm_bytes(plain) + added + more
        assert len(program.kernels) == len(plain.kernels) + launches


@coda.block
def linear(x: T["M D"], w: T["F D"]):
    return x @ w.T


@pytest.fixture
def programs(monkeypatch):
    """The Programs of backwards that add, as they run."""
    found = []

    def execute(program, *rest):
        found.extend([program] if program.updates else [])
        return run.execute(program, *rest)

    monkeypatch.setattr(train_module, "execute", execute)
    return found


@pytest.fixture
def written(monkeypatch):
    """For each sum that a kernel made: whether it was written where the gradient is kept."""
    found = []

    def add(held, gradient, *, summed):
        found.extend([gradient.data_ptr() == held.data_ptr()] if summed else [])
        module.add(held, gradient, summed=summed)

    monkeypatch.setattr(train_module, "add", add)
    return found


def test_siblings_have_one_product_where_their_gradients_are_rows_of_one_matrix(inputs, programs):
    """So are they after the first backward; a weight whose gradient lies apart takes another."""
    xs = microbatches(inputs)
    mine = train(weights_of(inputs), xs, True)
    gate, up = (w.grad for w in mine[1:3])
    assert gate.is_contiguous()
    assert up.data_ptr() == gate.data_ptr() + gate.numel() * gate.element_size()
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    mine[2].grad = up.clone()
    train(mine, xs[:1], True)
    counts = [len(list(gemms(p))) for p in programs]
    assert counts == [*[counts[0]] * (STEPS - 1), counts[0] + 1]
    plain = train(weights_of(inputs), torch.cat([xs, xs[:1]]), False)
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_matrices_are_joined_only_where_they_are_rows_of_one():
    whole = torch.zeros(7, 4)
    a, b, c = whole[:2], whole[2:5], whole[5:]
    found = joined([a, b, c])
    assert found is not None
    assert (found.shape, found.stride()) == (whole.shape, whole.stride())
    assert found.data_ptr() == whole.data_ptr()
    for others in ([b, a], [a, c], [a, b.clone()], [a, b.view(torch.int32)], [a, b[:, :2]]):
        assert joined(others) is None


def test_a_kernel_adds_in_place(written):
    x, w = random_inputs(linear.graph, {"M": 40, "D": 64, "F": 72})
    w.requires_grad_()
    w.main_grad = torch.ones(w.shape)
    with device("sm_90a", checks="raise"), coda.accumulate_gradients():
        for _ in range(2):
            linear(x, w, backend="sim").backward(x.new_ones(40, 72))
    theirs = 1 + 2 * x.float().sum(0).expand(w.shape)
    torch.testing.assert_close(w.main_grad, theirs, rtol=1e-6, atol=1e-5)
    assert w.grad is None
    assert written == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_kernels_add_in_place(arch, written, programs):
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
    assert written
    assert all(written)
    assert {len(list(gemms(p))) for p in programs} == {4}
    for w, g in zip(mine[1:3], held[1:], strict=True):
        assert w.grad is g
    sums = [*(w.grad for w in mine[:3]), mine[3].main_grad]
    for found, e in zip(sums, exact, strict=True):
        assert relative(found, 2 * e.grad) < 2e-2
