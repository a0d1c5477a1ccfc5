"""Functions of scores: which are generated, as what text, and what flash-attention makes of it."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coda
from coda import masks
from coda.ir.attend import LSE
from coda.ir.evaluate import evaluate
from coda.ir.graph import Const, Input, Map, Reshape
from coda.ir.scalars import SCALARS
from coda.ir.types import f32
from coda.kernels.attention.band import banded, keeps_a_key
from coda.kernels.attention.kind import ATTENTION
from coda.kernels.attention.scores import score_function
from coda.lowering.placement.values import Refused
from coda.lowering.program.text import program_source
from coda.measure import random_inputs
from coda.runtime.simulate import device
from tests.kernels.test_attention import attention_of
from tests.kernels.test_kernels import ARCHS, on_both
from tests.lowering.test_random_blocks import SETTINGS

T = coda.Tensor
SIZES = {"B": 2, "G": 2, "R": 2, "S": 5, "T": 7, "d": 16, "e": 8, "N": 6}


def block_of(mask=None, score=None, scale=None):
    """Functions of positions and of four captured tensors: ids, lengths, slopes and a table."""

    @coda.block
    def f(
        q: T["B (G R) S d"], k: T["B G T d"], v: T["B G T e"],
        ids: T["B T", coda.i64], lengths: T["B", coda.i32],
        slopes: T["(G R)", coda.f32], table: T["N (G R)"],
    ):  # fmt: skip
        more = ids, lengths, slopes, table
        given = {"mask": mask and (lambda *p: mask(*p, *more))}
        given["score"] = score and (lambda *p: score(*p, *more))
        return coda.attention(q, k, v, scale=scale, return_lse=True, **given)

    return f


def inputs_of(block, sizes, seed=0):
    q, k, v, ids, lengths, slopes, table = random_inputs(block.graph, sizes, seed)
    ids = (torch.arange(sizes["T"]) // 3).expand(sizes["B"], -1).contiguous() + (1 << 40)
    lengths = torch.arange(sizes["B"], dtype=torch.int32) * 3 + 2
    return [q, k, v, ids, lengths, slopes, table]


# The text.


def _element(x, *index):
    at = [torch.as_tensor(i).long().clamp(0, n - 1) for i, n in zip(index, x.shape, strict=True)]
    found = x[tuple(torch.broadcast_tensors(*at))]
    return found if found.dtype in (torch.int32, torch.int64) else found.double()


def run_text(text, s, positions, captured):
    """The module of a function, run by torch with all scores as one tensor."""
    names = {row.device or name: row.evaluate for name, row in SCALARS.items()}
    wide = {n: _in_float64(f) for n, f in names.items()}
    wide |= {"element": _element, "real": lambda x: x.double()}
    wide["condition"] = lambda x: (x != 0).double()
    wide["whole32"] = lambda x: torch.as_tensor(x).to(torch.int32)
    wide["whole64"] = lambda x: torch.as_tensor(x).to(torch.int64)
    exec("\n".join(line for line in text.split("\n") if not line.startswith("from")), wide)
    return wide["score"](s, *positions, captured)


def _in_float64(evaluate):
    def call(*args):
        tensors = [torch.as_tensor(a) for a in args]
        kept = [t.double() if t.dtype in (torch.bool, torch.float32) else t for t in tensors]
        found = evaluate(*kept)
        return found.double() if found.dtype == torch.bool else found

    return call


def held(node, sizes, values):
    """The scores of an attention by its band and its text, and as they are defined."""
    score, *names = node.scores.inputs
    found, shape = banded(node), [d.size(sizes) for d in score.shape]
    x = torch.randn(shape, dtype=torch.float64)
    known = dict(zip(names, evaluate(node.captured, values, sizes, torch.float64), strict=True))
    (exact,) = evaluate([node.scores.root], {score: x, **known}, sizes, torch.float64)
    index = torch.meshgrid(*(torch.arange(n, dtype=torch.int32) for n in shape), indexing="ij")
    y = x * found.scale
    if found.rest is not None:
        made = score_function(found.rest, node.scores.inputs)
        given = [t if t.ndim else t.reshape(1) for t in known.values()]
        numbers = [torch.tensor(d.size(sizes), dtype=torch.int32) for d in made.numbers]
        y = run_text(made.text, y, index, [*given, *numbers])
    apart = index[3] - index[2]
    low = -99 if found.lower is None else found.lower.size(sizes)
    high = 99 if found.upper is None else found.upper.size(sizes)
    y = y.masked_fill((apart < low) | (apart > high), -math.inf)
    return y, exact.expand(shape)


WHOLE = ("i", "j", "b", "h", "(i - j)", "(j + 2)", "((j - i) // 3)", "(j - 1)", "abs(i - j)", "2",
         "coda.maximum(i, j - 2)", "lengths[b]", "(i * j)")  # fmt: skip
WIDE = ("ids[b, i]", "ids[b, j]", "ids[b, coda.maximum(j - 2, 0)]")
FLOATS = ("s", "slopes[h]", "(j - i).cast(coda.f32)", "coda.tanh(s)", "0.5",
          "table[coda.minimum(abs(i - j), 5), h]", "lengths[b].cast(coda.f32)",
          "coda.where(i > j, s, -s)")  # fmt: skip
COMPARISONS = ("<=", "<", "==", ">=", ">", "!=")


@st.composite
def conditions(draw, depth=2):
    if depth and draw(st.booleans()):
        a, b = draw(conditions(depth - 1)), draw(conditions(depth - 1))
        return f"({a} {draw(st.sampled_from('&&|^'))} {b})"
    of = draw(st.sampled_from((WHOLE, WHOLE, WIDE)))
    a, b = draw(st.sampled_from(of)), draw(st.sampled_from(of))
    compared = f"({a} {draw(st.sampled_from(COMPARISONS))} {b})" if a != b != "2" else "(i >= j)"
    return draw(st.sampled_from((compared, compared, "(j - 2).cast(coda.bool_)")))


@st.composite
def scores(draw):
    parts = draw(st.lists(st.sampled_from(FLOATS), min_size=1, max_size=3))
    text = "s"
    for part in parts:
        text = f"({text} {draw(st.sampled_from('+-*'))} {part}.cast(s.dtype))".replace(
            "0.5.cast(s.dtype)", "0.5"
        )
    return text


ARGUMENTS = "b, h, i, j, ids, lengths, slopes, table"


@settings(SETTINGS, max_examples=25)
@given(conditions(), scores(), st.sampled_from((None, 1.0, -0.5)))
def test_the_text_is_the_function(condition, score, scale):
    """For random masks and scores at random sizes: band, scale and text give each score."""
    mask = eval(f"lambda {ARGUMENTS}: {condition}", {"coda": coda})
    function = eval(f"lambda s, {ARGUMENTS}: {score}", {"coda": coda})
    block = block_of(mask, function, scale)
    node = attention_of(block)
    for s, t in itertools.product((1, 4, 6), repeat=2):
        sizes = SIZES | {"S": s, "T": max(s, t)}
        values = dict(zip(block.graph.inputs, inputs_of(block, sizes), strict=True))
        found, exact = held(node, sizes, values)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


@settings(SETTINGS, max_examples=20)
@given(conditions(1), conditions(1), st.sampled_from(("j <= i", "j >= i - 1", "i < 9")))
def test_nested_masks_are_one(first, second, third):
    """where(a, where(b, s, -inf), -inf) is where(a & b, s, -inf), bands or not."""
    inner = f"coda.where({second}, coda.where({third}, s, low), low)"
    names = {"coda": coda, "low": -math.inf}
    function = eval(f"lambda s, {ARGUMENTS}: {inner}", names)
    block = block_of(eval(f"lambda {ARGUMENTS}: {first}", names), function)
    node = attention_of(block)
    for s in (1, 5):
        sizes = SIZES | {"S": s, "T": 6}
        values = dict(zip(block.graph.inputs, inputs_of(block, sizes), strict=True))
        torch.testing.assert_close(*held(node, sizes, values), rtol=1e-9, atol=1e-9)


@settings(SETTINGS, max_examples=20)
@given(st.integers(-3, 3), st.booleans(), st.sampled_from((-math.inf, -3e38, -1e4, -1.0)))
def test_masks_that_are_added_have_the_same_weights(far, window, low):
    """s + where(m, 0, low): as a mask where that is the same, and as it is elsewhere."""

    def score(s, b, h, i, j, *more):
        kept = j <= i + far
        kept = kept & (j >= i - 2) if window else kept
        return s * 0.5 + coda.where(kept, 0.0, low).cast(s.dtype)

    block = block_of(score=score)
    node = attention_of(block)
    for s, t in ((1, 1), (6, 6), (6, 4)):
        sizes = SIZES | {"S": s, "T": t}
        values = dict(zip(block.graph.inputs, inputs_of(block, sizes), strict=True))
        found, exact = (x.softmax(-1).nan_to_num(-1.0) for x in held(node, sizes, values))
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    assert (banded(node).rest is None) == (
        low == -math.inf or (low < -1e30 and far >= 0 and not window)
    )


def test_bands_are_told_apart_from_the_rest():
    """What is no band stays in the function, and all that is one leaves it."""
    far = masks.every(masks.causal, masks.chunked(2), masks.sliding_window(3))
    node = attention_of(block_of(lambda b, h, i, j, *more: far(b, h, i, j)))
    found = banded(node)
    assert (found.lower.constant, found.upper.constant, found.scale) == (-2, 0, 0.25)
    made = score_function(found.rest, node.scores.inputs)
    assert len(re.findall(r"floordiv\(", made.text)) == 2
    assert " - " not in made.text
    assert not keeps_a_key(node, found)


def test_a_factor_is_an_argument():
    """Of all that reads a score; a negative one, too, whose largest score is not of q kᵀ's."""
    for scale, score, text in (
        (0.3, lambda s, *more: coda.tanh(s), "    v0 = tanh(s)\n    return v0"),
        (-2.0, None, "    return s"),
    ):
        node = attention_of(block_of(score=score, scale=scale))
        found = banded(node)
        assert found.scale == scale
        assert score_function(found.rest, node.scores.inputs).text.endswith(text)


