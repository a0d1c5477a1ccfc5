"""Bulk and tensor copies, st.async, cluster launch control -> source that issues operations."""

from __future__ import annotations

import re

from coda.sim.ptx.codegen import Emitter
from coda.sim.ptx.parse import WIDTH, Instruction, split_operands
from coda.sim.ptx.rules import EmitterRules, Fields
from coda.sim.types import Unsupported

TABLE = EmitterRules()
rule = TABLE.rule
DIMENSIONS = "1d|2d|3d|4d|5d"
HINT = "hint?L2::cache_hint"
TX = "=mbarrier::complete_tx::bytes"
_TENSOR = re.compile(r"^\[([^,]+),\s*\{(.*)\}\s*\]$", re.S)


def _place(e: Emitter, operand: str) -> str:
    base, offset = e.address(operand)
    return f"({base}, {offset})"


def _box(e: Emitter, operand: str, f: Fields) -> tuple[str, str]:
    """The place of the tensor map and the list of coordinates of [map, {x, y, ...}]."""
    match = _TENSOR.match(operand)
    if match is None:
        raise Unsupported(f"tensor operand {operand!r}")
    coords = split_operands(match[2])
    four = f["mode"] in ("tile::gather4", "tile::scatter4")
    if len(coords) != (5 if four else int(f["dim"][0])):
        raise Unsupported(f"{len(coords)} coordinates")
    values = ", ".join(e.value(x, "s32") for x in coords)
    return _place(e, f"[{match[1].strip()}]"), f"[{values}]"


def _mode(f: Fields) -> str:
    return "'gather4'" if f["mode"] in ("tile::gather4", "tile::scatter4") else "'tile'"


@rule(
    f"cp.async.bulk.tensor dim={DIMENSIONS} =shared::cta|shared::cluster =global "
    f"mode?tile|tile::gather4 {TX} multicast?multicast::cluster "
    f"g1?cta_group::1|cta_group::2 {HINT} g2?cta_group::1|cta_group::2"
)
def _tensor_load(e: Emitter, ins: Instruction, f: Fields) -> None:
    to, barrier = _place(e, ins.operands[0]), _place(e, ins.operands[2])
    source, coords = _box(e, ins.operands[1], f)
    multicast = e.value(ins.operands[3], "u16") if f["multicast"] else "None"
    pair = "cta_group::2" in (f["g1"], f["g2"])
    e.line(
        f"M.transfers.load({e.site(ins)}, g, {e.mask(ins)}, {to}, {source}, {coords}, "
        f"barrier={barrier}, mode={_mode(f)}, multicast={multicast}, pair={pair})"
    )


@rule(
    f"cp.async.bulk.tensor dim={DIMENSIONS} =global =shared::cta mode?tile|tile::scatter4 "
    f"=bulk_group {HINT}",
    f"cp.reduce.async.bulk.tensor dim={DIMENSIONS} =global =shared::cta "
    f"op=add|min|max|inc|dec|and|or|xor mode?tile =bulk_group {HINT}",
)
def _tensor_store(e: Emitter, ins: Instruction, f: Fields) -> None:
    to, coords = _box(e, ins.operands[0], f)
    source = _place(e, ins.operands[1])
    e.line(
        f"M.transfers.store({e.site(ins)}, g, {e.mask(ins)}, {to}, {coords}, {source}, "
        f"mode={_mode(f)}, reduction={f.get('op', '')!r})"
    )


@rule(
    f"cp.async.bulk =shared::cta|shared::cluster =global {TX} multicast?multicast::cluster {HINT}"
)
def _bulk_load(e: Emitter, ins: Instruction, f: Fields) -> None:
    to, source, barrier = (_place(e, ins.operands[k]) for k in (0, 1, 3))
    size = e.value(ins.operands[2], "u32")
    multicast = e.value(ins.operands[4], "u16") if f["multicast"] else "None"
    e.line(
        f"M.transfers.bulk_load({e.site(ins)}, g, {e.mask(ins)}, {to}, {source}, {size}, "
        f"barrier={barrier}, multicast={multicast})"
    )


REDUCTIONS = "op=add|min|max|inc|dec|and|or|xor"
BULK_TYPES = "type=f16|bf16|b32|u32|s32|b64|u64|s64|f32|f64"


@rule(
    f"cp.async.bulk =shared::cluster =shared::cta {TX}",
    f"cp.reduce.async.bulk =shared::cluster =shared::cta {TX} {REDUCTIONS} {BULK_TYPES}",
)
def _bulk_cluster(e: Emitter, ins: Instruction, f: Fields) -> None:
    to, source, barrier = (_place(e, ins.operands[k]) for k in (0, 1, 3))
    size = e.value(ins.operands[2], "u32")
    reduction = (f["op"], f["type"]) if "op" in f else None
    e.line(
        f"M.transfers.bulk_to_cluster({e.site(ins)}, g, {e.mask(ins)}, {to}, {source}, {size}, "
        f"barrier={barrier}, reduction={reduction})"
    )


