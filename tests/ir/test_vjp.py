"""The derivative on the graph: equal to torch's autograd in float64, kind by kind and at random."""

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import coda
from coda.block import Block
from coda.ir.dims import ONE, Dim
from coda.ir.evaluate import evaluate
from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Contract,
    Expand,
    Gather,
    Graph,
    Input,
    Iota,
    Map,
    Permute,
    Pick,
    Put,
    Reduce,
    Reshape,
    Scan,
    Slice,
)
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SCALARS
from coda.ir.text import parse, show
from coda.ir.types import bool_, f64, i64
from coda.lowering.algebra.vjp import vjp
from coda.measure import random_inputs
from tests.lowering.test_random_blocks import SETTINGS, SIZES, blocks, values

ROOT = Path(__file__).parents[2] / "examples"
M, D, V = Dim.of("M"), Dim.of("D"), Dim.of("V")
SMALL = {"M": 5, "D": 6, "V": 4}


def joint(graph):
    """The graph's gradients as a graph of its inputs and of its outputs' cotangents."""
    given = {n: Input(f"d_{i}", n.shape, n.dtype) for i, n in enumerate(graph.roots)}
    wanted = [i for i in graph.inputs if i.dtype.kind == "float"]
    found = vjp(given, wanted)
    outputs = tuple((f"d{i.name}", found[i]) for i in wanted if i in found)
    return Graph("backward", (*graph.inputs, *given.values()), outputs), found


