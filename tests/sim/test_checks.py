"""Each check on a few lines of PTX: the bug is found, and the same code without it is clean."""

from types import SimpleNamespace

import numpy as np
import pytest

from coda.sim.checks.counters import conflicts
from coda.sim.types import CHECK_KINDS, BytesMoved, CheckFailed, Fault
from tests.sim.kernels import kernel, launch
from tests.sim.test_tma import encode

WARN = dict.fromkeys(CHECK_KINDS, "warn")
SCHEDULES = ({"schedule": "eager"}, {"schedule": "late"}, {"schedule": "random", "seed": 3})
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda o: o["schedule"])

HEAD = """
mov.u32 %r1, %tid.x; shr.u32 %r2, %r1, 5; and.b32 %r3, %r1, 31;
mov.u32 %r4, smem; shl.b32 %r5, %r3, 2; add.u32 %r5, %r5, %r4; shl.b32 %r6, %r1, 2;
add.u32 %r6, %r6, %r4; setp.eq.u32 %p1, %r2, 0; setp.eq.u32 %p2, %r1, 0;
mul.wide.u32 %rd9, %r1, 4; add.s64 %rd9, %rd9, %rd0;
"""


def found(body: str, *, block: int = 64, kinds: object = WARN, **more):
    """The result of a kernel; its first array has a word for each thread."""
    out = np.zeros(1024, np.uint32)
    text = kernel(HEAD + body + "\nret;", shared=4096)
    return launch(text, out, block=block, checks=kinds, **more)


def only(body: str, kind: str, **more):
    """The one finding of a kernel."""
    findings = found(body, **more).findings
    assert [f.kind for f in findings] == [kind], [str(f) for f in findings]
    return findings[0]


def clean(body: str, **more) -> None:
    findings = found(body, **more).findings
    assert not findings, [str(f) for f in findings]


# order within a block

WRITE = "@%p1 st.shared.b32 [%r5], %r1;"
READ = "@!%p1 ld.shared.b32 %r7, [%r5]; @!%p1 st.global.b32 [%rd9], %r7;"


@schedules
def test_a_barrier_between_a_store_and_a_load(schedule):
    assert "wrote" in only(WRITE + READ, "race", **SCHEDULES[0]).message
    clean(WRITE + "bar.sync 0;" + READ, **schedule)
    clean(WRITE + "@%p1 bar.arrive 1, 64; @!%p1 bar.sync 1, 64;" + READ, **schedule)


def test_a_barrier_of_others_orders_nothing():
    only(WRITE + "@%p1 bar.sync 1, 32; @!%p1 bar.sync 2, 32;" + READ, "race")


@schedules
def test_a_barrier_before_memory_is_used_again(schedule):
    once = WRITE + "bar.sync 0;" + READ
    clean(once + "bar.sync 0;" + WRITE, **schedule)
    assert "overwrites data that warp 1 reads" in only(once + WRITE, "race").message


def test_two_writers_race_and_those_of_parts_of_a_word_do_not():
    only("st.shared.b32 [%r5], %r1; bar.sync 0; st.shared.b32 [%r5+4], %r1;", "race", block=64)
    clean(
        "cvt.u16.u32 %h1, %r1; shl.b32 %r8, %r1, 1; add.u32 %r8, %r8, %r4; "
        "shl.b32 %r9, %r2, 1; add.u32 %r9, %r9, %r4; st.shared.b16 [%r9], %h1;"
    )


def test_atomics_do_not_race():
    clean(
        "@%p2 st.shared.b32 [%r4], %r1; bar.sync 0; red.shared.add.u32 [%r4], %r1; bar.sync 0; "
        "ld.shared.b32 %r7, [%r4];"
    )


# what nothing has written


