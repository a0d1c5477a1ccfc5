"""What no hardware does, what is stuck, and what is not modelled."""

import numpy as np
import pytest

from coda.sim.types import Deadlock, Fault, Livelock, Unsupported
from tests.sim.kernels import MBARRIER, kernel, lanes, launch, schedules

T = np.arange(32, dtype=np.uint32)


# what goes wrong


def test_a_store_outside_every_allocation_is_never_performed():
    room = np.zeros(64, np.uint32)
    text = kernel(
        """
        mov.u32 %r1, %tid.x;
        mul.wide.u32 %rd8, %r1, 4;
        add.s64 %rd8, %rd8, %rd0;
        st.global.b32 [%rd8], 1;
        ret;
        """
    )
    with pytest.raises(Fault) as e:
        launch(text, room[:20])
    assert e.value.finding is not None
    assert e.value.finding.kind == "out-of-bounds"
    assert "st.global.b32" in str(e.value)
    assert "after the end of array 0" in str(e.value)
    assert (room == 0).all()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("ld.global.b32 %r2, [%rd0+2];", "misaligned"),
        ("mov.u32 %r2, smem; ld.shared.b64 %rd3, [%r2+4];", "misaligned"),
        ("mov.u32 %r2, smem; st.shared.b32 [%r2+128], %r2;", "out-of-bounds"),
        ("mov.b32 %r2, 0; st.shared.b32 [%r2], %r2;", "out-of-bounds"),
        ("mov.u32 %r2, smem; add.s32 %r2, %r2, 0x1000000; ld.shared.b32 %r3, [%r2];", "out-of-"),
        ("mov.u32 %r2, smem; mbarrier.arrive.shared.b64 _, [%r2];", "uninitialised"),
        ("trap;", "trap"),
    ],
)
def test_operations_that_no_hardware_performs(body, kind):
    with pytest.raises(Fault) as e:
        launch(kernel(body + " ret;", shared=128), T.copy())
    assert e.value.finding is not None
    assert e.value.finding.kind.startswith(kind)
    assert f"PTX line {e.value.finding.ptx_line}" in str(e.value)


def test_too_many_arrivals():
    body = """
        mov.u32 %r2, smem;
        mov.u32 %r1, %tid.x;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 mbarrier.init.shared.b64 [%r2], 3;
        bar.sync 0;
        setp.lt.u32 %p2, %r1, 2;
        @%p2 mbarrier.arrive.shared.b64 _, [%r2], 2;
        ret;
    """
    with pytest.raises(Fault, match="expects only 1 more"):
        launch(kernel(body, shared=128), T.copy())


def test_a_deadlock_names_who_waits_for_what():
    body = """
        mov.u32 %r1, %tid.x;
        setp.lt.u32 %p1, %r1, 32;
        @%p1 bar.sync 2, 64;
        @!%p1 bar.sync 3, 64;
        ret;
    """
    with pytest.raises(Deadlock) as e:
        launch(kernel(body), T.copy(), block=64)
    message = str(e.value)
    assert "CTA 0 warp 0 waits at barrier 2 (32 of 64 threads have come)" in message
    assert "CTA 0 warp 1 waits at barrier 3 (32 of 64 threads have come)" in message


@schedules
def test_a_phase_that_never_ends_is_a_deadlock(options):
    produce = "setp.lt.u32 %p5, %r10, 3; @!%p5 bra $NEXT;"
    with pytest.raises(Deadlock, match="waits for the end of phase 1"):
        lanes(MBARRIER.format(produce=produce), threads=64, **options)


def test_a_shuffle_whose_lanes_never_come_is_a_deadlock():
    body = """
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, smem;
        setp.eq.b32 %p1, %r1, 0;
        @!%p1 bra $WAIT;
        mbarrier.init.shared.b64 [%r2], 1;
        $HANG:
        mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0;
        @!%p2 bra $HANG;
        $WAIT:
        shfl.sync.idx.b32 %r3, %r1, 0, 0x1f, -1;
        ret;
    """
    with pytest.raises(Deadlock, match="31 lanes of those that must execute a block together"):
        launch(kernel(body, shared=128), T.copy())


def test_an_endless_loop_uses_up_the_budget():
    with pytest.raises(Livelock, match="budget of 1000 warp instructions"):
        launch(kernel("$L: add.s32 %r1, %r1, 1; bra $L;"), T.copy(), instructions=1000)


def test_spinning_on_memory_that_nobody_changes_is_a_livelock():
    body = """
        $SPIN:
        ld.acquire.gpu.global.b32 %r2, [%rd0];
        setp.eq.b32 %p2, %r2, 0;
        @%p2 bra $SPIN;
        ret;
    """
    with pytest.raises(Livelock, match="nothing has happened"):
        launch(kernel(body), np.zeros(1, np.uint32))


@pytest.mark.parametrize(
    "body",
    [
        "frobnicate.b32 %r1, %r2;",
        "ld.global.sideways.b32 %r1, [%rd0];",
        "add.turbo.f32 %r1, %r1, %r1;",
        "mov.u32 %r1, %nosuch;",
        "bar.sync.maybe 0;",
        "cp.async.bulk.tensor.1d.global.shared::cta.im2col.bulk_group [%rd0, {%r1}], [%r2];",
    ],
)
def test_what_is_not_modelled_is_refused_by_name(body):
    with pytest.raises(Unsupported) as e:
        launch(kernel(f"{body} ret;"), T.copy())
    assert "PTX line 8" in str(e.value)
    assert body.split()[0] in str(e.value)
