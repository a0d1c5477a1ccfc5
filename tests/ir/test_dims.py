"""Dims are polynomials: arithmetic on them agrees with arithmetic on sizes."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from coda.errors import DimError
from coda.ir.dims import Dim
from coda.ir.text import parse

NAMES = ("A", "B", "C")
leaves = st.one_of(st.sampled_from(NAMES), st.integers(-4, 9)).map(Dim.of)
dims = st.recursive(
    leaves,
    lambda d: st.one_of(
        st.tuples(d, d).map(lambda p: p[0] + p[1]),
        st.tuples(d, d).map(lambda p: p[0] - p[1]),
        st.tuples(d, d).map(lambda p: p[0] * p[1]),
    ),
    max_leaves=6,
)
sizes = st.fixed_dictionaries({n: st.integers(1, 9) for n in NAMES})


@given(dims, dims, sizes)
def test_arithmetic(a, b, s):
    assert (a + b).size(s) == a.size(s) + b.size(s)
    assert (a - b).size(s) == a.size(s) - b.size(s)
    assert (a * b).size(s) == a.size(s) * b.size(s)
    assert a + b == b + a
    assert (a + b) * b == a * b + b * b


@given(dims, st.sampled_from(NAMES), st.integers(1, 5), sizes)
def test_division_undoes_multiplication(a, name, n, s):
    by = Dim.of(name) * n
    assert (a * by) // by == a
    half = Dim.of(name) // n
    assume(s[name] % n == 0)
    assert half.size(s) == s[name] // n


@given(dims)
def test_text(a):
    graph = parse(f"block f(%x: [{a}] bf16) {{ return out = %x }}")
    assert graph.inputs[0].shape == (a,)


@given(st.integers(1, 50), sizes)
def test_solving(n, s):
    dim = Dim.of("X") * Dim.of("A") * 3 + Dim.of("B")
    assert dim.solve(dim.size({**s, "X": n}), s) == ("X", n)
    assert dim.solve(7, {}) is None


def test_what_has_no_size():
    with pytest.raises(DimError, match="no size"):
        Dim.of("A").size({})
    with pytest.raises(DimError, match="not a whole number"):
        (Dim.of("A") // 2).size({"A": 5})
    with pytest.raises(DimError, match="does not divide"):
        Dim.of(5) // 2


def test_a_fraction_is_no_constant():
    a = Dim.of("A")
    half = (a + 1) // 2 - a // 2
    assert not half.symbols
    assert half.constant is None
    with pytest.raises(DimError, match="not a whole number"):
        half.size({})
