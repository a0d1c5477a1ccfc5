"""Attention, its masks and its scores: values and gradients are those of torch in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import coda
from coda import masks
from coda.errors import CodaError
from coda.frontend.tensor import Tensor
from coda.ir.dims import Dim
from coda.ir.evaluate import evaluate
from coda.ir.graph import Graph, Input
from coda.ir.text import parse, show
from coda.ir.types import bool_, f64, i64
from tests.ir.test_vjp import check
from tests.lowering.test_random_blocks import SETTINGS

SIZES = {"B": 2, "G": 2, "R": 3, "S": 7, "T": 7, "d": 4, "e": 3}
GENERATOR = torch.Generator().manual_seed(0)


def argument(name, shape, dtype=f64):
    return Input(name, tuple(Dim.of(d) for d in shape), dtype)


def operands(sizes):
    """Arguments q, k and v, and values of them."""
    b, g, r, s, t, d, e = (Dim.of(n) for n in "BGRSTde")
    nodes = [Input("q", (b, g * r, s, d), f64), Input("k", (b, g, t, d), f64)]
    nodes.append(Input("v", (b, g, t, e), f64))
    return nodes, [
        torch.randn([x.size(sizes) for x in n.shape], generator=GENERATOR, dtype=torch.float64)
        for n in nodes
    ]


def dense(q, k, v, score=None, mask=None, sinks=None):
    """(y, lse), in torch: rows without keys give 0."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    s = q @ k.mT / math.sqrt(q.shape[-1])
    b, h, i, j = (torch.arange(n) for n in s.shape)
    at = b[:, None, None, None], h[:, None, None], i[:, None], j
    s = s if score is None else score(s, *at)
    s = s if mask is None else s.masked_fill(~mask(*at), -math.inf)
    sink = None if sinks is None else sinks[:, None, None].expand(*s.shape[:3], 1)
    lse = torch.logsumexp(s if sink is None else torch.cat([s, sink], -1), -1)
    p = (s - lse[..., None].masked_fill(lse[..., None] == -math.inf, 0.0)).exp()
    return p @ v, lse


def hold(mine, theirs, sizes=None, more=()):
    """Values against torch, gradients against autograd's of the graph; `more` are arguments."""
    sizes = sizes or SIZES
    nodes, values = operands(sizes)
    nodes, values = [*nodes, *(n for n, _ in more)], [*values, *(x for _, x in more)]
    outputs = mine(*map(Tensor, nodes))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    graph = Graph("f", tuple(nodes), tuple((f"y{i}", y.node) for i, y in enumerate(outputs)))
    assert parse(show(graph)) == graph
    found = evaluate(graph.roots, dict(zip(nodes, values, strict=True)), sizes)
    expected = theirs(*values)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    check(graph, values, sizes)


IDS = argument("ids", ("B", "S"), i64), torch.tensor([[0, 0, 0, 1, 1, 2, 2], [3, 3, 5, 5, 5, 5, 7]])
LENGTHS = argument("n", ("B",), i64), torch.tensor([0, 5])
TREE = argument("tree", ("S", "S"), bool_), torch.rand(7, 7, generator=GENERATOR) < 0.5
SLOPES = argument("slopes", (6,)), torch.rand(6, generator=GENERATOR, dtype=torch.float64)
BIASES = argument("t", (8, 6)), torch.randn(8, 6, generator=GENERATOR, dtype=torch.float64)
FEW = argument("t", (6, 6)), torch.randn(6, 6, generator=GENERATOR, dtype=torch.float64)


