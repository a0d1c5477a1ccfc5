"""Tensor-core instructions -> source that hands them to their units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from coda.sim.ptx.codegen import Emit, Emitter
from coda.sim.ptx.parse import Instruction
from coda.sim.ptx.program import uses_and_writes
from coda.sim.ptx.rules import EmitterRules, Fields
from coda.sim.tensorcore import mma, tcgen05, tmem, wgmma
from coda.sim.tensorcore.tensor import WgmmaSite
from coda.sim.types import Unsupported

TABLE = EmitterRules()
rule = TABLE.rule


class _Anything:
    """A rule for opcodes that a unit parses by itself."""

    def __init__(self, head: str) -> None:
        self.head = head

    def match(self, op: str) -> dict[str, str] | None:
        return {} if op.startswith(self.head) else None


def parsed(head: str) -> Callable[[Emit], Emit]:
    """Let a function emit all opcodes that begin with `head`; it refuses what is unknown."""

    def add(emit: Emit) -> Emit:
        TABLE.enter(head.split(".")[0], _Anything(head), emit)
        return emit

    return add


def _slots(e: Emitter, operand: str) -> np.ndarray:
    names = e.vector(operand)
    for name in names:
        if e.layout.slots.get(name, (0, 0))[0] != 32:
            raise Unsupported(f"register {name!r}")
    return np.array([e.layout.slots[name][1] for name in names])


def _place(e: Emitter, operand: str) -> str:
    base, offset = e.address(operand)
    return f"({base}, {offset})"


def _whole(e: Emitter, ins: Instruction) -> None:
    if ins.predicate is not None:
        raise Unsupported("a predicate on an instruction of whole warps")


# wgmma


@parsed("wgmma.mma_async")
def _wgmma(e: Emitter, ins: Instruction, f: Fields) -> None:
    _whole(e, ins)
    form = wgmma.parse_wgmma(ins.op, ins.operands)
    d, a, b, scale = ins.operands[:4]
    held = _slots(e, a) if form.a_in_registers else None
    sources = frozenset(e.vector(a) if form.a_in_registers else ())
    names = frozenset(e.vector(d))
    site = e.constant(WgmmaSite(form, _slots(e, d), held, names, sources))
    left = "None" if form.a_in_registers else e.value(a, "b64")
    e.direct |= set(e.vector(d))
    right, keep = e.value(b, "b64"), e.value(scale, "pred")
    e.line(f"M.tensor.mma({e.site(ins)}, g, {site}, {left}, {right}, {keep})")


@rule("wgmma.commit_group.sync.aligned")
def _wgmma_commit(e: Emitter, ins: Instruction, f: Fields) -> None:
    _whole(e, ins)
    e.line(f"M.tensor.commit({e.site(ins)}, g)")


@rule("wgmma.wait_group.sync.aligned")
def _wgmma_wait(e: Emitter, ins: Instruction, f: Fields) -> None:
    _whole(e, ins)
    e.line(f"M.tensor.wait({e.site(ins)}, g, {int(ins.operands[0], 0)})")


# tcgen05

GROUP = "group=cta_group::1|cta_group::2"


@rule(f"tcgen05.alloc {GROUP} =sync =aligned ?shared::cta =b32")
def _alloc(e: Emitter, ins: Instruction, f: Fields) -> None:
    _whole(e, ins)
    count = e.value(ins.operands[1], "u32")
    e.line(f"M.tensor_memory.alloc({e.site(ins)}, g, {_place(e, ins.operands[0])}, {count})")


@rule(f"tcgen05.dealloc {GROUP} =sync =aligned =b32")
def _dealloc(e: Emitter, ins: Instruction, f: Fields) -> None:
    _whole(e, ins)
    address, count = (e.value(x, "u32") for x in ins.operands)
    e.line(f"M.tensor_memory.dealloc({e.site(ins)}, g, {address}, {count})")


@rule(f"tcgen05.relinquish_alloc_permit {GROUP} =sync =aligned")
def _relinquish(e: Emitter, ins: Instruction, f: Fields) -> None:
    pass


def _early(e: Emitter, ins: Instruction) -> tuple[frozenset[str], Any]:
    moves = e.program.early[ins.line]
    written = {x for move in moves for x in uses_and_writes(move, e.kernel)[1]}
    return frozenset(written | set(e.vector(ins.operands[0]))), e.moves(moves)


@parsed("tcgen05.ld.")
def _load(e: Emitter, ins: Instruction, f: Fields) -> None:
    _whole(e, ins)
    form = tmem.parse_move(ins.op)
    slots = _slots(e, ins.operands[0])
    if len(slots) != form.registers:
        raise Unsupported(f"{len(slots)} registers")
    split = int(ins.operands[2], 0) if len(ins.operands) > 2 else 0
    e.direct |= set(e.vector(ins.operands[0]))
    place, names = _place(e, ins.operands[1]), (e.constant(form), e.constant(slots))
    site, early = e.site(ins), e.constant(_early(e, ins))
    e.line(
        f"M.tensor_memory.load({site}, g, {names[0]}, {names[1]}, {place}, "
        f"split={split}, early={early})"
    )


@parsed("tcgen05.st.")
def _store(e: Emitter, ins: Instruction, f: Fields) -> None:
    _whole(e, ins)
    form = tmem.parse_move(ins.op)
    values = [e.value(x, "b32") for x in e.vector(ins.operands[-1])]
    if len(values) != form.registers:
        raise Unsupported(f"{len(values)} registers")
    split = int(ins.operands[1], 0) if len(ins.operands) > 2 else 0
    place = _place(e, ins.operands[0])
    site, name = e.site(ins), e.constant(form)
    e.line(f"M.tensor_memory.store({site}, g, {name}, [{', '.join(values)}], {place}, {split})")


@rule("tcgen05.wait::ld.sync.aligned", "tcgen05.wait::st.sync.aligned")
def _wait(e: Emitter, ins: Instruction, f: Fields) -> None:
    _whole(e, ins)
    e.line(f"M.tensor_memory.wait({e.site(ins)}, g, loads={'::ld' in ins.op})")


@parsed("tcgen05.mma")
def _tcgen05_mma(e: Emitter, ins: Instruction, f: Fields) -> None:
    form = tcgen05.parse_mma(ins.op, ins.operands)
    a = ins.operands[1]
    left = _address(e, a) if form.a_in_tmem else e.value(a, "b64")
    values = [_address(e, ins.operands[0]), left, e.value(ins.operands[2], "b64")]
    values.append(e.value(ins.operands[3], "u32"))
    rest = ins.operands[4:]
    masked: list[str] = []
    if form.masked:
        masked = [e.value(x, "u32") for x in e.vector(rest.pop(0))]
    if form.scales:
        values += [_address(e, rest.pop(0)), _address(e, rest.pop(0))]
    enable = e.value(rest[0], "pred")
    e.line(
        f"M.tensor_memory.mma({e.site(ins)}, g, {e.mask(ins)}, {e.constant(form)}, "
        f"[{', '.join(values)}], enable={enable}, disabled=[{', '.join(masked)}])"
    )


def _address(e: Emitter, operand: str) -> str:
    base, offset = e.address(operand)
    return f"({base} + np.uint32({offset}))" if offset else base


@parsed("tcgen05.cp.")
def _copy(e: Emitter, ins: Instruction, f: Fields) -> None:
    form = e.constant(tmem.parse_copy(ins.op))
    place, source = _place(e, ins.operands[0]), e.value(ins.operands[1], "b64")
    e.line(f"M.tensor_memory.copy({e.site(ins)}, g, {e.mask(ins)}, {form}, {place}, {source})")


@parsed("tcgen05.shift.")
def _shift(e: Emitter, ins: Instruction, f: Fields) -> None:
    ctas = tmem.parse_shift(ins.op)
    place = _place(e, ins.operands[0])
    e.line(f"M.tensor_memory.shift({e.site(ins)}, g, {e.mask(ins)}, {ctas}, {place})")


@rule(
    f"tcgen05.commit {GROUP} =mbarrier::arrive::one ?shared::cluster "
    "multicast?multicast::cluster =b64"
)
def _commit(e: Emitter, ins: Instruction, f: Fields) -> None:
    place = _place(e, ins.operands[0])
    multicast = e.value(ins.operands[1], "u16") if f["multicast"] else "None"
    ctas = f["group"][-1]
    e.line(f"M.tensor_memory.commit({e.site(ins)}, g, {e.mask(ins)}, {ctas}, {place}, {multicast})")


# mma.sync


@parsed("mma.sync.")
def _mma_sync(e: Emitter, ins: Instruction, f: Fields) -> None:
    _whole(e, ins)
    form = mma.parse_mma_sync(ins.op)
    kind = "b64" if form.word == 8 else "b32"
    parts = []
    for operand in ins.operands[1:4]:
        values = [e.value(x, kind) for x in e.vector(operand)]
        parts.append(e.new(f"np.stack([spread(x, M.shape) for x in [{', '.join(values)}]])"))
    out = e.new(f"{e.function(mma.mma_sync)}({e.constant(form)}, {', '.join(parts)})")
    e.line(f"M.result.flops += {16 * form.m * form.k} * M.shape[0]")
    for k, register in enumerate(e.vector(ins.operands[0])):
        e.put(register, e.new(f"{out}[{k}]"), kind, ins)
