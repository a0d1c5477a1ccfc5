"""Blocks under autograd: gradients, what is saved, what is refused, under torch.compile."""

import gc
import weakref

import pytest
import torch

import coda
from coda.ir.graph import Input
from coda.kernels.gemm.mainloop import gemms
from coda.measure import random_inputs, relative
from coda.runtime.call import calls_of
from coda.runtime.simulate import device
from tests.runtime.test_call import SIZES, mlp, torch_mlp


@pytest.fixture
def inputs():
    return [x.double() for x in random_inputs(mlp.graph, SIZES)]


def leaves(inputs, wanted=None):
    return [x.clone().requires_grad_(wanted is None or i in wanted) for i, x in enumerate(inputs)]


def expected(inputs, d):
    mine = leaves(inputs)
    return torch.autograd.grad(torch_mlp(*mine), mine, d)


def test_gradcheck():
    inputs = [x.double() for x in random_inputs(mlp.graph, {"M": 2, "D": 4, "F": 3})]
    assert torch.autograd.gradcheck(lambda *a: mlp(*a), leaves(inputs))


def test_backward_and_grad_agree(inputs):
    d = torch.randn(9, 16, dtype=torch.float64)
    mine = leaves(inputs)
    mlp(*mine).backward(d)
    for x, theirs in zip(mine, expected(inputs, d), strict=True):
        torch.testing.assert_close(x.grad, theirs, rtol=1e-5, atol=1e-6)
    mlp(*mine).backward(d)
    torch.testing.assert_close(mine[1].grad, 2 * expected(inputs, d)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [{0}, {1}, {2, 4}, {4}])
def test_frozen_arguments_have_no_gradient_and_no_kernel(inputs, wanted):
    d = torch.randn(9, 16, dtype=torch.float64)
    mine = leaves(inputs, wanted)
    mlp(*mine).backward(d)
    for i, (x, theirs) in enumerate(zip(mine, expected(inputs, d), strict=True)):
        if i in wanted:
            torch.testing.assert_close(x.grad, theirs, rtol=1e-5, atol=1e-6)
        else:
            assert x.grad is None
    names = tuple(mlp.graph.inputs[i].name for i in sorted(wanted))
    sizes = {s: SIZES[s] for s in mlp.graph.symbols}
    every = mlp.lower_training("sm_90a", sizes)[1]
    some = mlp.lower_training("sm_90a", sizes, wanted=names)[1]
    assert len(list(gemms(some))) < len(list(gemms(every)))


def test_a_block_that_trained_is_freed():
    """Neither its Programs nor its plans outlive it."""

    def run():
        block = coda.parse(str(mlp.graph))
        mine = leaves(random_inputs(block.graph, SIZES))
        block(*mine).sum().backward()
        with torch.no_grad():
            block(*mine)
        return block.handle, [weakref.ref(o) for o in (block, *block._programs.values())]

    handle, refs = run()
    gc.collect()
    assert [r() for r in refs] == [None] * len(refs)
    with pytest.raises(coda.errors.CallError, match="has not made"):
        calls_of(handle)


def test_nothing_is_saved_without_gradients(inputs):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        with torch.no_grad():
            mlp(*leaves(inputs))
        mlp(*inputs)
        assert not kept


def test_what_is_saved(inputs):
    """Pre-activations and one statistic beside the arguments; neither h nor the product."""
    kept = []

    def keep(x):
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        mlp(*leaves(inputs))
    assert sorted(kept) == sorted([(9, 16), (16,), (24, 16), (24, 16), (16, 24), (9, 48), (9, 1)])


def test_one_tensor_in_two_places(inputs):
    x, g, w, _, w_down = leaves(inputs)
    mlp(x, g, w, w, w_down).sum().backward()
    mine = w.grad
    w.grad = None
    torch_mlp(x, g, w, w, w_down).sum().backward()
    torch.testing.assert_close(mine, w.grad, rtol=1e-5, atol=1e-6)


def test_under_torch_compile(inputs):
    d = torch.randn(9, 16, dtype=torch.float64)
    mine = leaves(inputs)
    compiled = torch.compile(lambda *a: mlp(*a) * 2, backend="aot_eager", fullgraph=True)
    compiled(*mine).backward(d)
    for x, theirs in zip(mine, expected(inputs, d), strict=True):
        torch.testing.assert_close(x.grad, 2 * theirs, rtol=1e-5, atol=1e-6)


def test_one_backward_serves_all_rows(inputs):
    mlp(*leaves(inputs)).sum().backward()
    held = len(mlp._programs)
    for m in (1, 2, 130):
        x = torch.randn(m, 16, dtype=torch.float64)
        d = torch.randn(m, 16, dtype=torch.float64)
        mine = leaves([x, *inputs[1:]])
        mlp(*mine).backward(d)
        for a, b in zip(mine, expected([x, *inputs[1:]], d), strict=True):
            torch.testing.assert_close(a.grad, b, rtol=1e-5, atol=1e-6)
    assert len(mlp._programs) == held


