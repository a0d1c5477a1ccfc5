"""Accesses to memory of launches that may still run -> findings where nothing has waited for them.

A launch with the attribute for programmatic launches may begin before the launch in front of it has
ended: once all CTAs of that one have executed `griddepcontrol.launch_dependents` or exited.
`griddepcontrol.wait` returns when it has ended and its writes are visible. It is executed by some
warps; others are ordered behind it as behind any event: through barriers and mbarriers.

The launch in front is itself programmatic. If one of its CTAs launches dependents, or exits,
before it has waited, launches in front of that one may still run too.

An operation of torch between two launches orders them on a GPU, which is not known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.checks.blocks import Blocks
from coda.sim.checks.clocks import SEEN
from coda.sim.checks.observe import executing
from coda.sim.ptx.parse import Instruction

if TYPE_CHECKING:
    from coda.sim.machine import Machine
    from coda.sim.types import Touched
    from coda.sim.units.agents import AsyncOp

Array = NDArray[Any]
READ, WRITTEN = 1, 2
NO_WAIT = "with no griddepcontrol.wait in between"


class Launches(Blocks):
    """The checks of order between a launch and those before it."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.before = machine.grid.launch.before
        self.touched: dict[int, Array] = {}  # by allocation, as `before`, by its words
        self.left = False  # whether launches in front may outlive this one
        if not self.before:  # nothing to wait for
            self.clocks.at[:, SEEN, self.clocks.launches] = 1

    def fence(self, ins: Instruction, g: Any, m: Any) -> None:
        super().fence(ins, g, m)
        if not ins.op.startswith("griddepcontrol"):
            return
        for row in executing(self.machine, g, m):
            if ins.op.endswith("wait"):
                self.clocks.learn(row, self.clocks.launches, 1)
            elif not self._waited(np.array([row])).all():
                self._leave()

    def exited(self, cta: int) -> None:
        rows = np.arange(cta, self.machine.warps, self.machine.count)
        if not self._waited(rows).any():
            self._leave()

    def finished(self) -> None:
        """Write the memory of this launch into its result."""
        for k, shadow in self.shadows.items():
            base = self.starts[k] >> 2
            mine = np.where(shadow.writers != 0, WRITTEN, np.where(shadow.readers != 0, READ, 0))
            _add(self.machine.result.unfinished, {(base, len(mine)): mine.astype(np.uint8)})

    def _leave(self) -> None:
        """This launch may end before those in front of it."""
        if not self.left:
            self.left = True
            _add(self.machine.result.unfinished, self.before)

    def _waited(self, rows: Array) -> Array:
        """Whether launches in front of this one have ended, as each of some warps knows."""
        return self.clocks.at[rows, SEEN, self.clocks.launches] > 0

    def _lanes_abroad(
        self, ins: Instruction, r: Array, at: Array, nbytes: int, write: bool, flags: int
    ) -> None:
        if self.before:
            self._behind(ins, r, at, nbytes, write)
        super()._lanes_abroad(ins, r, at, nbytes, write, flags)

    def unit_abroad(
        self, op: AsyncOp, where: Any, nbytes: int, channel: tuple[int, int], *, write: bool
    ) -> None:
        if self.before:
            starts = np.atleast_1d(np.asarray(where, np.int64))
            self._behind(op.ins, np.full(len(starts), op.row), starts, nbytes, write)
        super().unit_abroad(op, where, nbytes, channel, write=write)

    def _behind(self, ins: Instruction, r: Array, at: Array, nbytes: int, write: bool) -> None:
        """Check accesses of warps `r` against the memory of launches that may still run."""
        early = ~self._waited(r)
        if not early.any():
            return
        r, at = r[early], at[early]
        least = READ if write else WRITTEN
        for k, words, which in self._places(at, nbytes):
            found = self._of(k)[words] >= least
            if found.any():
                n = int(found.any(1).argmax())
                row, address = int(r[which][n]), int(at[which][n])
                doing = "overwrites" if write else "reads"
                did = "accesses" if write else "writes"
                what = (
                    f"{doing} global memory ({self.names[k]}) that a launch before this one {did}, "
                    f"{NO_WAIT}"
                )
                self.find("race", what, ins, row, address)

    def _of(self, k: int) -> Array:
        """What launches in front did with each word of an allocation."""
        found = self.touched.get(k)
        if found is None:
            first, count = self.starts[k] >> 2, self.sizes[k] // 4 + 2
            found = self.touched[k] = np.zeros(count, np.uint8)
            for (base, words), theirs in self.before.items():
                low, high = max(first, base), min(first + count, base + words)
                if low < high:
                    mine = found[low - first : high - first]
                    np.maximum(mine, theirs[low - base : high - base], out=mine)
        return found


def _add(into: dict[tuple[int, int], Array], more: Touched) -> None:
    """Join two records of accesses."""
    for key, theirs in more.items():
        mine = into.get(key)
        into[key] = theirs if mine is None else np.maximum(mine, theirs)
