"""Gradients of maxima and minima: no row's is lost, however the values are rounded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coda
from coda.ir.evaluate import evaluate
from coda.ir.graph import Graph, Input, Reduce, walk
from coda.ir.types import bf16, f16, f32, f64
from coda.lowering.algebra.compared import compared, is_exact
from coda.lowering.algebra.training import MEMORY, derive
from coda.measure import random_inputs, relative
from coda.runtime.simulate import device
from tests.lowering.test_random_blocks import SETTINGS, SIZES, Author, D, E, M

T = coda.Tensor
TYPES = (f64, f32, bf16, f16)


@coda.block
def polynomial(y: T["M D"]):
    return coda.max(y * y + y, keepdims=True)


@coda.block
def least(y: T["M D"]):
    return coda.min((y + 1) * y - y * y * 0.1)


@coda.block
def max_norm(x: T["M D"], g: T["D"]):
    y = coda.rms_norm(x, g)
    return y / coda.max(abs(y), keepdims=True)


@coda.block
def quantised_product(x: T["M D"], g: T["D"], v: T["E D"]):
    y = coda.layer_norm(x, g)
    s = 1.0 / coda.max(abs(y), keepdims=True)
    return (coda.tanh(y * s) @ v.T) / s


@coda.block
def of_heads(x: T["M (H d)"], g: T["d"], w: T["(H d) (H d)"]):
    h = coda.rms_norm((x @ w.T).reshape("M (H d) -> M H d"), g)
    return (h / coda.max(h * h + h, keepdims=True)).reshape("M H d -> M (H d)")


@coda.block
def two_of_one(x: T["M D"], g: T["D"], v: T["E D"]):
    y = coda.rms_norm(x, g)
    scaled = y * coda.max(y * y + y, keepdims=True) + coda.min(y, keepdims=True)
    return (scaled / coda.max(abs(y), keepdims=True)) @ v.T


@coda.block
def of_a_product(x: T["M D"], w: T["E D"], e: T["M E"]):
    z = 0.3 * (x @ w.T) + e * e
    return coda.max(z, keepdims=True) * z


@coda.block
def of_weights(x: T["M D"], w: T["E D"], u: T["E D"]):
    return x @ (w * u / coda.max(w * u + w, keepdims=True)).T


@coda.block
def over_rows(x: T["M D"], g: T["D"]):
    y = coda.rms_norm(x, g)
    return y / coda.max(y * y, axis=0, keepdims=True)


BLOCKS = (
    polynomial,
    least,
    max_norm,
    quantised_product,
    of_heads,
    two_of_one,
    of_a_product,
    of_weights,
    over_rows,
)
WIDTHS = {"M": 37, "D": 64, "E": 48, "H": 2, "d": 32}


def gradients(call, inputs, dtype, d):
    mine = [x.to(dtype).requires_grad_() for x in inputs]
    out = call(*mine)
    return torch.autograd.grad(out, mine, d.to(dtype).expand_as(out))


def meaning(block, dtype):
    """The block in torch, as a function of tensors."""
    graph = block.graph_of(dtype)

    def call(*inputs):
        (out,) = evaluate(graph.roots, dict(zip(graph.inputs, inputs, strict=True)), WIDTHS)
        return out

    return call


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
def test_gradients_are_those_of_float64(block, memory):
    sizes = {s: WIDTHS[s] for s in block.graph.symbols}
    d = torch.randn((), generator=torch.Generator().manual_seed(1))
    inputs = [x.float() for x in random_inputs(block.graph_of(f32), sizes)]
    exact = gradients(meaning(block, f64), inputs, torch.float64, d)
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        found = gradients(
            lambda *a: block(*a, dims=sizes, memory=memory, backend="reference"), inputs, dtype, d
        )
        for a, b in zip(found, exact, strict=True):
            assert relative(a, b) < error


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
def test_what_is_compared_is_made_of_values_in_memory(block, dtype, memory):
    """Between a backward's arguments and a comparison is no operation that rounds."""
    graph = block.graph_of(dtype)
    backward = derive(graph, {s: WIDTHS[s] for s in graph.symbols}, memory=memory).backward
    found = compared(backward.roots)
    assert found
    for node in walk(n.arg for n in found):
        assert not node.operands or is_exact(node)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_equal_values_share_the_gradient(dtype):
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0], [-1.0, -1.0, -1.0, -1.0]], dtype=dtype.torch)
    x.requires_grad_()
    block = coda.block(_largest_shifted)
    (found,) = torch.autograd.grad(block(x, backend="reference").sum(), x)
    wanted = torch.tensor([[0, 0.5, 0.5, 0], [0.25] * 4], dtype=dtype.torch)
    assert torch.equal(found, wanted)


def _largest_shifted(x: T["M D"]):
    return coda.max(x * 1.0 + 0.25)


