"""Accesses to a memory -> who wrote each word last, who has read it since, and who must not have.

A word of 32 bits has the number of the event that wrote it last (0: nobody), and the number of the
set of those that have read it since. An event is a component of the vector clocks with a value; a
later access is in order when the clock of the one who makes it has reached that value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx import Instruction

Array = NDArray[Any]
Clock = Callable[[Any], Any]
PROXY, STRONG, PART = 1, 2, 4  # flags of an event: by the async proxy, atomic or strong, sub-word


@dataclass(frozen=True)
class Who:
    """Who made an access, for messages."""

    ins: Instruction
    row: int


class Events:
    """Numbered events: component, clock, flags; and numbered sets of readers."""

    def __init__(self) -> None:
        self.component = np.zeros(1024, np.int32)
        self.clock = np.zeros(1024, np.int32)
        self.flags = np.zeros(1024, np.uint8)
        self.row = np.zeros(1024, np.int32)
        self.who: list[Who | None] = [None]
        self.known: dict[tuple[int, int, int, int], int] = {}
        self.readers: list[dict[int, tuple[int, Who]]] = [{}]
        self.joined: dict[tuple[int, int, int, int], int] = {}

    def number(self, row: int, component: int, clock: int, flags: int, ins: Instruction) -> int:
        """The number of an event."""
        key = (row, component, clock, ins.line)
        found = self.known.get(key)
        if found is not None:
            return found
        k = self.known[key] = len(self.who)
        if k == len(self.clock):
            for name in ("component", "clock", "flags", "row"):
                setattr(self, name, np.resize(getattr(self, name), 2 * k))
        self.component[k], self.clock[k], self.flags[k] = component, clock, flags
        self.row[k] = row
        self.who.append(Who(ins, row))
        return k

    def with_reader(self, old: int, row: int, component: int, clock: int, ins: Instruction) -> int:
        """The set `old` and one reader more; an earlier read by the same component is replaced."""
        key = (old, component, clock, row)
        found = self.joined.get(key)
        if found is not None:
            return found
        before = self.readers[old]
        held = before.get(component)
        if held is not None and held[0] >= clock:
            self.joined[key] = old
            return old
        k = self.joined[key] = len(self.readers)
        self.joined[k, component, clock, row] = k
        self.readers.append({**before, component: (clock, Who(ins, row))})
        return k


class Shadow:
    """The events of each word of one memory, flat arrays that callers view as they like."""

    def __init__(self, events: Events, words: int) -> None:
        self.events = events
        self.writers = np.zeros(words, np.int32)
        self.readers = np.zeros(words, np.int32)

    def unordered(
        self, ids: Array, seen: Clock, flags: int, own: int = -1, fenced: Clock | None = None
    ) -> tuple[Array, Array | None]:
        """For events that wrote words: which do not come before an access, and which no fence.

        `seen(components)` are the clocks of the one who makes the access, `fenced` the same for
        the async proxy, None where the access is by the generic one. `own`: the component whose
        operations come in order by themselves.
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

    def still_reading(self, sets: Array, seen: Array, own: int = -1) -> tuple[int, int, Who] | None:
        """One reader in some sets that has not ended for a clock: (set, component, reader)."""
        top = int(sets.max(initial=0))
        if not top:
            return None
        numbers = [top] if int(sets.min()) == top else np.unique(sets).tolist()
        for number in numbers:
            for component, (clock, who) in self.events.readers[number].items():
                if seen[component] < clock and component != own:
                    return number, component, who
        return None
