"""Synchronisation of a launch -> vector clocks: which events happen before each warp's next one.

A clock has one component per ordered sequence of events. Each cluster has its own: one for each
warp's own accesses, one for each warp and kind of asynchronous operation that its kernel uses
(groups of bulk copies, wgmma, ...), one for the tcgen05 operations of each CTA, one for launches
before this one, and one for each mbarrier, which counts completed phases: a TMA write is visible to
warps that acquired its phase.

A warp has five vector clocks: SEEN, events that happen before it in the generic proxy; ASYNC, those
of them that the async proxy sees too, after a proxy fence; INIT, mbarrier initialisations that it
may rely on; PAST, events complete in time even if not visible (relaxed arrivals); MAPS, events
released to the proxy that reads tensor maps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
SEEN, ASYNC, INIT, PAST, MAPS = VIEWS = range(5)
KINDS = ("bulk", "bulk store", "wgmma", "cp.async", "tcgen05.ld", "tcgen05.st")
_NEEDED = {
    "bulk": ("cp.async.bulk", "cp.reduce"),
    "bulk store": ("cp.async.bulk", "cp.reduce"),
    "wgmma": ("wgmma.mma",),
    "cp.async": ("cp.async.c",),
    "tcgen05.ld": ("tcgen05.ld",),
    "tcgen05.st": ("tcgen05.st",),
}
MBARRIERS = 32
Known = dict[int, Array]  # other cluster -> its SEEN clock


def _merge(into: Known, more: Known) -> None:
    for cluster, seen in more.items():
        old = into.get(cluster)
        if old is None:
            into[cluster] = seen.copy()
        elif len(old) < len(seen):
            into[cluster] = np.maximum(np.pad(old, (0, len(seen) - len(old))), seen)
        else:
            np.maximum(old[: len(seen)], seen, out=old[: len(seen)])


class Clocks:
    """The clocks of the warps of all resident CTAs."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.size = machine.geometry.cluster_size
        self.per = machine.geometry.warps_per_cta * self.size
        row = np.arange(machine.warps)
        cta = row % machine.count
        self.own = row // machine.count * self.size + cta % self.size
        ops = {ins.op for block in machine.decoded.program.blocks for ins in block.instructions}
        self.first: dict[str, int] = {}
        used = self.per
        for kind in KINDS:
            if any(op.startswith(_NEEDED[kind]) for op in ops):
                self.first[kind] = used
                used += self.per
        self.products = used
        self.launches = used + self.size
        self.fixed = self.launches + 1
        self.clusters = machine.count // self.size
        self.width = self.fixed + MBARRIERS
        self.at = np.zeros((machine.warps, len(VIEWS), self.width), np.int32)
        self.at[row, SEEN, self.own] = 1
        self.at[row, PAST, self.own] = 1
        self.sequence = np.zeros((machine.warps, len(KINDS)), np.int64)
        self.issued = np.zeros(machine.count, np.int64)
        self.taken = [0] * self.clusters
        self.barriers: dict[int, int] = {}
        self.coming: dict[Any, Array] = {}
        self.come: dict[Any, Array] = {}
        self.phase = np.zeros(machine.warps, np.int64)
        self.abroad: list[Known] = [{} for _ in range(machine.warps)]
        self.coming_abroad: dict[Any, Known] = {}
        self.come_abroad: dict[Any, Known] = {}
        self.posts: dict[int, Known] = {}

    # components

    def component(self, kind: str, row: int) -> int:
        """Component of one warp's asynchronous operations of one kind."""
        return self.first[kind] + int(self.own[row])

    def next(self, kind: str, row: int) -> tuple[int, int]:
        """(component, clock) for a new operation of a warp."""
        k = KINDS.index(kind)
        self.sequence[row, k] += 1
        return self.component(kind, row), int(self.sequence[row, k])

    def so_far(self, kind: str, row: int) -> tuple[int, int]:
        """(component, clock) of the last operation of a kind that a warp issued."""
        if kind not in self.first:
            return int(self.own[row]), 0
        return self.component(kind, row), int(self.sequence[row, KINDS.index(kind)])

    def product(self, cta: int) -> tuple[int, int]:
        """(component, clock) for a new operation of the tensor core of a CTA."""
        self.issued[cta] += 1
        return self.products + cta % self.size, int(self.issued[cta])

    def products_so_far(self, cta: int) -> tuple[int, int]:
        """(component, clock) of the last operation of the tensor core of a CTA."""
        return self.products + cta % self.size, int(self.issued[cta])

    def barrier(self, key: int, cta: int) -> int:
        """The component of an mbarrier."""
        found = self.barriers.get(key)
        return self.add_barrier(key, cta) if found is None else found

    def add_barrier(self, key: int, cta: int) -> int:
        """A component for an mbarrier that was initialised."""
        cluster = cta // self.size
        number = self.fixed + self.taken[cluster]
        self.taken[cluster] += 1
        if number >= self.width:
            self._widen()
        self.barriers[key] = number
        self.coming.pop(("mbarrier", key), None)
        self.come.pop(("mbarrier", key), None)
        return number

    def _widen(self) -> None:
        more = self.width - self.fixed
        pad = [(0, 0), (0, 0), (0, more)]
        self.at = np.pad(self.at, pad)
        for table in (self.coming, self.come):
            for key, block in table.items():
                table[key] = np.pad(block, pad[1:])
        self.width += more

    def owner(self, component: int) -> str:
        """Describe a component for a message."""
        if component >= self.fixed:
            return "a copy that completes on an mbarrier"
        if component >= self.products:
            return f"tcgen05 of CTA {component - self.products} of the cluster"
        kind = "warp"
        for name, first in self.first.items():
            if component >= first:
                kind = f"{name} of warp"
        local = component % self.per
        where = f" of CTA {local % self.size} of the cluster" if self.size > 1 else ""
        return f"{kind} {local // self.size}{where}"

    # events of a warp

    def tick(self, row: int) -> None:
        """Advance a warp's own component, after a release or a fence."""
        own = self.own[row]
        self.at[row, SEEN, own] += 1
        self.at[row, PAST, own] += 1

    def release(self, row: int, key: Any, *, relaxed: bool = False) -> None:
        """A warp releases `key`: whoever acquires it next joins the warp's clocks."""
        self.give(key, self.known(row, relaxed=relaxed))
        if self.abroad[row] and not relaxed:
            _merge(self.coming_abroad.setdefault(key, {}), self.abroad[row])
        self.tick(row)

    def known(self, row: int, *, relaxed: bool = False) -> Array:
        """The clocks that a release by this warp publishes."""
        block = self.at[row].copy()
        np.maximum(block[PAST], block[SEEN], out=block[PAST])
        if relaxed:
            block[SEEN] = block[ASYNC] = block[MAPS] = 0
        return block

    def give(self, key: Any, block: Array) -> None:
        """Join clocks into those that the next phase of `key` will publish."""
        there = self.coming.get(key)
        if there is None:
            self.coming[key] = block
        else:
            np.maximum(there, block, out=there)

    def ends(self, key: Any) -> Array:
        """End a phase of `key`: its clocks can now be acquired."""
        block = self.coming.pop(key, None)
        if block is None:
            block = np.zeros((len(VIEWS), self.width), np.int32)
        self.come[key] = block
        if key in self.coming_abroad or key in self.come_abroad:
            self.come_abroad[key] = self.coming_abroad.pop(key, {})
        return block

    def acquire(self, row: int, key: Any) -> None:
        """A warp joins the clocks published by the last phase of `key`."""
        block = self.come.get(key)
        if block is not None:
            np.maximum(self.at[row], block, out=self.at[row])
        if key in self.come_abroad:
            _merge(self.abroad[row], self.come_abroad[key])

    # through global memory

    def publish(self, row: int, word: int) -> None:
        """A warp releases a word of global memory, for all clusters."""
        post = self.posts.setdefault(word, {})
        _merge(post, self.abroad[row])
        _merge(post, {int(self.machine.cluster_of_row[row]): self.at[row, SEEN]})
        self.tick(row)

    def subscribe(self, row: int, word: int) -> None:
        """A warp acquires a word of global memory."""
        post = self.posts.get(word)
        if post is None:
            return
        own = int(self.machine.cluster_of_row[row])
        _merge(self.abroad[row], {c: seen for c, seen in post.items() if c != own})
        if own in post:
            mine = self.at[row, SEEN, : len(post[own])]
            np.maximum(mine, post[own], out=mine)

    def reached(self, row: int, cluster: int, component: int, clock: int) -> bool:
        """Whether an event, of any cluster, happens before this warp's next instruction."""
        if cluster == self.machine.cluster_of_row[row]:
            return bool(self.at[row, SEEN, component] >= clock)
        seen = self.abroad[row].get(cluster)
        return seen is not None and component < len(seen) and bool(seen[component] >= clock)

    def learn(self, row: int, component: int, clock: int, *, proxy: bool = True) -> None:
        """A warp has waited for asynchronous operations (`proxy`: of the async proxy)."""
        for view in (SEEN, ASYNC, PAST) if proxy else (SEEN, PAST):
            self.at[row, view, component] = max(int(self.at[row, view, component]), clock)

    def fence(self, row: int, *, proxy: bool) -> None:
        """A warp's fence makes SEEN visible to the async proxy (else to mbarriers only)."""
        at = self.at[row]
        if proxy:
            np.maximum(at[ASYNC], at[SEEN], out=at[ASYNC])
        np.maximum(at[INIT], at[SEEN], out=at[INIT])
        self.tick(row)

    def fence_maps(self, row: int) -> None:
        """A warp's fence makes SEEN visible to the proxy that reads tensor maps."""
        at = self.at[row]
        np.maximum(at[MAPS], at[SEEN], out=at[MAPS])
        self.tick(row)
