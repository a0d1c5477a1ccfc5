"""Accesses to a memory -> per word its last writer and the readers since, and unordered accesses.

Each 32-bit word has the number of the event that wrote it last, and of the event that has read it
since (0: none; negative: several, minus the number of a set of events). An event is a component of
the vector clocks with a value; a later access is ordered after it if the clock of the accessing
warp or unit has reached that value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.parse import Instruction

Array = NDArray[Any]
Clock = Callable[[Any], Any]
PROXY, STRONG, PART = 1, 2, 4  # flags of an event: by the async proxy, atomic or strong, sub-word


@dataclass(frozen=True)
class Who:
    """Instruction and warp of an access, for messages."""

    ins: Instruction
    row: int


class Events:
    """Numbered events: component, clock, flags; and numbered sets of events that read a word."""

    def __init__(self) -> None:
        self.component = np.zeros(1024, np.int32)
        self.clock = np.zeros(1024, np.int32)
        self.flags = np.zeros(1024, np.uint8)
        self.row = np.zeros(1024, np.int32)
        self.instructions: list[Instruction | None] = [None]
        self.known: dict[tuple[int, int, int, int], int] = {}
        self.sets: list[dict[int, int]] = [{}]  # component -> event
        self.joined: dict[tuple[int, int], int] = {}

    def number(self, row: int, component: int, clock: int, flags: int, ins: Instruction) -> int:
        """The number of an event."""
        key = (row, component, clock, ins.line)
        found = self.known.get(key)
        if found is not None:
            return found
        k = self.known[key] = len(self.instructions)
        if k == len(self.clock):
            for name in ("component", "clock", "flags", "row"):
                setattr(self, name, np.resize(getattr(self, name), 2 * k))
        self.component[k], self.clock[k], self.flags[k] = component, clock, flags
        self.row[k] = row
        self.instructions.append(ins)
        return k

    def about(self, event: int) -> tuple[int, int, int]:
        """(component, clock, flags) of an event."""
        return int(self.component[event]), int(self.clock[event]), int(self.flags[event])

    def who(self, event: int) -> Who:
        """Instruction and warp of an event; `event` is not 0."""
        ins = self.instructions[event]
        assert ins is not None
        return Who(ins, int(self.row[event]))

    def members(self, readers: int) -> dict[int, int]:
        """The events of a word's readers, by component."""
        if readers > 0:
            return {int(self.component[readers]): readers}
        return self.sets[-readers]

    def with_reader(self, old: int, event: int) -> int:
        """Add an event to a word's readers; it replaces an earlier read by the same component."""
        if not old:
            return event
        key = (old, event)
        found = self.joined.get(key)
        if found is not None:
            return found
        before, component = self.members(old), int(self.component[event])
        held = before.get(component)
        if held is not None and self.clock[held] >= self.clock[event]:
            new = old
        elif old > 0 and held is not None:
            new = event
        else:
            new = -len(self.sets)
            self.sets.append({**before, component: event})
            self.joined[new, event] = new
        self.joined[key] = new
        return new


