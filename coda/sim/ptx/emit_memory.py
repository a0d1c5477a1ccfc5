"""Loads, stores, atomics and matrix moves -> source that calls the memories."""

from __future__ import annotations

from coda.sim.ptx.codegen import Emitter, dtype_name
from coda.sim.ptx.parse import WIDTH, Instruction
from coda.sim.ptx.rules import EmitterRules, Fields
from coda.sim.types import Unsupported

TABLE = EmitterRules()
rule = TABLE.rule
TYPES = "b8|u8|s8|b16|u16|s16|b32|u32|s32|f32|b64|u64|s64|f64|b128"
SCOPES = "cta|cluster|gpu|sys"
CACHE_HINTS = (
    "l1?L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate "
    "l2?L2::evict_normal|L2::evict_first|L2::evict_last "
    "hint?L2::cache_hint prefetch?L2::64B|L2::128B|L2::256B"
)
MEMORY = {
    "": "M.generic",
    "global": "M.memory",
    "const": "M.memory",
    "shared": "M.shared",
    "shared::cta": "M.shared",
    "shared::cluster": "M.shared",
}


def _elements(kind: str, names: list[str]) -> tuple[str, int, int]:
    """(type of an element, its bytes, their number); 16-byte ones are two halves."""
    return kind, WIDTH[kind] // 8, len(names)


@rule(
    f"ld space=param vec?v2|v4 type={TYPES}",
)
def _ld_param(e: Emitter, ins: Instruction, f: Fields) -> None:
    kind, size, _ = _elements(f["type"], [])
    dest = e.vector(ins.operands[0])
    base, offset = e.address(ins.operands[1])
    name = ins.operands[1].strip("[] ").split("+")[0].strip()
    known = next((p for p in e.kernel.parameters if p.name == name), None)
    for k, register in enumerate(dest):
        if known is not None:
            at = known.offset + offset + k * size
            loaded = e.new(f"M.parameter({at}, np.{dtype_name(kind)})")
        else:
            raw = e.new(
                f"M.memory.load({e.site(ins)}, g, m, {base}, {offset + k * size}, "
                f"size={size}, count=1)"
            )
            loaded = e.new(f"{raw}.view(np.{dtype_name(kind)})")
        e.put(register, loaded, kind, ins)


@rule(
    f"ld weak?weak space?global|const|shared|shared::cta|shared::cluster "
    f"cop?ca|cg|cs|lu|cv {CACHE_HINTS} vec?v2|v4|v8 type={TYPES}",
    f"ld space=global cop?ca|cg|cs nc=nc {CACHE_HINTS} vec?v2|v4|v8 type={TYPES}",
    f"ld order=volatile space?global|shared|shared::cta vec?v2|v4|v8 type={TYPES}",
    f"ld order=relaxed|acquire scope={SCOPES} space?global|shared|shared::cta|shared::cluster "
    f"{CACHE_HINTS} vec?v2|v4|v8 type={TYPES}",
)
def _ld(e: Emitter, ins: Instruction, f: Fields) -> None:
    kind, size, count = _elements(f["type"], e.vector(ins.operands[0]))
    base, offset = e.address(ins.operands[1])
    site, mask, load = e.site(ins), e.mask(ins), f"{MEMORY[f['space']]}.load"
    if size == 16:
        if count != 1:
            raise Unsupported("a vector of 128-bit elements")
        raw = e.new(f"{load}({site}, g, {mask}, {base}, {offset}, size=8, count=2)")
        e.put(ins.operands[0], f"M.pair({raw}[0], {raw}[1])", "b128", ins)
        return
    raw = e.new(f"{load}({site}, g, {mask}, {base}, {offset}, size={size}, count={count})")
    for k, register in enumerate(e.vector(ins.operands[0])):
        if register == "_":
            continue
        part = e.new(f"{raw}[{k}]") if count > 1 else raw
        unsigned = f"uint{8 * size}"
        dtype = dtype_name(kind)
        e.put(register, part if dtype == unsigned else e.new(f"{part}.view(np.{dtype})"), kind, ins)


def _stored(e: Emitter, operand: str, kind: str) -> str:
    """The value of an element as the unsigned type of its size; its register may be wider."""
    return e.value(operand, f"b{WIDTH[kind]}")


