"""Barriers and fences -> source that calls the barrier units; those that park end their block."""

from __future__ import annotations

from coda.sim.ptx.codegen import Emitter
from coda.sim.ptx.parse import Instruction
from coda.sim.ptx.rules import EmitterRules, Fields
from coda.sim.types import Unsupported

TABLE = EmitterRules()
rule = TABLE.rule
SPACE = "?shared|shared::cta|shared::cluster"
ORDER = "sem?release|relaxed|acquire scope?cta|cluster"
CTA = "shared|shared::cta"


def _place(e: Emitter, operand: str) -> str:
    base, offset = e.address(operand)
    return f"{base}, {offset}"


# mbarriers


@rule(f"mbarrier.init ?{CTA} =b64")
def _init(e: Emitter, ins: Instruction, f: Fields) -> None:
    count = e.value(ins.operands[1], "u32")
    place = _place(e, ins.operands[0])
    e.line(f"M.mbarriers.init({e.site(ins)}, g, {e.mask(ins)}, {place}, {count})")


@rule(f"mbarrier.inval ?{CTA} =b64")
def _inval(e: Emitter, ins: Instruction, f: Fields) -> None:
    place = _place(e, ins.operands[0])
    e.line(f"M.mbarriers.invalidate({e.site(ins)}, g, {e.mask(ins)}, {place})")


@rule(
    f"mbarrier.arrive expect?expect_tx {ORDER} {SPACE} =b64",
    f"mbarrier.arrive nocomplete=noComplete {ORDER} ?{CTA} =b64",
    f"mbarrier.arrive_drop expect?expect_tx {ORDER} {SPACE} =b64",
    f"mbarrier.arrive_drop nocomplete=noComplete {ORDER} ?{CTA} =b64",
)
def _arrive(e: Emitter, ins: Instruction, f: Fields) -> None:
    returns = not ins.operands[0].startswith("[")
    place = _place(e, ins.operands[int(returns)])
    rest = ins.operands[1 + int(returns) :]
    number = e.value(rest[0], "u32") if rest else "1"
    values = f"count=1, expect={number}" if f.get("expect") else f"count={number}"
    drop = ins.op.startswith("mbarrier.arrive_drop")
    out = e.new(
        f"M.mbarriers.arrive({e.site(ins)}, g, {e.mask(ins)}, {place}, {values}, drop={drop})"
    )
    if returns and ins.operands[0] != "_":
        e.put(ins.operands[0], out, "b64", ins)


@rule(f"mbarrier.expect_tx sem?relaxed scope?cta|cluster {SPACE} =b64")
def _expect(e: Emitter, ins: Instruction, f: Fields) -> None:
    tx = e.value(ins.operands[1], "u32")
    place = _place(e, ins.operands[0])
    e.line(f"M.mbarriers.expect({e.site(ins)}, g, {e.mask(ins)}, {place}, {tx})")


@rule(f"mbarrier.complete_tx sem?relaxed scope?cta|cluster {SPACE} =b64")
def _complete(e: Emitter, ins: Instruction, f: Fields) -> None:
    tx = e.value(ins.operands[1], "u32")
    place = _place(e, ins.operands[0])
    e.line(f"M.mbarriers.complete({e.site(ins)}, g, {e.mask(ins)}, {place}, {tx})")


@rule(
    f"mbarrier how=try_wait|test_wait parity?parity {ORDER} ?{CTA} =b64",
)
def _wait(e: Emitter, ins: Instruction, f: Fields) -> None:
    dest = ins.operands[0]
    slot = -1
    if dest != "_":
        slot = e.layout.slots[dest][1]
        e.direct.add(dest)
    base, offset = e.address(ins.operands[1])
    if f["parity"]:
        phase = e.value(ins.operands[2], "u32")
    else:
        phase = f"{e.value(ins.operands[2], 'b64')}.astype(np.uint32)"
    e.end = (
        f"M.mbarriers.wait({e.site(ins)}, g, m, {e.mask(ins)}, ({base}, {offset}), {phase}, "
        f"result={slot}, then={e.number + 1}, mode={f['how']!r})"
    )


# barriers of a CTA


@rule(
    "bar.sync", "bar.cta.sync", "barrier.sync ?aligned", "barrier.cta.sync ?aligned",
)  # fmt: skip
def _bar_sync(e: Emitter, ins: Instruction, f: Fields) -> None:
    e.end = _meet(e, ins, ins.operands, "")


