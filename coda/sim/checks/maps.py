"""Writes to tensor maps by kernels -> findings where TMA may still read the old map.

TMA reads maps through the tensormap proxy. The writer releases a map with
`fence.proxy.tensormap::generic.release` (`tensormap.cp_fenceproxy` includes it); the user acquires
it with the fence's `.acquire` on the map's address. An acquire holds for all warps of the CTA.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.checks.clocks import MAPS
from coda.sim.checks.launches import Launches
from coda.sim.checks.observe import executing
from coda.sim.ptx.parse import Instruction

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
BYTES = 128
NO_MAP_FENCE = "with no fence.proxy.tensormap in between"


class Maps(Launches):
    """The checks of tensor maps in global memory."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.acquired: dict[tuple[int, int], Array] = {}  # (CTA, address) -> clocks

    def fence(self, ins: Instruction, g: Any, m: Any) -> None:
        super().fence(ins, g, m)
        if "tensormap" in ins.op and ("release" in ins.op or "acq_rel" in ins.op):
            for row in executing(self.machine, g, m):
                self.clocks.fence_maps(row)

    def map_write(self, ins: Instruction, row: int, address: int) -> None:
        at = np.array([address], np.int64)
        self._lanes_abroad(ins, np.array([row]), at, BYTES, True, 0)

    def map_acquire(self, ins: Instruction, g: Any, m: Any, address: Array) -> None:
        for k, row in enumerate(self.machine.rows(g).tolist()):
            lanes = address[k] if m is None else address[k][m[k]]
            for at in np.unique(lanes).tolist():
                key = (self.machine.cta_of(row), at)
                before, now = self.acquired.get(key), self.clocks.at[row, MAPS]
                if before is None or len(before) < len(now):
                    self.acquired[key] = now.copy()
                else:
                    np.maximum(before, now, out=before)

    def map_use(self, ins: Instruction, row: int, address: int) -> None:
        if bisect_right(self.starts, address) - 1 not in self.shadows:
            return
        at = np.array([address], np.int64)
        for shadow, words, _ in self._parts(at, BYTES):
            for event in np.unique(shadow.writers[words]).tolist():
                if event and not self._visible(row, address, event):
                    component = int(self.events.component[event])
                    who = self.events.who(event)
                    what = f"uses a tensor map that {self.earlier(component, who, 'changed')}"
                    self.find("race", f"{what}, {NO_MAP_FENCE}", ins, row, address, who)

    def _visible(self, row: int, address: int, event: int) -> bool:
        """Whether a write to a map is visible to TMA operations of a warp."""
        clocks, events, machine = self.clocks, self.events, self.machine
        known = self.acquired.get((machine.cta_of(row), address))
        if known is None:
            return False
        component, clock = int(events.component[event]), int(events.clock[event])
        cluster = int(machine.cluster_of_row[int(events.row[event])])
        if cluster == int(machine.cluster_of_row[row]):
            return component < len(known) and bool(known[component] >= clock)
        return clocks.reached(row, cluster, component, clock)
