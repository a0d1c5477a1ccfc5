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
    "softmax_mean": lambda x: (x.real.softmax(-1) * x.imag).sum(-1, keepdim=True),
}
PAIRS = [name for name in TORCH if MONOIDS[name].of_pairs]
parts = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def in_parts(name, x, sizes):
    monoid = MONOIDS[name]
    planes, counts = monoid.split(x, -1, sizes)
    return monoid.finish(monoid.merge(planes, counts, -1), x.shape[-1])


def test_every_monoid_is_held_against_torch():
    assert MONOIDS.keys() == TORCH.keys()


@pytest.mark.parametrize("name", TORCH)
@settings(max_examples=40)
@given(sizes=parts, seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_split_and_merged_is_the_whole(name, sizes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, sum(sizes), generator=generator, dtype=torch.float64) * scale
    x = torch.complex(x, x.roll(1, -1) + 1) if name in PAIRS else x
    torch.testing.assert_close(in_parts(name, x, sizes), TORCH[name](x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(MONOIDS[name].reduce(x, -1), TORCH[name](x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_propagates_as_in_torch(name, value):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 12).clone()
    x[0, 7] = value
    given = [x]
    if name in PAIRS:
        given = [torch.complex(*both) for both in ((x, x), (x, x.flip(1)), (x.flip(1).clamp(0), x))]
    for one in given:
        torch.testing.assert_close(in_parts(name, one, [5, 4, 3]), TORCH[name](one), equal_nan=True)


def test_parts_of_weight_0_count_only_if_their_values_are_not_finite():
    nothing = torch.full((1, 4), float("-inf"), dtype=torch.float64)
    scores = torch.cat([nothing, torch.zeros(1, 4), nothing], 1)
    values = torch.arange(12.0, dtype=torch.float64).reshape(1, 12)
    for infinite in ([], [1], [5]):
        values[0, infinite] = float("inf")
        x = torch.complex(scores, values)
        found = in_parts("softmax_mean", x, [4, 4, 4])
        torch.testing.assert_close(found, TORCH["softmax_mean"](x), equal_nan=True)
        values[0, infinite] = 1.0
    x = torch.complex(torch.cat([nothing] * 3, 1), values)
    assert in_parts("softmax_mean", x, [4, 4, 4]).isnan()


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
