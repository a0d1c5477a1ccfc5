"""Control flow, moves, lanes, and what no other module has -> source in a block's function."""

from __future__ import annotations

from coda.sim.ptx.codegen import Emitter
from coda.sim.ptx.parse import WIDTH, Instruction
from coda.sim.ptx.rules import EmitterRules, Fields
from coda.sim.types import Unsupported
from coda.sim.units import special
from coda.sim.units.memory import GENERIC, RANK

TABLE = EmitterRules()
rule = TABLE.rule


# control flow


@rule("bra ?uni")
def _bra(e: Emitter, ins: Instruction, f: Fields) -> None:
    target = e.program.entry_of[ins.operands[0]]
    if ins.predicate is None:
        e.end = f"M.go(g, m, {target})"
    else:
        e.end = f"M.branch(g, m, {e.guard(ins)}, {target}, {e.number + 1})"


@rule("ret ?uni", "exit")
def _exit(e: Emitter, ins: Instruction, f: Fields) -> None:
    if ins.predicate is None:
        e.end = "M.go(g, m, M.EXIT)"
    else:
        e.end = f"M.branch(g, m, {e.guard(ins)}, M.EXIT, {e.number + 1})"


@rule("trap")
def _trap(e: Emitter, ins: Instruction, f: Fields) -> None:
    e.line(f"M.trap({e.site(ins)}, g, {e.mask(ins)})")


@rule("nanosleep =u32", "brkpt", "pmevent", "pmevent.mask")
def _nothing(e: Emitter, ins: Instruction, f: Fields) -> None:
    pass


# moves


def _pack(e: Emitter, ins: Instruction, kind: str, parts: list[str]) -> None:
    total, each = WIDTH[kind], WIDTH[kind] // len(parts)
    if total == 128:
        low, high = (e.value(x, "b64") for x in parts)
        e.put(ins.operands[0], f"M.pair({low}, {high})", kind, ins)
        return
    wide = f"np.uint{total}"
    pieces = []
    for k, part in enumerate(parts):
        value = f"{e.value(part, f'b{each}')}.astype({wide})"
        pieces.append(f"({value} << {wide}({k * each}))" if k else value)
    e.put(ins.operands[0], " | ".join(pieces), kind, ins)


def _unpack(e: Emitter, ins: Instruction, kind: str, parts: list[str]) -> None:
    total, each = WIDTH[kind], WIDTH[kind] // len(parts)
    source = e.value(ins.operands[1], f"b{total}")
    if total == 128:
        both = e.new(f"M.unpair({source})")
        for k, part in enumerate(parts):
            e.put(part, e.new(f"{both}[{k}]"), "b64", ins)
        return
    for k, part in enumerate(parts):
        moved = f"({source} >> np.uint{total}({k * each}))" if k else source
        if part != "_":
            e.put(part, e.new(f"{moved}.astype(np.uint{each})"), f"b{each}", ins)


@rule(
    "mov type=b16|b32|b64|b128|u16|u32|u64|s16|s32|s64|f16|f16x2|bf16|bf16x2|f32|f64|pred",
)
def _mov(e: Emitter, ins: Instruction, f: Fields) -> None:
    kind = f["type"]
    dest, source = ins.operands
    if dest.startswith("{"):
        _unpack(e, ins, kind, e.vector(dest))
        return
    if source.startswith("{"):
        _pack(e, ins, kind, e.vector(source))
        return
    slots = e.layout.slots
    same = dest in slots and source in slots and slots[dest][0] == slots[source][0]
    if same and ins.predicate is None:
        if source not in e.now:
            e.register(source, e.layout.storage(slots[source][0]))
        e.alias(dest, source)
    else:
        e.put(dest, e.value(source, kind), kind, ins)


# addresses

SPACES = "shared|shared::cta|shared::cluster|global|param|const|local"


@rule(f"cvta to?to space={SPACES} size=u64|u32")
def _cvta(e: Emitter, ins: Instruction, f: Fields) -> None:
    value = e.value(ins.operands[1], f["size"])
    if f["space"].startswith("shared") and f["size"] == "u64":
        bit = f"np.uint64({GENERIC})"
        value = f"{value} & ~{bit}" if f["to"] else f"{value} | {bit}"
    e.put(ins.operands[0], value, f["size"], ins)


@rule(f"isspacep space={SPACES}")
def _isspacep(e: Emitter, ins: Instruction, f: Fields) -> None:
    shared = f"({e.value(ins.operands[1], 'u64')} & np.uint64({GENERIC})) != 0"
    if f["space"] in ("shared", "shared::cta", "shared::cluster"):
        e.put(ins.operands[0], shared, "pred", ins)
    elif f["space"] == "global":
        e.put(ins.operands[0], f"~({shared})", "pred", ins)
    else:
        raise Unsupported(f"isspacep.{f['space']}")


