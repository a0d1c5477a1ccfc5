"""What a graph means, node by node, against torch; slices and numbers that mislead are refused."""

import ast
import itertools
import math
from pathlib import Path

import pytest
import torch

import coda
from coda.errors import CallError, InternalError, ShapeError
from coda.ir.dims import Dim
from coda.ir.evaluate import evaluate
from coda.ir.graph import Concat, Const, Gather, Graph, Input, Map, Pick, Reduce, Slice
from coda.ir.scalars import SCALARS
from coda.ir.text import parse, show
from coda.ir.types import bf16, bool_, e4m3, f32, f64, i64
from coda.ir.verify import verify

M, D = Dim.of("M"), Dim.of("D")
SIZES = {"M": 3, "D": 8}
VALUES = torch.tensor([-math.inf, -2.5, -0.0, 0.0, 1e-30, 0.7, math.inf, math.nan])


PLAIN = [row for row in SCALARS.values() if row.result != "pair"]  # reductions read pairs


@pytest.mark.parametrize("row", PLAIN, ids=lambda r: r.name)
def test_scalars_in_float64_and_op_by_op(row):
    """Each function of the table on all pairs of values that break functions."""
    grid = torch.cartesian_prod(*[VALUES] * row.arity).reshape(-1, row.arity)
    columns = [grid[:, i].contiguous() for i in range(row.arity)]
    kinds = [f32] * row.arity
    if row.name == "where":
        columns[0], kinds[0] = columns[0] > 0, bool_
    inputs = [Input(f"x{i}", (M,), k) for i, k in enumerate(kinds)]
    values = dict(zip(inputs, columns, strict=True))
    node = Map(row.name, tuple(inputs))
    wide = [c.double() if c.is_floating_point() else c for c in columns]
    (exact,) = evaluate([node], values, {"M": len(grid)})
    (eager,) = evaluate([node], values, {"M": len(grid)}, compute=None)
    torch.testing.assert_close(exact, row.evaluate(*wide), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(eager, row.evaluate(*columns), rtol=0, atol=0, equal_nan=True)
    assert eager.dtype == node.dtype.torch


def sample(row, signed=True):
    """Arguments of a function, one row of each; positive where it has no meaning below 0."""
    values = torch.linspace(-3.0, 2.9, 24, dtype=torch.float64)
    values = values if signed else values.abs() + 0.1
    return [values.roll(5 * i) for i in range(row.arity)]


@pytest.mark.parametrize("row", SCALARS.values(), ids=lambda row: row.name)
def test_facets_say_what_a_function_is(row):
    """Sums of signed arguments, products of powers, poles, choices: as the values are."""
    x = sample(row)
    if row.signs:
        whole = sum(sign * a for sign, a in zip(row.signs, x, strict=True))
        torch.testing.assert_close(row.evaluate(*x), whole)
    if row.powers:
        y = sample(row, signed=False)
        whole = math.prod(a**power for power, a in zip(row.powers, y, strict=True))
        torch.testing.assert_close(row.evaluate(*y), whole)
    if row.commutes:
        torch.testing.assert_close(row.evaluate(*x), row.evaluate(*x[::-1]))
    if row.arity == 1 and row.diverges_at_zero:
        assert row.evaluate(torch.zeros((), dtype=torch.float64)).isinf()
    if row.quotient:
        whole = [a.round() for a in sample(row)]
        found = row.evaluate(whole[0], whole[1].abs() + 1)
        torch.testing.assert_close(found, (whole[0] / (whole[1].abs() + 1)).floor())
        assert (found.abs() <= whole[0].abs()).all()
    if row.chooses:
        a, b = row.evaluate(torch.ones(24), *x[1:]), row.evaluate(torch.zeros(24), *x[1:])
        assert torch.equal(a, x[1])
        assert torch.equal(b, x[2])


@pytest.mark.parametrize("row", SCALARS.values(), ids=lambda row: row.name)
def test_what_is_called_linear_is(row):
    """f(x + t d) = f(x) + t (f(x + d) - f(x)) in the arguments that are moved, and f(0) = 0."""
    x = sample(row, signed=False)
    for chosen in itertools.product((False, True), repeat=row.arity):
        if not any(chosen) or not row.is_linear_in(chosen):
            continue
        moved = lambda t: row.evaluate(  # noqa: E731
            *(a + t * a.roll(3) if c else a for a, c in zip(x, chosen, strict=True))  # noqa: B023
        )
        straight = moved(0.0) + 2.5 * (moved(1.0) - moved(0.0))
        torch.testing.assert_close(moved(2.5), straight)
        none = [torch.zeros_like(a) if c else a for a, c in zip(x, chosen, strict=True)]
        assert not row.evaluate(*none).any()
    known = {"add", "sub", "neg", "mul", "div"}
    every = itertools.product((False, True), repeat=row.arity)
    assert any(any(c) and row.is_linear_in(c) for c in every) == (row.name in known)


def test_every_function_has_one_on_the_device():
    """An operator, or a function of device_math, which is read as text: it needs the DSL."""
    text = (Path(coda.__file__).parent / "kernels/device_math.py").read_text()
    tree = ast.parse(text)
    arguments = {n.name: len(n.args.args) for n in tree.body if isinstance(n, ast.FunctionDef)}
    for one in tree.body:  # other names of the same functions
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Tuple):
            pairs = zip(one.targets[0].elts, getattr(one.value, "elts", ()), strict=False)
            arguments |= {
                a.id: arguments[b.id] for a, b in pairs if getattr(b, "id", "") in arguments
            }
    for row in (r for r in PLAIN if not r.stops):
        name = row.device or row.name
        if name.isidentifier():
            assert arguments[name] == row.arity
        else:
            assert row.signs or row.powers


