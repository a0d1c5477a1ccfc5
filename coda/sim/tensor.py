"""The tensor cores: wgmma on registers, tcgen05 on tensor memory, as operations.

A wgmma of a warpgroup is one operation. When operations complete at issue, a chain of wgmmas on
the same accumulators is done at once at its commit: nothing can look at it before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim import wgmma
from coda.sim.agents import Operation
from coda.sim.lanes import spread
from coda.sim.memory import WINDOW
from coda.sim.ptx import Instruction

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
class Chain:
    """Wgmmas on the same accumulators of the same warpgroups, not done yet."""

    site: WgmmaSite
    rows: Array
    ctas: list[int]
    scale: list[bool]
    steps: list[tuple[Any, Any]] = field(default_factory=list)


class Tensor:
    """Issues the operations of wgmma."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.chain: Chain | None = None

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
        machine.agents.count += len(first)
        if machine.agents.eager and machine.observer is None:
            self._extend(ins, site, rows[order], ctas, left, right, keeps)
            return
        for k, cta in enumerate(ctas):
            warps = rows[order[4 * k : 4 * k + 4]]
            step = (None if left is None else [left[k]], [right[k]])
            self._issue(ins, site, warps, cta, step, keeps[k])

    def _extend(
        self,
        ins: Instruction,
        site: WgmmaSite,
        rows: Array,
        ctas: list[int],
        left: list[int] | None,
        right: list[int],
        keeps: list[bool],
    ) -> None:
        chain = self.chain
        joins = (
            chain is not None
            and chain.site.form == site.form
            and np.array_equal(chain.site.d, site.d)
            and np.array_equal(chain.rows, rows)
            and all(keeps)
        )
        if not joins:
            self.flush(ins)
            chain = self.chain = Chain(site, rows, ctas, keeps)
        assert chain is not None
        operand = self.registers(site.a, rows) if site.a is not None else left
        chain.steps.append((operand, right))
        self.machine.progress += 1

    def registers(self, slots: Any, rows: Array) -> Array:
        """A copy of registers, [slot, warp, lane]."""
        return self.machine.files.whole[32][np.ix_(slots, rows)]

    def flush(self, ins: Instruction) -> None:
        """Do the chain that is open."""
        chain, self.chain = self.chain, None
        if chain is None:
            return
        self._do(ins, chain.site, chain.rows, chain.ctas, chain.steps, chain.scale)

    def _do(
        self,
        ins: Instruction,
        site: WgmmaSite,
        rows: Array,
        ctas: list[int],
        steps: list[Any],
        scale: list[bool],
    ) -> None:
        machine = self.machine
        place = np.ix_(site.d, rows)
        file = machine.files.whole[32]
        old = file[place]
        smem = machine.shared.windows
        row = int(rows[0])
        args = (site.form, smem, ctas, steps, scale, old)
        file[place] = machine.guard(ins, row, wgmma.accumulate, *args)

    def _issue(
        self, ins: Instruction, site: WgmmaSite, warps: Array, cta: int, step: Any, keep: bool
    ) -> None:
        machine = self.machine

        def move() -> None:
            a = self.registers(site.a, warps) if site.a is not None else step[0]
            self._do(ins, site, warps, [cta], [(a, step[1])], [keep])

        operation = Operation(ins, int(warps[0]), "wgmma", [move])
        operation.stream = ("wgmma", int(warps[0]))
        operation.rows, operation.registers = tuple(warps.tolist()), site.d
        operation.names, operation.sources = site.names, site.sources
        form, base = site.form, cta * WINDOW
        if machine.observer is not None:
            if step[0] is not None:
                at = machine.guard(ins, int(warps[0]), wgmma.a_offsets, form, step[0][0])
                operation.reads.append(("shared", at.ravel() + base, 16))
            at = machine.guard(ins, int(warps[0]), wgmma.b_offsets, form, step[1][0])
            operation.reads.append(("shared", at.ravel() + base, 16))
        for row in operation.rows:
            machine.agents.wgmma.add(row, operation)
        machine.agents.issue(operation)

    def commit(self, ins: Instruction, g: Any) -> None:
        """wgmma.commit_group."""
        self.flush(ins)
        groups = self.machine.agents.wgmma
        if groups.committed:
            for row in self.machine.rows(g).tolist():
                groups.commit(row)

    def wait(self, ins: Instruction, g: Any, n: int) -> None:
        """wgmma.wait_group."""
        self.flush(ins)
        groups = self.machine.agents.wgmma
        if not groups.committed:
            return
        for row in self.machine.rows(g).tolist():
            if self.machine.observer is not None:
                self.machine.observer.waited(ins, row, groups.older(row, n), False)
            groups.wait(row, n)
