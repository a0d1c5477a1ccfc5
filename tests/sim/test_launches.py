"""Launches that may begin before the one in front of them has ended: what they have to wait for."""

import re

import numpy as np
import pytest
import torch

import coda.sim
from tests.sim.kernels import kernel, launch
from tests.sim.test_checks import HEAD, WARN, schedules

WAIT, LEAVE = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
STORE, LOAD = "st.global.b32 [%rd9], %r1;", "ld.global.b32 %r7, [%rd9];"
AWAY = "st.global.b32 [%rd9+2048], %r1;"  # nothing else accesses these words
RELAY = "@%p1 griddepcontrol.wait; "  # by one of two warps


def chain(*bodies, grid=(1, 1, 1), **options):
    """The findings of the last of some programmatic launches on one array; the others have none."""
    array, before, found = np.zeros(1024, np.uint32), {}, []
    for body in bodies:
        assert not found, [str(f) for f in found]
        text = kernel(HEAD + body + "\nret;", shared=4096)
        options = {"block": 64, "checks": WARN, **options}
        result = launch(text, array, grid=grid, before=before, **options)
        found, before = result.findings, result.unfinished
    return found


def race(*bodies, **options):
    """The message of the one finding of the last launch."""
    (found,) = chain(*bodies, **options)
    assert found.kind == "race"
    return found.message


@schedules
def test_a_launch_waits_before_it_reads_what_another_wrote(schedule):
    message = race(STORE, LOAD + WAIT, **schedule)
    assert message == (
        "reads global memory (array 0) that a launch before this one writes, with no "
        "griddepcontrol.wait in between"
    )
    assert not chain(STORE, WAIT + LOAD, **schedule)
    assert not chain(STORE, AWAY.replace("2048", "1024") + WAIT + LOAD, **schedule)


def test_a_launch_waits_before_it_overwrites_what_another_reads():
    assert "overwrites global memory (array 0) that a launch" in race(LOAD, STORE + WAIT)
    assert "overwrites global memory (array 0) that a launch" in race(STORE, STORE + WAIT)
    assert not chain(LOAD, LOAD + WAIT + STORE)


@schedules
def test_a_wait_by_one_warp_orders_those_that_meet_it(schedule):
    assert not chain(STORE, RELAY + "bar.sync 0;" + LOAD, **schedule)
    assert race(STORE, RELAY + "@%p1 bar.sync 1, 32;" + LOAD, **schedule)
    assert race(STORE, RELAY + LOAD, **schedule)


def test_a_launch_that_leaves_early_leaves_those_in_front_running():
    patient, hasty = WAIT + LEAVE + AWAY, LEAVE + WAIT + AWAY
    assert not chain(STORE, patient, LOAD + WAIT)  # it began after the first had ended
    assert race(STORE, hasty, LOAD + WAIT)
    assert race(STORE, hasty, hasty, LOAD + WAIT)
    assert race(STORE, AWAY, LOAD + WAIT)  # it waits for nothing, and may end first
    assert not chain(STORE, hasty, WAIT + LOAD)


def test_every_block_has_to_wait():
    one = "mov.u32 %r8, %ctaid.x; setp.eq.u32 %p5, %r8, 0; "
    assert race(STORE, one + "@%p5 griddepcontrol.wait; " + LOAD + "@!%p5 " + WAIT, grid=(2, 1, 1))
    half = one + "@%p5 griddepcontrol.wait; "
    assert race(STORE, half, LOAD + WAIT, grid=(2, 1, 1))


@pytest.mark.parametrize("waits", [True, False])
def test_a_gemm_without_its_wait_races_with_the_one_in_front(waits):
    with coda.sim.device("sm_90a", sms=2) as gpu:
        from quack.epilogue import library

        a = torch.randn(1, 128, 64).bfloat16()
        b, c = (torch.randn(1, 128, k).bfloat16() for k in (64, 128))
        d, e = (torch.empty(1, 128, 128).bfloat16() for _ in range(2))
        tile = {"tile_M": 128, "tile_N": 128, "cluster_M": 1}
        library.identity_epi.gemm(a, b, d, epi_args={}, **tile)
        find = gpu.store.find
        if not waits:
            gpu.store.find = lambda *key: re.sub(r"griddepcontrol\.wait;", "", find(*key))
        library.identity_epi.gemm(d, c, e, epi_args={}, **tile)
        findings = gpu.report().findings
    assert bool(findings) is not waits
    assert {f.kind for f in findings} <= {"race"}
