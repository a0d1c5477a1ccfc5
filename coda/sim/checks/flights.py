"""Register accesses -> findings: use while in flight, missing wgmma.fence, read of unwritten ones.

From issue until a wait, a wgmma owns its accumulators and the registers of A; a wgmma.fence must
separate earlier accesses to them from it. Which blocks touch the registers of which instruction is
known statically, so run time looks only at blocks that can collide.

A tcgen05.ld is exempt: kernels that are correct on hardware convert its results before they wait,
and ptxas, which knows the registers, makes the conversion wait. The purpose of tcgen05.wait::ld,
safe reuse of tensor memory, is checked in races.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.checks.observe import Observer
from coda.sim.ptx.parse import Instruction
from coda.sim.ptx.program import BasicBlock, registers_of, uses_and_writes

if TYPE_CHECKING:
    from coda.sim.machine import Machine
    from coda.sim.ptx.decoded import Decoded
    from coda.sim.units.agents import AsyncOp

Array = NDArray[Any]


class RegisterFacts:
    """Static facts about a kernel's registers.

    Products (PTX lines of wgmma) with the same registers form a group. Per block, `collisions` maps
    the line of a product to an instruction of the block that touches its registers, and `touched`
    lists the groups that other instructions than products touch. `maybe` are the registers that
    some path reads before writing; `used` and `written` are the checked ones among them per block.
    """

    def __init__(self, decoded: Decoded) -> None:
        program = decoded.program
        self.kernel, self.blocks = program.kernel, program.blocks
        self.group: dict[int, int] = {}
        self.writers: dict[str, set[int]] = {}
        self.readers: dict[str, set[int]] = {}
        groups: dict[frozenset[str], int] = {}
        for block in self.blocks:
            for ins in block.instructions:
                if ins.op.startswith("wgmma.mma"):
                    names = frozenset(self._operation(ins))
                    self.group[ins.line] = groups.setdefault(names, len(groups))
        self.groups = len(groups)
        self.collisions = [self._collisions(block) for block in self.blocks]
        self.touched = [self._touched(block, groups) for block in self.blocks]
        self._unwritten(program.entry_of)

    def _operation(self, ins: Instruction) -> set[str]:
        """The registers of a product."""
        writes = uses_and_writes(ins, self.kernel)[1]
        reads: list[str] = []
        if ins.operands[1].startswith("{"):
            reads = registers_of(ins.operands[1], self.kernel)
        for name in writes:
            self.writers.setdefault(name, set()).add(ins.line)
        for name in reads:
            self.readers.setdefault(name, set()).add(ins.line)
        return writes | set(reads)

    def _collisions(self, block: BasicBlock) -> dict[int, Instruction]:
        out: dict[int, Instruction] = {}
        for ins in block.instructions if self.group else ():
            uses, writes = uses_and_writes(ins, self.kernel)
            if ins.op.startswith("wgmma.mma"):  # those on the same accumulators come in order
                uses, writes = uses - writes, set()
            for name in uses | writes:
                for line in self.writers.get(name, ()):
                    out.setdefault(line, ins)
            for name in writes:
                for line in self.readers.get(name, ()):
                    out.setdefault(line, ins)
        return out

    def _touched(self, block: BasicBlock, groups: dict[frozenset[str], int]) -> Array:
        names: set[str] = set()
        for ins in block.instructions if groups else ():
            if not ins.op.startswith(("wgmma", "mov.")):
                names = names.union(*uses_and_writes(ins, self.kernel))
        return np.array([k for members, k in groups.items() if members & names], np.int64)

    def _uses(self, block: BasicBlock) -> set[str]:
        """Registers that a block reads, without accumulators: a product may start from zero."""
        out = set(block.uses)
        for ins in block.instructions:
            if ins.op.startswith("wgmma.mma"):
                out -= uses_and_writes(ins, self.kernel)[1]
        return out

    def _unwritten(self, entry_of: dict[str, int]) -> None:
        uses = [self._uses(block) for block in self.blocks]
        after = [_successors(block, k, entry_of) for k, block in enumerate(self.blocks)]
        live: list[set[str]] = [set() for _ in range(len(self.blocks) + 1)]
        changed = True
        while changed:
            changed = False
            for k in reversed(range(len(self.blocks))):
                out: set[str] = set().union(*(live[s] for s in after[k]))
                now = uses[k] | (out - self.blocks[k].writes)
                changed |= now != live[k]
                live[k] = now
        self.maybe = {name: k for k, name in enumerate(sorted(live[0]))}
        skipped = self._written_before(after)
        self.used = [
            _numbers((names - skipped[k]) & self._looks(self.blocks[k]), self.maybe)
            for k, names in enumerate(uses)
        ]
        wanted = {k for used in self.used for k in used}
        self.maybe = {name: k for name, k in self.maybe.items() if k in wanted}
        self.written = [_numbers(block.writes, self.maybe) for block in self.blocks]

    def _written_before(self, after: list[list[int]]) -> list[set[str]]:
        """For each block, the registers that some path to it may have written.

        These are not checked: compilers leave a register unwritten on the path where a bound
        predicates its load off, and never use the result on that path.
        """
        out: list[set[str]] = [set() for _ in range(len(self.blocks) + 1)]
        for k, block in enumerate(self.blocks):
            here = out[k] | (block.writes & self.maybe.keys())
            for s in after[k]:
                if s > k:
                    out[s] |= here
        return out

    def _looks(self, block: BasicBlock) -> set[str]:
        """Registers that a block reads in instructions other than moves and selections."""
        out: set[str] = set()
        for ins in block.instructions:
            if not ins.op.startswith(("mov.", "selp.")):
                out |= uses_and_writes(ins, self.kernel)[0]
        return out


def _numbers(names: set[str], numbered: dict[str, int]) -> list[int]:
    return sorted(numbered[x] for x in names & numbered.keys())


def _successors(block: BasicBlock, k: int, entry_of: dict[str, int]) -> list[int]:
    last = block.instructions[-1]
    stem = last.op.split(".")[0]
    out = [entry_of[last.operands[0]]] if stem == "bra" else []
    if stem not in ("bra", "ret", "exit", "trap") or last.predicate:
        out.append(k + 1)
    return out


class Flights(Observer):
    """The checks of registers."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        notes = machine.grid.notes
        if "registers" not in notes:
            notes["registers"] = RegisterFacts(machine.decoded)
        self.program: RegisterFacts = notes["registers"]
        self.reported: set[Any] = notes.setdefault("reported", set())
        self.flying: dict[int, Array] = {}
        self.open = np.ones((self.program.groups, machine.warps), bool)
        self.known = {k: np.zeros((machine.warps, 32), bool) for k in self.program.maybe.values()}

    def product(self, ins: Instruction, rows: Array) -> None:
        flying = self.flying.get(ins.line)
        if flying is None:
            flying = self.flying[ins.line] = np.zeros(self.machine.warps, np.int32)
        flying[rows] += 1
        touched = self.open[self.program.group[ins.line], rows]
        if touched.any():
            what = "its registers were accessed since the last wgmma.fence"
            self._find("in-flight", ins, int(rows[int(touched.argmax())]), what)

    def waited(self, ins: Instruction, row: int, ops: list[AsyncOp], *, reading: bool) -> None:
        if ins.op.startswith("wgmma.wait"):
            for op in ops:
                for product in op.chain:
                    self.flying[product.line][row] -= 1

    def fence(self, ins: Instruction, g: Any, m: Any) -> None:
        if ins.op.startswith("wgmma.fence"):
            self.open[:, g] = False

    def block(self, block: BasicBlock, number: int, g: Any, m: Any) -> None:
        program = self.program
        collisions = program.collisions[number]
        if collisions and self.flying:
            self._collide(collisions, self.machine.rows(g))
        for group in program.touched[number]:
            self.open[group, g] = True
        for k in program.used[number]:
            self._use(block, k, g, m)
        for k in program.written[number]:
            self.known[k][g] |= True if m is None else m

    def _collide(self, collisions: dict[int, Instruction], rows: Array) -> None:
        for line, ins in collisions.items():
            flying = self.flying.get(line)
            if flying is not None and (flying[rows] > 0).any():
                row = int(rows[int((flying[rows] > 0).argmax())])
                what = f"accesses registers of the product at PTX line {line} before waiting for it"
                self._find("in-flight", ins, row, what)

    def _use(self, block: BasicBlock, k: int, g: Any, m: Any) -> None:
        bad = ~self.known[k][g]
        if m is not None:
            bad &= m
        if not bad.any():
            return
        name = next(name for name, number in self.program.maybe.items() if number == k)
        ins = next(
            i for i in block.instructions if name in uses_and_writes(i, self.program.kernel)[0]
        )
        row = int(self.machine.rows(g)[int(bad.any(1).argmax())])
        self._find("uninitialised", ins, row, f"uses register {name}, which is uninitialised")

    def _find(self, kind: str, ins: Instruction, row: int, what: str) -> None:
        key = (kind, ins.line, what)
        if key not in self.reported:
            self.reported.add(key)
            self.machine.find(kind, what, ins, row, None)