@rule("mapa space?shared::cluster size=u32|u64")
def _mapa(e: Emitter, ins: Instruction, f: Fields) -> None:
    size = f["size"]
    address, rank = e.value(ins.operands[1], size), e.value(ins.operands[2], "u32")
    clear = (
        f"np.{'uint32' if size == 'u32' else 'uint64'}({(0xFF << RANK) ^ (2 ** WIDTH[size] - 1)})"
    )
    moved = f"({rank} << np.uint32({RANK})).astype(np.uint{WIDTH[size]})"
    e.put(ins.operands[0], f"({address} & {clear}) | {moved}", size, ins)


@rule("getctarank space?shared::cluster size=u32|u64")
def _getctarank(e: Emitter, ins: Instruction, f: Fields) -> None:
    address = e.value(ins.operands[1], f["size"])
    rank = f"({address}.astype(np.uint32) >> np.uint32({RANK}))"
    e.put(ins.operands[0], rank, "u32", ins)


# lanes of a warp


def _members(e: Emitter, operand: str) -> str:
    return e.value(operand, "u32")


@rule("shfl.sync mode=idx|bfly|up|down type=b32")
def _shfl(e: Emitter, ins: Instruction, f: Fields) -> None:
    dest = [x.strip() for x in ins.operands[0].split("|")]
    v, b, c = e.value(ins.operands[1], "b32"), *(e.value(x, "u32") for x in ins.operands[2:4])
    run = e.function(special.shuffle)
    out = e.new(f"{run}({f['mode']!r}, M.shape, {v}, {b}, {c})")
    e.put(dest[0], e.new(f"{out}[0]"), "b32", ins)
    if len(dest) == 2:
        e.put(dest[1], e.new(f"{out}[1]"), "pred", ins)


@rule("vote.sync mode=all|any|uni type=pred", "vote.sync mode=ballot type=b32")
def _vote(e: Emitter, ins: Instruction, f: Fields) -> None:
    p, members = e.value(ins.operands[1], "pred"), _members(e, ins.operands[2])
    run = e.function(special.vote)
    out = f"{run}({f['mode']!r}, {e.mask(ins)}, M.shape, {p}, {members})"
    e.put(ins.operands[0], f"spread({out}, M.shape)", f["type"], ins)


@rule("match.any.sync type=b32|b64")
def _match_any(e: Emitter, ins: Instruction, f: Fields) -> None:
    v, members = e.value(ins.operands[1], f["type"]), _members(e, ins.operands[2])
    run = e.function(special.match_any)
    e.put(ins.operands[0], f"{run}({e.mask(ins)}, M.shape, {v}, {members})", "b32", ins)


@rule("match.all.sync type=b32|b64")
def _match_all(e: Emitter, ins: Instruction, f: Fields) -> None:
    dest = [x.strip() for x in ins.operands[0].split("|")]
    v, members = e.value(ins.operands[1], f["type"]), _members(e, ins.operands[2])
    out = e.new(f"{e.function(special.match_all)}({e.mask(ins)}, M.shape, {v}, {members})")
    e.put(dest[0], f"spread({out}[0], M.shape)", "b32", ins)
    if len(dest) == 2:
        e.put(dest[1], f"spread({out}[1], M.shape)", "pred", ins)


@rule("elect.sync")
def _elect(e: Emitter, ins: Instruction, f: Fields) -> None:
    dest = [x.strip() for x in ins.operands[0].split("|")]
    members = _members(e, ins.operands[1])
    out = e.new(f"{e.function(special.elect)}({e.mask(ins)}, M.shape, {members})")
    e.put(dest[0], f"spread({out}[0], M.shape)", "b32", ins)
    e.put(dest[1], f"spread({out}[1], M.shape)", "pred", ins)


@rule(
    "redux.sync mode=add|min|max type=u32|s32",
    "redux.sync mode=and|or|xor type=b32",
    "redux.sync mode=min|max abs?abs nan?NaN type=f32",
)
def _redux(e: Emitter, ins: Instruction, f: Fields) -> None:
    v, members = e.value(ins.operands[1], f["type"]), _members(e, ins.operands[2])
    if f.get("abs"):
        v = f"np.abs({v})"
    nan = bool(f.get("nan"))
    run = e.function(special.reduce)
    out = f"{run}({f['mode']!r}, {e.mask(ins)}, M.shape, {v}, {members}, nan={nan})"
    e.put(ins.operands[0], f"spread({out}, M.shape)", f["type"], ins)


@rule("activemask type=b32")
def _activemask(e: Emitter, ins: Instruction, f: Fields) -> None:
    run = e.function(special.bits)
    out = f"{run}(M.active({e.mask(ins)}))"
    e.put(ins.operands[0], f"spread({out}, M.shape)", "b32", ins)


@rule("movmatrix.sync.aligned.m8n8.trans.b16")
def _movmatrix(e: Emitter, ins: Instruction, f: Fields) -> None:
    v = e.value(ins.operands[1], "b32")
    run = e.function(special.move_transposed)
    e.put(ins.operands[0], f"{run}(spread({v}, M.shape))", "b32", ins)
