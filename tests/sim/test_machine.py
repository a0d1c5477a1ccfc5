"""The machine: control flow, lanes, atomics, and what is counted."""

import numpy as np
import pytest

from tests.sim.kernels import MBARRIER, kernel, lanes, launch, schedules

T = np.arange(32, dtype=np.uint32)


# control flow


def test_divergent_lanes_rejoin():
    got = lanes(
        """
        and.b32 %r2, %r1, 1;
        setp.eq.b32 %p1, %r2, 0;
        mov.b32 %r0, 7;
        @%p1 bra $EVEN;
        mul.lo.s32 %r0, %r1, 3;
        bra $JOIN;
        $EVEN:
        add.s32 %r0, %r1, 100;
        $JOIN:
        vote.sync.ballot.b32 %r3, %p1, -1;
        add.s32 %r0, %r0, %r3;
        """
    )
    even = np.uint32(0x55555555)
    assert (got == np.where(T % 2 == 0, T + 100, T * 3) + even).all()


def test_loops_of_different_length_in_each_lane():
    got = lanes(
        """
        mov.b32 %r0, 0;
        mov.b32 %r2, 0;
        $LOOP:
        setp.ge.u32 %p1, %r2, %r1;
        @%p1 bra $DONE;
        add.s32 %r2, %r2, 1;
        add.s32 %r0, %r0, %r2;
        bra $LOOP;
        $DONE:
        """
    )
    assert (got == T * (T + 1) // 2).all()


def test_registers_exchanged_around_a_loop():
    """Values that change places at the end of a block are not overwritten by each other."""
    got = lanes(
        """
        mov.b32 %r2, %r1;
        add.s32 %r3, %r1, 1000;
        mov.b32 %r4, 0;
        $LOOP:
        mov.b32 %r5, %r2;
        mov.b32 %r2, %r3;
        mov.b32 %r3, %r5;
        add.s32 %r4, %r4, 1;
        setp.lt.s32 %p1, %r4, 5;
        @%p1 bra $LOOP;
        shl.b32 %r0, %r3, 16;
        or.b32 %r0, %r0, %r2;
        """
    )
    assert (got == (T << 16 | T + 1000)).all()


def test_a_branch_on_what_a_predicate_was_before():
    """A loop of two rounds whose end is known one round ahead, as compilers make them."""
    got = lanes(
        """
        mov.b32 %r0, 0;
        mov.pred %p4, -1;
        $LOOP:
        mov.pred %p1, %p4;
        add.s32 %r0, %r0, 1;
        mov.pred %p4, 0;
        @%p1 bra $LOOP;
        """
    )
    assert (got == 2).all()


def test_early_exit_of_some_lanes():
    out = np.zeros(32, np.uint32)
    text = kernel(
        """
        mov.u32 %r1, %tid.x;
        setp.lt.u32 %p1, %r1, 10;
        @%p1 ret;
        bar.warp.sync -1;
        mul.wide.u32 %rd8, %r1, 4;
        add.s64 %rd8, %rd8, %rd0;
        st.global.b32 [%rd8], %r1;
        ret;
        """
    )
    launch(text, out)
    assert (out == np.where(T < 10, 0, T)).all()


def test_a_block_of_threads_that_is_no_multiple_of_a_warp():
    out = np.zeros(64, np.uint32)
    text = kernel(
        """
        mov.u32 %r1, %tid.x;
        bar.sync 0;
        mul.wide.u32 %rd8, %r1, 4;
        add.s64 %rd8, %rd8, %rd0;
        st.global.b32 [%rd8], 1;
        ret;
        """
    )
    launch(text, out, block=40)
    assert out.tolist() == [1] * 40 + [0] * 24


def test_predicated_instructions_keep_the_old_value():
    got = lanes(
        """
        mov.b32 %r0, 5;
        setp.gt.u32 %p1, %r1, 15;
        @%p1 add.s32 %r0, %r0, %r1;
        @!%p1 mov.b32 %r0, 9;
        """
    )
    assert (got == np.where(T > 15, 5 + T, 9)).all()


def test_coordinates_of_a_grid_with_clusters():
    out = np.full((2 * 4, 6), 99, np.uint32)
    text = kernel(
        """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x;
        mad.lo.s32 %r4, %r2, %r3, %r1;
        mul.wide.u32 %rd8, %r4, 24;
        add.s64 %rd8, %rd8, %rd0;
        mov.u32 %r5, %cluster_ctarank; mov.u32 %r6, %clusterid.x; mov.u32 %r7, %cluster_nctarank;
        mov.u32 %r8, %cluster_ctaid.y;
        st.global.v2.b32 [%rd8], {%r1, %r2};
        st.global.v2.b32 [%rd8+8], {%r5, %r6};
        st.global.v2.b32 [%rd8+16], {%r7, %r8};
        ret;
        """
    )
    launch(text, out, grid=(4, 2, 1), cluster=(2, 2, 1), sms=1)
    want = [[x, y, y % 2 * 2 + x % 2, x // 2, 4, y % 2] for y in range(2) for x in range(4)]
    assert out.tolist() == want


# lanes


@pytest.mark.parametrize(
    ("mode", "b", "c", "want"),
    [
        ("idx", "3", "0x1f", np.full(32, 3)),
        ("idx", "3", "0x181f", T // 8 * 8 + 3),
        ("bfly", "5", "0x1f", T ^ 5),
        ("up", "2", "0", np.where(T >= 2, T - 2, T)),
        ("down", "4", "0x1f", np.where(T < 28, T + 4, T)),
        ("down", "4", "0x181f", np.where(T % 8 < 4, T + 4, T)),
    ],
)
def test_shuffles(mode, b, c, want):
    got = lanes(
        f"""
        shl.b32 %r2, %r1, 8;
        shfl.sync.{mode}.b32 %r0|%p1, %r2, {b}, {c}, -1;
        """
    )
    assert (got == want * 256).all()


def test_votes_matches_and_reductions():
    body = """
        setp.lt.u32 %p1, %r1, 8;
        {}
    """
    assert (lanes(body.format("vote.sync.ballot.b32 %r0, %p1, 0xffff;")) == 0xFF).all()
    assert (
        lanes(body.format("vote.sync.any.pred %p2, %p1, -1; selp.b32 %r0, 1, 2, %p2;")) == 1
    ).all()
    assert (
        lanes(body.format("vote.sync.all.pred %p2, %p1, -1; selp.b32 %r0, 1, 2, %p2;")) == 2
    ).all()
    got = lanes("shr.u32 %r2, %r1, 3; match.any.sync.b32 %r0, %r2, -1;")
    assert (got == np.uint32(0xFF) << (T // 8 * 8)).all()
    assert (lanes("redux.sync.add.u32 %r0, %r1, -1;") == T.sum()).all()
    assert (lanes("redux.sync.max.s32 %r0, %r1, 0xff;") == 7).all()


def test_elect_takes_the_lowest_active_lane():
    got = lanes(
        """
        setp.lt.u32 %p1, %r1, 9;
        mov.b32 %r0, 0;
        @%p1 bra $OUT;
        elect.sync %r2|%p2, 0xfffffe00;
        selp.b32 %r0, 1, 2, %p2;
        $OUT:
        """
    )
    assert (got == np.where(T < 9, 0, np.where(T == 9, 1, 2))).all()


# atomics


def test_atomics_on_shared_and_global_memory():
    total = np.zeros(4, np.uint32)
    text = kernel(
        """
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, smem;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 st.shared.b32 [%r2], 0;
        bar.sync 0;
        atom.shared.add.u32 %r3, [%r2], 1;
        red.global.add.u32 [%rd0], %r3;
        red.global.max.u32 [%rd0+4], %r1;
        atom.global.inc.u32 %r4, [%rd0+8], 10;
        red.global.add.u32 [%rd0+12], %r4;
        ret;
        """,
        shared=16,
    )
    launch(text, total, block=64)
    inc = [i % 11 for i in range(64)]
    assert total.tolist() == [sum(range(64)), 63, 64 % 11, sum(inc)]


def test_vector_reductions_of_floats():
    out = np.zeros(8, np.float32)
    text = kernel(
        """
        mov.u32 %r1, %tid.x;
        cvt.rn.f32.u32 %r2, %r1;
        and.b32 %r3, %r1, 1;
        mul.wide.u32 %rd8, %r3, 16;
        add.s64 %rd8, %rd8, %rd0;
        red.relaxed.gpu.global.add.v4.f32 [%rd8], {%r2, %r2, 0f3F800000, 0f40000000};
        ret;
        """
    )
    launch(text, out)
    assert out.tolist() == [240.0, 240.0, 16.0, 32.0, 256.0, 256.0, 16.0, 32.0]


def test_compare_and_swap_serialises():
    out = np.zeros(1, np.uint32)
    text = kernel(
        """
        $TRY:
        ld.volatile.global.b32 %r2, [%rd0];
        add.s32 %r3, %r2, 1;
        atom.global.cas.b32 %r4, [%rd0], %r2, %r3;
        setp.ne.b32 %p1, %r4, %r2;
        @%p1 bra $TRY;
        ret;
        """
    )
    launch(text, out, block=64)
    assert out[0] == 64


@schedules
def test_a_warp_that_spins_lets_the_others_run(options):
    out = np.zeros(2, np.uint32)
    text = kernel(
        """
        mov.u32 %r1, %ctaid.x;
        setp.ne.b32 %p1, %r1, 0;
        @%p1 bra $OTHER;
        $SPIN:
        ld.acquire.gpu.global.b32 %r2, [%rd0];
        setp.eq.b32 %p2, %r2, 0;
        @%p2 bra $SPIN;
        st.global.b32 [%rd0+4], %r2;
        ret;
        $OTHER:
        st.release.gpu.global.b32 [%rd0], 17;
        ret;
        """
    )
    launch(text, out, grid=(2, 1, 1), **options)
    assert out.tolist() == [17, 17]


@schedules
def test_lanes_that_spin_let_the_others_of_their_warp_run(options):
    """A lock that lanes of one warp take in turn: the one that has it stands behind the others."""
    body = """
        $AGAIN:
        atom.global.cas.b32 %r2, [%rd0], 0, 1;
        setp.ne.u32 %p1, %r2, 0;
        @%p1 bra $AGAIN;
        ld.global.b32 %r3, [%rd0+4];
        add.s32 %r3, %r3, 1;
        st.global.b32 [%rd0+4], %r3;
        membar.gl;
        atom.global.exch.b32 %r4, [%rd0], 0;
        ret;
        """
    out = np.zeros(2, np.uint32)
    launch(kernel(body), out, block=64, instructions=100_000, **options)
    assert out.tolist() == [0, 64]


@schedules
def test_a_lane_that_waits_for_another_of_its_warp(options):
    body = """
        mov.u32 %r1, %tid.x;
        setp.ne.u32 %p1, %r1, 0;
        @%p1 bra $OTHERS;
        $WAIT:
        ld.volatile.global.b32 %r2, [%rd0];
        setp.eq.u32 %p2, %r2, 0;
        @%p2 bra $WAIT;
        st.global.b32 [%rd0+4], %r2;
        bra $JOIN;
        $OTHERS:
        setp.ne.u32 %p1, %r1, 5;
        @%p1 bra $JOIN;
        mov.b32 %r3, 7;
        st.volatile.global.b32 [%rd0], %r3;
        $JOIN:
        bar.warp.sync -1;
        ld.global.b32 %r4, [%rd0+4];
        mul.wide.u32 %rd8, %r1, 4; add.s64 %rd8, %rd8, %rd1; st.global.b32 [%rd8], %r4;
        ret;
        """
    flag, out = np.zeros(2, np.uint32), np.zeros(32, np.uint32)
    launch(kernel(body, 2), flag, out, instructions=100_000, **options)
    assert (out == 7).all()


# counts


def test_sites_of_synchronisation_are_counted_and_those_that_never_ran_too():
    body = """
        mov.u32 %r1, %ntid.x;
        setp.eq.b32 %p1, %r1, 7;
        bar.sync 0;
        @!%p1 bra $OUT;
        bar.sync 1;
        $OUT:
        ret;
    """
    result = launch(kernel(body), T.copy(), block=96)
    counts = {result.sync_text[line]: n for line, n in result.sync_sites.items()}
    assert counts == {"bar.sync 0": 3, "bar.sync 1": 0}
    assert result.instructions["bar"] == 3
    assert result.warp_instructions == sum(result.instructions.values())


def test_launches_leave_nothing_behind():
    """The same kernel twice: barriers, groups and shared memory start afresh."""
    produce = "add.s32 %r5, %r10, 1; @%p1 st.shared.b32 [%r2+16], %r5;"
    first = lanes(MBARRIER.format(produce=produce), threads=64)
    second = lanes(MBARRIER.format(produce=produce), threads=64, schedule="late")
    assert (first == second).all()
