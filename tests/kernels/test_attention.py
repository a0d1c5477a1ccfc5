"""Attention as one kernel: which scores and widths it takes, and what flash-attention computes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coda
from coda import kernels, masks
from coda.ir.attend import Attend
from coda.ir.evaluate import evaluate
from coda.ir.graph import walk
from coda.kernels.attention.band import banded, keeps_a_key
from coda.kernels.attention.kind import ATTENTION
from coda.kernels.attention.mainloop import Attention, pairs_up_to
from coda.kernels.attention.problem import Band, Forward, tile_of, why_not_widths
from coda.lowering.algebra.attends import attends
from coda.lowering.algebra.constants import fold_constants
from coda.lowering.algebra.laws import LAWS
from coda.lowering.algebra.rewrite import rewrite
from coda.measure import random_inputs
from coda.runtime.simulate import device
from tests.kernels.test_kernels import hold_against_float64, on_both
from tests.lowering.test_random_blocks import SETTINGS

T = coda.Tensor
SIZES = {"B": 2, "G": 2, "R": 2, "S": 5, "T": 7, "d": 16, "e": 8}


def block_of(mask=None, score=None):
    @coda.block
    def f(q: T["B (G R) S d"], k: T["B G T d"], v: T["B G T e"]):
        return coda.attention(q, k, v, mask=mask, score=score)

    return f


def normal(block):
    graph = block.graph
    graph = graph.with_roots(rewrite(graph.roots, LAWS, lambda *_: False))
    return fold_constants(graph, SIZES)


def attention_of(block):
    """The attention of a block, of any scores."""
    found = []

    attends(normal(block), SIZES, lambda node, sizes: bool(found.append(node)) or True)
    return found[0]


def kept(node, sizes):
    """Which scores are not -inf, [S, T]."""
    score, *_ = node.scores.inputs
    shape = [d.size(sizes) for d in score.shape]
    (s,) = evaluate([node.scores.root], {score: torch.ones(shape)}, sizes)
    return (s > -math.inf)[0, 0]


BANDS = {
    "causal": (masks.causal, (None, 0)),
    "from a position": (masks.causal_from(3), (None, 3)),
    "window": (masks.sliding_window(3), (-2, 0)),
    "all": (None, (None, None)),
    "the other way": (lambda b, h, i, j: i - j <= 5, (-5, None)),
    "three ends": (lambda b, h, i, j: (i <= j + 3) & (j < i + 2) & (j <= i), (-3, 0)),
    "of a slice": (lambda b, h, i, j: j + 1 > i - 1, (-1, None)),
}
NO_BANDS = {
    "chunks": masks.chunked(2),
    "equality": lambda b, h, i, j: i == j,
    "columns": lambda b, h, i, j: j < 3,
    "a choice": lambda b, h, i, j: (j <= i) | (j < 2),
    "heads": lambda b, h, i, j: j <= i + h,
    "twice": lambda b, h, i, j: j + j <= i,
}


@pytest.mark.parametrize("name", BANDS)
def test_bands(name):
    mask, ends = BANDS[name]
    node = attention_of(block_of(mask))
    found = banded(node)
    assert found.scale == 0.25
    assert found.rest is None
    assert tuple(e if e is None else e.constant for e in (found.lower, found.upper)) == ends


@pytest.mark.parametrize("name", NO_BANDS)
def test_other_masks_are_no_bands(name):
    found = banded(attention_of(block_of(NO_BANDS[name])))
    assert found.rest is not None
    assert found.lower is found.upper is None


def test_other_scores_are_no_bands():
    for score in (
        lambda s, b, h, i, j: s + (j - i).cast(s.dtype),
        lambda s, b, h, i, j: coda.tanh(s),
        lambda s, b, h, i, j: s * s,
    ):
        assert banded(attention_of(block_of(score=score))).rest is not None


LOW = {"-inf": -math.inf, "lowest": torch.finfo(torch.bfloat16).min}


@pytest.mark.parametrize("name", LOW)
def test_bands_of_masks_that_are_added_or_low(name):
    """They mask as -inf does, if each row keeps a key; some of these rows keep none."""

    def added(positions, low):
        return coda.where(positions[3] <= positions[2] - low, 0.0, LOW[name])

    for low, taken in ((0, True), (4, name == "-inf")):
        for score in (
            lambda s, *p, m=low: s + added(p, m).cast(s.dtype),
            lambda s, *p, m=low: added(p, m).cast(s.dtype) + s,
            lambda s, b, h, i, j, m=low: coda.where(j <= i - m, s, LOW[name]),
        ):
            found = banded(attention_of(block_of(score=score)))
            assert (found.rest is None) == taken
            assert (found.upper is not None) == taken


def test_other_masks_that_are_low_stay_as_they_are():
    """A row that keeps none of its band's keys has equal weights for all keys."""

    def score(s, b, h, i, j):
        return coda.where((j <= i) & (j // 2 == i // 2), s, -3e38)

    found = banded(attention_of(block_of(score=score)))
    assert found.rest is not None
    assert found.upper is None
    high = banded(attention_of(block_of(score=lambda s, b, h, i, j: coda.where(j <= i, s, -1e9))))
    assert high.rest is not None


@settings(SETTINGS, max_examples=30)
@given(*[st.integers(-9, 9)] * 2, *[st.integers(1, 8)] * 2)
def test_pairs_of_a_band(lower, upper, rows, keys):
    apart = torch.arange(keys) - torch.arange(rows)[:, None]
    assert pairs_up_to(upper, rows, keys) == int((apart <= upper).sum())
    mask = masks.every(lambda b, h, i, j: j - i <= upper, lambda b, h, i, j: j - i >= lower)
    sizes = SIZES | {"S": rows, "T": keys}
    kernel = Attention((attention_of(block_of(mask)),), ("y",))
    inside = int(((apart <= upper) & (apart >= lower)).sum())
    assert kernel.pairs(sizes) == 2 * 4 * inside


TERMS = ("i", "j", "(i + 2)", "(j - 1)", "(j - i)", "(i - j)", "1", "0", "-2", "h")


@st.composite
def comparisons(draw):
    a, b = draw(st.sampled_from(TERMS[:6])), draw(st.sampled_from(TERMS))
    return f"({a} {draw(st.sampled_from(('<=', '<', '==', '>=', '>')))} {b})"


@settings(SETTINGS, max_examples=60)
@given(st.lists(comparisons(), min_size=1, max_size=3), st.sampled_from("&|"))
def test_a_band_is_what_the_mask_keeps(parts, sign):
    """For random conditions: either it is no band, or it is the mask, for all sizes."""
    node = attention_of(block_of(eval(f"lambda b, h, i, j: {sign.join(parts)}")))
    found = banded(node)
    if found.rest is not None:
        return
    for s, t in itertools.product((1, 4, 6), repeat=2):
        sizes = SIZES | {"S": s, "T": t}
        apart = torch.arange(t) - torch.arange(s)[:, None]
        low = -99 if found.lower is None else found.lower.size(sizes)
        high = 99 if found.upper is None else found.upper.size(sizes)
        mask = (apart >= low) & (apart <= high)
        assert torch.equal(mask, kept(node, sizes))
        assert not keeps_a_key(node, found) or mask.any(1).all()


def test_widths():
    taken = {(d, e) for d in range(4, 264, 4) for e in (8, 64, 128, 192, 256)
             if not why_not_widths(d, e, tensor_memory=False)}  # fmt: skip
    assert {(40, 64), (96, 128), (128, 64), (192, 128), (256, 256), (72, 8)} <= taken
    assert not taken & {(12, 64), (4, 8), (264, 256)}
    for widths in ((40, 64), (128, 128), (192, 128), (256, 256)):
        assert not why_not_widths(*widths, tensor_memory=True)
    for widths in ((192, 192), (256, 128), (136, 128), (128, 192), (64, 512)):
        assert "no kernel of Blackwell" in why_not_widths(*widths, tensor_memory=True)
    tiles = [tile_of(Forward("", False, "bf16", d, d, band=band)) for d in (64, 96, 128, 192, 256)
             for band in (Band(), Band(diagonal=True))]  # fmt: skip
    assert [(t.rows, t.columns) for t in tiles] == [
        (192, 128), (192, 128), (192, 144), (192, 128), (128, 128), (128, 128),
        (128, 112), (128, 96), (128, 80), (128, 64)]  # fmt: skip


REFUSED = {
    "f32": (block_of(), coda.f32, {}),
    "widths": (block_of(), coda.bf16, {"d": 12}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_takes_is_as_before(name):
    """Two contractions and a row-wise kernel; scores of torch are not made of what GEMMs take."""
    block, dtype, sizes = REFUSED[name]
    program = block.lower("sm_90a", SIZES | sizes, dtype=dtype)
    assert ATTENTION not in [k.kind for k in program.kernels]
    assert not any(isinstance(n, Attend) for k in program.kernels for n in k.nodes)


def test_scores_that_others_read_are_stored():
    @coda.block
    def f(q: T["B G S d"], k: T["B G T d"], v: T["B G T e"]):
        p = coda.softmax(q @ k.mT)
        return p @ v, coda.max(p)

    assert ATTENTION not in [k.kind for k in f.lower("sm_90a", without("R")).kernels]
    forward, backward = block_of().lower_training("sm_90a", SIZES)
    assert ATTENTION not in [k.kind for k in (*forward.kernels, *backward.kernels)]


def without(name):
    return {s: n for s, n in SIZES.items() if s != name}


def test_softmax_by_hand_is_attention_where_each_row_keeps_a_key():
    def f(low, other=None):
        @coda.block
        def f(q: T["B G S d"], k: T["B G S d"], v: T["B G S e"]):
            i, j = coda.iota(q.shape[2])[:, None], coda.iota(k.shape[2])
            mask = (j <= i) & (j >= i - low)
            mask = mask & other(i, j) if other else mask
            return coda.softmax(coda.where(mask, q @ k.mT, -math.inf)) @ v

        sizes = {s: n for s, n in SIZES.items() if s not in "TR"}
        return [k.kind for k in f.lower("sm_90a", sizes).kernels]

    assert f(0) == f(2) == [ATTENTION]
    # The first row keeps nothing, and is NaN; of documents it is not known. Its logsumexp tells.
    assert f(-1)[0] is f(2, lambda i, j: i // 2 == j // 2)[0] is ATTENTION
    assert len(f(-1)) == 2


@coda.block
def layer(
    x: T["B S D"], w: T["D"], w_q: T["(G R d) D"], w_k: T["(G d) D"], w_v: T["(G d) D"],
    w_o: T["D (G R d)"], cos: coda.Constant["S d/2"], sin: coda.Constant["S d/2"],
):  # fmt: skip
    h = coda.rms_norm(x, w)
    q = (h @ w_q.T).reshape("B S (G R d) -> B S (G R) d")
    k, v = ((h @ m.T).reshape("B S (G d) -> B S G d") for m in (w_k, w_v))
    q, k, v = (t.permute(0, 2, 1, 3) for t in (coda.rope(q, cos, sin), coda.rope(k, cos, sin), v))
    y = coda.attention(q, k, v, mask=masks.causal).permute(0, 2, 1, 3)
    return x + y.reshape("B S (G R) d -> B S (G R d)") @ w_o.T


LLAMA = {"B": 2, "S": 160, "D": 64, "G": 1, "R": 2, "d": 64}


def test_a_layer_has_no_copy_of_q_k_v_and_o():
    """They are columns of the buffers of the GEMMs beside them, and RoPE is in the epilogue."""
    program = layer.lower("sm_90a", LLAMA)
    assert [k.name for k in program.kernels] == ["rows0", "gemm1", "attention2", "gemm3"]
    _, projection, attention, out = program.kernels
    assert len({program.places[n].buffer for n in map(bases, attention.mainloop.operands)}) == 1
    assert len(projection.writes()) == 1
    assert attention.writes() == tuple(program.places[bases(out.mainloop.a)].buffer for _ in "1")
    assert "S" not in program.fixed


def bases(node):
    from coda.lowering.algebra.roles import base

    return base(node)


# Sizes of S and T, heads on heads, widths, and the mask.
CASES = {
    "causal, 2 on 1": (layer, LLAMA),
    "window, ragged": (block_of(masks.sliding_window(50)),
                       {"B": 1, "G": 2, "R": 1, "S": 129, "T": 200, "d": 64, "e": 64}),
    "few queries, 3 on 1": (block_of(masks.causal_from(120)),
                            {"B": 2, "G": 1, "R": 3, "S": 7, "T": 127, "d": 40, "e": 64}),
    "rows without keys": (block_of(lambda b, h, i, j: j <= i - 40),
                          {"B": 1, "G": 1, "R": 1, "S": 160, "T": 130, "d": 128, "e": 64}),
    "all keys, 192 and 128": (block_of(),
                              {"B": 1, "G": 1, "R": 2, "S": 130, "T": 160, "d": 192, "e": 128}),
    "one of each": (block_of(masks.causal),
                    {"B": 1, "G": 1, "R": 1, "S": 1, "T": 1, "d": 64, "e": 64}),
}  # fmt: skip
DEFAULT = ("few queries, 3 on 1", "sm_90a")


@pytest.mark.parametrize(("name", "arch"), on_both(CASES, DEFAULT))
def test_kernels(name, arch):
    """Also the second call, which replays the first, on other values."""
    block, sizes = CASES[name]
    assert ATTENTION in [k.kind for k in block.lower(arch, sizes).kernels]
    with device(arch, checks="raise") as gpu:
        for seed in (0, 1):
            hold_against_float64(block, random_inputs(block.graph, sizes, seed), sizes)
        assert not gpu.report().findings


def test_no_queries():
    for sizes in ({"S": 0}, {"B": 0}):
        known = SIZES | sizes
        q, k, v = random_inputs(block_of().graph, known)
        with device("sm_90a", checks="raise"):
            y = block_of()(q, k, v, backend="sim", arch="sm_90a", dims={"G": 2, "R": 2})
        assert y.shape == (known["B"], 4, known["S"], 8)
        assert not y.any()


def test_the_kind_is_one_of_the_list():
    assert ATTENTION in kernels.KINDS
    assert not [n for n in walk(block_of().graph.roots) if isinstance(n, Attend)]
