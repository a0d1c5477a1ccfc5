"""A reduction taken in parts and folded is the reduction taken whole, on hostile values too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.ir.monoids import MONOIDS

TORCH = {
    "sum": lambda x: x.sum(-1, keepdim=True),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "max": lambda x: x.amax(-1, keepdim=True),
    "min": lambda x: x.amin(-1, keepdim=True),
    "prod": lambda x: x.prod(-1, keepdim=True),
    "logsumexp": lambda x: torch.logsumexp(x, -1, keepdim=True),
    "variance": lambda x: x.var(-1, correction=0, keepdim=True),
}
parts = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def in_parts(name, x, sizes):
    monoid = MONOIDS[name]
    planes, counts = monoid.split(x, -1, sizes)
    return monoid.finish(monoid.merge(planes, counts, -1), x.shape[-1])


def test_every_monoid_is_held_against_torch():
    assert MONOIDS.keys() == TORCH.keys()


@pytest.mark.parametrize("name", TORCH)
@settings(max_examples=40, deadline=None)
@given(sizes=parts, seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_split_and_merged_is_the_whole(name, sizes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, sum(sizes), generator=generator, dtype=torch.float64) * scale
    torch.testing.assert_close(in_parts(name, x, sizes), TORCH[name](x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(MONOIDS[name].reduce(x, -1), TORCH[name](x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_propagates_as_in_torch(name, value):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 12).clone()
    x[0, 7] = value
    torch.testing.assert_close(in_parts(name, x, [5, 4, 3]), TORCH[name](x), equal_nan=True)


def test_logsumexp_of_parts_that_are_all_minus_infinity():
    x = torch.full((1, 8), float("-inf"), dtype=torch.float64)
    assert in_parts("logsumexp", x, [4, 4]).item() == float("-inf")
    x[0, 0] = 3.0
    assert in_parts("logsumexp", x, [4, 4]).item() == 3.0


def test_variance_in_float32_survives_a_large_mean():
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)) + 1e4
    exact = TORCH["variance"](x.double())
    found = in_parts("variance", x, [128] * 32)
    assert ((found - exact).abs() / exact).max() < 1e-3
