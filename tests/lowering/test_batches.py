"""Products of batches in blocks: right wherever they stand, and every pass knows that they are."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coda
from coda.frontend.tensor import Tensor
from coda.ir.dims import ONE, Dim
from coda.ir.evaluate import evaluate
from coda.ir.graph import Contract, Graph, Input, Map, Permute, Reduce, Reshape, Slice, walk
from coda.ir.sharding import Inseparable, share
from coda.ir.text import parse, show
from coda.ir.types import bf16, f32, f64
from coda.lowering.algebra.chunk import chunk
from coda.lowering.algebra.laws import EXCHANGES, LAWS
from coda.lowering.algebra.merge_siblings import merge_siblings
from coda.lowering.algebra.pushdown import push_down
from coda.lowering.algebra.rewrite import rewrite
from coda.lowering.algebra.roles import gemms, row_symbols, weight_nodes
from coda.lowering.algebra.training import MEMORY
from coda.lowering.compiler import lower
from coda.lowering.program.text import show_program
from coda.runtime.reference import run_reference
from tests.lowering import test_backward
from tests.lowering.test_random_blocks import SETTINGS, values

B, M, D, H = (Dim.of(n) for n in "BMDH")
SIZES = {"B": 3, "M": 5, "D": 64, "H": 2}
HEAD = 32


class Author:
    """Writes a block of batches [B, M, D], one random operation after another."""

    def __init__(self, draw):
        self.draw, self.inputs = draw, []
        self.dtype = draw(st.sampled_from((bf16, bf16, f64)))  # GEMMs, or operations of torch
        self.pool = [self.input("x", (B, M, D)), self.input("y", (B, M, D))]

    def input(self, name, shape):
        node = Input(f"{name}{len(self.inputs)}", shape, self.dtype)
        self.inputs.append(node)
        return Tensor(node)

    def pick(self):
        return self.draw(st.sampled_from(self.pool))

    def step(self):
        kind = self.draw(st.sampled_from(self.KINDS))
        self.pool.append(kind(self, self.pick()))

    def elementwise(self, x):
        fn = self.draw(st.sampled_from((coda.tanh, coda.sigmoid, lambda v: v * 0.5)))
        return fn(x)

    def joined(self, x):
        return x + self.pick() * self.input("g", (D,))

    def normed(self, x):
        return coda.rms_norm(x, self.input("g", (D,)), eps=0.5)

    def projected(self, x):
        return x @ self.input("w", (D, D)).T

    def attended(self, x):
        scores = coda.einsum("b i d, b j d -> b i j", x, self.pick()) * 0.1
        return coda.einsum("b i j, b j d -> b i d", coda.softmax(scores), self.pick())

    def by_heads(self, x):
        q, k, v = (t.reshape(B, M, D / HEAD, HEAD) for t in (x, self.pick(), self.pick()))
        scores = coda.einsum("b i h d, b j h d -> b h i j", q, k) * 0.1
        i, j = coda.iota(M), coda.iota(M)
        p = coda.exp(coda.where(i[:, None] >= j, coda.tanh(scores), -2.0))
        return coda.einsum("b h i j, b j h d -> b i h d", p, v).reshape(B, M, D) * 0.1

    def by_a_matrix_of_its_own(self, x):
        return (x @ self.input("e", (B, D, D))) * 0.1

    def by_one_for_all(self, x):
        return x @ self.input("o", (ONE, D, D)) * 0.1

    def over_rows(self, x):
        gram = coda.einsum("b m d, b m e -> b d e", x, self.pick())
        return (x @ coda.tanh(gram)) * 0.1

    def across_batches(self, x):
        y = self.pick()
        return coda.einsum("b m d, c m d -> b c", x, y)[:, :1, None] * x * 0.01

    def scanned(self, x):
        return (
            coda.cumsum(x, self.draw(st.sampled_from((-1, -2))), reverse=self.draw(st.booleans()))
            * 0.1
        )

    KINDS = (
        *(elementwise, joined, normed, projected, attended, by_heads, by_a_matrix_of_its_own),
        *(by_one_for_all, over_rows, across_batches, scanned),
    )


@st.composite
def blocks(draw, steps=5):
    author = Author(draw)
    for _ in range(draw(st.integers(1, steps))):
        author.step()
    return Graph("random", tuple(author.inputs), (("out", author.pool[-1].node),))


def sizes_of(graph, sizes=SIZES):
    return {s: sizes[s] for s in graph.symbols}


def check(graph, sizes=SIZES):
    sizes = sizes_of(graph, sizes)
    assert parse(show(graph)) == graph
    inputs = values(graph, sizes)
    expected = evaluate(graph.roots, dict(zip(graph.inputs, inputs, strict=True)), sizes)
    found = run_reference(lower(graph, sizes), inputs, exact=True)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@settings(SETTINGS, max_examples=40)
@given(blocks())
def test_a_program_means_what_its_block_means(graph):
    check(graph)


@settings(SETTINGS, max_examples=15)
@given(blocks(steps=3), st.sampled_from(MEMORY))
def test_gradients(graph, memory):
    test_backward.check(graph, values(graph, sizes_of(graph)), sizes_of(graph), memory)


@pytest.mark.slow
@settings(SETTINGS, max_examples=300)
@given(blocks(steps=8), st.sampled_from(MEMORY))
def test_many_blocks_and_their_gradients(graph, memory):
    check(graph)
    test_backward.check(graph, values(graph, sizes_of(graph)), sizes_of(graph), memory)


# Passes that know a matrix on the right.


def operands(shape=(B, M, D), other=None, dtype=f64):
    return Input("x", shape, dtype), Input("w", other or (*shape[:-2], H, shape[-1]), dtype)


PLANTED = {
    "a factor of the row": lambda x, w, r, g: Contract(Map("mul", (x, r)), w, f64),
    "a gain": lambda x, w, r, g: Contract(Map("mul", (x, g)), w, f64),
    "a shift": lambda x, w, r, g: Contract(Map("sub", (x, r)), w, f64),
    "a norm": lambda x, w, r, g: Contract(
        Map("add", (Map("mul", (Map("mul", (x, r)), g)), g)), w, f64
    ),
    "two sums": lambda x, w, r, g: Map(
        "add", (Contract(Map("exp", (x,)), w, f64), Contract(Map("tanh", (x,)), w, f64))
    ),
    "sums exchanged": lambda x, w, r, g: Reduce(
        "sum", Map("mul", (Contract(x, w, f64), Contract(Map("exp", (x,)), w, f64))), -1
    ),
}
SHARED = {
    "none": ((B, M, D), (B, H, D)),
    "the right": ((B, M, D), (ONE, H, D)),
    "the left": ((M, D), (B, H, D)),
    "both": ((B, ONE, M, D), (H, H, D)),
}


def accepted(budget, law, *_):
    """All laws with a choice, but of exchanges only as many as the budget has."""
    return law in LAWS or next(budget, False)


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("shared", SHARED)
def test_laws_leave_batches_right(planted, shared):
    x, w = operands(*SHARED[shared])
    r, g = Input("r", (*x.shape[:-1], ONE), f64), Input("g", (D,), f64)
    node = PLANTED[planted](x, w, Map("rsqrt", (Reduce("mean", Map("exp", (r,)), -1),)), g)
    inputs = dict(zip((x, w, r, g), values(Graph("f", (x, w, r, g), ()), SIZES), strict=True))
    (expected,) = evaluate([node], inputs, SIZES)
    for laws in (LAWS, (*EXCHANGES, *LAWS)):
        budget = iter([True])  # an exchange can be exchanged back
        after = rewrite([node], laws, partial(accepted, budget))
        torch.testing.assert_close(evaluate(after, inputs, SIZES)[0], expected)
    reached = set(walk([node]))
    check(Graph("f", tuple(i for i in (x, w, r, g) if i in reached), (("out", node),)))


def test_rows_are_batches_and_left_rows_and_columns_the_rest():
    x, w = operands((B, M, D), (B, H, D))
    y = Contract(x, w, f64)
    assert row_symbols(walk([y])) == {"B", "M"}
    assert row_symbols(walk([Contract(x, Map("exp", (x,)), f64)])) == {"B"}
    assert gemms(walk([y])) == []
    assert not weight_nodes(list(walk([y])))
    matrix = Contract(x, Input("v", (H, D), f64), f64)
    assert gemms(walk([matrix])) == [matrix]


def test_products_of_batches_are_not_merged_as_siblings():
    x = Input("x", (M, D), f64)
    v, w = (Input(n, shape, f64) for n, shape in (("v", (H, M, D)), ("w", (ONE, M, D))))
    graph = Graph("f", (x, v, w), (("a", Contract(x, v, f64)), ("b", Contract(x, w, f64))))
    assert merge_siblings(graph)[0] == graph


@pytest.mark.parametrize("axis", [-2, -3])
def test_slices_of_rows_stay_behind_a_product_of_batches(axis):
    x, w = operands()
    y = Slice(Contract(x, w, f64), axis, Dim.of(1), Dim.of(1), 1)
    graph = Graph("f", (x, w), (("out", y),))
    assert push_down(graph) == graph
    check(graph)


def test_a_product_of_batches_is_not_made_in_parts():
    b, t = Dim.of("B"), Dim.of("T")
    x, w = (Input(n, (b, t, Dim.of(8)), bf16) for n in "xw")
    p = Map("exp", (Contract(x, w, bf16),))
    graph = Graph("f", (x, w), (("out", Contract(p, Permute(w, (0, 2, 1)), bf16)),))
    assert chunk(graph, {"B": 2, "T": 4096}, frozenset()).graph == graph


@pytest.mark.parametrize(
    ("symbol", "state"), [("B", "split"), ("M", "split"), ("H", "split"), ("D", "partial")]
)
def test_ranks_that_have_parts_of_an_axis(symbol, state):
    x, w = operands()
    graph = Graph("f", (x, w), (("out", Contract(x, w, f64)),))
    assert share(graph, symbol).outputs == (state,)


def test_ranks_have_not_all_rows():
    x = Input("x", (B, M, D), f64)
    every = Contract(x, Map("exp", (x,)), f64), coda.cumsum(Tensor(x), -2).node
    for node in every:
        with pytest.raises(Inseparable, match="all of `M`"):
            share(Graph("f", (x,), (("out", node),)), "M")
    along = Graph("f", (x,), (("out", coda.cumsum(Tensor(x)).node),))
    assert share(along, "M").outputs == ("split",)


# What a block becomes.


@coda.block
def attention(
    x: coda.Tensor["B S D"],
    w_qkv: coda.Tensor["3*H*d D"],
    w_out: coda.Tensor["D H*d"],
    gain: coda.Tensor["D"],
):
    b, s, _ = x.shape
    heads = coda.rms_norm(x, gain, eps=1e-5) @ w_qkv.T
    q, k, v = (t.reshape("B S H*d -> B S H d") for t in coda.split(heads, 3))
    scores = coda.einsum("b i h d, b j h d -> b h i j", q, k) / coda.sqrt(q.shape[-1])
    i, j = coda.iota(s), coda.iota(s)
    p = coda.softmax(coda.where(i[:, None] >= j, scores, -1e4))
    o = coda.einsum("b h i j, b j h d -> b i h d", p, v)
    return x + o.reshape(b, s, -1) @ w_out.T


DIMS = {"B": 2, "S": 16, "D": 64, "H": 4, "d": 16}


def test_attention_in_a_block(golden):
    program = lower(attention.graph, DIMS)
    golden("attention_of_batches.txt", show_program(program))
    assert "B" not in program.fixed
    text = str(attention.explain("sm_90a", **DIMS))
    assert "a product of batches" not in text
    assert [k.name for k in program.kernels if k.kind.tiled] == ["gemm1", "gemm3"]


def arguments(sizes, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = [[d.size(sizes) for d in i.shape] for i in attention.graph.inputs]
    scales = (1.0, 0.1, 0.1, 1.0)
    pairs = zip(shapes, scales, strict=True)
    return [(torch.randn(s, generator=generator) * c).to(dtype) for s, c in pairs]


def by_torch(x, w_qkv, w_out, gain):
    b, s, _ = x.shape
    h = torch.nn.functional.rms_norm(x, x.shape[-1:], gain, 1e-5)
    q, k, v = (t.reshape(b, s, 4, 16).transpose(1, 2) for t in (h @ w_qkv.T).chunk(3, -1))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + o.transpose(1, 2).flatten(2) @ w_out.T


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_calls_with_empty_single_and_strided_batches(batch):
    x, *weights = arguments({**DIMS, "B": 3})
    x = x.transpose(0, 1).contiguous().transpose(0, 1)[:batch]
    assert batch < 2 or not x.is_contiguous()
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    y = attention(*leaves, dims={"H": 4}, backend="reference")
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = by_torch(*exact)
    assert y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.05)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(cotangent.to(y.dtype))
    expected.backward(cotangent.to(y.dtype).double())
    for mine, theirs in zip(leaves, exact, strict=True):
        assert (mine.grad.double() - theirs.grad).norm() <= 0.02 * theirs.grad.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_hostile_values_stay_in_their_batch(value):
    @coda.block
    def f(x: coda.Tensor["B M D", coda.f32], w: coda.Tensor["B D D", coda.f32]):
        return x @ w

    x, w = torch.randn(3, 4, 8), torch.randn(3, 8, 8)
    x[1, 2, 3] = value
    torch.testing.assert_close(f(x, w), x @ w, equal_nan=True)
    assert f(x, w)[[0, 2]].isfinite().all()


def test_products_of_fp8_batches_are_float32():
    @coda.block
    def f(x: coda.Tensor["B M D", coda.e4m3], w: coda.Tensor["B N D", coda.e4m3]):
        return x @ w.mT

    x, w = (torch.randn(2, n, 8).to(torch.float8_e4m3fn) for n in (3, 4))
    y = f(x, w)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.float() @ w.float().mT)


def test_a_view_that_a_product_of_batches_reads_is_returned_as_well():
    q, k = (Input(n, (B, M, H, D), f32) for n in "qk")
    turned = Permute(Map("tanh", (q,)), (0, 2, 1, 3))
    y = Contract(turned, Permute(k, (0, 2, 1, 3)), f32)
    outputs = ("y", y), ("turned", turned), ("flat", Reshape(turned, (B * H, M, D)))
    graph = Graph("f", (q, k), outputs)
    inputs = [x.float() for x in values(graph, SIZES)]
    expected = evaluate(graph.roots, dict(zip(graph.inputs, inputs, strict=True)), SIZES)
    for a, b in zip(expected, run_reference(lower(graph, SIZES), inputs), strict=True):
        torch.testing.assert_close(b.double(), a, rtol=1e-5, atol=1e-5)