def check(graph, inputs, sizes, tolerance=1e-8):
    """Our gradients and autograd's, of a random combination of the outputs."""
    backward, found = joint(graph)
    leaves = [x.double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = evaluate(graph.roots, dict(zip(graph.inputs, leaves, strict=True)), sizes)
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    unique = dict(zip(graph.roots, given, strict=True))
    pairs = [(o, unique[r]) for o, r in zip(outputs, graph.roots, strict=True) if o.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    expected = torch.autograd.grad(
        [o for o, _ in dict(pairs).items()],
        wanted,
        [c for _, c in dict(pairs).items()],
        allow_unused=True,
    )
    known = dict(zip(graph.inputs, [x.detach() for x in leaves], strict=True))
    known |= {i: unique[r] for r, i in zip(unique, backward.inputs[len(inputs) :], strict=True)}
    mine = dict(
        zip([n for n, _ in backward.outputs], evaluate(backward.roots, known, sizes), strict=True)
    )
    floats = [i for i in graph.inputs if i.dtype.kind == "float"]
    for node, theirs in zip(floats, expected, strict=True):
        if theirs is None:
            assert node not in found or not mine[f"d{node.name}"].any()
        elif f"d{node.name}" not in mine:
            assert not theirs.any()
        else:
            torch.testing.assert_close(
                mine[f"d{node.name}"], theirs, rtol=tolerance, atol=tolerance
            )
    return backward


@pytest.mark.parametrize(
    "row",
    [r for r in SCALARS.values() if r.result == "float" and r.of_floats],
    ids=lambda r: r.name,
)
def test_scalars(row):
    generator = torch.Generator().manual_seed(1)
    inputs, kinds = [], []
    for i in range(row.arity):
        x = torch.rand(5, 6, generator=generator, dtype=torch.float64) + 0.3
        if row.name in ("abs", "tanh", "sin", "cos", "erf", "where", "maximum", "square"):
            x = x - 0.8
        x = x / 2 if row.name in ("asin", "acos") else x + 1 if row.name == "acosh" else x
        condition = row.name == "where" and i == 0
        inputs.append(x > 0 if condition else x)
        kinds.append(bool_ if condition else f64)
    nodes = tuple(Input(f"x{i}", (M, D), k) for i, k in enumerate(kinds))
    check(Graph("f", nodes, (("y", Map(row.name, nodes)),)), inputs, SMALL)


def test_predicates_have_no_derivative():
    assert all(
        r.derivative is None for r in SCALARS.values() if r.result == "bool" or not r.of_floats
    )


@pytest.mark.parametrize("fn", MONOIDS)
@pytest.mark.parametrize("axis", [-1, -2])
def test_reductions(fn, axis):
    x, r = Input("x", (M, D), f64), Input("r", (M, D), f64)
    value = Map("tanh", (Map("mul", (x, r)),)) if MONOIDS[fn].of_pairs else None
    y = Map("mul", (Map("sub", (x, Reduce(fn, x, axis, value))), r))
    tied = torch.randn(5, 6, dtype=torch.float64).round()
    check(Graph("f", (x, r), (("y", y),)), [tied, torch.randn(5, 6)], SMALL)


X, W, T = Input("x", (M, D), f64), Input("w", (V, D), f64), Input("i", (M,), i64)
STEP = Input("s", (M, Dim.of(6)), f64)
CUBE = Map("mul", (Reshape(X, (M, ONE, D)), W))
NODES = {
    "contract": Contract(X, W, f64),
    "contract a vector": Contract(Reshape(Reduce("sum", X, -2), (D,)), W, f64),
    "contract a cube": Contract(Reshape(X, (ONE, M, D)), W, f64),
    "contract batches": Contract(CUBE, Map("exp", (CUBE,)), f64),
    "contract batches that share the right": Contract(CUBE, Reshape(W, (ONE, V, D)), f64),
    "contract batches that share the left": Contract(X, CUBE, f64),
    "contract batches of batches": Contract(
        Reshape(CUBE, (M, ONE, V, D)), Reshape(CUBE, (ONE, M, V, D)), f64
    ),
    "contract batches of one": Contract(Reshape(X, (ONE, M, D)), Reshape(W, (ONE, V, D)), f64),
    "scan": Scan("sum", X, -2, False),
    "scan in reverse": Map("mul", (Scan("sum", X, -1, True), X)),
    "cast": Cast(Cast(X, coda.f32), f64),
    "reshape": Reshape(X, (D, M)),
    "reshape of a sum": Reduce("sum", Reshape(X, (M, Dim.of(2), D / 2)), -1),
    "permute": Permute(Reshape(X, (M, ONE, D)), (2, 0, 1)),
    "slice": Slice(X, -2, Dim.of(1), Dim.of(3), 1),
    "slice with steps": Slice(STEP, -1, Dim.of(1), Dim.of(2), 3),
    "slices in turn": Map(
        "mul", (Slice(STEP, -1, Dim.of(0), Dim.of(3), 2), Slice(STEP, -1, Dim.of(1), Dim.of(3), 2))
    ),
    "slices that overlap": Map(
        "mul", (Slice(STEP, -1, Dim.of(0), Dim.of(4), 1), Slice(STEP, -1, Dim.of(2), Dim.of(4), 1))
    ),
    "concat": Concat((X, Map("exp", (X,))), -1),
    "expand": Map("mul", (Expand(Reduce("mean", X, -1), (M, D)), X)),
    "expand a number": Expand(Reshape(Reduce("sum", Reduce("sum", X, -1), -2), ()), (M, D)),
    "gather": Gather(W, (T,)),
    "gather at two indices": Gather(W, (T, Reshape(T, (M, ONE)))),
    "put": Put(X, (T,), (V,)),
    "put at two indices": Put(Reshape(X, (D, M)), (Reshape(Iota(D, i64), (D, ONE)), T), (D, V)),
    "pick": Pick(Contract(X, W, f64), T),
    "one value twice": Map("mul", (X, X)),
    "a row and a column": Map("mul", (Reduce("sum", X, -1), Reduce("sum", X, -2))),
}


@pytest.mark.parametrize("name", NODES)
def test_each_kind(name):
    node = NODES[name]
    inputs = [
        torch.randn(5, 6),
        torch.randn(4, 6),
        torch.tensor([0, 3, 1, 3, 2]),
        torch.randn(5, 6),
    ]
    graph = Graph("f", (X, W, T, STEP), (("y", node), ("z", Map("square", (node,)))))
    tolerance = 1e-5 if name == "cast" else 1e-8
    text = show(check(graph, inputs, SMALL, tolerance))
    assert show(parse(text)) == text


def test_what_nobody_depends_on_has_no_gradient():
    y = Input("y", (M,), f64)
    out = Map("exp", (X,))
    assert y not in vjp({out: X}, [X, y])
    assert vjp({out: X}, [y]) == {}


def test_differentiation_stops_where_it_is_told():
    middle = Map("exp", (X,))
    out = Map("mul", (middle, Const(2.0, f64)))
    d = Input("d", (M, D), f64)
    assert vjp({out: d}, [middle]) == {middle: Map("mul", (d, Const(2.0, f64)))}


SIZES_OF_EXAMPLES = {"M": 5, "D": 12, "F": 10, "H": 2, "G": 1, "d": 6, "V": 9}


@pytest.mark.parametrize(
    "path", sorted(p for p in ROOT.glob("*.py") if p.stem != "demo"), ids=lambda p: p.stem
)
def test_examples(path):
    for block in [
        v for v in runpy.run_path(str(path), run_name="x").values() if isinstance(v, Block)
    ]:
        graph = block.graph_of(f64)
        dims = {s: SIZES_OF_EXAMPLES[s] for s in graph.symbols}
        check(graph, random_inputs(graph, dims), dims, 1e-6)


@settings(SETTINGS, max_examples=100)
@given(blocks())
def test_random_blocks(graph):
    check(graph, values(graph), SIZES)
