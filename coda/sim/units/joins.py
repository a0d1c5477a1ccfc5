"""Warps at an instruction that needs several lanes or warps -> the complete sets, which may run.

Lanes that must execute an instruction convergently (the membermask of a shuffle, a whole warp for
ldmatrix, four warps for wgmma) are parked here until all have arrived.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.program import BasicBlock

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
BIT = np.uint32(1) << np.arange(32, dtype=np.uint32)


class Joins:
    """Lanes that wait for other lanes, and warps that wait for other warps."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.lanes: dict[tuple[int, int], Array] = {}
        self.warps: dict[tuple[int, int], int] = {}

    def gather(
        self, number: int, block: BasicBlock, rows: Array, m: Array | None
    ) -> tuple[Array, Array | None]:
        """(rows, lane mask) of the warps that may run the block now; the others are parked."""
        if m is not None:
            rows, m = self._lanes(number, block, rows, m)
        if len(rows) and block.warpgroup:
            rows, m = self._warpgroups(number, rows, m)
        return rows, m

    def _needed(self, block: BasicBlock, row: int) -> Array:
        """The lanes of a warp that must run the block together, exited ones included."""
        needed = np.zeros(32, bool)
        for mask in block.masks:
            slot = self.machine.decoded.layout.slots.get(mask)
            if slot is None:
                value = np.uint32(int(mask, 0) & 0xFFFFFFFF)
                needed |= (value & BIT) != 0
            else:
                here = self.machine.pc[row] == self.machine.key[row]
                values = self.machine.files.uint32[slot[1]][row]
                needed |= ((values[:, None] & BIT[None, :]) != 0)[here].any(0)
        return needed

    def _lanes(
        self, number: int, block: BasicBlock, rows: Array, m: Array
    ) -> tuple[Array, Array | None]:
        machine = self.machine
        m = m.copy()
        ready = np.ones(len(rows), bool)
        for k, row in enumerate(rows.tolist()):
            if m[k].all():
                continue
            have = m[k] | self.lanes.pop((row, number), False)
            missing = self._needed(block, row) & ~have & (machine.pc[row] < machine.EXIT)
            parked = self._needed(block, row) & ~have & (machine.pc[row] > machine.EXIT)
            if missing.any() or parked.any():
                machine.park(row, m[k])
                self.lanes[row, number] = have
                ready[k] = False
            else:
                machine.resume(row, have, number)
                m[k] = have
        rows, m = rows[ready], m[ready]
        return rows, None if len(m) and m.all() else m

    def _warpgroups(self, number: int, rows: Array, m: Array | None) -> tuple[Array, Array | None]:
        machine = self.machine
        group = rows // machine.count // 4 * machine.count + rows % machine.count
        counts = np.bincount(group)
        whole = counts[group] == 4
        if whole.all():
            return rows, m
        for row in rows[~whole].tolist():
            key = (row // machine.count // 4 * machine.count + row % machine.count, number)
            members = self.warps.get(key, 0) | 1 << (row // machine.count % 4)
            self.warps[key] = members
            machine.park(row, machine.pc[row] == number)
        for key in [k for k, members in self.warps.items() if members == 15]:
            del self.warps[key]
            first = key[0] // machine.count * 4 * machine.count + key[0] % machine.count
            for i in range(4):
                machine.resume(first + i * machine.count, np.ones(32, bool), number)
        return rows[whole], None if m is None else m[whole]

    def recheck(self) -> bool:
        """Resume lanes that wait only for lanes that have exited."""
        machine = self.machine
        gone = False
        for (row, number), have in list(self.lanes.items()):
            block = machine.decoded.program.blocks[number]
            left = self._needed(block, row) & ~have & (machine.pc[row] != machine.EXIT)
            if not left.any():
                del self.lanes[row, number]
                machine.resume(row, have, number)
                gone = True
        return gone
