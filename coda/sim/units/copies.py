"""cp.async: copies of 4, 8 or 16 bytes per lane, global -> shared memory, in groups.

Groups are tracked per warp; one operation holds the copies of all lanes of a warp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.parse import Instruction
from coda.sim.units.agents import AsyncOp
from coda.sim.units.lanes import spread
from coda.sim.units.memory import SHIFT

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
u32, u64, i64 = np.uint32, np.uint64, np.int64


class Copies:
    """The unit behind cp.async."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def issue(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        to: tuple[Array, int],
        source: tuple[Array, int],
        size: int,
        *,
        take: Array | None,
    ) -> None:
        """Queue the copies of all active lanes; of `size` bytes those past `take` become zero."""
        machine = self.machine
        if m is not None and not m.any():
            return
        shape = machine.shape
        index, _ = machine.shared.index(ins, g, m, to[0], to[1], size)
        index = spread(index, shape)
        a = np.asarray(source[0], u64) + u64(source[1] & (2**64 - 1))
        a = spread(a, shape)
        count = spread(u32(size) if take is None else np.minimum(take, u32(size)), shape)
        reads = machine.active(m) & (count > 0)
        if reads.any():
            machine.memory.check(ins, g, None if reads.all() else reads, a, size)
        rows, active = machine.rows(g), machine.active(m)
        for k in np.flatnonzero(active.any(1)):
            row, lanes = int(rows[k]), active[k]
            self._queue(ins, row, index[k][lanes], a[k][lanes], count[k][lanes], size)

    def _queue(
        self, ins: Instruction, row: int, index: Array, a: Array, count: Array, size: int
    ) -> None:
        machine = self.machine

        def move() -> None:
            full = count == size
            if full.all():
                at = ((a - u64(64)) >> u64(SHIFT[size])).astype(i64)
                machine.shared.views[size][index] = machine.memory.views[size][at]
                return
            for where, address, n in zip(index.tolist(), a.tolist(), count.tolist(), strict=True):
                first = where << SHIFT[size]
                machine.shared.data[first : first + size] = 0
                low = address - 64
                data = machine.memory.views[1][low : low + n]
                machine.shared.data[first : first + n] = data

        operation = AsyncOp(ins, row, "cp.async", [move], stream=("cp.async", row))
        operation.reads = [("global", a.astype(i64)[count > 0], size)]
        operation.writes = [("shared", index << SHIFT[size], size)]
        operation.nbytes = int(count.sum())
        machine.agents.copies.add(row, operation)
        machine.agents.issue(operation)

    def commit(self, g: Any, m: Any) -> None:
        """cp.async.commit_group."""
        machine = self.machine
        active = machine.active(m).any(1)
        for row in machine.rows(g)[active].tolist():
            machine.agents.copies.commit(row)

    def wait(self, ins: Instruction, g: Any, m: Any, n: int) -> None:
        """cp.async.wait_group, and wait_all for a negative `n`."""
        machine = self.machine
        groups = machine.agents.copies
        active = machine.active(m).any(1)
        for row in machine.rows(g)[active].tolist():
            if n < 0:
                groups.commit(row)
            if machine.observer is not None:
                machine.observer.waited(ins, row, groups.older(row, max(n, 0)), reading=False)
            groups.wait(row, max(n, 0))

    def arrive(
        self, ins: Instruction, g: Any, m: Any, a: Array, offset: int, *, more: bool
    ) -> None:
        """cp.async.mbarrier.arrive: each lane arrives when its copies so far are done."""
        machine = self.machine
        keys = machine.mbarriers.keys(ins, g, m, a, offset)
        rows = machine.rows(g)
        for k, key, lanes, _ in machine.mbarriers.each(keys):
            row = int(rows[k])
            barrier = machine.mbarriers.find(ins, key, row)
            if more:
                barrier.pending += lanes

            def move(barrier: Any = barrier, lanes: int = lanes, row: int = row) -> None:
                machine.mbarriers.take(ins, barrier, lanes, row)

            stream = ("cp.async", row)
            operation = AsyncOp(ins, row, "cp.async", [move], signals=(key,), stream=stream)
            machine.agents.issue(operation)
