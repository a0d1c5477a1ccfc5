"""bar, barrier and barrier.cluster instructions -> threads counted, lanes parked or resumed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.parse import Instruction
from coda.sim.units.barriers import Waiter
from coda.sim.units.lanes import spread

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
NEVER = np.int32(1 << 30)


@dataclass(slots=True)
class Named:
    """One use of a barrier: threads arrived, threads expected (0: all of the CTA), waiters."""

    count: int
    arrived: int = 0
    waiters: list[Waiter] = field(default_factory=list)
    yes: int = 0
    threads: int = 0


class NamedBarriers:
    """bar.sync, bar.arrive, bar.red of all resident CTAs."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.table: dict[tuple[int, int], Named] = {}

    def meet(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        acting: Any,
        number: Array,
        count: Array,
        *,
        then: int,
        reduction: tuple[str, Any, int] | None = None,
    ) -> None:
        """Arrive with whole warps and park until all expected threads have arrived."""
        machine = self.machine
        act = machine.active(acting)
        if m is None and acting is None and reduction is None:
            if self._all_here(ins, g, number, count):
                machine.go(g, None, then)
                return
            machine.go(g, None, machine.PARKED)
        else:
            machine.go_some(g, act, machine.PARKED)
            machine.go_some(g, machine.active(m) & ~act, then)
        for k, row, key, threads in self._arrivals(g, act, number, count):
            waiter = Waiter(ins, row, act[k].copy(), then)
            if reduction is not None:
                waiter.result = reduction[2]
                waiter.value = (reduction[0], spread(reduction[1], machine.shape)[k])
            self._come(ins, row, key, threads, waiter)

    def _all_here(self, ins: Instruction, g: Any, number: Array, count: Array) -> bool:
        """Fast path: whether exactly the expected warps arrive together, so that none waits."""
        machine = self.machine
        if np.ndim(number) or np.ndim(count) or int(number) > 15 or int(count) % 32:
            return False
        rows = machine.rows(g)
        come = np.bincount(rows % machine.count, minlength=machine.count).tolist()
        keys = [(cta, int(number)) for cta, n in enumerate(come) if n]
        for key in keys:
            needed = int(count) or machine.live_threads(key[0])
            if key in self.table or 32 * come[key[0]] != needed:
                return False
        machine.progress += 1
        if machine.observer is not None:
            pairs = [(row, (machine.cta_of(row), int(number))) for row in rows.tolist()]
            for row, key in pairs:
                machine.observer.named_arrive(ins, row, key)
            for row, key in pairs:
                machine.observer.named_acquire(ins, row, key)
        return True

    def arrive(self, ins: Instruction, g: Any, m: Any, number: Array, count: Array) -> None:
        """Arrive with whole warps and continue."""
        for _, row, key, threads in self._arrivals(g, self.machine.active(m), number, count):
            self._come(ins, row, key, threads, None)

    def _arrivals(
        self, g: Any, act: Array, number: Array, count: Array
    ) -> list[tuple[int, int, tuple[int, int], int]]:
        """(warp, row, barrier, expected threads) for each warp with an active lane."""
        machine = self.machine
        numbers = spread(number, machine.shape)
        counts = spread(count, machine.shape)
        out = []
        for k, row in enumerate(machine.rows(g).tolist()):
            if act[k].any():
                lane = int(act[k].argmax())
                key = (machine.cta_of(row), int(numbers[k, lane]))
                out.append((k, row, key, int(counts[k, lane])))
        return out

    def _come(
        self, ins: Instruction, row: int, key: tuple[int, int], count: int, waiter: Waiter | None
    ) -> None:
        machine = self.machine
        if key[1] > 15 or count % 32:
            what = f"barrier {key[1]} with {count} threads"
            machine.fault(ins, "barrier", what, row, None, key[1])
        barrier = self.table.setdefault(key, Named(count))
        if barrier.count != count:
            what = (
                f"barrier {key[1]} of CTA {key[0]} with {count} threads, while others came to it "
                f"with {barrier.count}"
            )
            machine.fault(ins, "barrier", what, row, None, key[1])
        barrier.arrived += 32
        machine.progress += 1
        if machine.observer is not None:
            machine.observer.named_arrive(ins, row, key)
        if waiter is not None:
            barrier.waiters.append(waiter)
            if isinstance(waiter.value, tuple):
                barrier.yes += int((waiter.value[1] & waiter.mask).sum())
                barrier.threads += int(waiter.mask.sum())
        self._settle(key, barrier)

    def _settle(self, key: tuple[int, int], barrier: Named) -> None:
        needed = barrier.count or self.machine.live_threads(key[0])
        if barrier.arrived < needed:
            return
        del self.table[key]
        if barrier.arrived > needed:
            what = f"barrier {key[1]} of CTA {key[0]} got {barrier.arrived} threads, not {needed}"
            waiter = barrier.waiters[0] if barrier.waiters else None
            row = waiter.row if waiter else 0
            self.machine.fault(waiter.ins if waiter else None, "barrier", what, row, None, key[1])
        for waiter in barrier.waiters:
            self._release(key, barrier, waiter)
        self.machine.resume_all(barrier.waiters)

    def _release(self, key: tuple[int, int], barrier: Named, waiter: Waiter) -> None:
        machine = self.machine
        if isinstance(waiter.value, tuple):
            mode = waiter.value[0]
            results = {
                "popc": barrier.yes,
                "and": barrier.yes == barrier.threads,
                "or": barrier.yes > 0,
            }
            file = machine.files.uint32 if mode == "popc" else machine.files.bool
            file[waiter.result][waiter.row, waiter.mask] = results[mode]
        if machine.observer is not None:
            machine.observer.named_acquire(waiter.ins, waiter.row, key)

    def recheck(self) -> bool:
        """Complete barriers for all threads of a CTA, where the missing ones have exited."""
        before = len(self.table)
        for key, barrier in list(self.table.items()):
            if barrier.count == 0:
                self._settle(key, barrier)
        return len(self.table) < before