def block_diffusion(b, h, i, j, n=4, size=2):
    """The three parts, as Arriola et al. (2025) write them."""
    of_i, of_j = (torch.where(p >= n, (p - n) // size, p // size) for p in (i, j))
    diagonal = (of_i == of_j) & ((i >= n) == (j >= n))
    offset = (of_i > of_j) & (j >= n) & (i < n)
    causal = (of_i >= of_j) & (j >= n) & (i >= n)
    return diagonal | offset | causal


# name -> (mask of coda, the same mask in torch, arguments, sizes)
MASKS = {
    "causal": (lambda: masks.causal, lambda: lambda b, h, i, j: j <= i, (), {}),
    "causal, few queries": (lambda: masks.causal_from(5), lambda: lambda b, h, i, j: j <= i + 5,
                            (), {"S": 2}),
    "causal, more queries": (lambda: masks.causal_from(-4), lambda: lambda b, h, i, j: j <= i - 4,
                             (), {"T": 3}),
    "window": (lambda: masks.sliding_window(3),
               lambda: lambda b, h, i, j: (j <= i) & (i - j < 3), (), {}),
    "chunks": (lambda: masks.every(masks.causal, masks.chunked(3)),
               lambda: lambda b, h, i, j: (j <= i) & (i // 3 == j // 3), (), {}),
    "documents": (lambda ids: masks.every(masks.documents(ids), masks.causal),
                  lambda ids: lambda b, h, i, j: (ids[b, i] == ids[b, j]) & (j <= i), (IDS,), {}),
    "prefix": (masks.prefix, lambda n: lambda b, h, i, j: (j <= i) | (j < n[b]), (LENGTHS,), {}),
    "tree": (lambda t: masks.tree(t, 3),
             lambda t: lambda b, h, i, j: (j < 3) | t[i, (j - 3).clamp(min=0)], (TREE,),
             {"T": 10}),
    "diffusion": (lambda: masks.block_diffusion(4, 2), lambda: block_diffusion, (),
                  {"S": 8, "T": 8}),
    "window or first": (lambda: masks.some(masks.sliding_window(2), lambda b, h, i, j: j < 1),
                        lambda: lambda b, h, i, j: (j <= i) & (i - j < 2) | (j < 1), (), {}),
    "by head": (lambda: lambda b, h, i, j: (h % 2 == 0) | (j <= i),
                lambda: lambda b, h, i, j: (h % 2 == 0) | (j <= i), (), {}),
    "rows without keys": (lambda: lambda b, h, i, j: (j < i) & (i != 4),
                          lambda: lambda b, h, i, j: (j < i) & (i != 4), (), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mine, theirs, more, sizes = MASKS[name]
    hold(
        lambda q, k, v, *a: coda.attention(q, k, v, mask=mine(*a), return_lse=True),
        lambda q, k, v, *a: dense(q, k, v, mask=theirs(*a)),
        SIZES | sizes,
        more,
    )


def t5(table, both_ways, far=6):
    """Hugging Face's buckets."""

    def score(s, b, h, i, j):
        count, away = len(table) // (1 + both_ways), j - i
        first = (away > 0).long() * count * both_ways
        away = away.abs() if both_ways else -away.clamp(max=0)
        near = count // 2
        large = torch.log(away.float() / near) / math.log(far / near) * (count - near)
        large = (near + large.nan_to_num(0, 0, 0).long()).clamp(max=count - 1)
        return s + table[first + torch.where(away < near, away, large), h]

    return score


SCORES = {
    "alibi": (masks.alibi, lambda m: lambda s, b, h, i, j: s - m[h] * (i - j), (SLOPES,)),
    "softcap": (lambda: masks.softcapped(0.5),
                lambda: lambda s, b, h, i, j: 0.5 * torch.tanh(2 * s), ()),
    "T5, both ways": (lambda t: masks.relative_bias(t, far=6), lambda t: t5(t, True), (BIASES,)),
    "T5, causal": (lambda t: masks.relative_bias(t, far=6, both_ways=False),
                   lambda t: t5(t, False), (FEW,)),
    "positions alone": (lambda: lambda s, b, h, i, j: (j % 3).cast(s.dtype),
                        lambda: lambda s, b, h, i, j: (j % 3).expand(s.shape).double(), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("masked", [False, True])
def test_scores(name, masked):
    mine, theirs, more = SCORES[name]
    mask = (masks.causal, lambda b, h, i, j: j <= i) if masked else (None, None)
    hold(
        lambda q, k, v, *a: coda.attention(q, k, v, score=mine(*a), mask=mask[0]),
        lambda q, k, v, *a: dense(q, k, v, theirs(*a), mask[1])[0],
        more=more,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_sinks(masked):
    """Also in rows without keys, which give 0."""
    sinks = (
        argument("sinks", (Dim.of("G") * Dim.of("R"),)),
        torch.randn(6, generator=GENERATOR, dtype=torch.float64),
    )
    mask = (lambda b, h, i, j: j < i) if masked else None
    hold(
        lambda q, k, v, s: coda.attention(q, k, v, mask=mask, sinks=s, return_lse=True),
        lambda q, k, v, s: dense(q, k, v, mask=mask, sinks=s),
        more=(sinks,),
    )


def test_plain_attention_is_torch_s():
    hold(
        coda.attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    )


def test_a_scale():
    hold(
        lambda q, k, v: coda.attention(q, k, v, scale=0.3),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True),
    )


def test_sigmoid_attention():
    hold(
        lambda q, k, v: coda.sigmoid_attention(q, k, v, mask=masks.causal),
        lambda q, k, v: (
            torch.tril(torch.sigmoid(q @ k.repeat_interleave(3, 1).mT / 2))
            @ v.repeat_interleave(3, 1)
        ),
    )


@st.composite
def conditions(draw, depth=3):
    """A mask of positions, as text that coda and torch both evaluate."""
    if not depth or draw(st.booleans()):
        a, b = (draw(st.sampled_from(TERMS)) for _ in range(2))
        return f"({a} {draw(st.sampled_from(('<=', '<', '==', '!=', '>')))} {b})"
    if draw(st.integers(0, 3)) == 0:
        return f"~{draw(conditions(depth - 1))}"
    a, b = draw(conditions(depth - 1)), draw(conditions(depth - 1))
    return f"({a} {draw(st.sampled_from('&|^'))} {b})"


TERMS = ("i", "j", "b", "h", "i // 2", "j % 3", "(i - j)", "(j - i) // 3", "(i * 2 + b)", "h % 2")


@settings(SETTINGS, max_examples=25)
@given(conditions(), st.sampled_from((1, 2, 7)), st.sampled_from((1, 3, 7)))
def test_masks_at_random(text, rows, keys):
    """Any condition of positions, also of rows without keys, forward and backward."""
    mask = eval(f"lambda b, h, i, j: {text}")
    hold(
        lambda q, k, v: coda.attention(q, k, v, mask=mask, return_lse=True),
        lambda q, k, v: dense(q, k, v, mask=mask),
        SIZES | {"S": rows, "T": keys},
    )


AXES = {"q": ("B", 6, "S", "d"), "k": ("B", 2, "T", "d"), "v": ("B", 2, "T", "e")}
Q, K, V = (Tensor(argument(name, axes)) for name, axes in AXES.items())


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda: coda.attention(Q[:, 0], K, V), r"queries \[B, H, S, d\] and keys"),
        (lambda: coda.attention(V, K, V), r"queries \[B, H, S, d\] and keys"),
        (lambda: coda.attention(Q, K, Q), r"values \[B, G, T, e\]"),
        (lambda: coda.attention(Q[:, :5], K, V), "a whole number of heads of queries"),
        (lambda: coda.attention(Q, K, V.cast(coda.bf16)), "one element type"),
        (lambda: coda.attention(Q, K, V, mask=lambda b, h, i, j: j), "gives a condition"),
        (lambda: coda.attention(Q, K, V, mask=lambda b, h, i, j: Q[0, 0] > 0), "for each b, h"),
        (lambda: coda.attention(Q, K, V, score=lambda s, b, h, i, j: j), "gives floats"),
        (lambda: coda.attention(Q, K, V, score=lambda s, b, h, i, j: Q), "for each b, h, i and j"),
        (lambda: coda.attention(Q, K, V, score=lambda s, b, h, i, j: 1.0), "gives a tensor"),
        (lambda: coda.attention(Q, K, V, sinks=Q), "one number for each head"),
        (lambda: coda.attention(Q, None, V), "takes tensors of the block"),
    ],
)
def test_what_is_wrong_is_one_error_with_the_line(write, says):
    with pytest.raises(CodaError, match=says) as caught:
        write()
    assert caught.value.where.file == __file__
