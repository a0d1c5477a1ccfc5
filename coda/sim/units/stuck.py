"""A machine without progress -> Deadlock or Livelock, with the barrier that each warp waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numpy as np

from coda.sim.types import Deadlock, Livelock

if TYPE_CHECKING:
    from coda.sim.machine import Machine
    from coda.sim.units.barriers import Waiter

SHOWN = 40


def _who(machine: Machine, waiter: Waiter) -> str:
    lanes = np.flatnonzero(waiter.mask)
    some = (
        ""
        if len(lanes) == 32
        else f" lanes {lanes[0]}..{lanes[-1]}"
        if len(lanes) > 1
        else (f" lane {lanes[0]}")
    )
    cta = int(machine.ctas[machine.cta_of(waiter.row)])
    return f"CTA {cta} warp {machine.warp_of(waiter.row)}{some}"


def _at(waiter: Waiter) -> str:
    source = f" ({waiter.ins.source})" if waiter.ins.source else ""
    return f"at PTX line {waiter.ins.line}: {waiter.ins.text}{source}"


def waits(machine: Machine) -> list[str]:
    """One line for each wait of a warp."""
    out = []
    for barrier, w in machine.mbarriers.waiting():
        state = (
            f"phase {barrier.phase}, {barrier.pending} of {barrier.expected} arrivals pending, "
            f"{barrier.tx} transaction bytes open"
        )
        name = machine.mbarriers.name(barrier.key)
        out.append(
            f"{_who(machine, w)} waits for the end of phase {w.parity} of the mbarrier of {name} "
            f"({state}) {_at(w)}"
        )
    for (cta, number), barrier in machine.named.table.items():
        needed = barrier.count or machine.live_threads(cta)
        state = f"{barrier.arrived} of {needed} threads have come"
        if not barrier.waiters:
            out.append(f"barrier {number} of CTA {cta}: {state}, none waits")
        for w in barrier.waiters:
            out.append(f"{_who(machine, w)} waits at barrier {number} ({state}) {_at(w)}")
    for cluster, state in machine.cluster_barriers.table.items():
        rows = np.flatnonzero(machine.cluster_of_row == cluster)
        come, all_of = int(state.arrived[rows].sum()), 32 * len(rows)
        for w in state.waiters:
            out.append(
                f"{_who(machine, w)} waits at the cluster barrier ({come} of {all_of} threads have "
                f"come) {_at(w)}"
            )
    return out + _joins(machine)


def _joins(machine: Machine) -> list[str]:
    out = []
    blocks = machine.decoded.program.blocks
    for (row, number), have in machine.joins.lanes.items():
        ins = blocks[number].instructions[0]
        out.append(
            f"CTA {machine.cta_of(row)} warp {machine.warp_of(row)} has {int(have.sum())} lanes of "
            f"those that must execute a block together, at PTX line {ins.line}: {ins.text}"
        )
    for (group, number), members in machine.joins.warps.items():
        ins = blocks[number].instructions[0]
        cta, first = group % machine.count, group // machine.count * 4
        here = [str(first + i) for i in range(4) if members >> i & 1]
        out.append(
            f"CTA {cta}: only warps {', '.join(here)} of a warpgroup are at PTX line {ins.line}: "
            f"{ins.text}"
        )
    return out


def _listed(lines: list[str]) -> str:
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join(["", *lines[:SHOWN], *more])


def deadlock(machine: Machine) -> NoReturn:
    """Raise Deadlock."""
    name = machine.grid.launch.kernel
    raise Deadlock(f"deadlock in {name}: every thread waits{_listed(waits(machine))}")


def livelock(machine: Machine, why: str) -> NoReturn:
    """Raise Livelock, with the instructions at which warps spin."""
    from coda.sim.machine import EXIT, SPIN

    blocks = machine.decoded.program.blocks
    running = np.flatnonzero(machine.key < EXIT)
    lines = []
    for number in np.unique(machine.key[running] & (SPIN - 1)).tolist():
        rows = running[(machine.key[running] & (SPIN - 1)) == number]
        ins = blocks[number].instructions[0]
        who = ", ".join(
            f"CTA {machine.ctas[machine.cta_of(r)]} warp {machine.warp_of(r)}" for r in rows[:4]
        )
        lines.append(f"{len(rows)} warps ({who}) near PTX line {ins.line}: {ins.text}")
    name = machine.grid.launch.kernel
    raise Livelock(f"livelock in {name}: {why}{_listed(lines + waits(machine))}")
