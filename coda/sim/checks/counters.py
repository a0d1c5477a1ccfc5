"""Memory accesses of a launch -> bytes of global memory per tensor and unit, bank conflicts.

Every byte of an allocation has a bit mask: the classes of accesses that have loaded it (low bits)
and stored it (high bits). So counts of unique bytes are exact, in total and per unit.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from coda.sim.checks.observe import Observer
from coda.sim.ptx.parse import Instruction
from coda.sim.types import BytesMoved

if TYPE_CHECKING:
    from coda.sim.machine import Machine
    from coda.sim.units.agents import AsyncOp

Array = NDArray[Any]
CLASSES = ("threads", "tma", "bulk", "cp.async")
LOADED, STORED = 0x0F, 0xF0
BANKS_BYTES = 128


class Marks:
    """The marks of one allocation, and the bytes moved by each class (loaded, stored)."""

    def __init__(self, base: int, nbytes: int, name: str) -> None:
        self.base, self.nbytes, self.name = base, nbytes, name
        self.marks = np.zeros(nbytes, np.uint8)
        self.moved = np.zeros((len(CLASSES), 2), np.int64)

    def unique(self, mask: int) -> int:
        """Number of bytes that have any of the bits of `mask` set."""
        return int(np.count_nonzero(self.marks & np.uint8(mask)))


class Tally:
    """Traffic of a whole launch, over all waves of its CTAs."""

    def __init__(self, allocations: list[tuple[int, int, str]]) -> None:
        ranges = sorted(x for x in allocations if x[2] != "kernel parameters")
        self.starts = [base for base, _, _ in ranges]
        self.all = [Marks(*x) for x in ranges]

    def find(self, address: int) -> Marks | None:
        """The allocation that holds an address."""
        k = bisect_right(self.starts, address) - 1
        if k < 0 or address >= self.all[k].base + self.all[k].nbytes:
            return None
        return self.all[k]

    def runs(self, kind: int, starts: Array, length: int, *, write: bool) -> None:
        """Count runs of `length` contiguous bytes at `starts`, moved by access class `kind`."""
        if not len(starts) or not length:
            return
        found = self.find(int(starts[0]))
        if found is None:
            return
        low, high = int(starts.min()), int(starts.max()) + length
        if found.base <= low and high <= found.base + found.nbytes:
            self._add(found, kind, starts, length, write=write)
            return
        owner = np.searchsorted(np.array(self.starts), starts, "right")
        for k in np.unique(owner).tolist():
            if k:
                self._add(self.all[k - 1], kind, starts[owner == k], length, write=write)

    def _add(self, found: Marks, kind: int, starts: Array, length: int, *, write: bool) -> None:
        found.moved[kind, int(write)] += len(starts) * length
        self._mark(found.marks, starts - found.base, length, np.uint8(1 << (kind + 4 * write)))

    @staticmethod
    def _mark(marks: Array, at: Array, length: int, bit: Any) -> None:
        if len(at) > 1:
            step = int(at[1] - at[0])
            if step >= length and int(at[-1] - at[0]) == step * (len(at) - 1):
                whole = np.array_equal(at, np.arange(int(at[0]), int(at[-1]) + 1, step))
                if whole:
                    view = as_strided(marks[int(at[0]) :], (len(at), length), (step, 1))
                    view |= bit
                    return
            if length in (4, 8, 16) and not (np.bitwise_or.reduce(at) & (length - 1)):
                size = len(marks) // length * length
                marks[:size].reshape(-1, length)[at // length] |= bit
                return
            marks[(at[:, None] + np.arange(length)).ravel()] |= bit
            return
        marks[int(at[0]) : int(at[0]) + length] |= bit


class Counters(Observer):
    """Counts for a wave of CTAs into the tally of the launch."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        notes = machine.grid.notes
        if "tally" not in notes:
            notes["tally"] = Tally(machine.grid.allocations)
        self.tally: Tally = notes["tally"]

    # global memory

    def global_access(
        self, ins: Instruction, g: Any, m: Any, addresses: Array, nbytes: int, *, write: bool
    ) -> None:
        at = addresses.ravel() if m is None else addresses[m]
        self.tally.runs(0, at.astype(np.int64), nbytes, write=write)

    def atomic(
        self, ins: Instruction, g: Any, m: Any, space: str, where: Array, nbytes: int
    ) -> None:
        if space != "global":
            return
        at = (where.ravel() if m is None else where[m]).astype(np.int64)
        if ins.op.startswith("atom"):
            self.tally.runs(0, at, nbytes, write=False)
        self.tally.runs(0, at, nbytes, write=True)

    def issued(self, op: AsyncOp) -> None:
        if op.unit not in CLASSES:
            return
        kind = CLASSES.index(op.unit)
        for write, touched in ((False, op.reads), (True, op.writes)):
            for space, where, nbytes in touched:
                if space == "global":
                    self.tally.runs(kind, np.atleast_1d(where), nbytes, write=write)

    # banks of shared memory

    def shared_access(
        self, ins: Instruction, g: Any, m: Any, index: Array, nbytes: int, *, write: bool
    ) -> None:
        self.machine.result.bank_conflicts += conflicts(index, m, nbytes)

    def finished(self) -> None:
        """Write the sums so far into the launch's result."""
        result = self.machine.result
        units = {name: BytesMoved() for name in CLASSES}
        for marks in self.tally.all:
            if not marks.moved.any():
                continue
            loaded, stored = marks.moved.sum(0).tolist()
            result.per_allocation[marks.name] = BytesMoved(
                loaded, stored, marks.unique(LOADED), marks.unique(STORED)
            )
            for k, name in enumerate(CLASSES):
                unit = units[name]
                unit.loaded += int(marks.moved[k, 0])
                unit.stored += int(marks.moved[k, 1])
                if marks.moved[k].any():
                    unit.unique_loaded += marks.unique(1 << k)
                    unit.unique_stored += marks.unique(16 << k)
        result.per_unit = {n: t for n, t in units.items() if t.loaded or t.stored}


def conflicts(index: Array, m: Any, nbytes: int) -> int:
    """Extra shared-memory passes (bank conflicts) of warps whose lanes access bytes at `index`.

    One pass serves 128 bytes, one word per bank; lanes that access the same word share it.
    """
    unit = min(max(nbytes, 4), 16)
    per = min(BANKS_BYTES // unit, index.shape[1])
    keys = index // unit
    if m is not None:
        keys = np.where(m, keys, -1)
    keys = np.sort(np.ascontiguousarray(keys).reshape(-1, per), axis=1)
    fresh = np.ones(keys.shape, bool)
    fresh[:, 1:] = keys[:, 1:] != keys[:, :-1]
    fresh &= keys >= 0
    banks = BANKS_BYTES // unit
    where = keys % banks + (np.arange(len(keys)) * banks)[:, None]
    counts = np.bincount(where[fresh], minlength=len(keys) * banks)
    most = counts.reshape(len(keys), banks).max(1)
    return int(np.maximum(most - 1, 0).sum()) * max(nbytes // 16, 1)


def make(machine: Machine) -> list[Observer]:
    """Counters where any check is on."""
    on = any(level != "off" for level in machine.options.checks.values())
    return [Counters(machine)] if on else []
