"""wgmma instructions of warpgroups -> asynchronous operations on the accumulator registers.

Wgmmas of a warpgroup on the same accumulators, up to their commit, form a chain: one operation.
Under the eager schedule, the chains of all warpgroups are executed in one batch: no instruction can
observe the accumulators before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.parse import Instruction
from coda.sim.tensorcore import wgmma
from coda.sim.units.agents import AsyncOp
from coda.sim.units.lanes import spread
from coda.sim.units.memory import WINDOW

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class WgmmaSite:
    """The static part of one wgmma: its form, the slots and names of D and (in registers) of A."""

    form: wgmma.Wgmma
    d: Array
    a: Array | None
    names: frozenset[str]
    sources: frozenset[str]


@dataclass(slots=True)
class WgmmaChain:
    """Wgmmas on the same accumulators of the same warpgroups, not issued yet.

    A step is (site, registers or descriptors of A, descriptors of B); A is None for a product that
    reads A from registers only at completion.
    """

    rows: Array
    ctas: list[int]
    scale: list[bool]
    steps: list[tuple[WgmmaSite, Any, list[int]]] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)


class WgmmaUnit:
    """Issues the operations of wgmma."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.chain: WgmmaChain | None = None

    def mma(self, ins: Instruction, g: Any, site: WgmmaSite, a: Any, b: Any, scale: Any) -> None:
        """wgmma.mma_async by complete warpgroups; `a` is None for A in registers."""
        machine = self.machine
        rows = machine.rows(g)
        order = machine.warpgroups(rows)
        first = order[::4]
        ctas = [machine.cta_of(int(row)) for row in rows[first]]
        machine.result.flops += site.form.flops * len(first)
        shape = machine.shape
        left = None if a is None else spread(a, shape)[first, 0].tolist()
        right = spread(b, shape)[first, 0].tolist()
        keeps = spread(scale, shape)[first, 0].tolist()
        if machine.observer is not None:
            machine.observer.product(ins, rows)
        if site.a is not None and machine.agents.eager:
            left = self.registers(site.a, rows[order])
        chain = self._chain(site, rows[order], ctas, keeps)
        chain.steps.append((site, left, right))
        chain.instructions.append(ins)
        machine.progress += 1

    def _chain(
        self, site: WgmmaSite, rows: Array, ctas: list[int], keeps: list[bool]
    ) -> WgmmaChain:
        """The open chain if the product continues it, else a new one."""
        chain = self.chain
        if chain is not None:
            last = chain.steps[0][0]
            same = last.form == site.form and np.array_equal(last.d, site.d)
            if same and np.array_equal(chain.rows, rows) and all(keeps):
                return chain
            self.flush()
        self.chain = chain = WgmmaChain(rows, ctas, keeps)
        return chain

    def registers(self, slots: Any, rows: Array) -> Array:
        """A copy of registers, uint32 [slot, warp, lane]."""
        return self.machine.files.whole[32][np.ix_(slots, rows)]

    def flush(self) -> None:
        """Issue the open chain."""
        chain, self.chain = self.chain, None
        if chain is None:
            return
        machine = self.machine
        machine.agents.count += len(chain.steps) * len(chain.ctas)
        if machine.agents.eager:
            steps = [(a, b) for _, a, b in chain.steps]
            self._do(chain, chain.rows, chain.ctas, steps, chain.scale)
            if machine.observer is None:
                return
        for k in range(len(chain.ctas)):
            self._issue(chain, k)

    def _do(
        self, chain: WgmmaChain, rows: Array, ctas: list[int], steps: list[Any], scale: list[bool]
    ) -> None:
        machine, site = self.machine, chain.steps[0][0]
        place = np.ix_(site.d, rows)
        file = machine.files.whole[32]
        args = (site.form, machine.shared.windows, ctas, steps, scale, file[place])
        ins = chain.instructions[0]
        file[place] = machine.guard(ins, int(rows[0]), wgmma.accumulate, *args)

    def _issue(self, chain: WgmmaChain, k: int) -> None:
        """Issue one warpgroup's part of a chain as an operation."""
        machine = self.machine
        warps, cta, sites = (
            chain.rows[4 * k : 4 * k + 4],
            chain.ctas[k],
            [x[0] for x in chain.steps],
        )

        def move() -> None:
            if machine.agents.eager:
                return
            steps = [
                ([a[k]] if a is not None else self.registers(site.a, warps), [b[k]])
                for site, a, b in chain.steps
            ]
            self._do(chain, warps, [cta], steps, [chain.scale[k]])

        operation = AsyncOp(chain.instructions[0], int(warps[0]), "wgmma", [move])
        operation.stream = ("wgmma", int(warps[0]))
        operation.rows, operation.registers = tuple(warps.tolist()), sites[0].d
        operation.names = sites[0].names
        operation.sources = frozenset().union(*(site.sources for site in sites))
        operation.chain = tuple(chain.instructions)
        if machine.observer is not None:
            self._describe(operation, chain, k)
        for row in operation.rows:
            machine.agents.wgmma.add(row, operation)
        machine.agents.issue(operation)

    def _describe(self, operation: AsyncOp, chain: WgmmaChain, k: int) -> None:
        """Record the shared memory that a warpgroup's part of a chain reads."""
        guard, row, base = self.machine.guard, operation.row, chain.ctas[k] * WINDOW
        form = chain.steps[0][0].form
        if not form.a_in_registers:
            a = tuple(a[k] for _, a, _ in chain.steps)
            parts = guard(operation.ins, row, wgmma.a_pieces, form, a)
            operation.by_warp = len(parts) == 4
            operation.reads += [("shared", at + base, nbytes) for at, nbytes in parts]
        b = tuple(b[k] for _, _, b in chain.steps)
        at, nbytes = guard(operation.ins, row, wgmma.b_piece, form, b)
        operation.reads.append(("shared", at + base, nbytes))

    def commit(self, ins: Instruction, g: Any) -> None:
        """wgmma.commit_group."""
        self.flush()
        groups = self.machine.agents.wgmma
        if groups.committed:
            for row in self.machine.rows(g).tolist():
                groups.commit(row)

    def wait(self, ins: Instruction, g: Any, n: int) -> None:
        """wgmma.wait_group."""
        self.flush()
        groups = self.machine.agents.wgmma
        if not groups.committed:
            return
        for row in self.machine.rows(g).tolist():
            if self.machine.observer is not None:
                self.machine.observer.waited(ins, row, groups.older(row, n), reading=False)
            groups.wait(row, n)
