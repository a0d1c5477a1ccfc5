"""Einsum, products of batches, positions and cumulative sums: values and gradients are torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coda
from coda.errors import CodaError, DtypeError, ShapeError, TraceError
from coda.frontend.tensor import Tensor
from coda.ir.dims import Dim
from coda.ir.evaluate import evaluate
from coda.ir.graph import Contract, Graph, Input, Permute, walk
from coda.ir.text import parse, show
from coda.ir.types import bf16, f32, f64, i32
from tests.ir.test_vjp import check
from tests.lowering.test_random_blocks import SETTINGS

SIZES = (0, 1, 2, 3, 5)


def argument(name, shape, dtype=f64):
    return Input(name, tuple(Dim.of(d) for d in shape), dtype)


@st.composite
def contractions(draw, least=1):
    """Names and sizes of the axes of two operands and of the result, in any order."""
    kinds = ("batch", "summed", "rows", "columns", "left alone", "right alone")
    names = iter("abcdefghijkl")
    axes = {k: [next(names) for _ in range(draw(st.integers(0, 2)))] for k in kinds}
    sizes = {n: draw(st.sampled_from(SIZES[least:])) for found in axes.values() for n in found}

    def order(*kinds):
        return draw(st.permutations([n for k in kinds for n in axes[k]]))

    left = order("batch", "summed", "rows", "left alone")
    right = order("batch", "summed", "columns", "right alone")
    return left, right, order("batch", "rows", "columns"), sizes


def written(left, right, result, apart):
    """The text, in names apart or as torch has it."""
    a, b, c = ((" " if apart else "").join(t) for t in (left, right, result))
    return f"{a}, {b} -> {c}" if apart else f"{a},{b}->{c}"


def random_of(node, sizes, seed):
    shape = [d.size(sizes) for d in node.shape]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(SETTINGS, max_examples=60)
@given(contractions(), st.booleans(), st.data())
def test_einsum_is_torch_s(spec, symbolic, data):
    """Values and gradients, whatever the order of the axes and their sizes."""
    left, right, result, sizes = spec
    named = lambda n: Dim.of(f"{n.upper()}_") if symbolic else Dim.of(sizes[n])  # noqa: E731
    a, b = (Input(x, tuple(map(named, t)), f64) for x, t in (("a", left), ("b", right)))
    known = {f"{n.upper()}_": s for n, s in sizes.items()}
    text = written(left, right, result, False)
    y = coda.einsum(text, Tensor(a), Tensor(b))
    assert y.shape == tuple(map(named, result))
    graph = Graph("f", (a, b), (("y", y.node),))
    assert parse(show(graph)) == graph
    inputs = [random_of(a, known, 1), random_of(b, known, 2)]
    (found,) = evaluate([y.node], dict(zip((a, b), inputs, strict=True)), known)
    torch.testing.assert_close(found, torch.einsum(text, *inputs), rtol=1e-9, atol=1e-9)
    check(graph, inputs, known)


@settings(SETTINGS, max_examples=40)
@given(contractions(least=0))
def test_both_spellings_are_one_graph_and_take_empty_axes(spec):
    left, right, result, sizes = spec
    a, b = (Input(x, tuple(Dim.of(n) for n in t), f64) for x, t in (("a", left), ("b", right)))
    short = coda.einsum(written(left, right, result, False), Tensor(a), Tensor(b))
    long = coda.einsum(written(left, right, result, True), Tensor(a), Tensor(b))
    if any(len(t) > 1 for t in (left, right, result)):
        assert short.node is long.node
    inputs = [random_of(a, sizes, 1), random_of(b, sizes, 2)]
    (found,) = evaluate([short.node], dict(zip((a, b), inputs, strict=True)), sizes)
    expected = torch.einsum(written(left, right, result, False), *inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("text", "a", "b"),
    [
        ("...ij,...jk->...ik", (3, 1, 4, 5), (2, 5, 6)),
        ("i...j,kj...->...ik", (4, 3, 5), (6, 5, 3)),
        ("...i,...i->...", (3, 5), (5,)),
        ("ij,jk", (4, 5), (5, 6)),
        ("b i j , b j k", (2, 4, 5), (2, 5, 6)),
        ("...i,ij", (2, 3, 4), (4, 5)),
        ("Ab,bC", (3, 4), (4, 5)),
        ("bij,bjk->bik", (1, 4, 5), (3, 5, 6)),
        ("bij,bjk->bik", (2, 4, 1), (2, 5, 6)),
    ],
)
def test_leading_axes_and_results_left_out(text, a, b):
    nodes = argument("a", a), argument("b", b)
    inputs = [random_of(n, {}, i) for i, n in enumerate(nodes)]
    y = coda.einsum(text, *map(Tensor, nodes))
    (found,) = evaluate([y.node], dict(zip(nodes, inputs, strict=True)), {})
    torch.testing.assert_close(found, torch.einsum(text, *inputs))


def test_one_operand_is_summed_and_permuted():
    x = argument("x", (2, 3, 4))
    value = random_of(x, {}, 0)
    for text in ("a b c -> c a", "abc->", "abc->bca"):
        (found,) = evaluate([coda.einsum(text, Tensor(x)).node], {x: value}, {})
        torch.testing.assert_close(found, torch.einsum(text, value))


def test_attention_s_scores_are_one_contraction_of_views():
    b, s, h, d = (Dim.of(n) for n in ("B", "S", "H", "d"))
    q, k = (Tensor(Input(n, (b, s, h, d), bf16)) for n in "qk")
    y = coda.einsum("b i h d, b j h d -> b h i j", q, k).node
    assert isinstance(y, Contract)
    assert y.batched
    assert [type(o) for o in y.operands] == [Permute, Permute]
    assert coda.einsum("b i h d, b j h d -> b h j i", q, k).node is Contract(y.rhs, y.lhs, bf16)
    weight = Input("w", (Dim.of("E"), d), bf16)
    assert coda.einsum("b i h d, e d -> b i h e", q, Tensor(weight)).node is Contract(
        q.node, weight, bf16
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 3, 4), (2, 4, 5)),
        ((2, 3, 4), (1, 4, 5)),
        ((3, 4), (2, 4, 5)),
        ((6, 1, 3, 4), (2, 4, 5)),
        ((4,), (2, 4, 5)),
        ((2, 3, 4), (4, 5)),
        ((2, 1, 3, 4), (1, 7, 4, 5)),
        ((0, 3, 4), (1, 4, 5)),
        ((4,), (4, 5)),
    ],
)
def test_products_of_batches_broadcast_as_torch_s(a, b):
    x, w = argument("x", a), argument("w", b)
    y = Tensor(x) @ Tensor(w)
    inputs = [random_of(x, {}, 0), random_of(w, {}, 1)]
    (found,) = evaluate([y.node], dict(zip((x, w), inputs, strict=True)), {})
    torch.testing.assert_close(found, inputs[0] @ inputs[1])
    check(Graph("f", (x, w), (("y", y.node),)), inputs, {})


def test_transposes_and_permutations():
    x = Tensor(argument("x", (2, 3, 4)))
    assert x.mT.mT.node is x.node
    assert x.permute(2, 0, 1).permute(1, 2, 0).node is x.node
    assert coda.permute(x, -1, 0, 1).node is x.permute(2, 0, 1).node
    w = Tensor(argument("w", (2, 5, 4)))
    assert (x @ w.mT).node is Contract(x.node, w.node, f64)
    value = random_of(x.node, {}, 0)
    (found,) = evaluate([x.permute(1, -1, 0).node], {x.node: value}, {})
    assert torch.equal(found, value.permute(1, -1, 0))


A, B = (Tensor(argument(n, (2, 3, 4), f32)) for n in "ab")


@pytest.mark.parametrize(
    ("write", "kind", "says"),
    [
        (lambda: coda.einsum("b i d, b j d - b i j", A, B), ShapeError, "cannot be read"),
        (lambda: coda.einsum("b i (h d), b j d -> b i j", A, B), ShapeError, "cannot be read"),
        (lambda: coda.einsum("b i d -> b i", A, B), ShapeError, "a term for each operand"),
        (lambda: coda.einsum("b i, b j d -> b i j", A, B), ShapeError, "each axis of its operand"),
        (lambda: coda.einsum("b i i, b j d -> b j", A, B), ShapeError, "the axis `i` twice"),
        (lambda: coda.einsum("b i d, b j d -> b i i", A, B), ShapeError, "the axis `i` twice"),
        (lambda: coda.einsum("b i d, b j d -> b k", A, B), ShapeError, "`k` that no operand has"),
        (lambda: coda.einsum("b i d, i j d -> b j", A, B), ShapeError, "`i` of an einsum has two"),
        (lambda: coda.einsum("b i d, b j d, j -> b", A, B, A), ShapeError, "one or two operands"),
        (lambda: coda.einsum("->"), ShapeError, "one or two operands"),
        (lambda: coda.einsum(A, "bid->b"), TraceError, "coda.einsum takes tensors"),
        (lambda: coda.einsum(3, A), TraceError, "begins with its text"),
        (lambda: coda.einsum("bid,bjd->bij", A, B.cast(bf16)), DtypeError, "one element type"),
        (lambda: A @ B, ShapeError, "or batches"),
        (lambda: A @ Tensor(argument("c", (3, 4, 5), f32)), ShapeError, "or batches"),
        (lambda: A.permute(0, 1), ShapeError, "names each axis once"),
        (lambda: A.permute(0, 1, 1), ShapeError, "names each axis once"),
        (lambda: A.T, ShapeError, "takes a matrix"),
        (lambda: A.reshape(24).mT, ShapeError, "takes matrices"),
        (lambda: coda.iota("S"), ShapeError, "has a size"),
        (lambda: coda.iota(0), ShapeError, "has a size"),
        (lambda: coda.iota(4, coda.bool_), DtypeError, "of numbers"),
        (lambda: coda.cumsum(A > 0), DtypeError, "takes numbers"),
        (lambda: coda.cumsum(A, 3), ShapeError, "axis"),
    ],
)
def test_what_is_wrong_is_one_error_with_the_line(write, kind, says):
    with pytest.raises(CodaError, match=says) as caught:
        write()
    assert type(caught.value) is kind
    assert caught.value.where is not None
    assert caught.value.where.file == __file__


@pytest.mark.parametrize("axis", [-1, -2, 0])
@pytest.mark.parametrize("reverse", [False, True])
def test_cumulative_sums(axis, reverse):
    x = argument("x", (2, 3, 4))
    value = random_of(x, {}, 0)
    y = coda.cumsum(Tensor(x), axis, reverse=reverse).node
    graph = Graph("f", (x,), (("y", y),))
    assert parse(show(graph)) == graph
    (found,) = evaluate([y], {x: value}, {})
    expected = value.flip(axis).cumsum(axis).flip(axis) if reverse else value.cumsum(axis)
    torch.testing.assert_close(found, expected)
    check(graph, [value], {})


def test_cumulative_sums_of_whole_numbers_are_whole():
    x = argument("x", (5,), i32)
    value = torch.tensor([1, 0, 2, 0, 3], dtype=torch.int32)
    (found,) = evaluate([coda.cumsum(Tensor(x)).node], {x: value}, {})
    assert found.tolist() == [1, 1, 3, 3, 6]
    assert found.dtype == torch.int32


def test_positions_make_masks():
    @coda.block
    def causal(x: coda.Tensor["S T", coda.f32]):
        i, j = coda.iota(x.shape[0]), coda.iota(x.shape[1])
        return coda.where(i[:, None] >= j, x, 0.0), coda.cumsum(x, axis=0)

    x = torch.randn(5, 7)
    masked, total = causal(x)
    assert torch.equal(masked, x.tril())
    torch.testing.assert_close(total, x.cumsum(0))
    assert {type(n).__name__ for n in walk(causal.graph.roots)} >= {"Iota", "Scan"}
