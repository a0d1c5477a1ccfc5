"""Which of two Programs is chosen: by modelled time, unless it is too close to tell."""

import itertools
from dataclasses import replace

import pytest

import coda
from coda.lowering.compiler import lower
from coda.lowering.explain import Explanation
from coda.lowering.program.cost import hbm_bytes, held_bytes, prepare_bytes, prepare_time
from coda.lowering.program.price import CALLS, HELD, Price, price
from coda.lowering.program.target import find_target
from coda.lowering.program.time import Time

T = coda.Tensor
H200 = find_target("H200")


def cost(moved=0, launches=1, **parts):
    """A price with these parts of its time, in µs."""
    return Price(
        Time(**{"launch": 0.0} | {p: us * 1e-6 for p, us in parts.items()}), moved, launches
    )


def test_the_faster_one_is_chosen_though_it_moves_more():
    assert cost(200, memory=8).undercuts(cost(100, memory=10))
    assert not cost(100, memory=10).undercuts(cost(200, memory=8))


def test_fewer_bytes_are_chosen_where_a_constant_decides():
    """9 µs of launches for 8.5 of memory: with launches of 10 % less it is the other way round."""
    apart, together = cost(100, launch=12, memory=1), cost(200, launch=3, memory=9.5)
    assert apart.undercuts(together)
    assert not together.undercuts(apart)
    clear = cost(200, launch=3, memory=9)
    assert clear.undercuts(apart)
    assert not apart.undercuts(clear)


def test_fewer_launches_are_chosen_of_as_many_bytes():
    assert cost(100, 2, memory=5).undercuts(cost(100, 3, memory=5))
    assert not cost(100, 2, memory=5).undercuts(cost(100, 2, memory=5))


def test_what_both_have_does_not_count():
    """0.1 µs of a layer of 5 ms decide, since nothing else differs."""
    ours, theirs = cost(200, mainloop=5000, memory=1.0), cost(100, mainloop=5000, memory=1.1)
    assert ours.undercuts(theirs)


def test_at_most_one_of_two_is_chosen():
    times = itertools.product((0.0, 1.0, 1.05), (0.0, 0.93, 2.0), (0, 1))
    prices = [cost(moved, launch=a, memory=b) for a, b, moved in times]
    for ours, theirs in itertools.product(prices, prices):
        assert not (ours.undercuts(theirs) and theirs.undercuts(ours))
        assert (ours == theirs) == (not ours.undercuts(theirs) and not theirs.undercuts(ours))


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_choice_by_time_stands_if_a_constant_moves(factor):
    """Whatever the parts: what was chosen though it moves more bytes stays the faster one."""
    values, names = (0.0, 1.0, 3.0, 3.2), ("launch", "mainloop", "memory")
    for ours, theirs in itertools.product(itertools.product(values, repeat=3), repeat=2):
        more = cost(2, **dict(zip(names, ours, strict=True)))
        fewer = cost(1, **dict(zip(names, theirs, strict=True)))
        for moving in range(3) if more.undercuts(fewer) else ():
            gain = [b - a for a, b in zip(ours, theirs, strict=True)]
            assert sum(d * (factor if i == moving else 1) for i, d in enumerate(gain)) > 0


@coda.block
def layer_norms(x: T["M D"], g: T["D"], b: T["D"], w: T["N D"]):
    return coda.layer_norm(x, g, b, eps=1e-5) @ w.T


def test_the_price_is_the_modelled_time_that_explain_says():
    sizes = {"M": 4096, "D": 1024, "N": 2048}
    frozen = lower(layer_norms.graph, sizes, H200, frozen=True)
    found = price(frozen)
    assert found.seconds == pytest.approx(Explanation(frozen).seconds)
    assert (found.moved, found.launches) == (hbm_bytes(frozen), len(frozen.kernels))


def test_weights_that_change_are_prepared_once_a_version_and_stay():
    sizes = {"M": 4096, "D": 1024, "N": 2048}
    program = lower(layer_norms.graph, sizes, H200)
    more, held = price(program), held_bytes(program)
    same = price(replace(program, frozen=True))
    assert held >= 2 * 1024 * 2048
    expected = prepare_time(program).seconds / CALLS + HELD * held / H200.rates.bandwidth
    assert more.seconds - same.seconds == pytest.approx(expected)
    assert more.moved - same.moved == prepare_bytes(program) // CALLS + HELD * held


def test_explain_says_what_preparing_weights_takes():
    """W · g is read from W and g and written, at the bandwidth, in a kernel of its own."""
    report = layer_norms.explain("H200", M=4096, D=1024, N=2048)
    moved, us = prepare_bytes(report.program), report.json()["prepared_us"]
    assert moved >= 2 * 2 * 1024 * 2048
    kernels = us * 1e-6 - moved / H200.rates.bandwidth
    count = len(report.program.prepared)
    assert kernels == pytest.approx(count * H200.rates.ramp)
    said = " ".join(str(report).split())
    assert f"{', '.join(report.program.prepared)} ({moved / 1e6:.1f} MB, {us:.1f} µs)" in said