def test_shared_memory_that_nothing_wrote():
    finding = only("ld.shared.b32 %r7, [%r6+128];", "uninitialised", block=32)
    assert (finding.cta, finding.warp, finding.address) == (0, 0, 1024 + 128)
    assert finding.ptx_text.startswith("ld.shared.b32")
    clean("st.shared.b32 [%r6+128], %r1; ld.shared.b32 %r7, [%r6+128];", block=32)


def test_a_register_that_a_loop_changes_but_nothing_began():
    loop = "L: add.u32 %r10, %r10, 1; setp.lt.u32 %p3, %r10, 5; @%p3 bra L;"
    assert "%r10" in only(loop, "uninitialised").message
    clean("mov.b32 %r10, 0;" + loop)
    skipped = "@%p1 bra S; mov.b32 %r10, 0; S: add.u32 %r11, %r10, 1;"
    clean(skipped)  # a value left open where a branch forbids it


# the async proxy

COPY = "@%p2 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r4], 128;"
COMMIT = "@%p2 cp.async.bulk.commit_group;"
DRAIN = "@%p2 cp.async.bulk.wait_group.read 0;"


@schedules
def test_a_proxy_fence_between_stores_and_a_bulk_copy(schedule):
    good = WRITE + "fence.proxy.async.shared::cta; bar.sync 0;" + COPY + COMMIT + DRAIN
    clean(good, **schedule)
    clean(WRITE + "bar.sync 0; fence.proxy.async.shared::cta;" + COPY + COMMIT + DRAIN, **schedule)
    finding = only(good.replace("fence.proxy.async.shared::cta;", ""), "race", **schedule)
    assert "no fence.proxy.async" in finding.message


@schedules
def test_a_bulk_copy_has_read_before_its_source_changes(schedule):
    good = WRITE + "fence.proxy.async.shared::cta; bar.sync 0;" + COPY + COMMIT + DRAIN
    clean(good + "bar.sync 0;" + WRITE, **schedule)
    kinds = {f.kind for f in found(good.replace(DRAIN, "") + "bar.sync 0;" + WRITE).findings}
    assert kinds == {"race", "exited"}
    assert "a CTA exits" in only(good.replace(DRAIN, ""), "exited").message


INIT = "@%p2 mbarrier.init.shared.b64 [%r4+1024], 1;"
FENCE = "fence.mbarrier_init.release.cluster;"
LOAD = """@%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%r4+1024], 128;
@%p2 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r4], [%rd0], 128, [%r4+1024];
"""
WAIT = "W: mbarrier.try_wait.parity.shared.b64 %p4, [%r4+1024], 0; @!%p4 bra W;"
USE = "ld.shared.b32 %r7, [%r5];"


@schedules
def test_what_a_bulk_load_brings_is_read_after_its_mbarrier(schedule):
    clean(INIT + FENCE + "bar.sync 0;" + LOAD + WAIT + USE, **schedule)
    messages = [f.message for f in found(INIT + FENCE + "bar.sync 0;" + LOAD + USE).findings]
    assert any("a copy that completes on an mbarrier wrote" in m for m in messages)
    assert any("a CTA exits" in m for m in messages)


def test_an_mbarrier_is_used_after_its_initialisation():
    messages = [f.message for f in found(INIT + FENCE + LOAD + WAIT + USE, **SCHEDULES[0]).findings]
    assert any("initialised" in m for m in messages)
    messages = [f.message for f in found(INIT + "bar.sync 0;" + LOAD + WAIT + USE).findings]
    assert any("no fence.mbarrier_init" in m for m in messages)


def test_memory_that_was_read_is_loaded_again():
    first = INIT + FENCE + "bar.sync 0;" + LOAD + WAIT + USE
    again = LOAD + WAIT.replace("W", "V").replace(", 0;", ", 1;")
    clean(first + "bar.sync 0;" + again)
    assert "overwrites data that warp 1 reads" in only(first + again, "race").message