class Shadow:
    """Last writer and readers of each word of one memory: flat int32 arrays of event numbers."""

    def __init__(self, events: Events, words: int) -> None:
        self.events = events
        self.writers = np.zeros(words, np.int32)
        self.readers = np.zeros(words, np.int32)

    def unordered(
        self, ids: Array, seen: Clock, flags: int, own: int = -1, fenced: Clock | None = None
    ) -> tuple[Array, Array | None]:
        """For events that wrote words: (not ordered before an access, ordered but not fenced).

        `seen(components)` are the clocks of the accessing warp or unit; `fenced` likewise for the
        async proxy, None for an access by the generic proxy. `own`: the component whose operations
        are ordered among themselves.
        """
        events = self.events
        component, clock, of = events.component[ids], events.clock[ids], events.flags[ids]
        late = seen(component) < clock
        if own >= 0:
            late &= component != own
        if flags:
            late &= (of & (flags & (STRONG | PART))) == 0
        if fenced is None:
            return late, None
        return late, (fenced(component) < clock) & ((of & PROXY) == 0) & ~late

    def still_reading(self, readers: Array, seen: Array, own: int = -1) -> tuple[int, int] | None:
        """One reader of the words that is not ordered before a clock: (readers, event), or None."""
        if not readers.size:
            return None
        low, top = int(readers.min()), int(readers.max())
        for number in (top,) if low == top else np.unique(readers).tolist():
            event = self._late(number, seen, own)
            if event:
                return number, event
        return None

    def _late(self, readers: int, seen: Array, own: int = -1) -> int:
        events = self.events
        for component, event in events.members(readers).items() if readers else ():
            if seen[component] < events.clock[event] and component != own:
                return event
        return 0

    def read_before(self, readers: Array, r: Array, seen: Array) -> tuple[int, int] | None:
        """One word that warps `r` write and an unordered event reads: (index, event), or None.

        `readers`: int [accesses, words], of each warp's words; `seen`: the clocks of all warps.
        """
        events = self.events
        single = np.maximum(readers, 0)
        late = seen[r[:, None], events.component[single]] < events.clock[single]
        if late.any():
            k, j = np.unravel_index(int(late.argmax()), late.shape)
            return int(k), int(readers[k, j])
        several = np.nonzero(readers < 0)
        if len(several[0]):
            pairs = readers[several] * np.int64(len(seen)) - r[several[0]]
            found, first = np.unique(pairs, return_index=True)
            for pair, at in zip(found.tolist(), several[0][first].tolist(), strict=True):
                event = self._late(-(-pair // len(seen)), seen[r[at]])
                if event:
                    return at, event
        return None

    def read(
        self,
        at: Array,
        words: int,
        r: Array,
        numbers: Array,
        seen: Array,
        cluster: Array | None = None,
    ) -> None:
        """Record reads by warps `r` of units `at` of `words` words; `numbers`: each warp's event.

        A reader that is ordered before another is dropped: a wait for the later one covers both.
        So most words have one reader, of the last instruction. `cluster` has the cluster of each
        warp if clusters share the memory: clocks do not order events of other clusters.
        """
        events = self.events
        readers = self.readers.reshape(-1, words)
        old, mine = readers[at], numbers[r][:, None]
        single = np.maximum(old, 0)
        ended = seen[r[:, None], events.component[single]] >= events.clock[single]
        ended &= old >= 0
        if cluster is not None:
            ended &= (old == 0) | (cluster[events.row[single]] == cluster[r][:, None])
        if ended.all():
            readers[at] = mine
            left = readers[at] != mine  # several warps read the word at this instruction
        else:
            readers[at] = np.where(ended, mine, old)
            left = (readers[at] != mine) | ~ended
        if left.any():
            k, j = np.nonzero(left)
            self._read_together(at[k] * words + j, r[k], numbers)

    def unit_reads(self, readers: Array, at: Any, event: int) -> None:
        """Add a unit's read to words `at` of a view of `readers`; other readers are kept."""
        old = readers[at]
        if not old.size:
            return
        top = int(old.max())
        if int(old.min()) == top:
            readers[at] = self.events.with_reader(top, event)
            return
        kinds, back = np.unique(old, return_inverse=True)
        new = [self.events.with_reader(k, event) for k in kinds.tolist()]
        readers[at] = np.array(new, np.int32)[back].reshape(old.shape)

    def _read_together(self, word: Array, r: Array, numbers: Array) -> None:
        """Add several readers to words: once for each set of warps and of earlier readers."""
        warps = len(numbers)
        pairs = np.unique(word * warps + r)
        word, r = pairs // warps, pairs % warps
        first = np.flatnonzero(np.diff(word, prepend=-1))
        word, count = word[first], np.diff(first, append=len(r))
        old = self.readers[word]
        kinds = np.add.reduceat(_names(warps)[r], first) + old * np.int64(0x9E3779B97F4A7C1)
        _, start, kind = np.unique(kinds, return_index=True, return_inverse=True)
        new = [
            self._fold(int(old[k]), numbers[r[first[k] : first[k] + count[k]]].tolist())
            for k in start.tolist()
        ]
        self.readers[word] = np.array(new, np.int32)[kind]

    def _fold(self, old: int, more: Iterable[int]) -> int:
        for event in more:
            old = self.events.with_reader(old, event)
        return old


@lru_cache
def _names(warps: int) -> Array:
    """Random numbers of 63 bits for warps; their sums stand for sets of warps."""
    return np.random.default_rng(0).integers(0, 2**63 - 1, warps, np.int64)