@rule(
    "bar.red.popc =u32", "bar.red op=and|or =pred", "bar.cta.red.popc =u32",
    "bar.cta.red op=and|or =pred", "barrier.red.popc ?aligned =u32",
    "barrier.red op=and|or ?aligned =pred", "barrier.cta.red.popc ?aligned =u32",
    "barrier.cta.red op=and|or ?aligned =pred",
)  # fmt: skip
def _bar_red(e: Emitter, ins: Instruction, f: Fields) -> None:
    dest = ins.operands[0]
    slot = e.layout.slots[dest][1]
    e.direct.add(dest)
    p = e.value(ins.operands[-1], "pred")
    mode = f.get("op") or "popc"
    e.end = _meet(e, ins, ins.operands[1:-1], f", reduction=({mode!r}, {p}, {slot})")


def _meet(e: Emitter, ins: Instruction, operands: list[str], more: str) -> str:
    number = e.value(operands[0], "u32")
    count = e.value(operands[1], "u32") if len(operands) > 1 else "0"
    start = f"M.named.meet({e.site(ins)}, g, m, {e.mask(ins)}, {number}, {count}"
    return f"{start}, then={e.number + 1}{more})"


@rule(
    "bar.arrive", "bar.cta.arrive", "barrier.arrive ?aligned", "barrier.cta.arrive ?aligned",
)  # fmt: skip
def _bar_arrive(e: Emitter, ins: Instruction, f: Fields) -> None:
    number, count = (e.value(x, "u32") for x in ins.operands)
    e.line(f"M.named.arrive({e.site(ins)}, g, {e.mask(ins)}, {number}, {count})")


@rule("bar.warp.sync")
def _warp_sync(e: Emitter, ins: Instruction, f: Fields) -> None:
    _fence(e, ins, f)


# barriers of a cluster


@rule("barrier.cluster.arrive sem?release|relaxed ?aligned")
def _cluster_arrive(e: Emitter, ins: Instruction, f: Fields) -> None:
    e.line(f"M.cluster_barriers.arrive({e.site(ins)}, g, {e.mask(ins)})")


@rule("barrier.cluster.wait sem?acquire ?aligned")
def _cluster_wait(e: Emitter, ins: Instruction, f: Fields) -> None:
    site, mask = e.site(ins), e.mask(ins)
    e.end = f"M.cluster_barriers.wait({site}, g, m, {mask}, {e.number + 1})"


# fences: no effect on execution, as each instruction takes effect at once; for observers only


@rule(
    "fence.proxy.async ?global|shared|shared::cta|shared::cluster",
    "fence.proxy.async.generic =acquire|release ?sync_restrict::shared::cluster|sync_restrict::"
    "shared::cta =cluster",
    "fence.proxy.alias",
    "fence.proxy.tensormap::generic =release =cta|cluster|gpu|sys",
    "fence.mbarrier_init.release.cluster",
    "fence ?sc|acq_rel|acquire|release =cta|cluster|gpu|sys",
    "fence =acquire|release =sync_restrict::shared::cluster|sync_restrict::shared::cta =cluster",
    "membar =cta|gl|sys",
    "griddepcontrol =wait|launch_dependents",
    "tcgen05.fence::before_thread_sync",
    "tcgen05.fence::after_thread_sync",
    "wgmma.fence.sync.aligned",
)
def _fence(e: Emitter, ins: Instruction, f: Fields) -> None:
    guard = "m" if ins.predicate is None else f"both(m, {e.guard(ins)}, M.shape)"
    e.line("if M.observer is not None:")
    e.line(f"    M.observer.fence({e.site(ins)}, g, {guard})")


@rule("fence.proxy.tensormap::generic order=acquire|acq_rel =cta|cluster|gpu|sys")
def _map_fence(e: Emitter, ins: Instruction, f: Fields) -> None:
    base, offset = e.address(ins.operands[0])
    at = f"spread(M.transfers.at(({base}, {offset})), M.shape)"
    guard = "m" if ins.predicate is None else f"both(m, {e.guard(ins)}, M.shape)"
    e.line("if M.observer is not None:")
    e.line(f"    M.observer.fence({e.site(ins)}, g, {guard})")
    e.line(f"    M.observer.map_acquire({e.site(ins)}, g, {guard}, {at})")


@rule("setmaxnreg op=inc|dec =sync =aligned =u32")
def _setmaxnreg(e: Emitter, ins: Instruction, f: Fields) -> None:
    count = int(ins.operands[0], 0)
    if not 24 <= count <= 256 or count % 8:
        raise Unsupported(f"setmaxnreg to {count} registers")
