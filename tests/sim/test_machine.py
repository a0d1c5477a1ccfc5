"""The machine: control flow, memory, barriers, lanes, asynchrony, and how it fails."""

import numpy as np
import pytest

from coda.sim.types import Deadlock, Fault, Livelock, Unsupported
from tests.sim.kernels import kernel, lanes, launch

T = np.arange(32, dtype=np.uint32)
SCHEDULES = [
    {"schedule": "eager"},
    {"schedule": "late"},
    {"schedule": "random", "seed": 1},
    {"schedule": "random", "seed": 2},
]
schedules = pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: f"{o}")


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


# shared memory and barriers


@schedules
def test_a_barrier_orders_shared_memory(options):
    got = lanes(
        """
        mov.u32 %r2, smem;
        mad.lo.s32 %r3, %r1, 4, %r2;
        mul.lo.s32 %r4, %r1, 11;
        st.shared.b32 [%r3], %r4;
        bar.sync 0;
        sub.s32 %r5, 127, %r1;
        mad.lo.s32 %r6, %r5, 4, %r2;
        ld.shared.b32 %r0, [%r6];
        """,
        threads=128,
        **options,
    )
    assert (got == (127 - np.arange(128)) * 11).all()


def test_vectors_in_shared_memory():
    got = lanes(
        """
        mov.u32 %r2, smem;
        mad.lo.s32 %r3, %r1, 16, %r2;
        add.s32 %r4, %r1, 1; add.s32 %r5, %r1, 2; add.s32 %r6, %r1, 3;
        st.shared.v4.b32 [%r3], {%r1, %r4, %r5, %r6};
        bar.warp.sync -1;
        ld.shared.v2.b32 {%r7, %r8}, [%r3+8];
        ld.shared.u8 %r9, [%r3+4];
        shl.b32 %r8, %r8, 8;
        shl.b32 %r9, %r9, 16;
        or.b32 %r0, %r7, %r8;
        or.b32 %r0, %r0, %r9;
        """
    )
    assert (got == (T + 2 | T + 3 << 8 | T + 1 << 16)).all()


def test_generic_addresses_reach_both_memories():
    out = np.zeros(32, np.uint32)
    text = kernel(
        """
        mov.u32 %r1, %tid.x;
        mul.wide.u32 %rd8, %r1, 4;
        mov.u64 %rd3, smem;
        cvta.shared.u64 %rd3, %rd3;
        add.s64 %rd3, %rd3, %rd8;
        add.s64 %rd4, %rd0, %rd8;
        st.b32 [%rd3], %r1;
        setp.lt.u32 %p1, %r1, 16;
        selp.b64 %rd5, %rd3, %rd4, %p1;
        ld.b32 %r2, [%rd5];
        st.b32 [%rd4], %r2;
        ret;
        """,
        shared=128,
    )
    out[:] = 1000 + T
    launch(text, out)
    assert (out == np.where(T < 16, T, T + 1000)).all()


def test_named_barriers_count_arrivals_and_waits():
    """Two warps produce and only arrive, two consume and wait: 128 threads."""
    got = lanes(
        """
        mov.u32 %r2, smem;
        shr.u32 %r3, %r1, 5;
        setp.lt.u32 %p1, %r3, 2;
        @%p1 bra $PRODUCE;
        bar.sync 3, 128;
        sub.s32 %r4, %r1, 64;
        mad.lo.s32 %r5, %r4, 4, %r2;
        ld.shared.b32 %r0, [%r5];
        bra $OUT;
        $PRODUCE:
        mad.lo.s32 %r5, %r1, 4, %r2;
        add.s32 %r6, %r1, 500;
        st.shared.b32 [%r5], %r6;
        bar.arrive 3, 128;
        mov.b32 %r0, 1;
        $OUT:
        """,
        threads=128,
    )
    assert (got == np.r_[np.ones(64), 500 + np.arange(64)]).all()


def test_a_reduction_at_a_barrier():
    got = lanes(
        """
        setp.gt.u32 %p1, %r1, 40;
        bar.red.popc.u32 %r0, 0, %p1;
        """,
        threads=64,
    )
    assert (got == 23).all()