def test_a_row_with_nan_has_no_gradient_but_nan():
    y = torch.tensor([[1.0, torch.nan, 2.0], [1.0, 3.0, 2.0]], requires_grad=True)
    (found,) = torch.autograd.grad(polynomial(y, backend="reference").sum(), y)
    assert found[0].isnan().all()
    assert torch.equal(found[1], torch.tensor([0.0, 7.0, 0.0]))


@coda.block
def largest_of_other(x: T["M D"], y: T["M D"]):
    return coda.tanh(x) * coda.max(y * y + y, keepdims=True)


def test_a_maximum_that_is_not_differentiated_is_saved_like_other_statistics():
    training = derive(largest_of_other.graph_of(f32), WIDTHS, ["x"])
    assert not any(isinstance(n, Reduce) for n in walk(training.backward.roots))


@coda.block
def largest_alone(x: T["M D"], w: T["D D"], g: T["D"]):
    y = coda.rms_norm(x * x + x, g)
    z = 0.3 * (x @ w.T) + y * y
    alone = coda.where(y == coda.max(y, keepdims=True), y, 0.0 * y)
    rest = coda.where(z <= coda.min(z)[:, None], 0.0 * z, z)
    return alone, rest


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_block_finds_the_extreme_among_its_values(dtype):
    sizes = {"M": 37, "D": 64}
    inputs = [x.to(dtype.torch).requires_grad_() for x in random_inputs(largest_alone.graph, sizes)]
    alone, rest = largest_alone(*inputs, backend="reference")
    assert ((alone != 0).sum(-1) >= 1).all()
    assert ((rest == 0).sum(-1) >= 1).all()


# Random blocks.


@st.composite
def shifted(draw):
    """A random block, the extreme of what it gives and a shift, and how its backward saves."""
    dtype = draw(st.sampled_from(TYPES))
    author = Author(draw, dtype)
    for _ in range(draw(st.integers(1, 6))):
        author.step()
    x = author.pick((M, D), (M, E))
    shift = author.input("e", x.shape)
    z = x + shift
    out = draw(st.sampled_from((coda.max, coda.min, lambda z: coda.max(abs(z)))))(z)
    used = {n for n in walk([out.node]) if isinstance(n, Input)}
    inputs = tuple(i for i in author.inputs if i in used)
    graph = Graph("shifted", inputs, (("out", out.node),))
    return graph, dtype, draw(st.sampled_from(MEMORY)), inputs.index(shift.node)


def check_shifted(graph, dtype, memory, shift):
    """Σ |∂ extreme / ∂ shift| is 1 in every row, shared among how many elements it may be."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn([d.size(SIZES) for d in i.shape], generator=generator).to(dtype.torch)
        for i in graph.inputs
    ]
    inputs[shift].requires_grad_()
    out = coda.parse(str(graph))(*inputs, memory=memory, backend="reference")
    (found,) = torch.autograd.grad(out.sum(), inputs[shift])
    total = found.double().abs().sum(-1)[out.isfinite()]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0.02, atol=0)


@settings(SETTINGS, max_examples=15)
@given(shifted())
def test_a_random_extreme_gives_all_of_its_cotangent(case):
    check_shifted(*case)


@pytest.mark.slow
@settings(SETTINGS, max_examples=600)
@given(shifted())
def test_many_random_extremes_give_all_of_their_cotangents(case):
    check_shifted(*case)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("block", [polynomial, max_norm], ids=lambda b: b.__name__)
def test_kernels_lose_no_row(block, arch):
    sizes = {s: WIDTHS[s] for s in block.graph.symbols}
    d = torch.randn((), generator=torch.Generator().manual_seed(1))
    inputs = [x.float() for x in random_inputs(block.graph_of(f32), sizes)]
    exact = gradients(meaning(block, f64), inputs, torch.float64, d)
    with device(arch, checks="raise"):
        found = gradients(lambda *a: block(*a, backend="sim"), inputs, torch.float32, d)
    for a, b in zip(found, exact, strict=True):
        assert relative(a, b) < 3e-6


@coda.block
def largest_sum(x: T["M D"], g: T["D"], w: T["E D"], e: T["M E"]):
    z = 0.3 * (coda.rms_norm(x, g) @ w.T)
    return coda.max(z * z + z + e)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_kernels_of_products_lose_no_row(dtype, arch):
    sizes = {s: WIDTHS[s] for s in largest_sum.graph.symbols}
    inputs = [x.to(dtype.torch) for x in random_inputs(largest_sum.graph, sizes)]
    inputs[3].requires_grad_()
    with device(arch, checks="raise"):
        (found,) = torch.autograd.grad(largest_sum(*inputs, backend="sim").sum(), inputs[3])
    total = found.double().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0.02, atol=0)