@schedules
def test_cp_async_is_waited_for(schedule):
    copy = "cp.async.ca.shared.global [%r6], [%rd9], 4; cp.async.commit_group;"
    use = "ld.shared.b32 %r7, [%r6];"
    clean(copy + "cp.async.wait_group 0;" + use, **schedule)
    assert {f.kind for f in found(copy + use).findings} == {"race", "exited"}


# registers and tensor memory

ZERO = "".join(f"st.shared.b32 [%r6+{k}], 0;" for k in range(0, 2048, 512))
DESCRIPTOR = """and.b32 %r8, %r4, 0x3ffff; shr.u32 %r8, %r8, 4; cvt.u64.u32 %rd10, %r8;
or.b64 %rd10, %rd10, 0x0000000800080000;"""
PRODUCT = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23},
%rd10, %rd10, 0, 1, 1, 0, 0; wgmma.commit_group.sync.aligned;"""


def test_registers_of_a_product_in_flight():
    start = ZERO + "fence.proxy.async.shared::cta; bar.sync 0;" + DESCRIPTOR
    fence, wait = "wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
    use = "st.global.b32 [%rd9], %r20;"
    clean(start + fence + PRODUCT + wait + use, block=128)
    kinds = {f.kind for f in found(start + fence + PRODUCT + use, block=128).findings}
    assert kinds == {"in-flight", "exited"}
    touched = start + "mov.b32 %r20, 0;" + PRODUCT + wait + use
    assert "wgmma.fence" in only(touched, "in-flight", block=128).message


def test_tensor_memory_is_freed_and_was_written():
    alloc = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4], 32;"
    address = "ld.shared.b32 %r8, [%r4];"
    free = "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r8, 32;"
    clean(alloc + address + free, block=32)
    assert only(alloc + address, "leak", block=32).address == 0
    load = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r9}, [%r8]; tcgen05.wait::ld.sync.aligned;"
    store = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r8], {%r1}; tcgen05.wait::st.sync.aligned;"
    clean(alloc + address + store + load + free, block=32)
    only(alloc + address + load + free, "uninitialised", block=32)


# clusters


def test_a_cluster_barrier_keeps_a_block_that_others_touch():
    remote = """mov.u32 %r11, %cluster_ctarank; xor.b32 %r11, %r11, 1;
    mapa.shared::cluster.u32 %r12, %r5, %r11; st.shared.b32 [%r5], %r1;"""
    meet = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    use = "ld.shared::cluster.b32 %r13, [%r12];"
    pair = {"grid": (2, 1, 1), "cluster": (2, 1, 1), "block": 32}
    clean(remote + meet + use + meet, **pair)
    assert {f.kind for f in found(remote + meet + use, **pair).findings} == {"exited"}
    assert {f.kind for f in found(remote + use + meet, **pair).findings} <= {
        "race",
        "uninitialised",
    }
    relaxed = meet.replace("arrive.", "arrive.relaxed.")
    assert {f.kind for f in found(remote + relaxed + use + relaxed, **pair).findings} == {"race"}


# between blocks

ROLE = "mov.u32 %r11, %ctaid.x; setp.eq.u32 %p5, %r11, 0;"
SEND = "@%p5 st.global.b32 [%rd9], %r1;"
RAISE = "bar.sync 0; @%p2 st.release.gpu.global.b32 [%rd0+4092], 1;"
AWAIT = "A: ld.acquire.gpu.global.b32 %r12, [%rd0+4092]; setp.ne.u32 %p6, %r12, 1; @%p6 bra A;"
TAKE = "@!%p5 ld.global.b32 %r13, [%rd9];"


@schedules
def test_blocks_hand_over_global_memory_by_release_and_acquire(schedule):
    two = {"grid": (2, 1, 1), **schedule}
    handed = SEND + "@!%p5 bra N;" + RAISE + "bra.uni X; N: " + AWAIT + "bar.sync 0; X:" + TAKE
    clean(ROLE + handed, **two)
    by_one = handed.replace("N: A:", "N: @!%p2 bra B; A:").replace(
        "bar.sync 0; X:", "B: bar.sync 0; X:"
    )
    clean(ROLE + by_one, **two)  # a thread asks, the barrier tells the others
    unasked = ROLE + SEND + "bar.sync 0;" + TAKE
    message = only(unasked, "race", grid=(2, 1, 1)).message
    assert "global memory (array 0) that CTA 0 wrote" in message
    clean("st.global.b32 [%rd9], %r1;", grid=(2, 1, 1))


@schedules
def test_a_block_overwrites_what_another_has_read(schedule):
    two = {"grid": (2, 1, 1), **schedule}
    look, put = "@%p5 ld.global.b32 %r13, [%rd9];", "@!%p5 st.global.b32 [%rd9], %r1;"
    ordered = look + "@!%p5 bra N;" + RAISE + "bra.uni X; N: " + AWAIT + "bar.sync 0; X:" + put
    clean(ROLE + ordered, **two)
    message = only(ROLE + look + "bar.sync 0;" + put, "race", **two).message
    assert "overwrites global memory (array 0) that CTA 0 reads" in message
    clean(ROLE + "ld.global.b32 %r13, [%rd9+1024];" + put, **two)
    copy = COPY.replace("@%p2", "@%p7").replace("[%rd0]", "[%rd0+128]") + COMMIT + DRAIN
    other = "not.pred %p7, %p5; and.pred %p7, %p7, %p2; fence.proxy.async.shared::cta; bar.sync 0;"
    only(ROLE + WRITE + look + other + copy, "race", **two)


def test_reductions_of_blocks_do_not_race():
    clean("red.global.add.u32 [%rd0], %r1;", grid=(2, 1, 1))
    store = WRITE + "fence.proxy.async.shared::cta; bar.sync 0;" + COPY + COMMIT + DRAIN
    only(store, "race", grid=(2, 1, 1))
    plain = "cp.async.bulk.global.shared::cta.bulk_group"
    clean(
        store.replace(plain, "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32"),
        grid=(2, 1, 1),
    )


# bounds: nothing goes on after them


@pytest.mark.parametrize(
    ("access", "kind"),
    [
        ("ld.global.b32 %r7, [%rd9+4096];", "out-of-bounds"),
        ("st.global.b32 [%rd9+2], %r1;", "misaligned"),
        ("ld.shared.b32 %r7, [%r5+262144];", "out-of-bounds"),
        ("st.shared.v2.b32 [%r5+4], {%r1, %r1};", "misaligned"),
    ],
)
def test_bounds_and_alignment(access, kind):
    with pytest.raises(Fault) as error:
        found(access)
    finding = error.value.finding
    assert finding is not None
    assert (finding.kind, finding.kernel, finding.cta) == (kind, "k", 0)
    assert finding.address


# levels, places, counters


MAP = """
mov.u32 %r1, %tid.x; mov.u32 %r4, smem; mul.wide.u32 %rd9, %r1, 4; add.s64 %rd9, %rd9, %rd0;
setp.eq.u32 %p2, %r1, 0; @!%p2 bra $STORED;
mbarrier.init.shared.b64 [%r4], 1; fence.mbarrier_init.release.cluster;
$STORED: bar.sync 0;
{change}
{release}
{between}
@!%p2 bra $WAIT;
{acquire}
mbarrier.arrive.expect_tx.shared.b64 _, [%r4], 64;
cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes
  [%r4+1024], [%rd0, {{0, 0}}], [%r4];