@rule(
    f"cp.async.bulk =global =shared::cta =bulk_group {HINT}",
    f"cp.reduce.async.bulk =global =shared::cta =bulk_group {HINT} {REDUCTIONS} noftz?noftz "
    f"{BULK_TYPES}",
)
def _bulk_store(e: Emitter, ins: Instruction, f: Fields) -> None:
    to, source = (_place(e, ins.operands[k]) for k in (0, 1))
    size = e.value(ins.operands[2], "u32")
    reduction = (f["op"], f["type"]) if "op" in f else None
    e.line(
        f"M.transfers.bulk_store({e.site(ins)}, g, {e.mask(ins)}, {to}, {source}, {size}, "
        f"reduction={reduction})"
    )


@rule("cp.async.bulk.commit_group")
def _commit(e: Emitter, ins: Instruction, f: Fields) -> None:
    e.line(f"M.transfers.commit(g, {e.mask(ins)})")


@rule("cp.async.bulk.wait_group read?read")
def _wait(e: Emitter, ins: Instruction, f: Fields) -> None:
    n = int(ins.operands[0], 0)
    reading = bool(f["read"])
    e.line(f"M.transfers.wait({e.site(ins)}, g, {e.mask(ins)}, {n}, reading={reading})")


@rule(
    f"st.async weak?weak =shared::cluster {TX} vec?v2|v4 type=b32|u32|s32|f32|b64|u64|s64|f64",
    f"red.async =relaxed =cluster =shared::cluster {TX} op=inc|dec|min|max|add|and|or|xor "
    "type=u32|s32|u64|b32",
)
def _store_async(e: Emitter, ins: Instruction, f: Fields) -> None:
    to, barrier = _place(e, ins.operands[0]), _place(e, ins.operands[2])
    kind = f["type"]
    values = ", ".join(e.value(x, f"b{WIDTH[kind]}") for x in e.vector(ins.operands[1]))
    reduction = (f["op"], kind) if "op" in f else None
    e.line(
        f"M.transfers.store_async({e.site(ins)}, g, {e.mask(ins)}, {to}, [{values}], {barrier}, "
        f"reduction={reduction})"
    )


# cluster launch control


@rule(
    f"clusterlaunchcontrol.try_cancel.async ?shared::cta {TX} "
    "multicast?multicast::cluster::all =b128"
)
def _try_cancel(e: Emitter, ins: Instruction, f: Fields) -> None:
    to, barrier = _place(e, ins.operands[0]), _place(e, ins.operands[1])
    every = bool(f["multicast"])
    e.line(
        f"M.launch_control.try_cancel({e.site(ins)}, g, {e.mask(ins)}, {to}, {barrier}, "
        f"every={every})"
    )


@rule("clusterlaunchcontrol.query_cancel.is_canceled =pred =b128")
def _is_canceled(e: Emitter, ins: Instruction, f: Fields) -> None:
    answer = e.value(ins.operands[1], "b128")
    e.put(ins.operands[0], f"M.launch_control.canceled({answer})", "pred", ins)


@rule(
    "clusterlaunchcontrol.query_cancel "
    "axis=get_first_ctaid::x|get_first_ctaid::y|get_first_ctaid::z =b32 =b128",
    "clusterlaunchcontrol.query_cancel.get_first_ctaid v4=v4 =b32 =b128",
)
def _first_ctaid(e: Emitter, ins: Instruction, f: Fields) -> None:
    answer = e.value(ins.operands[1], "b128")
    names = e.vector(ins.operands[0])
    axes = range(4) if "v4" in f else ["xyz".index(f["axis"][-1])]
    for name, axis in zip(names, axes, strict=True):
        if name != "_":
            e.put(name, f"M.launch_control.ctaid({answer}, {axis})", "b32", ins)


# tensor maps in memory


@rule(
    "tensormap.replace.tile field=global_address|rank|box_dim|global_dim|global_stride|"
    "element_stride|elemtype|interleave_layout|swizzle_mode|swizzle_atomicity|fill_mode "
    "space?global|shared::cta =b1024 type=b32|b64"
)
def _replace(e: Emitter, ins: Instruction, f: Fields) -> None:
    place = _place(e, ins.operands[0])
    index = int(ins.operands[1], 0) if len(ins.operands) == 3 else None
    value = e.value(ins.operands[-1], f["type"])
    e.line(
        f"M.launch_control.replace({e.site(ins)}, g, {e.mask(ins)}, {place}, {value}, "
        f"space={f['space']!r}, field={f['field']!r}, index={index})"
    )


@rule(
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release "
    "=cta|cluster|gpu|sys =sync =aligned"
)
def _cp_fenceproxy(e: Emitter, ins: Instruction, f: Fields) -> None:
    to, source = (_place(e, x) for x in ins.operands[:2])
    e.line(f"M.launch_control.copy_map({e.site(ins)}, g, {e.mask(ins)}, {to}, {source})")