@pytest.mark.parametrize(("start", "size", "step"), [(0, 8, 1), (1, 3, 2), (7, 1, 1), (0, 4, 2)])
def test_slices(start, size, step):
    x = torch.arange(24.0, dtype=torch.float64).reshape(3, 8)
    node = Input("x", (M, Dim.of(8)), f64)
    (found,) = evaluate([Slice(node, -1, Dim.of(start), Dim.of(size), step)], {node: x}, SIZES)
    torch.testing.assert_close(found, x[:, start::step][:, :size])


@pytest.mark.parametrize(("start", "size", "step"), [(-1, 2, 1), (7, 2, 1), (0, 5, 2), (0, 8, 0)])
def test_slices_outside_their_axis_are_refused(start, size, step):
    node = Input("x", (M, Dim.of(8)), f64)
    with pytest.raises(ShapeError, match="outside its axis"):
        Slice(node, -1, Dim.of(start), Dim.of(size), step)


def test_gather_pick_and_concat():
    x, index = Input("x", (M, D), f64), Input("i", (M,), i64)
    values = {x: torch.randn(3, 8, dtype=torch.float64), index: torch.tensor([2, 0, 2])}
    rows, column, twice = evaluate(
        [Gather(x, (index,)), Pick(x, index), Concat((x, x), -1)], values, SIZES
    )
    torch.testing.assert_close(rows, values[x][values[index]])
    torch.testing.assert_close(column[:, 0], values[x][range(3), values[index]])
    torch.testing.assert_close(twice, torch.cat([values[x]] * 2, -1))


@pytest.mark.parametrize("at", [(3, 0), (-1, 2), (0, 8), (2, -1)])
def test_an_index_outside_its_own_axis_is_refused(at):
    """Also one whose element, counted along all axes, is inside the table."""
    x = Input("x", (M, D), f64)
    i, j = (Input(n, (), i64) for n in "ij")
    values = {x: torch.randn(3, 8), i: torch.tensor(at[0]), j: torch.tensor(at[1])}
    with pytest.raises(CallError, match="a table of 3 × 8"):
        evaluate([Gather(x, (i, j))], values, SIZES)


def test_eight_bit_floats_are_computed_wider():
    x = Input("x", (M, D), e4m3)
    values = {x: torch.randn(3, 8).to(torch.float8_e4m3fn)}
    nodes = [Map("add", (x, x)), Reduce("sum", x, -1)]
    exact, total = evaluate(nodes, values, SIZES)
    torch.testing.assert_close(exact, values[x].double() * 2)
    torch.testing.assert_close(total, values[x].double().sum(-1, keepdim=True))
    rounded, _ = evaluate(nodes, values, SIZES, compute=None)
    assert rounded.dtype == torch.float8_e4m3fn


def test_constants_are_the_same_node_only_if_they_are_the_same_number():
    assert Const(math.nan, f32) is Const(float("nan"), f32)
    assert Const(-0.0, f32) is not Const(0.0, f32)
    assert Const(2, f32) is Const(2.0, f32)


@pytest.mark.parametrize("value", [-0.0, 0.1, 5e-324, 1.7976931348623157e308, math.nan, math.inf])
def test_numbers_are_exact_in_text(value):
    x = Input("x", (M,), bf16)
    graph = Graph("f", (x,), (("out", Map("mul", (x, Const(value, bf16)))),))
    again = parse(show(graph))
    assert again.roots[0] is graph.roots[0]
    assert again.roots[0].operands[1].value.hex() == value.hex()


def test_names_that_are_numbers_or_greek():
    one, gamma = Input("1", (M, D // 2 - 1), f32), Input("γ", (D // 2 - 1,), f32)
    a = Map("mul", (one, gamma))
    graph = Graph("f", (one, gamma), (("σ", Map("exp", (Map("add", (a, one)),))),))
    assert parse(show(graph)) == graph


def test_the_verifier_finds_a_double():
    x = Input("x", (M,), f32)
    forged = type.__call__(Map, "exp", (x,))
    kept = Map("exp", (x,))
    with pytest.raises(InternalError, match="means the same") as error:
        verify(Graph("f", (x,), (("out", forged),)), "test")
    assert "exp %0: [M] f32 : [M] f32" in str(error.value)
    verify(Graph("f", (x,), (("out", kept),)), "test")
