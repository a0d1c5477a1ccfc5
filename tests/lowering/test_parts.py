"""What is made in parts means what it meant whole, in random blocks and their backwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coda
from coda.frontend.tensor import Tensor
from coda.ir.dims import Dim
from coda.ir.evaluate import evaluate
from coda.ir.graph import Contract, Graph, Input, Iota, Map, Reduce, Slice, walk
from coda.ir.types import f64
from coda.lowering.algebra import chunk as parts
from coda.lowering.algebra.chunk import chunk, part_columns
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower
from coda.runtime.reference import run_reference
from tests.lowering.test_random_blocks import SETTINGS, SIZES, blocks, values

T = coda.Tensor


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of a few columns, of anything that is computed."""
    monkeypatch.setattr(parts, "STEP", 24)
    monkeypatch.setattr(parts, "SHARE", 1 << 20)
    monkeypatch.setattr(parts, "MOST", 3)


def same(a: Graph, b: Graph, sizes):
    given = dict(zip(a.inputs, values(a), strict=True))
    for x, y in zip(*(evaluate(g.roots, given, sizes) for g in (a, b)), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)


WIDE = 240


@st.composite
def wide_blocks(draw):
    """A random block, and behind it a wide layer, whose gradient is the largest between kernels."""
    graph = draw(blocks(steps=3))
    h = Tensor(graph.outputs[0][1])
    d, n = h.shape[-1], Dim.of(WIDE)
    w, v = Input("wide", (n, d), f64), Input("back", (d, n), f64)
    fn = draw(st.sampled_from([coda.tanh, coda.silu, lambda x: x * coda.sigmoid(x + 1.0)]))
    out = fn(h @ Tensor(w).T * 0.3) @ Tensor(v).T
    return Graph("wide", (*graph.inputs, w, v), (("out0", out.node),))


cuts = []


@settings(SETTINGS, max_examples=12)
@given(wide_blocks())
def test_parts_of_a_backward_mean_what_it_means(graph):
    training = derive(graph, {s: SIZES[s] for s in graph.symbols}, memory="min")
    backward, policy = training.backward, training.policy()
    sizes = {s: SIZES[s] for s in backward.symbols}
    program = lower(backward, sizes, policy=policy)
    cuts.append(len(program.cuts))
    inputs = values(backward)
    expected = evaluate(backward.roots, dict(zip(backward.inputs, inputs, strict=True)), SIZES)
    for a, b in zip(expected, run_reference(program, inputs, exact=True), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_random_backwards_were_cut():
    """The property above is not empty."""
    test_parts_of_a_backward_mean_what_it_means()
    assert sum(cuts) > len(cuts) // 2


@coda.block
def two_layers(x: T["M D", coda.f64], w: T["E D", coda.f64], v: T["D E", coda.f64]):
    return coda.tanh(x @ w.T) @ v.T


def test_a_sum_over_columns_is_one_over_parts():
    graph = two_layers.graph
    parted = chunk(graph, SIZES, frozenset())
    (cut,) = parted.cuts
    assert cut.columns == (48, 48)
    (root,) = parted.graph.roots
    assert isinstance(root, Map)
    assert root.fn == "add"
    wide = [n for n in walk(parted.graph.roots) if isinstance(n, Contract)]
    assert len(wide) == 4
    assert set(parted.part_of[n] for n in wide) == {0, 1}
    same(graph, parted.graph, SIZES)


def test_parts_of_weights_are_views_of_them():
    graph = chunk(two_layers.graph, SIZES, frozenset()).graph
    cut = [n for n in walk(graph.roots) if isinstance(n, Slice)]
    assert {n.arg for n in cut} == set(graph.inputs[1:])
    assert not any(isinstance(n, Iota) for n in walk(graph.roots))


def test_a_statistic_that_needs_all_columns_is_taken_of_them():
    @coda.block
    def normed(x: T["M D", coda.f64], w: T["E D", coda.f64], v: T["D E", coda.f64]):
        return coda.softmax(x @ w.T) @ v.T

    parted = chunk(normed.graph, SIZES, frozenset())
    whole = [n.arg for n in walk(parted.graph.roots) if isinstance(n, Reduce)]
    assert all(n.shape[-1] == normed.graph.inputs[1].shape[0] for n in whole)
    same(normed.graph, parted.graph, SIZES)


@pytest.mark.parametrize(
    ("columns", "count", "found"),
    [
        (96, 1, (96,)),
        (96, 2, (48, 48)),
        (100, 2, (72, 28)),
        (97, 3, (48, 49)),
        (20, 5, (20,)),
        (240, 99, (96, 96, 48)),
    ],
)
def test_sizes_of_parts(columns, count, found):
    assert part_columns(columns, count) == found
    assert sum(found) == columns
