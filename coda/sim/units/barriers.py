"""mbarrier instructions of lanes -> phases, pending counts, and lanes parked or resumed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.parse import Instruction
from coda.sim.units.lanes import count_true, spread
from coda.sim.units.memory import WINDOW

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
MOST = (1 << 20) - 1


@dataclass(slots=True)
class Waiter:
    """Lanes `mask` of warp `row` that wait at `ins` and continue at block `then`."""

    ins: Instruction
    row: int
    mask: Array
    then: int
    parity: int = 0
    result: int = -1
    value: Any = None


@dataclass(slots=True)
class Mbarrier:
    """An mbarrier object: its phase completes when no arrival and no transaction is pending."""

    expected: int
    pending: int
    key: int
    tx: int = 0
    phase: int = 0
    completions: int = 0
    waiters: list[Waiter] = field(default_factory=list)


class Mbarriers:
    """The mbarriers of all resident CTAs, by the index of their first byte in shared memory."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.table: dict[int, Mbarrier] = {}

    def keys(self, ins: Instruction, g: Any, m: Any, a: Array, offset: int) -> Array:
        """The key of each lane's barrier, [warps, 1] or [warps, 32]; -1 for inactive lanes."""
        shared = self.machine.shared
        index, _ = shared.index(ins, g, m, a, offset, 8)
        keys = index << 3
        return keys if m is None else np.where(m, keys, -1)

    def find(self, ins: Instruction, key: int, row: int = 0) -> Mbarrier:
        """The barrier at a key."""
        barrier = self.table.get(key)
        if barrier is None:
            what = f"no mbarrier was initialised at {self.name(key)}"
            self.machine.fault(ins, "uninitialised", what, row, None, key)
        assert barrier is not None
        return barrier

    @staticmethod
    def name(key: int) -> str:
        """Describe a barrier for a message."""
        return f"CTA {key // WINDOW}, shared address {key % WINDOW:#x}"

    def rows(self, g: Any) -> Array:
        """The warps' rows as an array."""
        return self.machine.rows(g)

    def init(self, ins: Instruction, g: Any, m: Any, a: Array, offset: int, count: Array) -> None:
        """mbarrier.init by each active lane."""
        keys = spread(self.keys(ins, g, m, a, offset), self.machine.shape)
        counts = spread(count, self.machine.shape)
        rows = self.rows(g)
        for k, lane in zip(*np.nonzero(keys >= 0), strict=True):
            key, number = int(keys[k, lane]), int(counts[k, lane])
            if not 1 <= number <= MOST:
                what = f"an mbarrier with an expected count of {number}"
                self.machine.fault(ins, "barrier", what, int(rows[k]), None, key)
            old = self.table.get(key)
            if old is not None and old.waiters:
                what = f"mbarrier at {self.name(key)} initialised while a warp waits on it"
                self.machine.fault(ins, "barrier", what, int(rows[k]), None, key)
            self.table[key] = Mbarrier(number, number, key)
            self.machine.progress += 1
            if self.machine.observer is not None:
                self.machine.observer.barrier_init(ins, int(rows[k]), key)

    def invalidate(self, ins: Instruction, g: Any, m: Any, a: Array, offset: int) -> None:
        """mbarrier.inval by each active lane."""
        keys = self.keys(ins, g, m, a, offset)
        for key in np.unique(keys):
            if key >= 0:
                self.table.pop(int(key), None)

    def each(self, keys: Array, *values: Any) -> list[tuple[int, int, int, tuple[int, ...]]]:
        """(warp, key, lanes, values) for each warp and each different (key, values) in it."""
        shape = self.machine.shape
        keys = spread(keys, shape)
        where = (keys >= 0).nonzero()
        columns = [spread(v, shape)[where].tolist() for v in values]
        groups: dict[tuple[int, ...], int] = {}
        for item in zip(where[0].tolist(), keys[where].tolist(), *columns, strict=True):
            groups[item] = groups.get(item, 0) + 1
        return [(item[0], item[1], n, item[2:]) for item, n in groups.items()]

    def arrive(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        a: Array,
        offset: int,
        *,
        count: Any = 1,
        expect: Any = 0,
        drop: bool = False,
    ) -> Array:
        """Arrive with all active lanes, after expect-tx; returns the phase tokens before."""
        keys = self.keys(ins, g, m, a, offset)
        rows = self.rows(g)
        token = np.zeros(self.machine.shape, np.uint64)
        for k, key, lanes, (number, tx) in self.each(keys, count, expect):
            barrier = self.find(ins, key, int(rows[k]))
            token[k] = barrier.completions
            if self.machine.observer is not None:
                self.machine.observer.barrier_arrive(ins, int(rows[k]), key)
            for _ in range(lanes if lanes * number > barrier.pending else 1):
                times = 1 if lanes * number > barrier.pending else lanes
                barrier.tx += tx * times
                if drop:
                    barrier.expected -= number * times
                self.take(ins, barrier, number * times, int(rows[k]))
        return token

    def take(self, ins: Instruction, barrier: Mbarrier, count: int, row: int) -> None:
        """Count arrivals; the last one completes the phase."""
        barrier.pending -= count
        if barrier.pending < 0:
            what = (
                f"{count} arrivals at the mbarrier of {self.name(barrier.key)}, which expects only "
                f"{barrier.pending + count} more in this phase (count {barrier.expected})"
            )
            self.machine.fault(ins, "barrier", what, row, None, barrier.key)
        self.machine.progress += 1
        self.settle(barrier)

    def expect(self, ins: Instruction, g: Any, m: Any, a: Array, offset: int, tx: Array) -> None:
        """mbarrier.expect_tx."""
        for k, key, lanes, (number,) in self.each(self.keys(ins, g, m, a, offset), tx):
            self.find(ins, key, int(self.rows(g)[k])).tx += number * lanes
            self.machine.progress += 1

    def complete(self, ins: Instruction, g: Any, m: Any, a: Array, offset: int, tx: Array) -> None:
        """mbarrier.complete_tx, which counts bytes without a copy."""
        for k, key, lanes, (number,) in self.each(self.keys(ins, g, m, a, offset), tx):
            self.complete_tx(ins, key, number * lanes, int(self.rows(g)[k]))

    def complete_tx(self, ins: Instruction, key: int, nbytes: int, row: int) -> None:
        """Count bytes that an asynchronous operation has moved."""
        barrier = self.find(ins, key, row)
        barrier.tx -= nbytes
        self.machine.progress += 1
        self.settle(barrier)

    def arrive_once(self, ins: Instruction, key: int, row: int) -> None:
        """One arrival by an asynchronous unit."""
        self.take(ins, self.find(ins, key, row), 1, row)

    def settle(self, barrier: Mbarrier) -> None:
        """Start the next phase if this one is complete, and resume the lanes that wait for it."""
        if barrier.pending or barrier.tx:
            return
        barrier.phase ^= 1
        barrier.completions += 1
        barrier.pending = barrier.expected
        machine = self.machine
        if machine.observer is not None:
            machine.observer.barrier_phase(barrier.key, barrier.completions)
        waiting, barrier.waiters = barrier.waiters, []
        for waiter in waiting:
            if barrier.phase != waiter.parity:
                self.succeed(waiter, barrier)
            else:
                barrier.waiters.append(waiter)

    def succeed(self, waiter: Waiter, barrier: Mbarrier) -> None:
        """Resume lanes that wait for a phase that is complete."""
        machine = self.machine
        self.answer(waiter, result=True)
        if machine.observer is not None:
            machine.observer.barrier_acquire(waiter.ins, waiter.row, barrier.key)

    def answer(self, waiter: Waiter, *, result: bool) -> None:
        """Give parked lanes the result of their wait, and resume them."""
        machine = self.machine
        if waiter.result >= 0:
            machine.files.bool[waiter.result][waiter.row, waiter.mask] = result
        machine.resume(waiter.row, waiter.mask, waiter.then)

    def wait(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        acting: Any,
        place: tuple[Array, int],
        parity: Array,
        *,
        result: int,
        then: int,
        mode: str,
    ) -> None:
        """try_wait and test_wait: lanes whose phase is incomplete park, or continue with false.

        `parity` names the phase: by its parity, or (mode "state") by the token of an arrival.
        """
        machine = self.machine
        keys = spread(self.keys(ins, g, acting, *place), machine.shape)
        parities = spread(parity, machine.shape)
        if m is None and acting is None and self._all_ended(ins, g, keys, parities):
            if result >= 0:
                machine.files.bool[result][g] = True
            machine.go(g, None, then)
            return
        rows = self.rows(g)
        done = np.ones(machine.shape, bool) if m is None else m.copy()
        answers = np.zeros(machine.shape, bool)
        for k in range(machine.shape[0]):
            row = int(rows[k])
            for lanes, key, value in _groups(keys[k], parities[k]):
                barrier = self.find(ins, key, row)
                wanted = int(value) & 1
                if machine.agents.fails_anyway():
                    continue
                if barrier.phase != wanted:
                    answers[k] |= lanes
                    if machine.observer is not None:
                        machine.observer.barrier_acquire(ins, row, key)
                elif "test" not in mode:
                    done[k] &= ~lanes
                    machine.park(row, lanes)
                    barrier.waiters.append(Waiter(ins, row, lanes, then, wanted, result))
        if result >= 0:
            self._answers(g, m, acting, result, answers)
        machine.go(g, None if done.all() else done, then)

    def _all_ended(self, ins: Instruction, g: Any, keys: Array, parities: Array) -> bool:
        """Fast path: all warps wait, each for one phase, and all these phases are complete."""
        machine = self.machine
        same = (keys == keys[:, :1]) & (parities == parities[:, :1])
        if machine.agents.random or count_true(same) != same.size:
            return False
        pairs = list(zip(keys[:, 0].tolist(), parities[:, 0].tolist(), strict=True))
        if any(self.find(ins, key).phase == parity & 1 for key, parity in set(pairs)):
            return False
        if machine.observer is not None:
            for row, (key, _) in zip(self.rows(g).tolist(), pairs, strict=True):
                machine.observer.barrier_acquire(ins, row, key)
        return True

    def _answers(self, g: Any, m: Any, acting: Any, result: int, answers: Array) -> None:
        target = self.machine.files.bool[result]
        if acting is None:
            target[g] = answers
        else:
            target[g] = np.where(acting, answers, target[g])

    def waiting(self) -> list[tuple[Mbarrier, Waiter]]:
        """All parked waiters."""
        return [(b, w) for b in self.table.values() for w in b.waiters]

    def fail_all(self) -> bool:
        """Answer every wait with false, as hardware does after a time-out."""
        waiting = self.waiting()
        for barrier, _ in waiting:
            barrier.waiters = []
        for _, waiter in waiting:
            self.answer(waiter, result=False)
        return bool(waiting)


def _groups(keys: Array, values: Array) -> list[tuple[Array, int, int]]:
    """Group the lanes of a warp by equal (key, value); lanes with key -1 are left out."""
    first = int(keys[0])
    if first >= 0 and (keys == first).all() and (values == values[0]).all():
        return [(np.ones(32, bool), first, int(values[0]))]
    out = []
    left = keys >= 0
    while left.any():
        lane = int(left.argmax())
        same = left & (keys == keys[lane]) & (values == values[lane])
        out.append((same, int(keys[lane]), int(values[lane])))
        left &= ~same
    return out