$WAIT:
mbarrier.try_wait.parity.shared.b64 %p3, [%r4], 0; @!%p3 bra $WAIT;
ret;
"""
RELEASE = "fence.proxy.tensormap::generic.release.gpu;"
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%rd0], 128;"
CHANGES = (
    "ld.global.b32 %r2, [%rd9]; st.global.b32 [%rd9], %r2; bar.warp.sync -1;",
    "@%p2 tensormap.replace.tile.fill_mode.global.b1024.b32 [%rd0], 0;",
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_map_that_is_changed_is_released_and_acquired(change):
    data, raw = np.zeros((4, 16), np.uint32), np.zeros(64, np.uint32)
    map_ = raw[-(raw.ctypes.data // 4) % 32 :][:32]
    map_[:16] = np.frombuffer(encode(data.ctypes.data, (16, 4), (64,), (4, 4), "f32"), np.uint32)

    def kinds(release: str, acquire: str, between: str = "bar.sync 0;"):
        body = MAP.format(change=change, release=release, acquire=acquire, between=between)
        result = launch(kernel(body, 2, shared=4096), map_, data, block=32, checks=WARN)
        return [f.message for f in result.findings]

    assert kinds(RELEASE, ACQUIRE) == []
    for without in ((RELEASE, ""), ("", ACQUIRE), ("", "")):
        (message,) = kinds(*without)
        assert "no fence.proxy.tensormap" in message


def test_levels():
    with pytest.raises(CheckFailed, match="race: reads data that warp 0 wrote"):
        found(WRITE + READ, kinds={"race": "raise"})
    assert not found(WRITE + READ, kinds={"race": "off", "leak": "warn"}).findings
    assert not found(WRITE + READ, kinds={}).per_allocation


def test_a_finding_is_told_once_with_its_source_line():
    lines = kernel(HEAD + WRITE + "\n.loc 1 42 7\n" + READ + "\nret;", shared=4096)
    text = lines + '\n.file 1 "attention.py"\n'
    out = np.zeros(1024, np.uint32)
    (finding,) = launch(text, out, block=64, grid=(3, 1, 1), checks={"race": "warn"}).findings
    assert finding.source is not None
    assert "attention.py:42" in finding.source
    assert text.split("\n")[finding.ptx_line - 1].strip().startswith("@!%p1 ld.shared")
    assert str(finding.ptx_line) in str(finding)


def test_traffic_by_tensor_and_unit():
    body = "ld.global.b32 %r7, [%rd9]; ld.global.b32 %r8, [%rd0]; @%p1 st.global.b32 [%rd9], %r7;"
    result = found(body)
    assert result.per_allocation == {"array 0": BytesMoved(512, 128, 256, 128)}
    assert result.per_unit == {"threads": BytesMoved(512, 128, 256, 128)}
    result = found(INIT + FENCE + "bar.sync 0;" + LOAD + WAIT + USE)
    assert result.per_unit == {"bulk": BytesMoved(128, 0, 128, 0)}
    assert result.per_allocation == {"array 0": BytesMoved(128, 0, 128, 0)}


def test_bank_conflicts():
    lane = np.arange(32)[None]
    assert conflicts(lane * 4, None, 4) == 0
    assert conflicts(lane * 8, None, 4) == 1
    assert conflicts(lane * 128, None, 4) == 31
    assert conflicts(lane * 0, None, 4) == 0
    assert conflicts(lane * 16, None, 16) == 0
    assert conflicts(lane * 128, None, 16) == 4 * 7
    assert conflicts(np.arange(8)[None] * 144, None, 16) == 0
    assert conflicts(np.arange(8)[None] * 128, None, 16) == 7
    assert conflicts(lane * 128, lane % 2 == 0, 4) == 15
    result = found(
        "shl.b32 %r8, %r3, 5; add.u32 %r8, %r8, %r4; st.shared.b32 [%r8], %r1;", block=32
    )
    assert result.bank_conflicts == 7


def test_nothing_is_looked_at_when_nobody_asks(monkeypatch):
    from coda.sim.checks import checks, counters

    def refuse(machine: SimpleNamespace) -> None:
        raise AssertionError("an observer was made")

    monkeypatch.setattr(checks, "Exits", refuse)
    monkeypatch.setattr(counters, "Counters", refuse)
    assert not found(WRITE + READ, kinds={}).findings
