"""Accesses of CTAs to global memory -> findings for unordered read/write pairs between two CTAs.

Each tensor that the launch touches has a shadow with one entry per 32-bit word. CTAs synchronise
through atomics and through volatile, relaxed, release or acquire loads and stores: each counts as a
release of its word if it writes and as an acquire if it reads. That accepts more than the PTX
memory model, where a relaxed access needs a fence beside it: these fences are not checked. Such
accesses do not race with each other, nor do reductions by asynchronous units.

Two CTAs that store to the same word are not reported: flash-attention does so, with equal values.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.checks.clocks import SEEN
from coda.sim.checks.races import NO_ORDER, STRONGS, Races, strong
from coda.sim.checks.shadow import PART, STRONG, Shadow
from coda.sim.ptx.parse import Instruction

if TYPE_CHECKING:
    from coda.sim.machine import Machine
    from coda.sim.units.agents import AsyncOp

Array = NDArray[Any]


class Blocks(Races):
    """The checks of order in global memory."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        ranges = sorted(machine.grid.allocations)
        self.starts = [base for base, _, _ in ranges]
        self.bases = np.array(self.starts, np.int64)
        self.names = [name for _, _, name in ranges]
        self.sizes = [nbytes for _, nbytes, _ in ranges]
        self.shadows: dict[int, Shadow] = {}

    def _places(self, starts: Array, nbytes: int) -> Iterator[tuple[int, Array, slice | Array]]:
        """Yield (number, words [runs, words], which runs) for each allocation that holds runs."""
        owner = np.searchsorted(self.bases, starts, "right") - 1
        whole = int(owner[0]) == int(owner[-1]) and bool(np.equal(owner, owner[0]).all())
        for k in owner[:1].tolist() if whole else np.unique(owner).tolist():
            if k < 0:
                continue
            which = slice(None) if whole else np.flatnonzero(owner == k)
            first = (starts[which] - (self.starts[k] & ~3)) >> 2
            yield k, first[:, None] + np.arange(max(nbytes // 4, 1)), which

    def _parts(self, starts: Array, nbytes: int) -> Iterator[tuple[Shadow, Array, slice | Array]]:
        """Yield (shadow, words [runs, words], which runs) for each allocation that holds runs."""
        for k, words, which in self._places(starts, nbytes):
            shadow = self.shadows.get(k)
            if shadow is None:
                shadow = self.shadows[k] = Shadow(self.events, self.sizes[k] // 4 + 2)
            yield shadow, words, which

    # accesses by lanes

    def global_access(
        self, ins: Instruction, g: Any, m: Any, addresses: Array, nbytes: int, *, write: bool
    ) -> None:
        rows = np.broadcast_to(self.machine.rows(g)[:, None], addresses.shape)
        r, at = (rows.ravel(), addresses.ravel()) if m is None else (rows[m], addresses[m])
        if not len(at):
            return
        flags = (PART if nbytes < 4 else 0) | (STRONG if strong(ins) else 0)
        self._lanes_abroad(ins, r, at.astype(np.int64), nbytes, write, flags)
        if flags & STRONG:
            self._strong(r, at, not write, write)

    def atomic(
        self, ins: Instruction, g: Any, m: Any, space: str, where: Array, nbytes: int
    ) -> None:
        super().atomic(ins, g, m, space, where, nbytes)
        if space == "global":
            rows = np.broadcast_to(self.machine.rows(g)[:, None], where.shape)
            r, at = (rows.ravel(), where.ravel()) if m is None else (rows[m], where[m])
            self._lanes_abroad(ins, r, at.astype(np.int64), nbytes, True, STRONG)
            self._strong(r, at, ins.op.startswith("atom"), True)

    def _strong(self, r: Array, at: Array, acquire: bool, release: bool) -> None:
        for row, word in sorted(
            set(zip(r.tolist(), (at >> at.dtype.type(2)).tolist(), strict=True))
        ):
            if acquire:
                self.clocks.subscribe(row, word)
            if release:
                self.clocks.publish(row, word)

    def _lanes_abroad(
        self, ins: Instruction, r: Array, at: Array, nbytes: int, write: bool, flags: int
    ) -> None:
        for shadow, words, which in self._parts(at, nbytes):
            rows = r[which]
            self._ordered(ins, rows, shadow.writers[words], write, flags, at[which])
            if write:
                self._still_read(ins, rows, shadow, words, flags, at[which])
                shadow.writers[words] = self._numbers(ins, rows, flags)[rows][:, None]
            elif not flags & STRONG:
                each, numbers = np.repeat(rows, words.shape[1]), self._numbers(ins, rows, flags)
                seen, cluster = self.clocks.at[:, SEEN], self.machine.cluster_of_row
                shadow.read(words.ravel(), 1, each, numbers, seen, cluster)

    def _still_read(
        self, ins: Instruction, r: Array, shadow: Shadow, words: Array, flags: int, at: Array
    ) -> None:
        """Check a write against earlier reads of the same words."""
        readers = shadow.readers[words]
        if not readers.any():
            return
        shadow.readers[words] = 0
        if flags & STRONG:
            return
        pairs = readers * np.int64(self.machine.warps) - r[:, None]
        found, first = np.unique(pairs, return_index=True)
        for pair, k in zip(found.tolist(), (first // readers.shape[1]).tolist(), strict=True):
            number, row = -(-pair // self.machine.warps), int(r[k])
            for event in self.events.members(number).values() if number else ():
                self._reached(ins, row, event, "overwrites", int(at[k]), "reads")

    def _ordered(
        self, ins: Instruction, r: Array, ids: Array, write: bool, flags: int, at: Array
    ) -> None:
        """Check accesses of warps `r` against the events that last wrote the words."""
        if not ids.any():
            return
        events = self.events
        of = events.flags[ids]
        open_to = (of & (flags & STRONG)) | (of & PART) if not write else of & flags
        theirs = (events.row[ids] != r[:, None]) | (events.component[ids] >= self.clocks.per)
        # Two CTAs that store to one word mostly store equal values.
        if write and ins.op.startswith("st"):
            theirs &= events.component[ids] >= self.clocks.per
        bad = (ids > 0) & theirs & (open_to == 0)
        if not bad.any():
            return
        pairs = ids.astype(np.int64) * self.machine.warps + r[:, None]
        found, first = np.unique(pairs[bad], return_index=True)
        where = at[np.nonzero(bad)[0][first]]
        for pair, address in zip(found.tolist(), where.tolist(), strict=True):
            event, row = divmod(pair, self.machine.warps)
            self._reached(ins, row, event, "overwrites" if write else "reads", address)

    def _reached(
        self, ins: Instruction, row: int, event: int, doing: str, address: int, did: str = "wrote"
    ) -> None:
        events = self.events
        component, who = int(events.component[event]), events.who(event)
        cluster = int(self.machine.cluster_of_row[who.row])
        if self.clocks.reached(row, cluster, component, int(events.clock[event])):
            return
        k = bisect_right(self.starts, address) - 1
        block = int(self.machine.ctas[self.machine.cta_of(who.row)])
        what = (
            f"{doing} global memory ({self.names[k]}) that CTA {block} {did} at PTX line "
            f"{who.ins.line} ({who.ins.op}), {NO_ORDER}"
        )
        self.find("race", what, ins, row, address, who)

    # accesses by units

    def unit_abroad(
        self, op: AsyncOp, where: Any, nbytes: int, channel: tuple[int, int], *, write: bool
    ) -> None:
        starts = np.atleast_1d(np.asarray(where, np.int64))
        if not len(starts) or nbytes < 4:
            return
        flags = STRONG if op.ins.op.startswith(STRONGS) else 0
        event = self.events.number(op.row, *channel, flags, op.ins)
        for shadow, words, which in self._parts(starts, nbytes):
            r = np.full(len(words), op.row)
            self._ordered(op.ins, r, shadow.writers[words], write, flags, starts[which])
            if write:
                self._still_read(op.ins, r, shadow, words, flags, starts[which])
                shadow.writers[words] = event
            else:
                shadow.unit_reads(shadow.readers, words, event)