MBARRIER = """
    mov.u32 %r2, smem;
    setp.eq.b32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared.b64 [%r2], 32;
    bar.sync 0;
    mov.b32 %r10, 0;
    mov.b32 %r0, 0;
    shr.u32 %r3, %r1, 5;
    setp.ne.b32 %p2, %r3, 0;
    $ROUND:
    @%p2 bra $WAIT;
    {produce}
    mbarrier.arrive.shared.b64 _, [%r2];
    bra $NEXT;
    $WAIT:
    and.b32 %r11, %r10, 1;
    $TRY:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r2], %r11;
    @!%p3 bra $TRY;
    ld.shared.b32 %r12, [%r2+16];
    add.s32 %r0, %r0, %r12;
    $NEXT:
    bar.sync 1, 64;
    add.s32 %r10, %r10, 1;
    setp.lt.u32 %p4, %r10, 5;
    @%p4 bra $ROUND;
"""


@schedules
def test_phases_of_an_mbarrier(options):
    produce = "add.s32 %r5, %r10, 1; @%p1 st.shared.b32 [%r2+16], %r5;"
    got = lanes(MBARRIER.format(produce=produce), threads=64, **options)
    assert got.tolist() == [0] * 32 + [15] * 32


def test_ldmatrix_and_stmatrix():
    got = lanes(
        """
        mov.u32 %r2, smem;
        mad.lo.s32 %r3, %r1, 4, %r2;
        shl.b32 %r4, %r1, 1;
        add.s32 %r5, %r4, 1;
        shl.b32 %r5, %r5, 16;
        or.b32 %r6, %r4, %r5;
        st.shared.b32 [%r3], %r6;
        bar.warp.sync -1;
        and.b32 %r7, %r1, 7;
        mad.lo.s32 %r8, %r7, 16, %r2;
        ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r9}, [%r8];
        add.s32 %r8, %r8, 256;
        stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r8], {%r9};
        bar.warp.sync -1;
        ld.shared.b32 %r10, [%r3+256];
        sub.s32 %r11, %r10, %r6;
        mad.lo.s32 %r0, %r11, 1000000, %r9;
        """
    )
    matrix = np.arange(64, dtype=np.uint32).reshape(8, 8).T.reshape(32, 2)
    assert (got == (matrix[:, 0] | matrix[:, 1] << 16)).all()


@schedules
def test_distributed_shared_memory_and_the_cluster_barrier(options):
    out = np.zeros((4, 32), np.uint32)
    text = kernel(
        """
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, smem;
        mov.u32 %r3, %cluster_ctarank;
        mov.u32 %r9, %ctaid.x;
        xor.b32 %r4, %r3, 1;
        mad.lo.s32 %r5, %r1, 4, %r2;
        mapa.shared::cluster.u32 %r6, %r5, %r4;
        mad.lo.s32 %r7, %r9, 100, %r1;
        st.shared::cluster.b32 [%r6], %r7;
        barrier.cluster.arrive.release;
        barrier.cluster.wait.acquire;
        ld.shared.b32 %r8, [%r5];
        mad.lo.s32 %r10, %r9, 32, %r1;
        mul.wide.u32 %rd8, %r10, 4;
        add.s64 %rd8, %rd8, %rd0;
        st.global.b32 [%rd8], %r8;
        ret;
        """,
        shared=128,
    )
    launch(text, out, grid=(4, 1, 1), cluster=(2, 1, 1), **options)
    assert (out == (np.arange(4)[:, None] ^ 1) * 100 + T).all()


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


# asynchronous copies

CP_ASYNC = """
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, smem;
    mad.lo.s32 %r3, %r1, 4, %r2;
    mul.wide.u32 %rd8, %r1, 4;
    add.s64 %rd9, %rd8, %rd0;
    add.s64 %rd10, %rd8, %rd1;
    st.shared.b32 [%r3], 1;
    cp.async.ca.shared.global [%r3], [%rd9], 4;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [%rd10], %r4;
    ret;
"""


@schedules
def test_cp_async_that_is_waited_for(options):
    source, out = T + 50, np.zeros(32, np.uint32)
    text = kernel(CP_ASYNC.format(wait="cp.async.wait_group 0;"), parameters=2, shared=128)
    launch(text, source, out, **options)
    assert (out == source).all()


def test_a_forgotten_wait_reads_stale_data_when_copies_are_late():
    source, out = T + 50, np.zeros(32, np.uint32)
    text = kernel(CP_ASYNC.format(wait="cp.async.wait_group 1;"), parameters=2, shared=128)
    launch(text, source, out, schedule="eager")
    assert (out == source).all()
    launch(text, source, out, schedule="late")
    assert (out == 1).all()