def test_functions_that_differ_in_a_number_are_compiled_apart():
    """flash-attention's own hash does not tell s · 2 from s · 3."""
    blocks = [block_of(score=lambda s, *more, c=c: coda.tanh(s) * c) for c in (2.0, 3.0, 2.0)]
    programs = [b.lower("sm_90a", SIZES) for b in blocks]
    texts = [p.kernels[0].mainloop.problem(p.target, SIZES).scores for p in programs]
    assert texts[0] == texts[2] != texts[1]
    assert "tanh(s)" in program_source(programs[0])


def test_what_a_score_cannot_read():
    s = Input("s", T["2 2 3 4"].shape, f32)
    with pytest.raises(Refused, match="a `reshape` of positions"):
        score_function(Reshape(s, T["1 4 3 4"].shape), (s,))
    wide = Input("w", T["4"].shape, coda.f64)
    with pytest.raises(Refused, match="elements of f64"):
        score_function(Map("add", (s, wide)), (s, wide))
    assert score_function(Map("mul", (s, Const(2.0, f32))), (s,)).flops == 1


def test_values_of_heads_are_computed_before():
    """A special function of what does not vary by score is a tensor that another kernel makes."""

    def score(s, b, h, i, j, ids, lengths, slopes, table):
        return s * coda.exp(slopes)[h].cast(s.dtype)

    block = block_of(score=score)
    program = block.lower("sm_90a", SIZES, frozen=False)
    assert [k.kind.name for k in program.kernels] == ["rows", "attention"]
    assert "exp" not in program.kernels[1].mainloop.function.text


