"""Deep and long graphs: lowering takes work in proportion to them, and no recursion limit."""

import sys

import pytest
import torch

from coda.frontend import library, ops
from coda.frontend.tensor import Tensor
from coda.ir.dims import Dim
from coda.ir.evaluate import evaluate
from coda.ir.graph import Const, Contract, Graph, Input, Map
from coda.ir.types import bf16, f32
from coda.lowering import compiler as pipeline
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower
from coda.lowering.program.text import program_source
from coda.runtime.reference import run_reference

DIMS = {"M": 256, "D": 128, "F": 192}


def mlps(count):
    """A chain of gated MLPs, each with its norm and residual."""
    inputs = [Input("x", (Dim.of("M"), Dim.of("D")), f32)]
    x = Tensor(inputs[0])
    for i in range(count):
        shapes = {"g": ("D",), "a": ("F", "D"), "b": ("F", "D"), "c": ("D", "F")}
        mine = [Input(f"{n}{i}", tuple(map(Dim.of, s)), f32) for n, s in shapes.items()]
        inputs += mine
        g, a, b, c = map(Tensor, mine)
        h = library.rms_norm(x, g, 1e-5)
        x = x + library.swiglu(h @ a.T, h @ b.T) @ c.T
    return Graph("mlps", tuple(inputs), (("out", x.node),))


def work(call):
    """What a call returns, and how many Python functions it called: time without a clock."""
    calls = 0

    def count(_, event, __):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        found = call()
    finally:
        sys.setprofile(None)
    return found, calls


def test_work_grows_with_the_number_of_layers_and_no_faster():
    lower(mlps(2), DIMS)
    small, at_eight = work(lambda: lower(mlps(8), DIMS))
    large, at_sixteen = work(lambda: lower(mlps(16), DIMS))
    assert len(large.kernels) == 2 * len(small.kernels) - 1  # the first statistic has a kernel
    assert at_sixteen < 2.5 * at_eight


def test_work_of_a_backward_grows_with_the_number_of_layers():
    def both(graph):
        training = derive(graph, DIMS)
        return [
            lower(side, {s: DIMS[s] for s in side.symbols})
            for side in (training.forward, training.backward)
        ]

    both(mlps(2))
    (_, small), at_four = work(lambda: both(mlps(4)))
    (_, large), at_eight = work(lambda: both(mlps(8)))
    assert len(large.kernels) < 2.1 * len(small.kernels)
    assert at_eight < 2.6 * at_four


def test_choices_that_look_alike_are_made_together(monkeypatch):
    tried = []
    original = pipeline.run_stages
    monkeypatch.setattr(
        pipeline, "run_stages", lambda *a, **k: tried.append(1) or original(*a, **k)
    )
    lower(mlps(6), DIMS)
    few = len(tried)
    tried.clear()
    lower(mlps(12), DIMS)
    assert len(tried) == few


@pytest.mark.parametrize("product", [False, True])
def test_thousands_of_operations_one_after_the_other(product):
    x = Input("x", (Dim.of("M"), Dim.of("D")), f32)
    w = Input("w", (Dim.of("D"), Dim.of("D")), f32)
    node = Contract(x, w, f32) if product else x
    for i in range(1500):
        node = Map("add", (node, Const(0.01, f32))) if i % 2 else Map("sin", (node,))
    graph = Graph("deep", (x, w) if product else (x,), (("out", node),))
    program = lower(graph, {"M": 8, "D": 16})
    assert not any(k.name.startswith("torch") for k in program.kernels)
    assert 2 < len(program.kernels) < 40
    torch.manual_seed(0)
    given = [torch.randn(8, 16), torch.randn(16, 16)][: len(graph.inputs)]
    (found,) = run_reference(program, given)
    (exact,) = evaluate(graph.roots, dict(zip(graph.inputs, given, strict=True)), {"M": 8, "D": 16})
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("product", [False, True])
def test_a_value_used_twice_again_and_again_is_no_tree(product):
    """Written out, it would have 2³⁰ leaves."""
    x = Tensor(Input("x", (Dim.of("M"), Dim.of("D")), bf16))
    w = Tensor(Input("w", (Dim.of("D"), Dim.of("D")), bf16))
    y = (x @ w.T if product else x).cast(f32)
    for _ in range(30):
        y = y * ops.sigmoid(y) * 1.5
    inputs = (x.node, w.node) if product else (x.node,)
    graph = Graph("shared", inputs, (("out", y.node),))
    program = lower(graph, {"M": 8, "D": 16})
    assert len(program_source(program)) < 20_000
    assert len(repr(y.node)) < 100
    torch.manual_seed(0)
    given = [torch.randn(8, 16).bfloat16(), torch.randn(16, 16).bfloat16()][: len(inputs)]
    (found,) = run_reference(program, given, exact=True)
    (exact,) = evaluate(graph.roots, dict(zip(inputs, given, strict=True)), {"M": 8, "D": 16})
    torch.testing.assert_close(found.double(), exact)