@rule(
    f"st weak?weak space?global|shared|shared::cta|shared::cluster "
    f"cop?wb|cg|cs|wt {CACHE_HINTS} vec?v2|v4|v8 type={TYPES}",
    f"st order=volatile space?global|shared|shared::cta vec?v2|v4|v8 type={TYPES}",
    f"st order=relaxed|release scope={SCOPES} space?global|shared|shared::cta|shared::cluster "
    f"{CACHE_HINTS} vec?v2|v4|v8 type={TYPES}",
)
def _st(e: Emitter, ins: Instruction, f: Fields) -> None:
    kind, size, _ = _elements(f["type"], [])
    base, offset = e.address(ins.operands[0])
    if size == 16:
        both = e.new(f"M.unpair({e.value(ins.operands[1], 'b128')})")
        values, size = [f"{both}[{k}]" for k in (0, 1)], 8
    else:
        values = [_stored(e, x, kind) for x in e.vector(ins.operands[1])]
    memory, mask = MEMORY[f["space"]], e.mask(ins)
    arguments = f"{base}, {offset}, [{', '.join(values)}], size={size}"
    e.line(f"{memory}.store({e.site(ins)}, g, {mask}, {arguments})")


@rule(
    "prefetch.tensormap",
    "prefetch space=param|const level=tensormap",
    "prefetch space?global level=L1|L2|L2::evict_last|L2::evict_normal",
    "prefetchu.L1",
    "applypriority space?global =L2::evict_normal",
    "discard space?global =L2",
    "cp.async.bulk.prefetch.L2 space=global hint?L2::cache_hint",
    "cp.async.bulk.prefetch.tensor =1d|2d|3d|4d|5d =L2 =global ?tile|tile::gather4 "
    "hint?L2::cache_hint",
    "createpolicy.fractional =L2::evict_last|L2::evict_normal|L2::evict_first|L2::evict_unchanged "
    "?L2::evict_first|L2::evict_unchanged =b64",
)
def _prefetch(e: Emitter, ins: Instruction, f: Fields) -> None:
    if ins.op.startswith("createpolicy"):
        e.put(ins.operands[0], "np.uint64(0)", "b64", ins)


# atomics

INTEGERS = "b32|u32|s32|b64|u64|s64"
ATOMIC_TYPES = f"{INTEGERS}|f32|f64|f16|bf16|f16x2|bf16x2"
OPERATIONS = "add|min|max|inc|dec|and|or|xor|exch|cas"
ORDERS = f"order?relaxed|acquire|release|acq_rel scope?{SCOPES}"
ATOMIC_SPACES = "space?global|shared|shared::cta|shared::cluster"


@rule(
    f"atom {ORDERS} {ATOMIC_SPACES} op={OPERATIONS} noftz?noftz hint?L2::cache_hint "
    f"vec?v2|v4|v8 type={ATOMIC_TYPES}|b16"
)
def _atom(e: Emitter, ins: Instruction, f: Fields) -> None:
    kind = _atomic_type(f)
    base, offset = e.address(ins.operands[1])
    many = len(e.vector(ins.operands[2]))
    count = 2 if f["op"] == "cas" else 1
    operands = [_packed(e, x, kind) for x in ins.operands[2 : 2 + count]]
    out = e.new(
        f"M.atomics.run({e.site(ins)}, g, {e.mask(ins)}, {base}, {offset}, "
        f"[{', '.join(operands)}], space={f['space']!r}, operation={f['op']!r}, kind={kind!r})"
    )
    for k, register in enumerate(e.vector(ins.operands[0])):
        part = e.new(f"{out}[{k}]") if many > 1 else out
        if register != "_":
            e.put(register, part, f"b{WIDTH[kind]}", ins)


@rule(
    f"red {ORDERS} {ATOMIC_SPACES} op=add|min|max|inc|dec|and|or|xor noftz?noftz "
    f"hint?L2::cache_hint vec?v2|v4|v8 type={ATOMIC_TYPES}"
)
def _red(e: Emitter, ins: Instruction, f: Fields) -> None:
    kind = _atomic_type(f)
    base, offset = e.address(ins.operands[0])
    value = _packed(e, ins.operands[1], kind)
    e.line(
        f"M.atomics.run({e.site(ins)}, g, {e.mask(ins)}, {base}, {offset}, [{value}], "
        f"space={f['space']!r}, operation={f['op']!r}, kind={kind!r}, wanted=False)"
    )


