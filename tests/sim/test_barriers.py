"""Shared memory, barriers and asynchronous copies between the threads of a cluster."""

import numpy as np
import pytest

from coda.sim.types import Deadlock
from tests.sim.kernels import MBARRIER, kernel, lanes, launch, schedules

T = np.arange(32, dtype=np.uint32)


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
