"""The columns that elements read -> swaps of blocks of columns, by which a kernel reads them.

A row-wise kernel whose points are single columns reads, at column c, a matrix in memory at c and at
columns that `access.swapped` finds from c. So one kernel has pairs of any distances, and any
reduction of values that are computed from them:

    RoPE of 4 columns, at 0 1 2 3:   reads [0 2] [1 3] [0 2] [1 3]
                                     as    c, and c with columns 2 apart swapped
    lane 0: swaps () () (2) (2)      lane 1: swaps (2) (2) () ()

A statistic of a group of columns is read of other groups in the same way: as the statistic of the
values in the swapped columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from coda.lowering.placement.arrays import distinct
from coda.lowering.placement.values import Refused
from coda.lowering.program.access import Periodic, swapped
from coda.lowering.program.body import Ints

Swaps = tuple[int, ...]
MOST_SWAPS = 8  # ways of a kernel to read columns elsewhere
SHARED = (1, 2, 4, 8)  # neighbouring points that may share an element of a table
OTHER_GROUP = "an element reads the statistic of another group of columns"


@dataclass
class Elsewhere:
    """The ways in which the points of a kernel read columns.

    Attributes:
        swaps: the ways; the first reads the point's own column.
        statistics: name -> statistic of groups that is read of other groups, and of which.
    """

    swaps: list[Swaps] = field(default_factory=lambda: [()])
    statistics: dict[str, tuple[str, Swaps]] = field(default_factory=dict[str, tuple[str, Swaps]])

    def lanes(self, slots: Ints) -> Ints:
        """[n, k]: the number of the swaps by which element c reads column `slots[c, i]`.

        -1 for no column. Swaps that are not known yet are added. Raises Refused if there are none.
        """
        lanes, column = np.full(slots.shape, -1), np.arange(len(slots))
        for i in range(slots.shape[1]):
            for number, swaps in enumerate(self.swaps):
                _assign(lanes[:, i], slots[:, i], column, swaps, number)
            while len(left := np.flatnonzero((slots[:, i] >= 0) & (lanes[:, i] < 0))):
                self.swaps.append(_best(left, slots[left, i], len(slots)))
                if len(self.swaps) > MOST_SWAPS:
                    raise Refused("its elements read columns at too many distances")
                number = len(self.swaps) - 1
                _assign(lanes[:, i], slots[:, i], column, self.swaps[number], number)
        return lanes

    def groups(self, group: Ints, size: int) -> Ints:
        """[n]: the number of the swaps by which element c reads group `group[c]` of `size` columns.

        0 for its own group, or none. Raises Refused if there are none.
        """
        column = np.arange(len(group))
        slots = np.where(group < 0, column, group * size + column % size)
        found = self.lanes(slots[:, None])[:, 0]
        read = [self.swaps[number] for number in distinct(found)]
        if any(distance % size for swaps in read for distance in swaps):
            raise Refused(OTHER_GROUP)
        return found

    def table(self, point: Ints, index: Ints, period: int) -> Periodic | None:
        """How points read these elements of a table of `period` elements; None if not regularly."""
        for each in SHARED:
            for swaps in self.swaps:
                if np.array_equal(index, swapped(point, swaps) // each % period):
                    return Periodic(period, each, swaps)
        return None

    def statistic(self, name: str, number: int) -> str:
        """The name of a statistic of groups that is read by swaps with such a number."""
        if number == 0:
            return name
        alias = f"{name}_columns{show(self.swaps[number])}"
        self.statistics[alias] = name, self.swaps[number]
        return alias

    def read_as(self, name: str, needed: set[str]) -> list[tuple[str, Swaps]]:
        """The names, and swaps, by which a statistic is needed."""
        own: list[tuple[str, Swaps]] = [(name, ())] if name in needed else []
        moved = sorted(self.statistics.items())
        return own + [(a, s) for a, (of, s) in moved if of == name and a in needed]


def show(swaps: Swaps) -> str:
    """Swaps as a part of a name."""
    return "".join(f"_{distance}" for distance in swaps)


def _assign(lane: Ints, slot: Ints, column: Ints, swaps: Swaps, number: int) -> None:
    lane[(lane < 0) & (slot == swapped(column, swaps))] = number


def _best(columns: Ints, read: Ints, width: int) -> Swaps:
    """The swaps that give the columns read for the first column, and for most others."""
    distance = abs(int(read[0] - columns[0]))
    found = [s for s in _candidates(distance, width) if swapped(int(columns[0]), s) == read[0]]
    if not found:
        raise Refused("an element reads a column that no swap of blocks of columns moves to it")
    return max(found, key=lambda s: int((swapped(columns, s) == read).sum()))


def _candidates(distance: int, width: int) -> Iterator[Swaps]:
    """The swaps, of one or of two distances, that may move columns by so much."""
    if distance and width % (2 * distance) == 0:
        yield (distance,)
    small = 1
    while small < width:
        for large in (distance - small, distance + small):
            nested = large > small and large % (2 * small) == 0
            if nested and width % (2 * large) == 0:
                yield large, small
        small *= 2
