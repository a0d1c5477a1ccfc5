"""Blocks that no example has: what they become, and that they mean what they say."""

import pytest
import torch

import coda
from coda.ir.evaluate import evaluate
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.compiler import lower
from coda.measure import random_inputs, relative
from coda.runtime.reference import run_reference

T = coda.Tensor


def lowered(block, sizes):
    """The Program, held in float64 against the block."""
    program = lower(block.graph, sizes)
    inputs = [x.double() if x.is_floating_point() else x for x in random_inputs(block.graph, sizes)]
    known = dict(zip(block.graph.inputs, inputs, strict=True))
    found = run_reference(program, inputs, exact=True)
    for a, b in zip(found, evaluate(block.graph.roots, known, sizes), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    return program


@coda.block
def phi(
    x: T["M D"], w_q: T["(H d) D"], w_k: T["(H d) D"], w: T["F D"], cos: T["M r"], sin: T["M r"]
):
    q = coda.rope((x @ w_q.T).reshape("M (H d) -> M H d"), cos, sin)
    k = coda.rope((x @ w_k.T).reshape("M (H d) -> M H d"), cos, sin)
    return q, k, coda.gelu(x @ w.T)


@pytest.mark.parametrize(("d", "r"), [(20, 4), (80, 16), (96, 24)])
def test_rotated_columns_that_do_not_divide_a_head(d, r):
    """Pairs that lie in no pattern go elsewhere, and take nothing else of their GEMM with them."""
    program = lowered(phi, {"M": 5, "D": 16, "H": 3, "F": 24, "d": d, "r": r})
    assert program.places[program.outputs[2][1]].buffer in {
        s.buffer for k in gemms(program) for s in k.body.epilogue.stores
    }


@coda.block
def capped(x: T["M D"], g: T["D"], w: T["V D"], label: T["M", coda.i64]):
    logits = coda.softcap(coda.rms_norm(x, g) @ w.T, 30.0)
    return coda.cross_entropy(logits.cast(coda.f32), label)


def test_a_constant_factor_under_a_cast():
    program = lowered(capped, {"M": 6, "D": 16, "V": 40})
    assert not any(k.kind is TORCH for k in program.kernels)
    stored = [
        b for b in program.buffers.values() if b.kind == "temp" and b.name in written(program)
    ]
    assert not any(b.shape[-1].size(program.sizes) == 40 for b in stored), "logits are not stored"


def written(program):
    return {s.buffer for k in program.kernels for s in k.body.epilogue.stores}


@coda.block
def quantised(x: T["M D"]):
    scale = coda.max(abs(x), keepdims=True) / 448.0
    return (x / scale).cast(coda.e4m3)


@coda.block
def quantised_product(x: T["M D"], w: T["F D"]):
    y = x @ w.T
    scale = coda.max(abs(y), keepdims=True) / 448.0
    return (y / scale).cast(coda.e4m3)


@coda.block
def normed_in_half(x: T["M D", coda.f32], g: T["D", coda.f16], w: T["F D", coda.f16]):
    return (coda.rms_norm(x).cast(coda.f16) * g) @ w.T


@pytest.mark.parametrize(
    ("block", "scale"), [(quantised, 1e-3), (quantised_product, 1e-3), (normed_in_half, 1e6)]
)
def test_a_scale_comes_before_the_cast_to_a_type_of_shorter_range(block, scale):
    sizes = {s: n for s, n in {"M": 5, "D": 32, "F": 24}.items() if s in block.graph.symbols}
    inputs = random_inputs(block.graph, sizes)
    inputs[0] *= scale
    known = dict(zip(block.graph.inputs, inputs, strict=True))
    (exact,) = evaluate(block.graph.roots, known, sizes)
    (plain,) = evaluate(block.graph.roots, known, sizes, None)
    (found,) = run_reference(lower(block.graph, sizes), inputs)
    assert relative(found, exact) <= 1.05 * relative(plain, exact)


@coda.block
def scaled(x: T["M D"], w: T["D D"]):
    y = (x @ w.T) / 8.0
    return y / coda.sqrt(x.shape[-1]) + coda.rsqrt(2 * x.shape[0])


def test_numbers_are_no_kernels():
    program = lowered(scaled, {"M": 8, "D": 16})
    assert len(program.kernels) == 1
    assert program.fixed == {"D"}, "the number of rows is read in each call"


@coda.block
def two_tokens(
    x: T["M D"], g: T["D"], w: T["V D"], v: T["V D"], a: T["M", coda.i64], b: T["M", coda.i64]
):
    h = coda.rms_norm(x, g)
    return coda.cross_entropy(h @ w.T, a) + coda.cross_entropy(h @ v.T, b)


def test_two_heads_with_a_loss_each_store_no_logits():
    """Side by side in one GEMM, neither loss would be a reduction of its whole rows."""
    program = lowered(two_tokens, {"M": 6, "D": 16, "V": 40})
    assert not any(k.kind is TORCH for k in program.kernels)
    assert len(list(gemms(program))) == 2
    widths = {program.buffers[n].shape[-1].size(program.sizes) for n in written(program)}
    assert widths <= {1, 16}


@coda.block
def turned_after_a_norm_of_all_heads(
    x: T["M D"], w: T["(H d) D"], g: T["(H d)"], cos: T["M d"], sin: T["M d"]
):
    q = coda.rms_norm(x @ w.T, g).reshape("M (H d) -> M H d")
    a, b = coda.split(q, 2)
    turned = coda.concat([-b, a])
    return q * cos.reshape("M d -> M 1 d") + turned * sin.reshape("M d -> M 1 d")


def test_halves_go_back_to_the_pass_that_has_both():
    sizes = {"M": 16, "D": 32, "H": 2, "d": 16}
    program = lowered(turned_after_a_norm_of_all_heads, sizes)
    assert [k.name for k in program.kernels] == ["gemm0", "rows1"]


def test_rows_that_are_a_transposed_product_are_not_joined_as_they_were_made():
    """A product of rows with some of themselves: part of the gradient is (dyᵀ x)ᵀ above zeros."""
    graph = coda.parse("""
block rows(%x: [16, 8] f32, %d: [16, 8] f32) {
  %0 = permute %d (1, 0)
  %1 = permute %x (1, 0)
  %2 = contract %0, %1 f32
  %3 = permute %2 (1, 0)
  %4 = contract %1, %0 f32
  %5 = const 0.0 f32
  %6 = expand %5 [8, 8]
  %7 = concat %3, %6 axis -2
  %8 = concat %3, %4 axis -1
  return a = %7, b = %8
}
""")
    lowered(graph, {})


def test_a_value_of_a_sequence_that_is_placed_for_a_kernel_is_placed_once():
    """Its extremes over tokens are operations of torch, which a kernel of all rows asks for."""

    @coda.block
    def extremes(x: T["A B 5", coda.f32], w: T["5 5", coda.f32]):
        y = x @ w
        return coda.min(y, axis=-2), coda.max(y, axis=-2)

    sizes = {"A": 5, "B": 5}
    x, w = random_inputs(extremes.graph, sizes)
    ours, theirs = ([t.clone().requires_grad_() for t in (x, w)] for _ in range(2))
    found = extremes(*ours, backend="reference")
    y = theirs[0] @ theirs[1]
    expected = y.amin(-2), y.amax(-2)
    for one in (found, expected):
        (one[0].sum() + one[1].square().sum()).backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
