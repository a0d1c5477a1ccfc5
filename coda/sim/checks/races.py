"""Accesses of warps and units -> findings: races, missing proxy fences, uninitialised reads.

shadow.py records the accesses to each word of shared and tensor memory; clocks.py decides which
happen before which. An asynchronous operation is in flight from its issue until a warp has waited
for it, so a race is found under every schedule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.checks.clocks import ASYNC, INIT, SEEN, Clocks
from coda.sim.checks.observe import Observer, executing
from coda.sim.checks.shadow import PART, PROXY, STRONG, Events, Shadow, Who
from coda.sim.ptx.parse import Instruction
from coda.sim.ptx.program import BasicBlock
from coda.sim.tensorcore.tensor_memory import COLUMNS
from coda.sim.units.memory import WINDOW

if TYPE_CHECKING:
    from coda.sim.machine import Machine
    from coda.sim.units.agents import AsyncOp

Array = NDArray[Any]
WORDS = WINDOW // 4
STRONGS = ("atom", "red", "cp.reduce", "red.async")
NO_ORDER = "and no synchronisation orders them"
NO_FENCE = "with no fence.proxy.async in between"


def strong(ins: Instruction) -> bool:
    """Whether an access is atomic or strong: two such accesses never race."""
    parts = ins.op.split(".")
    return ins.op.startswith(STRONGS) or not {
        "volatile",
        "relaxed",
        "acquire",
        "release",
    }.isdisjoint(parts)


class Races(Observer):
    """The checks of ordering, of fences between proxies and of uninitialised reads."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.clocks = Clocks(machine)
        self.events = Events()
        self.shared = Shadow(self.events, machine.count * WORDS)
        self.tensor = Shadow(self.events, machine.count * 128 * COLUMNS)
        self.reported: set[Any] = machine.grid.notes.setdefault("reported", set())
        self.snapshots: dict[int, Array] = {}
        self.inits: dict[int, tuple[int, int, Who]] = {}
        self.last: list[dict[int, tuple[int, Who]]] = [{} for _ in range(machine.count)]
        self.gone = np.zeros(machine.count, bool)
        self.loads: dict[int, list[tuple[frozenset[str], tuple[int, int]]]] = {}

    # findings

    def find(
        self,
        kind: str,
        what: str,
        ins: Instruction | None,
        row: int,
        word: int,
        who: Who | None = None,
    ) -> None:
        """Report once per pair of instructions, whichever warps execute them."""
        lines = (ins.line if ins else 0, who.ins.line if who else 0)
        key = (kind, lines, what.rpartition(", ")[2])
        if key not in self.reported:
            self.reported.add(key)
            self.machine.find(kind, what, ins, row, word)

    def earlier(self, component: int, who: Who | None, verb: str) -> str:
        """Describe an earlier access for a message."""
        line = f" at PTX line {who.ins.line} ({who.ins.op})" if who else ""
        return f"{self.clocks.owner(component)} {verb}{line}"

    def unwritten(self, ins: Instruction, row: int, word: int, memory: str) -> None:
        self.find("uninitialised", f"reads {memory} that is uninitialised", ins, row, word)

    def conflict(
        self, ins: Instruction, row: int, word: int, event: int, doing: str, *, fence: bool = False
    ) -> None:
        """Report an access not ordered after the event that wrote the word."""
        component = int(self.events.component[event])
        who = self.events.who(event) if event else None
        what = f"{doing} data that {self.earlier(component, who, 'wrote')}, "
        self.find("race", what + (NO_FENCE if fence else NO_ORDER), ins, row, word, who)

    def overwrites(self, ins: Instruction, row: int, word: int, event: int) -> None:
        """Report a write not ordered after an event that reads the word."""
        who, component = self.events.who(event), int(self.events.component[event])
        what = f"overwrites data that {self.earlier(component, who, 'reads')}, {NO_ORDER}"
        self.find("race", what, ins, row, word, who)

    # accesses by lanes

    def shared_access(
        self, ins: Instruction, g: Any, m: Any, index: Array, nbytes: int, *, write: bool
    ) -> None:
        words = max(nbytes // 4, 1)
        at = index // (4 * words)
        rows = self.machine.rows(g)
        if m is None:
            r, at = np.repeat(rows, at.shape[1]), at.ravel()
        else:
            r, at = np.broadcast_to(rows[:, None], m.shape)[m], at[m]
        if len(at):
            flags = (PART if nbytes < 4 else 0) | (STRONG if strong(ins) else 0)
            self._lanes(ins, r, at, words, write, flags)

    def matrix_access(
        self, ins: Instruction, row: int, index: Array, nbytes: int, *, write: bool
    ) -> None:
        words = nbytes // 4
        at = index // nbytes
        self._lanes(ins, np.full(len(at), row), at, words, write, 0)

    def atomic(
        self, ins: Instruction, g: Any, m: Any, space: str, where: Array, nbytes: int
    ) -> None:
        if space == "shared":
            self.shared_access(ins, g, m, where, nbytes, write=True)

    def _lanes(
        self, ins: Instruction, r: Array, at: Array, words: int, write: bool, flags: int
    ) -> None:
        """Accesses of `words` words each by warps `r`; `at` counts in units of `words`."""
        clocks = self.clocks
        writers = self.shared.writers.reshape(-1, words)
        ids = writers[at]
        if not write and not ids.all():
            k = int((ids == 0).any(1).argmax())
            self.unwritten(ins, int(r[k]), self._address(at[k] * words), "shared memory")
        seen = clocks.at[:, SEEN]
        late, _ = self.shared.unordered(ids, lambda c: seen[r[:, None], c], flags)
        if late.any():
            k, j = np.unravel_index(int(late.argmax()), late.shape)
            doing = "overwrites" if write else "reads"
            where = self._address(at[k] * words + j)
            self.conflict(ins, int(r[k]), where, int(ids[k, j]), doing)
        self._remote(ins, r, at, words)
        if write:
            self._lanes_write(ins, r, at, words, flags)
        else:
            numbers = self._numbers(ins, r, flags)
            self.shared.read(at, words, r, numbers, clocks.at[:, SEEN])

    def _address(self, word: Any) -> int:
        return int(word) * 4 % WINDOW

    def _numbers(self, ins: Instruction, r: Array, flags: int) -> Array:
        """The event number of this access for each of the warps `r`."""
        clocks = self.clocks
        numbers = np.zeros(self.machine.warps, np.int32)
        rows = np.flatnonzero(np.bincount(r, minlength=len(numbers)))
        own = clocks.own[rows]
        for row, component, clock in zip(
            rows.tolist(), own.tolist(), clocks.at[rows, SEEN, own].tolist(), strict=True
        ):
            numbers[row] = self.events.number(row, component, clock, flags, ins)
        return numbers

    def _lanes_write(self, ins: Instruction, r: Array, at: Array, words: int, flags: int) -> None:
        readers = self.shared.readers.reshape(-1, words)
        sets = readers[at]
        if sets.any():
            found = None if flags else self.shared.read_before(sets, r, self.clocks.at[:, SEEN])
            if found:
                k, event = found
                self.overwrites(ins, int(r[k]), self._address(at[k] * words), event)
            readers[at] = 0
        writers = self.shared.writers.reshape(-1, words)
        mine = self._numbers(ins, r, flags)[r][:, None]
        writers[at] = mine
        lost = (writers[at] != mine).any(1)
        if not flags and lost.any():  # two warps write a word at one instruction
            k = int(lost.argmax())
            event = int(writers[at[k]].max())
            self.conflict(
                ins, int(r[k]), self._address(at[k] * words), event, "overwrites", fence=False
            )

    def _remote(self, ins: Instruction, r: Array, at: Array, words: int) -> None:
        """Record accesses to the shared memory of other CTAs, which must not exit before them."""
        if self.clocks.size == 1:
            return
        cta = at * words // WORDS
        away = cta != r % self.machine.count
        if away.any():
            for row, target in {(int(a), int(b)) for a, b in zip(r[away], cta[away], strict=True)}:
                self.leaves(ins, row, target)

    def leaves(self, ins: Instruction, row: int, target: int) -> None:
        """A warp accesses the memory of another CTA: report if that CTA has exited."""
        if self.gone[target]:
            what = "accesses the shared memory of a CTA that has exited"
            self.find("exited", what, ins, row, target)
        own = int(self.clocks.own[row])
        self.last[target][own] = (int(self.clocks.at[row, SEEN, own]), Who(ins, row))

    # accesses by units

    def issued(self, op: AsyncOp) -> None:
        unit = op.unit
        if unit == "tcgen05.commit" or (unit == "cp.async" and op.signals):
            self._signal(op)
            return
        if unit == "tcgen05":
            channels = [self.clocks.product(op.stream[1])]  # type: ignore[index]
        elif op.signals:
            channels = [self._phase(op, key) for key in op.signals]
        else:
            kind = "bulk" if unit == "tma" else unit
            channels = [self.clocks.next(kind, op.row)]
            if kind == "bulk":
                channels.append(self.clocks.next("bulk store", op.row))
        op.clocks = channels
        block, reads = self.clocks.at[op.row], list(op.reads)
        if len(op.rows) == 4:
            blocks = self.clocks.at[list(op.rows)]
            block = np.minimum.reduce(blocks)
            if op.by_warp:
                for known, touched in zip(blocks, reads[:4], strict=True):
                    self._unit(op, known, touched, channels[0], False)
                reads = reads[4:]
        for touched in reads:
            self._unit(op, block, touched, channels[0], False)
        for k, touched in enumerate(op.writes):
            channel = channels[-1] if touched[0] == "global" else channels[k % len(channels)]
            self._unit(op, block, touched, channel, True)
        if unit == "tcgen05.ld":
            self.loads.setdefault(op.row, []).append((op.names, channels[0]))

    def _phase(self, op: AsyncOp, key: int) -> tuple[int, int]:
        """The component of an mbarrier, and the number of its current phase."""
        self._usable(op.ins, op.row, key, True)
        barrier = self.machine.mbarriers.table.get(key)
        done = barrier.completions if barrier else 0
        return self.clocks.barrier(key, key // WINDOW), done + 1

    def _signal(self, op: AsyncOp) -> None:
        """A deferred arrival by a unit: it publishes its thread's clocks and earlier operations."""
        block = self.clocks.known(op.row)
        if op.unit == "cp.async":
            block[:] = 0
            channel = self.clocks.so_far("cp.async", op.row)
        else:
            channel = self.clocks.products_so_far(op.stream[1])  # type: ignore[index]
        block[:, channel[0]] = channel[1]
        self.snapshots[op.number] = block
        for key in op.signals:
            self._usable(op.ins, op.row, key, False)
            target = key // WINDOW
            if target != op.row % self.machine.count:
                self.last[target][channel[0]] = (channel[1], Who(op.ins, op.row))

    def moves(self, op: AsyncOp, step: int) -> None:
        block = self.snapshots.pop(op.number, None)
        if block is not None:
            if block.shape[1] < self.clocks.width:
                block = np.pad(block, [(0, 0), (0, self.clocks.width - block.shape[1])])
            for key in op.signals:
                self.clocks.give(("mbarrier", key), block.copy())

    def _unit(
        self, op: AsyncOp, block: Array, touched: Any, channel: tuple[int, int], write: bool
    ) -> None:
        """A unit accesses a piece of memory."""
        space, where, nbytes = touched
        if space == "global":
            self.unit_abroad(op, where, nbytes, channel, write=write)
            return
        proxy = space == "shared" and op.unit not in ("cp.async", "st.async")
        flags = (PROXY if proxy else 0) | (STRONG if op.ins.op.startswith(STRONGS) else 0)
        if space == "tensor":
            cta, lane, lanes, column, columns = where
            shape = (self.machine.count, 128, COLUMNS)
            at: Any = (cta, slice(lane, lane + lanes), slice(column, column + columns))
            shadow, memory = self.tensor, "tensor memory"
            ctas = (cta,)
            base = ((cta * 128 + lane) << 16) + column
        elif isinstance(where, np.ndarray):
            shape, at = (-1, nbytes // 4), where // nbytes
            shadow, memory = self.shared, "shared memory"
            ctas = {int(at[0]) * nbytes // WINDOW}
            base = int(where[0]) % WINDOW
        else:
            shape, at = (-1,), slice(where >> 2, (where + nbytes) >> 2)
            shadow, memory = self.shared, "shared memory"
            ctas = (where // WINDOW,)
            base = where % WINDOW
        for cta in ctas:
            if self.gone[cta]:
                what = f"{op.unit} accesses {memory} of a CTA that has exited"
                self.find("exited", what, op.ins, op.row, base)
            self.last[cta][channel[0]] = (channel[1], Who(op.ins, op.row))
        writers, readers = shadow.writers.reshape(shape), shadow.readers.reshape(shape)
        own = channel[0] if op.unit == "tcgen05" else -1
        self._unit_writers(op, block, writers[at], (write, flags, own, memory, base), shadow)
        if write:
            self._unit_readers(op, block, readers[at], flags, own, base)
            readers[at] = 0
            writers[at] = self.events.number(op.row, *channel, flags, op.ins)
        else:
            event = self.events.number(op.row, *channel, 0, op.ins)
            shadow.unit_reads(readers, at, event)

    def unit_abroad(
        self, op: AsyncOp, where: Any, nbytes: int, channel: tuple[int, int], *, write: bool
    ) -> None:
        """A unit accesses global memory: see blocks.py."""

    def _unit_writers(
        self, op: AsyncOp, block: Array, ids: Array, access: tuple[Any, ...], shadow: Shadow
    ) -> None:
        """Check an access of a unit against the events that last wrote the words."""
        write, flags, own, memory, base = access
        if not ids.size:
            return
        low, top = int(ids.min()), int(ids.max())
        if not low and not write:
            self.unwritten(op.ins, op.row, base, memory)
        if low == top and self._in_order(top, block, flags, own):
            return
        fenced = block[ASYNC].__getitem__ if flags & PROXY else None
        late, hidden = shadow.unordered(ids, block[SEEN].__getitem__, flags & STRONG, own, fenced)
        doing = "overwrites" if write else "reads"
        for fence, bad in ((False, late), (True, hidden)):
            if bad is not None and bad.any():
                event = int(ids.ravel()[int(bad.argmax())])
                self.conflict(op.ins, op.row, base, event, doing, fence=fence)

    def _in_order(self, event: int, block: Array, flags: int, own: int) -> bool:
        """Whether one event comes before an access of a unit, as `Shadow.unordered` for many."""
        component, clock, of = self.events.about(event)
        after = component == own or of & flags & STRONG or block[SEEN, component] >= clock
        hidden = flags & PROXY and not of & PROXY and block[ASYNC, component] < clock
        return bool(after and not hidden)

    def _unit_readers(
        self, op: AsyncOp, block: Array, sets: Array, flags: int, own: int, base: int
    ) -> None:
        """Check a write of a unit against earlier reads of the words."""
        if flags & STRONG:
            return
        found = self.shared.still_reading(sets, block[SEEN], own)
        if found:
            self.overwrites(op.ins, op.row, base, found[1])

    def block(self, block: BasicBlock, number: int, g: Any, m: Any) -> None:
        """A use of the results of a tcgen05.ld waits for it: ptxas inserts that wait."""
        if not self.loads:
            return
        for row in self.machine.rows(g).tolist():
            loads = self.loads.get(row)
            if loads:
                used = [channel for names, channel in loads if not names.isdisjoint(block.needs)]
                for channel in used:
                    self.clocks.learn(row, *channel)
                self.loads[row] = [x for x in loads if x[1] not in used]

    def waited(self, ins: Instruction, row: int, ops: list[AsyncOp], *, reading: bool) -> None:
        clocks = self.clocks
        if ins.op.startswith("tcgen05.wait"):
            kind = "tcgen05.ld" if "::ld" in ins.op else "tcgen05.st"
            if kind == "tcgen05.ld":
                self.loads.pop(row, None)
            if kind in clocks.first:
                clocks.learn(row, *clocks.so_far(kind, row))
            return
        latest: dict[int, int] = {}
        for op in ops:
            for component, clock in op.clocks[:1] if reading else op.clocks:
                latest[component] = max(latest.get(component, 0), clock)
        for component, clock in latest.items():
            clocks.learn(row, component, clock, proxy=not ins.op.startswith("cp.async.wait"))

    # synchronisation

    def fence(self, ins: Instruction, g: Any, m: Any) -> None:
        proxy = ins.op.startswith("fence.proxy.async")
        if not proxy and not ins.op.startswith("fence.mbarrier_init"):
            return
        for row in executing(self.machine, g, m):
            self.clocks.fence(row, proxy=proxy)

    def barrier_init(self, ins: Instruction, row: int, key: int) -> None:
        clocks = self.clocks
        self._lanes(ins, np.array([row]), np.array([key >> 3]), 2, True, 0)
        clocks.add_barrier(key, key // WINDOW)
        own = int(clocks.own[row])
        self.inits[key] = (own, int(clocks.at[row, SEEN, own]), Who(ins, row))

    def _usable(self, ins: Instruction, row: int, key: int, proxy: bool) -> None:
        """A warp or unit uses an mbarrier: its initialisation must happen before."""
        init = self.inits.get(key)
        if init is None:
            return
        component, clock, who = init
        at = self.clocks.at[row]
        if at[INIT, component] >= clock or (not proxy and at[SEEN, component] >= clock):
            return
        seen = at[SEEN, component] >= clock
        why = "with no fence.mbarrier_init in between" if seen else NO_ORDER
        what = f"uses the mbarrier that {self.earlier(component, who, 'initialised')}, {why}"
        self.find("race", what, ins, row, key % WINDOW, who)

    def barrier_arrive(self, ins: Instruction, row: int, key: int) -> None:
        self._usable(ins, row, key, False)
        target = key // WINDOW
        if target != row % self.machine.count:
            self.leaves(ins, row, target)
        self.clocks.release(row, ("mbarrier", key))

    def barrier_phase(self, key: int, completions: int) -> None:
        component = self.clocks.barrier(key, key // WINDOW)
        self.clocks.ends(("mbarrier", key))[:, component] = completions

    def barrier_acquire(self, ins: Instruction, row: int, key: int) -> None:
        self._usable(ins, row, key, False)
        self.clocks.acquire(row, ("mbarrier", key))

    def named_arrive(self, ins: Instruction, row: int, key: tuple[int, int]) -> None:
        self.clocks.release(row, ("named", key))

    def named_acquire(self, ins: Instruction, row: int, key: tuple[int, int]) -> None:
        if ("named", key) in self.clocks.coming:
            self.clocks.ends(("named", key))
        self.clocks.acquire(row, ("named", key))

    def cluster_arrive(self, ins: Instruction, row: int, cluster: int) -> None:
        phase = self.machine.cluster_barriers.phases.get(cluster, 0)
        self.clocks.phase[row] = phase
        self.clocks.release(row, ("cluster", cluster, phase), relaxed="relaxed" in ins.op)

    def cluster_acquire(self, ins: Instruction, row: int, cluster: int) -> None:
        key = ("cluster", cluster, int(self.clocks.phase[row]))
        if key in self.clocks.coming:
            self.clocks.ends(key)
        self.clocks.acquire(row, key)
