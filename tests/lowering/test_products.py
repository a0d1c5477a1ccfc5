"""Products taken apart: the same values for fewer operations at each element."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.ir.scalars import SCALARS
from coda.lowering.program.epilogue import Acc, Call, Literal, Load, calls
from coda.lowering.program.factor import factored, work

X, Y, G = Load("x"), Load("y"), Acc()  # of each element
R, S = Load("r"), Load("s")  # one a row
LEAVES = {X: 0.7, Y: -1.3, G: 0.9, R: 1.7, S: 0.6, Acc(1): -0.4}


def once(leaf):
    return leaf in (R, S)


def mul(*args):
    out = args[0]
    for arg in args[1:]:
        out = Call("mul", (out, arg))
    return out


def add(a, b):
    return Call("add", (a, b))


def value(expr):
    if isinstance(expr, Literal):
        return expr.value
    if not isinstance(expr, Call):
        return LEAVES[expr]
    args = [value(a) for a in expr.args]
    plain = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "neg": lambda a: -a,
        "square": lambda a: a * a,
        "div": lambda a, b: a / b,
        "tanh": math.tanh,
        "where": lambda c, a, b: a if c else b,
        "le": lambda a, b: float(a <= b),
    }
    return plain[expr.fn](*args)


def test_what_products_share_is_computed_once():
    """The backward of SwiGLU: the scaled operands are no two times multiplied with the factor."""
    found = factored([mul(X, R, Y), mul(Y, X, G, R), mul(R, G, X)], once)
    assert work(found, once) == 4
    assert found[0] == mul(Y, mul(X, R)) or found[0] == mul(mul(X, R), Y)


def test_a_factor_of_both_terms_leaves_a_sum():
    th = Call("tanh", (X,))
    half = Literal(0.5)
    (found,) = factored([add(mul(X, half), mul(mul(X, half), th))], once)
    assert found == mul(X, add(half, mul(th, half)))


def test_a_factor_of_both_values_leaves_a_choice():
    test = Call("le", (Y, Literal(0.0)))
    (found,) = factored([Call("where", (test, mul(X, R), mul(G, R)))], once)
    assert found == mul(Call("where", (test, X, G)), R)


def test_rows_and_numbers_meet_before_elements():
    (found,) = factored([mul(Call("div", (mul(X, R), Literal(4.0))), S, Literal(-2.0))], once)
    assert found == mul(X, mul(R, S, Literal(-0.5)))
    assert work([found], once) == 1


def test_signs_are_taken_along():
    found = factored([Call("sub", (X, mul(Y, Literal(-3.0)))), Call("neg", (mul(X, R),))], once)
    assert found == [add(X, mul(Y, Literal(3.0))), Call("neg", (mul(X, R),))]


@pytest.mark.parametrize("number", [0.0, float("inf")])
def test_numbers_that_are_no_factors_stay(number):
    exprs = [Literal(number), mul(X, Literal(number))]
    assert factored(exprs, once) == exprs


def expressions():
    leaves = st.sampled_from([*LEAVES, Literal(2.0), Literal(-1.0), Literal(0.25), Literal(0.0)])

    def grown(inner):
        one = st.tuples(st.sampled_from(["neg", "square", "tanh"]), st.tuples(inner))
        two = st.tuples(st.sampled_from(["mul", "mul", "add", "sub"]), st.tuples(inner, inner))
        by = st.tuples(st.just("div"), st.tuples(inner, st.sampled_from([Literal(4.0)])))
        three = st.tuples(st.just("where"), st.tuples(inner, inner, inner))
        return st.one_of(one, two, two, by, three).map(lambda c: Call(*c))

    return st.recursive(leaves, grown, max_leaves=14)


@settings(max_examples=300)
@given(st.lists(expressions(), min_size=1, max_size=3))
def test_values_stay_and_work_never_grows(exprs):
    found = factored(exprs, once)
    assert len(found) == len(exprs)
    assert work(found, once) <= work(exprs, once)
    assert {c.fn for c in calls(found)} <= SCALARS.keys()
    for old, new in zip(exprs, found, strict=True):
        assert value(new) == pytest.approx(value(old), rel=1e-9, abs=1e-9)
