"""A parsed kernel -> basic blocks with live registers: the decoded program that the machine runs.

A block is a sequence of instructions that its active lanes execute together. An instruction that
may park a lane ends its block; one that writes registers asynchronously is a block of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

from coda.sim.ptx.parse import Instruction, PtxKernel

PARKS = (
    *("bar.sync", "bar.red", "barrier.sync", "barrier.red", "barrier.cta.sync", "barrier.cta.red"),
    *("barrier.cluster.wait", "mbarrier.try_wait", "mbarrier.test_wait"),
)
ALONE = ("wgmma.", "tcgen05.ld", "tcgen05.wait", "tcgen05.st")
MASKED = ("shfl.sync", "vote.sync", "match.", "redux.sync", "elect.sync", "bar.warp.sync")
TOGETHER = (
    *MASKED,
    *("ldmatrix", "stmatrix", "mma.sync", "mma.sp.sync", "movmatrix", "wgmma.", "setmaxnreg"),
    *("bar.", "barrier.sync", "barrier.arrive", "barrier.cta.", "barrier.red"),
    *("barrier.cluster.arrive.aligned", "barrier.cluster.wait.aligned"),
    *("tcgen05.alloc", "tcgen05.dealloc", "tcgen05.relinquish", "tcgen05.ld", "tcgen05.st"),
    "tcgen05.wait",
)
EFFECTS = (
    *("st.", "red.", "atom.", "mbarrier.", "cp.", "bar.", "barrier.", "tcgen05.", "stmatrix"),
    *("multimem.", "tensormap.", "clusterlaunchcontrol.try_cancel", "trap"),
)
SYNC = (
    *("bar.", "barrier.", "mbarrier.", "fence.", "membar", "wgmma.fence", "wgmma.wait"),
    *("wgmma.commit", "cp.async.bulk.wait", "cp.async.bulk.commit", "cp.async.wait"),
    *("cp.async.commit", "cp.async.mbarrier", "tcgen05.wait", "tcgen05.commit", "tcgen05.fence"),
    *("griddepcontrol",),
)
PRODUCTS = ("wgmma.mma", "tcgen05.mma")
SPINS = ("ld.acquire", "ld.relaxed", "ld.volatile", "atom.", "nanosleep")
NO_RESULT = (
    *("st.", "stmatrix", "red.", "bra", "ret", "exit", "trap", "mbarrier.init", "mbarrier.inval"),
    *("mbarrier.expect_tx", "mbarrier.complete_tx", "cp.", "fence", "membar", "bar.sync"),
    *("bar.arrive", "bar.warp", "barrier.sync", "barrier.arrive", "barrier.cluster"),
    *("barrier.cta.sync", "barrier.cta.arrive"),
    *("prefetch", "setmaxnreg", "griddepcontrol", "tcgen05.alloc", "tcgen05.dealloc"),
    *("tcgen05.relinquish", "tcgen05.st", "tcgen05.wait", "tcgen05.fence", "tcgen05.mma"),
    *("tcgen05.commit", "tcgen05.cp", "tcgen05.shift", "wgmma.fence", "wgmma.commit"),
    *("wgmma.wait", "nanosleep", "tensormap", "multimem.red", "clusterlaunchcontrol.try_cancel"),
    *("discard", "applypriority", "brkpt", "pmevent"),
)
_REGISTER = re.compile(r"[%A-Za-z_$][\w$%#]*(?:\.[xyzw]\b)?")


@dataclass
class BasicBlock:
    """Instructions [start, stop) and the registers that cross the block's borders.

    `reads` are needed on entry, also to keep the old value of a register that a predicated
    instruction writes; `uses` are those whose value the block depends on. `masks` are the operands
    with the lanes that must execute it together ("-1": all of the warp). `needs` are the registers
    that no load of tensor memory may have in flight when the block runs. `acts`: it has effects on
    memory or synchronisation, other than products.
    """

    start: int
    stop: int
    instructions: list[Instruction]
    alone: bool = False
    warpgroup: bool = False
    spins: bool = False
    exits: bool = False
    acts: bool = False
    masks: tuple[str, ...] = ()
    reads: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)
    needs: set[str] = field(default_factory=set)
    live_out: set[str] = field(default_factory=set)


@dataclass
class PtxProgram:
    """Blocks in program order; `entry_of` maps a label to the block it starts.

    `early` has, for the line of a tcgen05.ld, the moves of its results that come before its wait.
    """

    kernel: PtxKernel
    blocks: list[BasicBlock]
    entry_of: dict[str, int]
    early: dict[int, list[Instruction]]


def registers_of(text: str, kernel: PtxKernel) -> list[str]:
    """Names of the registers that an operand mentions."""
    return [x for x in _REGISTER.findall(text) if x in kernel.registers]


def uses_and_writes(ins: Instruction, kernel: PtxKernel) -> tuple[set[str], set[str]]:
    """(registers whose value an instruction reads, registers that it may write)."""
    uses: set[str] = set()
    writes: set[str] = set()
    if ins.predicate:
        uses.add(ins.predicate)
    for k, operand in enumerate(ins.operands):
        names = set(registers_of(operand, kernel))
        if k == 0 and not operand.startswith("[") and not ins.op.startswith(NO_RESULT):
            writes |= names
            if ins.op.startswith("wgmma.mma"):
                uses |= names
        else:
            uses |= names
    return uses, writes


def membermask(ins: Instruction) -> str:
    """The operand with the lanes that execute `ins` together; "-1" if it has none."""
    if ins.op.startswith("bar.warp.sync"):
        return ins.operands[0]
    return ins.operands[-1] if ins.op.startswith(MASKED) else "-1"


Flow = list[tuple[set[str], set[str]]]  # (registers read, registers written) of each instruction


def early_moves(kernel: PtxKernel, flow: Flow) -> dict[int, list[Instruction]]:
    """For each tcgen05.ld, by its line, the plain moves of its results that follow it.

    Kernels use the results before they wait for the load: ptxas tracks its registers, so a use
    waits implicitly, and the explicit wait only says when tensor memory may be overwritten. Plain
    moves do not count as uses: compilers pack the results into pairs at once, and ptxas does not
    wait for these moves. So the destinations of such moves are written when the load completes.
    """
    starts = set(kernel.labels.values())
    out: dict[int, list[Instruction]] = {}
    code = kernel.instructions
    for k, load in enumerate(code):
        if not load.op.startswith("tcgen05.ld."):
            continue
        flying = set(registers_of(load.operands[0], kernel))
        moves: dict[int, Instruction] = {}
        for at in range(k + 1, len(code)):
            ins = code[at]
            if ins.op.startswith(("tcgen05.wait::ld", "bra", "ret")) or at in starts:
                break
            uses, writes = flow[at]
            if ins.op.startswith("mov.") and not ins.predicate and uses and uses <= flying:
                moves[at] = ins
                flying |= writes
            elif not flying.isdisjoint(writes):
                flying -= writes
                moves = {i: x for i, x in moves.items() if flow[i][1].isdisjoint(writes)}
        out[load.line] = list(moves.values())
    return out


def _leaders(kernel: PtxKernel, flow: Flow) -> list[int]:
    code = kernel.instructions
    leaders = {0, len(code)} | set(kernel.labels.values())
    effects = False
    written: set[str] = set()
    for k, ins in enumerate(code):
        together = ins.op.startswith(TOGETHER)
        mask = membermask(ins) if together else "-1"
        if ins.op.startswith(ALONE):
            leaders |= {k, k + 1}
        elif together and (effects or mask in written):
            leaders.add(k)
        if k in leaders:
            effects, written = False, set()
        effects |= ins.op.startswith(EFFECTS)
        written |= flow[k][1]
        if ins.op.split(".")[0] in ("bra", "ret", "exit", "trap") or ins.op.startswith(PARKS):
            leaders.add(k + 1)
    return sorted(leaders)


def build(kernel: PtxKernel) -> PtxProgram:
    """Split a kernel into basic blocks and compute the liveness of its registers."""
    flow = [uses_and_writes(ins, kernel) for ins in kernel.instructions]
    leaders = _leaders(kernel, flow)
    blocks = [BasicBlock(a, b, kernel.instructions[a:b]) for a, b in pairwise(leaders)]
    number = {start: k for k, start in enumerate(leaders)}
    entry_of = {label: number[at] for label, at in kernel.labels.items()}
    early = early_moves(kernel, flow)
    lines = {ins.line for moves in early.values() for ins in moves}
    successors = [_prepare(block, k, flow, entry_of, lines) for k, block in enumerate(blocks)]
    live_in: list[set[str]] = [set() for _ in range(len(blocks) + 1)]
    changed = True
    while changed:
        changed = False
        for k in reversed(range(len(blocks))):
            block = blocks[k]
            block.live_out = set().union(*(live_in[s] for s in successors[k]))
            live = block.reads | (block.live_out - block.writes)
            if live != live_in[k]:
                live_in[k] = live
                changed = True
    return PtxProgram(kernel, blocks, entry_of, early)


def _prepare(
    block: BasicBlock, k: int, flow: Flow, entry_of: dict[str, int], early: set[int]
) -> list[int]:
    """Fill in a block's reads, writes, masks and needs; return the numbers of its successors."""
    masks: list[str] = []
    of_block = flow[block.start : block.stop]
    for ins, (uses, writes) in zip(block.instructions, of_block, strict=True):
        if ins.line not in early:
            block.uses |= uses - block.writes
            block.needs |= uses | writes
        block.reads |= (uses | writes if ins.predicate else uses) - block.writes
        block.writes |= writes
        block.alone |= ins.op.startswith(ALONE)
        block.warpgroup |= ins.op.startswith("wgmma.mma")
        block.spins |= ins.op.startswith(SPINS)
        block.acts |= ins.op.startswith((*EFFECTS, *SYNC)) and not ins.op.startswith(PRODUCTS)
        if ins.op.startswith(TOGETHER):
            masks.append(membermask(ins))
    block.masks = tuple(dict.fromkeys(masks))
    last = block.instructions[-1]
    block.exits = last.op.startswith(("ret", "exit"))
    stem = last.op.split(".")[0]
    out: list[int] = []
    if stem == "bra":
        out.append(entry_of[last.operands[0]])
    if stem not in ("bra", "ret", "exit", "trap") or last.predicate:
        out.append(k + 1)
    return out
