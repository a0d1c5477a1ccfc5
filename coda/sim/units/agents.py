"""Asynchronous operations of instructions -> data moved and mbarriers signalled at completion.

The schedule chooses the time of completion: "eager" at issue, "late" when a warp waits for it or
nothing else can run, "random" at any time in between. A stream is a queue whose operations complete
in order; operations outside of streams complete in any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from coda.sim.ptx.parse import Instruction

if TYPE_CHECKING:
    from coda.sim.machine import Machine

RATES = (0.02, 0.15, 0.5)


@dataclass(slots=True, eq=False)
class AsyncOp:
    """One asynchronous operation of the warp `row`, in steps that run in order.

    With two steps, the first reads the operands and the second writes the result, so that a wait
    for reading alone differs from a full one. `signals` are the keys of the mbarriers on which it
    completes; `registers` the slots of the 32-bit registers of the warps `rows` that it writes;
    `names` are the registers that it writes, `sources` those that it reads when it completes.
    `reads` and `writes` are the memory that it accesses: (space, first byte or array, bytes); the
    space is "shared" (index of the byte in shared memory), "global" or "tensor" (see observe.py);
    `by_warp` says that the first four of `reads` belong to one warp each. `chain` has the
    instructions that are fused into this operation; `clocks` is for the checks.
    """

    ins: Instruction
    row: int
    unit: str
    steps: list[Callable[[], None]]
    signals: tuple[int, ...] = ()
    stream: Hashable = None
    registers: Any = ()
    rows: tuple[int, ...] = ()
    sources: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    reads: list[tuple[str, Any, int]] = field(default_factory=list)
    writes: list[tuple[str, Any, int]] = field(default_factory=list)
    by_warp: bool = False
    chain: tuple[Instruction, ...] = ()
    clocks: list[tuple[int, int]] = field(default_factory=list)
    nbytes: int = 0
    done: int = 0
    number: int = 0

    @property
    def finished(self) -> bool:
        """Whether all steps have run."""
        return self.done == len(self.steps)


class Groups:
    """Operations by the group in which a thread (or warp) committed them."""

    def __init__(self, agents: Agents) -> None:
        self.agents = agents
        self.open: dict[Hashable, list[AsyncOp]] = {}
        self.committed: dict[Hashable, list[list[AsyncOp]]] = {}

    def add(self, key: Hashable, operation: AsyncOp) -> None:
        """Put an operation into the group that is open."""
        self.open.setdefault(key, []).append(operation)
        self.committed.setdefault(key, [])

    def commit(self, key: Hashable) -> None:
        """Close the open group."""
        if key in self.committed:
            self.committed[key].append(self.open.pop(key, []))

    def older(self, key: Hashable, n: int) -> list[AsyncOp]:
        """The operations of all committed groups except the last `n`."""
        groups = self.committed.get(key)
        if not groups:
            return []
        return [op for group in groups[: len(groups) - n] for op in group]

    def wait(self, key: Hashable, n: int, steps: int = 99) -> None:
        """Finish (the first `steps` of) the operations of all but the last `n` groups."""
        for operation in self.older(key, n):
            self.agents.finish(operation, steps)
        groups = self.committed.get(key)
        while groups and all(op.finished for op in groups[0]) and len(groups) > n:
            groups.pop(0)

    def everything(self, key: Hashable) -> list[AsyncOp]:
        """All operations, committed or not."""
        return self.older(key, 0) + self.open.get(key, [])


class Agents:
    """The asynchronous units of all resident CTAs."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        options = machine.options
        self.eager = options.schedule == "eager"
        self.random = options.schedule == "random"
        self.rng = np.random.default_rng(options.seed)
        self.rate = RATES[options.seed % len(RATES)]
        self.loose: dict[AsyncOp, None] = {}
        self.streams: dict[Hashable, deque[AsyncOp]] = {}
        self.with_registers: dict[AsyncOp, None] = {}
        self.count = 0
        self.bulk, self.copies, self.wgmma = Groups(self), Groups(self), Groups(self)

    def issue(self, operation: AsyncOp) -> None:
        """Hand an operation to its unit."""
        machine = self.machine
        machine.progress += 1
        self.count += 1
        operation.number = self.count
        if machine.observer is not None:
            machine.observer.issued(operation)
        if operation.stream is not None:
            self.streams.setdefault(operation.stream, deque()).append(operation)
        else:
            self.loose[operation] = None
        if len(operation.rows):
            self.with_registers[operation] = None
        if self.eager:
            self.finish(operation)

    def finish(self, operation: AsyncOp, steps: int = 99) -> None:
        """Run the first `steps` steps of an operation, after earlier ones of its stream."""
        if operation.done >= min(steps, len(operation.steps)):
            return
        if operation.stream is not None:
            queue = self.streams[operation.stream]
            while queue[0] is not operation:
                self._run(queue[0], 99)
        self._run(operation, steps)

    def _run(self, operation: AsyncOp, steps: int) -> None:
        machine = self.machine
        while operation.done < min(steps, len(operation.steps)):
            if machine.observer is not None:
                machine.observer.moves(operation, operation.done)
            operation.steps[operation.done]()
            operation.done += 1
        if operation.finished:
            if operation.stream is None:
                self.loose.pop(operation, None)
            else:
                self.streams[operation.stream].popleft()
            self.with_registers.pop(operation, None)
            if machine.observer is not None:
                machine.observer.completed(operation)
        machine.progress += 1

    def arrive_in_registers(self, rows: Any, needs: set[str]) -> None:
        """Complete the loads of tensor memory whose results the warps are about to read."""
        for row in rows.tolist():
            queue = self.streams.get(("tcgen05.ld", row))
            if queue:
                last = [op for op in queue if not op.names.isdisjoint(needs)]
                if last:
                    self.finish(last[-1])

    def finish_stream(self, stream: Hashable) -> None:
        """Complete all operations of a stream."""
        queue = self.streams.get(stream)
        while queue:
            self._run(queue[0], 99)

    def pending(self) -> list[AsyncOp]:
        """All operations that have not finished, oldest first."""
        out = list(self.loose)
        for queue in self.streams.values():
            out += queue
        return sorted(out, key=lambda op: op.number)

    def eligible(self) -> list[AsyncOp]:
        """The operations that may complete now: heads of streams, and all outside of streams."""
        return [*self.loose, *(queue[0] for queue in self.streams.values() if queue)]

    def fails_anyway(self) -> bool:
        """Whether a wait returns false at random, as hardware may."""
        return self.random and self.rng.random() < 0.3

    def stir(self) -> None:
        """Under the random schedule, complete some operations between two blocks."""
        if self.random and self.rng.random() < self.rate:
            eligible = self.eligible()
            if eligible:
                self._run(eligible[int(self.rng.integers(len(eligible)))], 99)

    def relieve(self) -> bool:
        """No warp can run: complete what warps wait for, else the oldest operation."""
        if self.eager:
            return False
        if self.random:
            eligible = self.eligible()
            if eligible:
                self._run(eligible[int(self.rng.integers(len(eligible)))], 99)
            return bool(eligible)
        pending = self.pending()
        table = self.machine.mbarriers.table
        wanted = [op for op in pending if any(k in table and table[k].waiters for k in op.signals)]
        for operation in wanted or pending[:1]:
            self.finish(operation)
        return bool(pending)