BULK = """
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, smem;
    setp.eq.b32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared.b64 [%r2], 1;
    bar.sync 0;
    @!%p1 bra $WAIT;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {bytes};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2+128], [%rd0], 128, [%r2];
    $WAIT:
    mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0;
    @!%p2 bra $WAIT;
    mad.lo.s32 %r3, %r1, 4, %r2;
    ld.shared.b32 %r4, [%r3+128];
    add.s32 %r4, %r4, 1;
    st.shared.b32 [%r3+256], %r4;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    @!%p1 bra $OUT;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2+256], 128;
    cp.async.bulk.commit_group;
    {wait}
    st.shared.b32 [%r2+256], 77;
    $OUT:
    ret;
"""


@schedules
def test_bulk_copies_with_an_mbarrier_and_a_group(options):
    source, out = T * 3, np.zeros(32, np.uint32)
    text = BULK.format(bytes=128, wait="cp.async.bulk.wait_group.read 0;")
    launch(kernel(text, parameters=2, shared=1024), source, out, **options)
    assert (out == source + 1).all()


def test_a_store_whose_source_is_overwritten_before_it_is_read():
    source, out = T * 3, np.zeros(32, np.uint32)
    text = BULK.format(bytes=128, wait="cp.async.bulk.wait_group.read 1;")
    launch(kernel(text, parameters=2, shared=1024), source, out, schedule="late")
    assert out[0] == 77
    assert (out[1:] == source[1:] + 1).all()


def test_a_transaction_count_that_is_wrong_is_a_deadlock():
    text = kernel(BULK.format(bytes=256, wait=""), parameters=2, shared=1024)
    with pytest.raises(Deadlock) as e:
        launch(text, T, np.zeros(32, np.uint32))
    message = str(e.value)
    assert "CTA 0 warp 0 waits for the end of phase 0" in message
    assert "0 of 1 arrivals pending, 128 transaction bytes open" in message
    assert "mbarrier.try_wait.parity" in message


@schedules
def test_st_async_to_another_cta(options):
    out = np.zeros((2, 32), np.uint32)
    text = kernel(
        """
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, smem;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 mbarrier.init.shared.b64 [%r2], 1;
        fence.mbarrier_init.release.cluster;
        @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 128;
        barrier.cluster.arrive.relaxed;
        barrier.cluster.wait;
        mov.u32 %r3, %cluster_ctarank;
        xor.b32 %r4, %r3, 1;
        mad.lo.s32 %r5, %r1, 4, %r2;
        mapa.shared::cluster.u32 %r6, %r5, %r4;
        mapa.shared::cluster.u32 %r7, %r2, %r4;
        mad.lo.s32 %r8, %r3, 1000, %r1;
        st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r6+128], %r8, [%r7];
        $WAIT:
        mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0;
        @!%p2 bra $WAIT;
        ld.shared.b32 %r9, [%r5+128];
        mad.lo.s32 %r10, %r3, 32, %r1;
        mul.wide.u32 %rd8, %r10, 4;
        add.s64 %rd8, %rd8, %rd0;
        st.global.b32 [%rd8], %r9;
        ret;
        """,
        shared=1024,
    )
    launch(text, out, grid=(2, 1, 1), cluster=(2, 1, 1), **options)
    assert (out == np.array([[1000], [0]]) + T).all()


@schedules
def test_clusters_that_are_cancelled_are_run_by_those_that_asked(options):
    """One resident CTA does the work of all five, by cluster launch control."""
    out = np.zeros(5, np.uint32)
    text = kernel(
        """
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, smem;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 mbarrier.init.shared.b64 [%r2], 1;
        bar.sync 0;
        mov.u32 %r3, %ctaid.x;
        mov.b32 %r4, 0;
        $LOOP:
        mul.wide.u32 %rd8, %r3, 4;
        add.s64 %rd8, %rd8, %rd0;
        @%p1 red.global.add.u32 [%rd8], 1;
        @!%p1 bra $WAIT;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 16;
        clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128
            [%r2+64], [%r2];
        $WAIT:
        mbarrier.try_wait.parity.shared.b64 %p2, [%r2], %r4;
        @!%p2 bra $WAIT;
        xor.b32 %r4, %r4, 1;
        ld.shared.v2.b64 {%rd3, %rd4}, [%r2+64];
        mov.b128 %q0, {%rd3, %rd4};
        clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p3, %q0;
        clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r3, %q0;
        bar.sync 0;
        @%p3 bra $LOOP;
        ret;
        """,
        shared=1024,
        declare=".reg .b128 %q<2>;",
    )
    result = launch(text, out, grid=(5, 1, 1), sms=1, block=1024, **options)
    assert (out == 1).all()
    assert result.warp_instructions > 0


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