@dataclass(slots=True)
class Cluster:
    """The barrier of one cluster: for each lane, whether it has arrived in this phase."""

    arrived: Array
    waiters: list[Waiter] = field(default_factory=list)


class ClusterBarriers:
    """barrier.cluster of all resident clusters."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.table: dict[int, Cluster] = {}
        self.phase = np.full(machine.shape_of_file, NEVER)  # the phase that each lane arrived in
        self.phases: dict[int, int] = {}

    def _rows(self, cluster: int) -> Array:
        return np.flatnonzero(self.machine.cluster_of_row == cluster)

    def arrive(self, ins: Instruction, g: Any, m: Any) -> None:
        """barrier.cluster.arrive by all active lanes."""
        machine = self.machine
        rows, act = machine.rows(g), machine.active(m)
        for cluster in np.unique(machine.cluster_of_row[rows]).tolist():
            state = self.table.get(cluster)
            if state is None:
                state = self.table[cluster] = Cluster(np.zeros(machine.shape_of_file, bool))
            here = machine.cluster_of_row[rows] == cluster
            mine = rows[here]
            twice = state.arrived[mine] & act[here]
            if twice.any():
                row = int(mine[twice.any(1).argmax()])
                what = "a thread arrives twice at the cluster barrier in one phase"
                machine.fault(ins, "barrier", what, row, None, None)
            state.arrived[mine] |= act[here]
            self.phase[mine] = np.where(act[here], self.phases.get(cluster, 0), self.phase[mine])
            if machine.observer is not None:
                for row in mine:
                    machine.observer.cluster_arrive(ins, int(row), cluster)
        machine.progress += 1
        self.recheck()

    def wait(self, ins: Instruction, g: Any, m: Any, acting: Any, then: int) -> None:
        """barrier.cluster.wait: park until the phase of the thread's own arrival is complete."""
        machine = self.machine
        rows, act = machine.rows(g), machine.active(acting)
        on = machine.active(m).copy()
        for k, row in enumerate(rows.tolist()):
            cluster = int(machine.cluster_of_row[row])
            ended = self.phase[row] < self.phases.get(cluster, 0)
            late = act[k] & ~ended
            self.phase[row][act[k] & ended] = NEVER
            if not late.any():
                if machine.observer is not None:
                    machine.observer.cluster_acquire(ins, row, cluster)
                continue
            state = self.table.get(cluster)
            if state is None or not state.arrived[row][late].all():
                what = "a thread waits at the cluster barrier without having arrived"
                machine.fault(ins, "barrier", what, row, None, None)
            assert state is not None
            machine.park(row, late)
            on[k] &= ~late
            state.waiters.append(Waiter(ins, row, late, then))
        machine.go_some(g, on, then)

    def recheck(self) -> bool:
        """Complete phases at which every thread that has not exited has arrived."""
        ended = False
        for cluster, state in list(self.table.items()):
            rows = self._rows(cluster)
            if not (state.arrived[rows] | self.machine.exited(rows)).all():
                continue
            if not state.arrived[rows].any():
                continue
            ended = True
            self.phases[cluster] = self.phases.get(cluster, 0) + 1
            del self.table[cluster]
            for waiter in state.waiters:
                if self.machine.observer is not None:
                    self.machine.observer.cluster_acquire(waiter.ins, waiter.row, cluster)
                self.phase[waiter.row][waiter.mask] = NEVER
                self.machine.resume(waiter.row, waiter.mask, waiter.then)
        return ended
