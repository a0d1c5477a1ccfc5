"""Exits of CTAs and deallocations of tensor memory -> findings; also assembles all checks.

A CTA may exit once every operation on its shared memory is known to be complete by one of its
warps: bulk stores after a wait, loads after an acquire of their mbarrier, accesses and arrivals of
other CTAs after a synchronisation with them. Register checks are in flights.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coda.sim.checks.clocks import PAST, SEEN
from coda.sim.checks.flights import Flights
from coda.sim.checks.maps import Maps
from coda.sim.checks.observe import Observer
from coda.sim.checks.races import NO_ORDER
from coda.sim.ptx.parse import Instruction
from coda.sim.tensorcore.tensor_memory import COLUMNS

if TYPE_CHECKING:
    from coda.sim.machine import Machine


class Exits(Maps):
    """The checks at the end of a CTA and of its tensor memory."""

    def exited(self, cta: int) -> None:
        super().exited(cta)
        machine = self.machine
        rows = np.arange(cta, machine.warps, machine.count)
        block = self.clocks.at[rows]
        past = np.maximum(block[:, SEEN].max(0), block[:, PAST].max(0))
        for component, (clock, who) in self.last[cta].items():
            if past[component] < clock:
                what = (
                    f"a CTA exits, and {self.earlier(component, who, 'may still access')} its "
                    f"memory, {NO_ORDER}"
                )
                self.find("exited", what, who.ins, who.row, cta, who)
        self.gone[cta] = True
        for column, columns in machine.tensor_memory.allocated.get(cta, {}).items():
            what = f"a CTA exits with {columns} columns of tensor memory at {column} allocated"
            ins, row = self.allocations[cta, column]
            self.find("leak", what, ins, row, column)

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.allocations: dict[tuple[int, int], tuple[Instruction, int]] = {}

    def tensor_alloc(self, ins: Instruction, row: int, cta: int, column: int, columns: int) -> None:
        self.allocations[cta, column] = (ins, row)
        for table in (self.tensor.writers, self.tensor.readers):
            table.reshape(-1, 128, COLUMNS)[cta, :, column : column + columns] = 0

    def tensor_dealloc(
        self, ins: Instruction, row: int, cta: int, column: int, columns: int
    ) -> None:
        """Freed columns may be allocated by another CTA: all accesses to them must be complete."""
        at = (cta, slice(0, 128), slice(column, column + columns))
        seen = self.clocks.at[row, SEEN]
        ids = self.tensor.writers.reshape(-1, 128, COLUMNS)[at]
        late, _ = self.tensor.unordered(ids, seen.__getitem__, 0)
        if late.any():
            event = int(ids[late][0])
            self.conflict(ins, row, column, event, "frees")
        sets = self.tensor.readers.reshape(-1, 128, COLUMNS)[at]
        found = self.tensor.still_reading(sets, seen)
        if found:
            who, component = self.events.who(found[1]), int(self.events.component[found[1]])
            what = f"frees columns that {self.earlier(component, who, 'reads')}, {NO_ORDER}"
            self.find("race", what, ins, row, column, who)


def make(machine: Machine) -> list[Observer]:
    """The checks for a wave of CTAs, or none if every check is off."""
    if all(level == "off" for level in machine.options.checks.values()):
        return []
    return [Exits(machine), Flights(machine)]