# Kernels.

RAGGED = {"B": 2, "G": 1, "R": 3, "S": 130, "T": 200, "d": 64, "e": 64, "N": 32}
SQUARE = {"B": 2, "G": 2, "R": 1, "S": 160, "T": 160, "d": 64, "e": 64, "N": 32}
FEW = {"B": 1, "G": 1, "R": 4, "S": 1, "T": 129, "d": 128, "e": 64, "N": 8}


def strict(b, h, i, j, ids, *more):
    return (ids[b, i] == ids[b, j]) & (j < i)


def sloped(s, b, h, i, j, ids, lengths, slopes, table):
    return masks.alibi(slopes)(s, b, h, i, j)


def bucketed(s, b, h, i, j, ids, lengths, slopes, table):
    return masks.relative_bias(table)(s, b, h, i, j)


CASES = {
    "documents and slopes": (strict, sloped, RAGGED),
    "softcap": (None, lambda s, *more: masks.softcapped(5.0)(s, *more[:4]), RAGGED),
    "a window of softcapped scores": (
        lambda b, h, i, j, *more: masks.sliding_window(50)(b, h, i, j),
        lambda s, *more: masks.softcapped(2.0)(s, *more[:4]),
        SQUARE,
    ),
    "buckets": (None, bucketed, SQUARE),
    "prefix": (lambda b, h, i, j, ids, n, *more: masks.prefix(n)(b, h, i, j), None, RAGGED),
    "chunks": (lambda b, h, i, j, *more: masks.chunked(48)(b, h, i, j), None, RAGGED),
    "block diffusion": (
        lambda b, h, i, j, *more: masks.block_diffusion(80, 16)(b, h, i, j), None, SQUARE),
    "a query": (lambda b, h, i, j, ids, n, *more: j < 100 + n[b], sloped, FEW),
    "whole numbers": (
        lambda b, h, i, j, *more: ((j - i) // 3 != 5) & (coda.minimum(j, i * 2) >= abs(i - j) // 2),
        lambda s, b, h, i, j, *more: s + ((j - i) // 7).cast(s.dtype) * 0.01,
        RAGGED,
    ),
    "a negative factor": (None, lambda s, *more: s * -3.0, RAGGED),
}  # fmt: skip
DEFAULT = ("documents and slopes", "sm_90a")


@pytest.mark.parametrize(("name", "arch"), on_both(CASES, DEFAULT))
def test_kernels(name, arch):
    """Also the second call, which replays the first, on other values."""
    mask, score, sizes = CASES[name]
    block = block_of(mask, score)
    assert [k.kind for k in block.lower(arch, sizes).kernels] == [ATTENTION]
    with device(arch, checks="raise") as gpu:
        for seed in (0, 1):
            run(block, inputs_of(block, sizes, seed), arch, sizes)
        assert not gpu.report().findings


def run(block, inputs, arch, sizes):
    """Hold a call to float64."""
    dims = {s: sizes[s] for s in ("G", "R")}
    y, lse = block(*inputs, backend="sim", arch=arch, dims=dims)
    known = dict(zip(block.graph.inputs, inputs, strict=True))
    exact, all_lse = evaluate(block.graph.roots, known, sizes, torch.float64)
    none = torch.isneginf(all_lse)
    assert torch.equal(torch.isneginf(lse), none)
    assert (lse - all_lse).masked_fill(none, 0.0).abs().amax() <= 2e-4 * all_lse[~none].abs().amax()
    assert (y.double() - exact).norm() <= 4e-3 * exact.norm()


@coda.block
def biased(
    q: T["B H S d"],
    k: T["B H T d"],
    v: T["B H T e"],
    bias: T["B H S T"],
    tree: T["S S", coda.bool_],
):
    mask = masks.tree(tree, k.shape[2] - q.shape[2])
    return coda.attention(
        q, k, v, mask=mask, score=lambda s, b, h, i, j: s + bias[b, h, i, j], return_lse=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_a_bias_and_a_tree(arch):
    """Tensors that are captured whole, and a size that is an argument; of any strides."""
    sizes = {"B": 2, "H": 2, "S": 40, "T": 160, "d": 64, "e": 64}
    q, k, v, bias, tree = random_inputs(biased.graph, sizes)
    tree = torch.rand(40, 40).tril() > 0.3
    with device(arch, checks="raise") as gpu:
        for other in (bias, bias[:, :, :, :1].expand(-1, -1, -1, 160), bias.mT.contiguous().mT):
            inputs = [q, k, v, other, tree]
            y, lse = biased(*inputs, backend="sim", arch=arch)
            known = dict(zip(biased.graph.inputs, inputs, strict=True))
            exact, all_lse = evaluate(biased.graph.roots, known, sizes, torch.float64)
            assert (y.double() - exact).norm() <= 4e-3 * exact.norm()
            assert (lse - all_lse).abs().amax() <= 2e-4 * all_lse.abs().amax()
        assert not gpu.report().findings


def test_both_results_read_the_same_function():
    program = biased.lower("sm_90a", {"B": 2, "H": 2, "S": 4, "T": 9, "d": 16, "e": 8})
    (kernel,) = program.kernels
    assert kernel.mainloop.buffer(LSE) is not None
    assert [x.name for x in kernel.mainloop.node.captured] == ["tree", "bias"]
    assert "score(0.25 · q kᵀ, tree, bias)" in str(program)


@coda.block
def by_hand(q: T["B H S d"], k: T["B H T d"], v: T["B H T e"], bias: T["H S T"]):
    return coda.softmax(q @ k.mT * 0.125 + bias) @ v


def hidden_rows():
    """Arguments of `by_hand` with two rows that keep no key, whose weights are NaN."""
    sizes = {"B": 2, "H": 2, "S": 40, "T": 130, "d": 64, "e": 64}
    *others, bias = random_inputs(by_hand.graph, sizes)
    bias[0, 3], bias[1, 0], bias[:, :, 7] = -math.inf, -math.inf, -math.inf
    return sizes, [*others, bias]


@pytest.mark.parametrize(
    "backend", ["reference", *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHS)]
)
def test_rows_without_keys_are_nan_where_a_softmax_is(backend):
    sizes, inputs = hidden_rows()
    assert by_hand.lower("sm_90a", sizes).kernels[0].kind is ATTENTION
    known = dict(zip(by_hand.graph.inputs, inputs, strict=True))
    (exact,) = evaluate(by_hand.graph.roots, known, sizes, torch.float64)
    assert int(exact.isnan().sum()) == 2 * 2 * 64
    if backend == "reference":
        y = by_hand(*inputs, backend=backend)
    else:
        with device(backend, checks="raise") as gpu:
            y = by_hand(*inputs, backend="sim", arch=backend)
            assert not gpu.report().findings
    assert torch.equal(y.isnan(), exact.isnan())
    error = (y.double() - exact).nan_to_num(0.0)
    assert error.norm() <= 4e-3 * exact.nan_to_num(0.0).norm()