def test_no_further_from_float64_than_torch():
    """bf16 gradients of the block and of torch's own, against float64."""
    narrow = random_inputs(mlp.graph, {"M": 128, "D": 64, "F": 192})
    d = torch.randn(128, 64).bfloat16()
    exact, theirs, mine = (leaves(x) for x in ([t.double() for t in narrow], narrow, narrow))

    def theirs_of(x, g, *w):
        h = torch.nn.functional.rms_norm(x, (64,), g, 1e-6)
        return x + (torch.nn.functional.silu(h @ w[0].T) * (h @ w[1].T)) @ w[2].T

    theirs_of(*exact).backward(d.double())
    theirs_of(*theirs).backward(d)
    mlp(*mine).backward(d)
    for e, t, m in zip(exact, theirs, mine, strict=True):
        far = [(x.grad.double() - e.grad).norm() / e.grad.norm() for x in (m, t)]
        assert far[0] <= far[1] * 1.05


def test_the_backward_reads_no_argument_that_it_does_not_need():
    sizes = {s: SIZES[s] for s in mlp.graph.symbols}
    backward = mlp.lower_training("sm_90a", sizes, wanted=["w_down"])[1]
    names = {i.name for i in backward.graph.inputs if isinstance(i, Input)}
    assert not names & {"x", "g", "w_gate", "w_up", "w_down"}


@pytest.mark.parametrize("f", [72, 100])
def test_halves_of_any_width_are_stored(f):
    """Gate and up lie F columns apart in what is saved: kernels store them in whole vectors."""
    forward, _ = mlp.lower_training("sm_90a", {"M": 40, "D": 64, "F": f})
    every = [g.body.epilogue for g in gemms(forward)]
    splits = [e.apart(s) for e in every for s in e.stores]
    assert f not in splits
    wide, _ = mlp.lower_training("sm_90a", {"M": 40, "D": 64, "F": 96})
    every = [g.body.epilogue for g in gemms(wide)]
    assert 96 in [e.apart(s) for e in every for s in e.stores]


@pytest.mark.slow
@pytest.mark.parametrize("f", [72, 100])
def test_kernels_of_halves_of_any_width(f):
    inputs = random_inputs(mlp.graph, {"M": 40, "D": 64, "F": f})
    exact, mine = leaves([x.double() for x in inputs]), leaves(inputs)
    mlp(*exact).sum().backward()
    with device("sm_90a", checks="raise"):
        mlp(*mine, backend="sim").sum().backward()
    for a, b in zip(mine, exact, strict=True):
        assert relative(a.grad, b.grad) < 2e-2


@coda.block
def largest(x: coda.Tensor["M D"], w: coda.Tensor["F D"], e: coda.Tensor["M F"]):
    return coda.max(0.3 * (x @ w.T) + e)


@coda.block
def largest_returned(x: coda.Tensor["M D"], y: coda.Tensor["M D"], e: coda.Tensor["M D"]):
    z = 0.3 * x * y + e
    return coda.max(z), z


@coda.block
def by_largest(x: coda.Tensor["M D"], w: coda.Tensor["F D"], e: coda.Tensor["M F"]):
    z = coda.silu(x @ w.T) + e
    return z / coda.max(abs(z), keepdims=True), z


def differentiated(block, memory):
    """Outputs, a cotangent of the first one, and the gradient of `e`."""
    sizes = {s: n for s, n in {"M": 32, "D": 64, "F": 48}.items() if s in block.graph.symbols}
    x, w, e = random_inputs(block.graph, sizes)
    e = (e.abs() + 1).requires_grad_()
    found = block(x, w, e, memory=memory)
    found = found if isinstance(found, tuple) else (found,)
    d = torch.rand(found[0].shape).bfloat16()
    (de,) = torch.autograd.grad(found[0], e, d)
    return [t.detach().float() for t in (*found, d, de)]


@pytest.mark.parametrize("block", [largest, largest_returned])
@pytest.mark.parametrize("memory", ["min", "balanced", "speed"])
def test_a_maximum_gives_all_of_its_cotangent(block, memory):
    """A value is not the same to the last bit in two kernels, nor before and after a store."""
    *_, d, de = differentiated(block, memory)
    torch.testing.assert_close(de.sum(-1), d, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("memory", ["min", "balanced", "speed"])
def test_what_is_scaled_by_its_maximum_is_no_larger_for_a_factor(memory):
    """Euler: Σ z ∂f/∂z = 0 where f(a z) = f(z)."""
    _, z, _, dz = differentiated(by_largest, memory)
    assert ((z * dz).sum(-1).abs() <= 0.03 * (z * dz).abs().sum(-1)).all()