def _atomic_type(f: Fields) -> str:
    kind = f["type"]
    floating = kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
    if floating and f["op"] not in ("add", "min", "max"):
        raise Unsupported(f"atomic {f['op']} of {kind}")
    if f["vec"] and not floating:
        raise Unsupported(f"an atomic vector of {kind}")
    return kind


def _packed(e: Emitter, operand: str, kind: str) -> str:
    """A list of the elements of an operand, as unsigned numbers."""
    return f"[{', '.join(e.value(x, f'b{WIDTH[kind]}') for x in e.vector(operand))}]"


# matrices of 8 rows


@rule(
    "ldmatrix.sync.aligned shape=m8n8 num=x1|x2|x4 trans?trans ?shared|shared::cta type=b16",
    "ldmatrix.sync.aligned shape=m16n16 num=x1|x2 trans=trans ?shared|shared::cta type=b8",
)
def _ldmatrix(e: Emitter, ins: Instruction, f: Fields) -> None:
    base, offset = e.address(ins.operands[1])
    dest = e.vector(ins.operands[0])
    form = (f["shape"], int(f["num"][1:]), bool(f["trans"]))
    out = e.new(f"M.matrices.load({e.site(ins)}, g, {base}, {offset}, {form})")
    for k, register in enumerate(dest):
        e.put(register, e.new(f"{out}[{k}]"), "b32", ins)


@rule(
    "stmatrix.sync.aligned shape=m8n8 num=x1|x2|x4 trans?trans ?shared|shared::cta type=b16",
    "stmatrix.sync.aligned shape=m16n8 num=x1|x2|x4 trans=trans ?shared|shared::cta type=b8",
)
def _stmatrix(e: Emitter, ins: Instruction, f: Fields) -> None:
    base, offset = e.address(ins.operands[0])
    values = [e.value(x, "b32") for x in e.vector(ins.operands[1])]
    form = (f["shape"], int(f["num"][1:]), bool(f["trans"]))
    site = e.site(ins)
    e.line(f"M.matrices.store({site}, g, {base}, {offset}, {form}, [{', '.join(values)}])")


# cp.async, the copies of threads


@rule(
    "cp.async how=ca|cg =shared|shared::cta =global hint?L2::cache_hint ?L2::64B|L2::128B|L2::256B"
)
def _cp_async(e: Emitter, ins: Instruction, f: Fields) -> None:
    (to, to_offset), (at, at_offset) = e.address(ins.operands[0]), e.address(ins.operands[1])
    size = int(ins.operands[2], 0)
    if size not in ((16,) if f["how"] == "cg" else (4, 8, 16)):
        raise Unsupported(f"cp.async.{f['how']} of {size} bytes")
    rest = ins.operands[3 : len(ins.operands) - (1 if f["hint"] else 0)]
    take = "None"
    if rest and e.layout.slots.get(rest[0], (32,))[0] == 1:  # ignore-src
        take = e.new(f"np.where({e.value(rest[0], 'pred')}, np.uint32(0), np.uint32({size}))")
    elif rest:
        take = e.value(rest[0], "u32")
    e.line(
        f"M.copies.issue({e.site(ins)}, g, {e.mask(ins)}, ({to}, {to_offset}), "
        f"({at}, {at_offset}), {size}, take={take})"
    )


@rule("cp.async.commit_group")
def _cp_commit(e: Emitter, ins: Instruction, f: Fields) -> None:
    e.line(f"M.copies.commit(g, {e.mask(ins)})")


@rule("cp.async.wait_group", "cp.async.wait_all")
def _cp_wait(e: Emitter, ins: Instruction, f: Fields) -> None:
    n = int(ins.operands[0], 0) if ins.operands else -1
    e.line(f"M.copies.wait({e.site(ins)}, g, {e.mask(ins)}, {n})")


@rule("cp.async.mbarrier.arrive noinc?noinc ?shared|shared::cta type=b64")
def _cp_arrive(e: Emitter, ins: Instruction, f: Fields) -> None:
    base, offset = e.address(ins.operands[0])
    more = not f["noinc"]
    e.line(f"M.copies.arrive({e.site(ins)}, g, {e.mask(ins)}, {base}, {offset}, more={more})")
