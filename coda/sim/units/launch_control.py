"""clusterlaunchcontrol and tensormap.replace -> changes to the launch's queue and to tensor maps.

The response of try_cancel is 16 bytes: a flag that is 1 if a cluster was cancelled, then the
coordinates of its first CTA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.parse import Instruction
from coda.sim.units import tensormap
from coda.sim.units.agents import AsyncOp
from coda.sim.units.memory import GENERIC, OFFSET, RANK

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]


class LaunchControl:
    """Cancels clusters that have not started, on behalf of running ones."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def try_cancel(
        self, ins: Instruction, g: Any, m: Any, place: Any, barrier: Any, *, every: bool
    ) -> None:
        """Cancel the next cluster; the response goes to one CTA or to all of the cluster."""
        machine = self.machine
        at = machine.transfers.at
        for row, _, (to, bar) in machine.transfers.each(g, m, at(place), at(barrier)):
            size = machine.geometry.cluster_size
            ranks = range(size) if every else [to >> RANK]
            starts = [
                machine.shared.span(ins, row, r << RANK | (to & OFFSET), 16, 16) for r in ranks
            ]
            keys = [machine.shared.span(ins, row, r << RANK | (bar & OFFSET), 8, 8) for r in ranks]
            answer = self._next()

            def move(
                row: int = row, starts: Any = starts, keys: Any = keys, a: Any = answer
            ) -> None:
                for start in starts:
                    machine.shared.data[start : start + 16] = a.view(np.uint8)
                for key in keys:
                    machine.mbarriers.complete_tx(ins, key, 16, row)

            operation = AsyncOp(ins, row, "try_cancel", [move], signals=tuple(keys), nbytes=16)
            operation.writes = [("shared", start, 16) for start in starts]
            machine.agents.issue(operation)

    def _next(self) -> Array:
        geometry, waiting = self.machine.geometry, self.machine.waiting
        if not waiting:
            return np.zeros(4, np.uint32)
        cluster = waiting.popleft()
        first = np.array([cluster * geometry.cluster_size])
        ctaid = geometry.coordinates(first)[0][0]
        return np.array([1, *ctaid.tolist()], np.uint32)

    @staticmethod
    def _words(answer: Array) -> Array:
        return np.ascontiguousarray(answer)[..., None].view(np.uint32)

    def canceled(self, answer: Array) -> Array:
        """query_cancel.is_canceled."""
        return self._words(answer)[..., 0] == 1

    def ctaid(self, answer: Array, axis: int) -> Array:
        """query_cancel.get_first_ctaid of axis 0, 1 or 2."""
        words = self._words(answer)
        return words[..., axis + 1] if axis < 3 else np.zeros_like(words[..., 0])

    # tensor maps

    def _bytes(self, ins: Instruction, row: int, space: str, address: int, write: bool) -> Array:
        machine = self.machine
        if space.startswith("shared") or (not space and address & GENERIC):
            start = machine.shared.span(ins, row, address & 0xFFFFFFFF, 128, 64)
            if machine.observer is not None:
                machine.observer.matrix_access(ins, row, np.array([start]), 128, write=write)
            return machine.shared.data[start : start + 128]
        machine.memory.span(ins, row, address, address + 128)
        if machine.observer is not None and write:
            machine.observer.map_write(ins, row, address)
        return machine.memory.views[1][address - 64 : address + 64]

    def replace(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        place: Any,
        value: Any,
        *,
        space: str,
        field: str,
        index: int | None,
    ) -> None:
        """tensormap.replace by each active lane (equal ones once)."""
        machine = self.machine
        at = machine.transfers.at(place)
        for row, _, (address, new) in machine.transfers.each(g, m, at, value):
            raw = self._bytes(ins, row, space, address, True)
            machine.guard(ins, row, tensormap.replace, raw, field, index, new)
            machine.progress += 1

    def copy_map(self, ins: Instruction, g: Any, m: Any, to: Any, source: Any) -> None:
        """tensormap.cp_fenceproxy: 128 bytes from shared to global memory."""
        machine = self.machine
        at = machine.transfers.at
        for row, _, (target, start) in machine.transfers.each(g, m, at(to), at(source)):
            raw = self._bytes(ins, row, "shared", start, False)
            self._bytes(ins, row, "global", target, True)[...] = raw
            machine.progress += 1
        if machine.observer is not None:
            machine.observer.fence(ins, g, m)
