"""The exchange of sums at a row's factor: found where it holds, and only there."""

import torch

import coda
from coda.ir.evaluate import evaluate
from coda.ir.graph import Input, walk
from coda.ir.types import f64
from coda.lowering.algebra.vjp import vjp

T = coda.Tensor
SIZES = {"M": 5, "d": 4}


@coda.block
def turned(x: T["M d"], c: T["M d"], s: T["M d"]):
    z = x * coda.rsqrt(coda.mean(x * x, keepdims=True) + 0.1)
    return {"a": z * c - coda.concat([z[:, 2:], z[:, :2]]) * s, "b": -z}


@coda.block
def gated(x: T["M d"], w: T["M d"]):
    return x * w * coda.sigmoid(coda.sum(x * w, keepdims=True))


@coda.block
def squared(x: T["M d"]):
    z = x * coda.rsqrt(coda.mean(x * x, keepdims=True) + 0.1)
    return z * z


@coda.block
def transposed(x: T["M M"]):
    """Rows of the output are columns of the product: shapes alone do not tell."""
    return (x * coda.rsqrt(coda.mean(x * x, keepdims=True) + 0.1)).T


@coda.block
def rolled(x: T["M d"]):
    """The output has the rows of the product in another order."""
    z = x * coda.rsqrt(coda.mean(x * x, keepdims=True) + 0.1)
    return coda.concat([z[2:], z[:2]], axis=0)


@coda.block
def broadcast(x: T["M d"], c: T["M 1 1"]):
    """The leading axis of the output is the coefficient's."""
    return x * coda.rsqrt(coda.mean(x * x, keepdims=True) + 0.1) * c


@coda.block
def projected(x: T["M d"], w: T["d d"]):
    z = x * coda.rsqrt(coda.mean(x * x, keepdims=True) + 0.1)
    return z @ w.T


def gradients(block, kept):
    graph = block.graph_of(f64)
    generator = torch.Generator().manual_seed(0)
    roots = dict.fromkeys(graph.roots)
    given = {r: Input(f"d{i}", r.shape, r.dtype) for i, r in enumerate(roots)}
    found = vjp(given, graph.inputs, kept=kept)
    values = {
        n: torch.randn([d.size(SIZES) for d in n.shape], generator=generator, dtype=torch.float64)
        for n in (*graph.inputs, *given.values())
    }
    nodes = [found[i] for i in graph.inputs]
    return nodes, evaluate(nodes, values, SIZES), set(graph.roots)


def reads_outputs(block):
    nodes, values, outputs = gradients(block, True)
    _, plain, _ = gradients(block, False)
    for a, b in zip(values, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    return any(o in outputs for n in walk(nodes) if n not in outputs for o in n.operands)


def test_a_factor_of_what_goes_on_linearly():
    assert reads_outputs(turned)


def test_a_factor_that_may_be_zero_is_left_alone():
    assert not reads_outputs(gated)


def test_what_goes_on_by_a_square_is_left_alone():
    assert not reads_outputs(squared)


def test_rows_that_do_not_stay_in_place_are_left_alone():
    for block in (transposed, rolled, broadcast):
        assert not reads_outputs(block)


def test_a_contraction_keeps_its_rows():
    assert reads_outputs(projected)
