"""A launch -> its effect on memory, and a result with findings and counters.

Each step picks the lowest basic block at which any lane is, and runs it as one function on arrays
for all warps that are at it (random schedule: a random block, some of its warps). Diverged lanes
wait at a higher block and reconverge there. A lane that waits for a barrier is parked meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.checks.observe import Observer
from coda.sim.checks.observers import attach
from coda.sim.ptx.decoded import Decoded, decode
from coda.sim.ptx.parse import Instruction
from coda.sim.tensorcore.tensor import WgmmaUnit
from coda.sim.tensorcore.tensor_memory import TensorMemory
from coda.sim.types import (
    Allocations,
    CheckFailed,
    Fault,
    Finding,
    Launch,
    LaunchResult,
    Options,
    SimError,
)
from coda.sim.units.agents import Agents
from coda.sim.units.atomics import Atomics
from coda.sim.units.barriers import Mbarriers, Waiter
from coda.sim.units.blas import one_blas_thread
from coda.sim.units.copies import Copies
from coda.sim.units.grid import Grid
from coda.sim.units.joins import Joins
from coda.sim.units.lanes import all_lanes, count_true, lowest, spread
from coda.sim.units.launch_control import LaunchControl
from coda.sim.units.matrices import Matrices
from coda.sim.units.memory import Generic, Global, SharedMemory
from coda.sim.units.named import ClusterBarriers, NamedBarriers
from coda.sim.units.registers import Files, special_registers
from coda.sim.units.stuck import deadlock, livelock
from coda.sim.units.transfers import Transfers

Array = NDArray[Any]
SPIN = 1 << 20  # added to the block number of a warp that polls memory: it runs after the others
EXIT = 1 << 24
PARKED = 1 << 25
PATIENCE = 5_000  # rounds in which all warps only spin before it counts as a livelock


class Machine:
    """The resident CTAs of a launch and the units that serve them."""

    EXIT, PARKED = EXIT, PARKED

    def __init__(self, grid: Grid, ctas: Array, result: LaunchResult) -> None:
        self.grid, self.result = grid, result
        self.decoded: Decoded = grid.decoded
        self.options, self.geometry = grid.options, grid.geometry
        self.waiting: deque[int] = grid.waiting
        self.ctas = ctas
        count, per = len(ctas), self.geometry.warps_per_cta
        self.count, self.warps = count, count * per
        self.shape_of_file = (self.warps, 32)
        self.shape = (0, 32)
        self.progress = 0
        self.executed = 0
        self.block = 0
        self.observer: Observer | None = None
        row = np.arange(self.warps)
        self.cluster_of_row = row % count // self.geometry.cluster_size
        self._state()
        self._units()

    def _state(self) -> None:
        self.files = Files(self.decoded.layout, self.warps)
        sms, smem = self.options.sms, self.grid.launch.smem
        self.special: dict[str, Any] = special_registers(self.geometry, self.ctas, smem, sms)
        clock = dict.fromkeys(("%clock", "%globaltimer_lo"), self._clock)
        self.special |= {**clock, "%clock64": self._clock64, "%globaltimer": self._clock64}
        self.parameters = self.grid.parameters
        self.variables = self.grid.variables
        self.window = self.special["%cluster_ctarank"] << np.uint32(24)
        thread = np.arange(self.warps)[:, None] // self.count * 32 + np.arange(32)
        exists = thread < self.geometry.threads
        self.pc = np.where(exists, 0, EXIT).astype(np.int32)
        self.key = np.zeros(self.warps, np.int32)
        self.split = np.zeros(self.warps, bool)
        self.refresh(slice(0, self.warps))

    def _units(self) -> None:
        self.agents = Agents(self)
        self.shared = SharedMemory(self, self.count, self.grid.shared_limit)
        self.memory: Global = self.grid.memory_for(self)
        self.generic, self.atomics = Generic(self), Atomics(self)
        self.matrices, self.copies = Matrices(self), Copies(self)
        self.mbarriers, self.named = Mbarriers(self), NamedBarriers(self)
        self.cluster_barriers = ClusterBarriers(self)
        self.transfers, self.launch_control = Transfers(self), LaunchControl(self)
        self.tensor, self.tensor_memory = WgmmaUnit(self), TensorMemory(self)
        self.joins = Joins(self)
        self.observer = attach(self)

    # queries by generated code and units

    def rows(self, g: Any) -> Array:
        """The rows of the warps of an instruction."""
        return np.arange(g.start, g.stop) if isinstance(g, slice) else g

    def active(self, m: Any) -> Array:
        """A mask as an array."""
        return all_lanes(self.shape) if m is None else m

    def cta_of(self, row: int) -> int:
        """The resident CTA of a warp."""
        return row % self.count

    def warp_of(self, row: int) -> int:
        """The number of a warp in its CTA."""
        return row // self.count

    def exited(self, rows: Array) -> Array:
        """Mask of the lanes that have exited: bool [rows, 32]."""
        return self.pc[rows] == EXIT

    def live_threads(self, cta: int) -> int:
        """Threads of the CTA's warps that have a live lane, as barriers count them."""
        rows = np.arange(cta, self.warps, self.count)
        return 32 * int((~self.exited(rows).all(1)).sum())

    def warpgroups(self, rows: Array) -> Array:
        """Indices that order `rows` so that each four in a row are one complete warpgroup."""
        group = rows // self.count // 4 * self.count + rows % self.count
        return np.lexsort((rows, group))

    def parameter(self, offset: int, kind: Any) -> Any:
        """A kernel parameter as a scalar."""
        size = np.dtype(kind).itemsize
        return self.grid.block[offset : offset + size].view(kind)[0]

    def pair(self, low: Array, high: Array) -> Array:
        """Join two 64-bit values into 128-bit ones."""
        low, high = spread(low, self.shape), spread(high, self.shape)
        return np.stack([low, high], -1).view(np.complex128)[..., 0]

    def unpair(self, both: Array) -> Array:
        """Split 128-bit values into 64-bit halves along a new first axis, low half first."""
        halves = np.ascontiguousarray(both)[..., None].view(np.uint64)
        return np.ascontiguousarray(np.moveaxis(halves, -1, 0))

    def _clock(self) -> Any:
        return np.uint32(self.executed & 0xFFFFFFFF)

    def _clock64(self) -> Any:
        return np.uint64(self.executed)

    # errors

    def fault(
        self, ins: Instruction | None, kind: str, what: str, g: Any, k: int | None, at: int | None
    ) -> Any:
        """Raise Fault for an illegal operation by row `g`, or by warp `k` of the warps `g`."""
        row = int(self.rows(g)[k]) if k is not None else int(g)
        finding = self.finding(kind, what, ins, row, at)
        error = Fault(str(finding))
        error.finding = finding
        raise error

    def finding(
        self, kind: str, what: str, ins: Instruction | None, row: int, at: int | None
    ) -> Finding:
        """A finding at a warp's instruction."""
        line, text = (ins.line, ins.text) if ins else (0, "")
        source = ins.source if ins else None
        cta = int(self.ctas[self.cta_of(row)])
        name = self.grid.launch.kernel
        return Finding(kind, what, name, line, text, source, self.warp_of(row), cta, at)

    def find(self, kind: str, what: str, ins: Instruction | None, row: int, at: int | None) -> None:
        """Report a finding of a check: off, warn or raise, as the options say for its kind."""
        level = self.options.checks.get(kind, "off")
        if level == "off":
            return
        finding = self.finding(kind, what, ins, row, at)
        self.result.findings.append(finding)
        if level == "raise":
            raise CheckFailed(finding)

    def guard(self, ins: Instruction, row: int, run: Callable[..., Any], *args: Any) -> Any:
        """Call a unit; a SimError that it raises gets the instruction added to its message."""
        try:
            return run(*args)
        except SimError as e:
            if getattr(e, "placed", False) or getattr(e, "finding", None) is not None:
                raise
            where = f"PTX line {ins.line}: {ins.text}"
            error = type(e)(f"{e}; CTA {self.cta_of(row)}, warp {self.warp_of(row)}; {where}")
            error.placed = True
            raise error from None

    def trap(self, ins: Instruction, g: Any, m: Any) -> None:
        """trap by any active lane."""
        if m is None or m.any():
            k = 0 if m is None else int(m.any(1).argmax())
            self.fault(ins, "trap", "the kernel executed trap", g, k, None)

    # calls of the observer

    def saw_shared(
        self, ins: Instruction, g: Any, m: Any, index: Array, nbytes: int, *, write: bool
    ) -> None:
        """Call the observer for an access to shared memory."""
        assert self.observer is not None
        at = spread(index, self.shape)
        self.observer.shared_access(ins, g, m, at, nbytes, write=write)

    def saw_global(
        self, ins: Instruction, g: Any, m: Any, addresses: Array, nbytes: int, *, write: bool
    ) -> None:
        """Call the observer for an access to global memory."""
        assert self.observer is not None
        at = spread(addresses, self.shape)
        self.observer.global_access(ins, g, m, at, nbytes, write=write)

    # program counters of lanes

    def refresh(self, g: Any) -> None:
        """Recompute the lowest block of the lanes of these warps."""
        pc = self.pc[g]
        key = lowest(pc, axis=1)
        self.key[g] = key
        self.split[g] = np.logical_or.reduce(pc != key[:, None], axis=1)

    def go(self, g: Any, m: Any, then: int) -> None:
        """Set the next block of the active lanes."""
        if m is None:
            self.pc[g] = then
            self.key[g] = then
            self.split[g] = False
        else:
            self.go_some(g, m, then)

    def go_some(self, g: Any, lanes: Array, then: int) -> None:
        """Set the next block of some lanes; the others keep theirs."""
        self.pc[g] = np.where(lanes, then, self.pc[g])
        self.refresh(g)

    def branch(self, g: Any, m: Any, condition: Any, target: int, fall: int) -> None:
        """Active lanes go to `target` where the condition holds, else to `fall`."""
        condition = spread(condition, self.shape)
        if m is None:
            yes = count_true(condition)
            if yes == condition.size:
                self.go(g, None, target)
                return
            if not yes:
                self.go(g, None, fall)
                return
            self.pc[g] = np.where(condition, np.int32(target), np.int32(fall))
        else:
            there = np.where(condition, np.int32(target), np.int32(fall))
            self.pc[g] = np.where(m, there, self.pc[g])
        self.refresh(g)

    def park(self, row: int, lanes: Array) -> None:
        """Suspend lanes until `resume`."""
        self.pc[row][lanes] = PARKED
        self._one(row)

    def resume(self, row: int, lanes: Array, then: int) -> None:
        """Parked lanes continue at a block."""
        self.pc[row][lanes] = then
        self._one(row)

    def resume_all(self, waiters: list[Waiter]) -> None:
        """Resume the lanes of several waits; whole warps take a fast path."""
        for then in {w.then for w in waiters}:
            whole = [w.row for w in waiters if w.then == then and w.mask.all()]
            if whole:
                self.go(np.array(whole), None, then)
        for w in waiters:
            if not w.mask.all():
                self.resume(w.row, w.mask, w.then)

    def _one(self, row: int) -> None:
        pc = self.pc[row]
        key = lowest(pc)
        self.key[row] = key
        self.split[row] = count_true(pc != key) > 0

    # the schedule

    def run(self) -> None:
        """Run the resident CTAs to their end."""
        pick = self._pick_random if self.agents.random else self._pick
        budget = self.options.instructions
        while True:
            picked = pick()
            if picked is None:
                if not self._idle():
                    break
                continue
            self._step(*picked)
            if budget and self.executed > budget:
                livelock(self, f"the budget of {budget} warp instructions is used up")
        self._end()

    def _pick(self) -> tuple[int, Array] | None:
        block = int(lowest(self.key))
        if block >= SPIN:
            return None
        return block, (self.key == block).nonzero()[0]

    def _pick_random(self) -> tuple[int, Array] | None:
        self.agents.stir()
        ready = self.key[self.key < SPIN]
        if not len(ready):
            return None
        rng = self.agents.rng
        blocks = np.unique(ready)
        block = int(blocks[rng.integers(len(blocks))])
        rows = np.flatnonzero(self.key == block)
        if len(rows) > 1 and rng.random() < 0.5:
            some = rows[rng.random(len(rows)) < 0.5]
            rows = some if len(some) else rows
        return block, rows

    def _step(self, number: int, rows: Array) -> None:
        block = self.decoded.program.blocks[number]
        m = None
        if count_true(self.split[rows]):
            m = self.pc[rows] == number
            if count_true(m) == m.size:
                m = None
        if block.warpgroup or (block.masks and m is not None):
            rows, m = self.joins.gather(number, block, rows, m)
            if not len(rows):
                return
        n = len(rows)
        first = int(rows[0])
        g: Any = slice(first, first + n) if int(rows[-1]) - first == n - 1 else rows
        self.shape, self.block = (n, 32), number
        self.grid.runs[number] += n
        self.executed += n * len(block.instructions)
        if self.agents.with_registers:
            self.agents.arrive_in_registers(rows, block.needs)
        if self.observer is not None:
            if block.acts:
                self._flush()
            self.observer.block(block, number, g, m)
        self.decoded.function(number)(self, g, m)
        if block.exits and self.observer is not None:
            self._left(rows)
        if block.spins:
            self._spin(rows, m)

    def _spin(self, rows: Array, m: Array | None) -> None:
        """Polling warps (or their lanes at this block) yield to the others before they continue."""
        if m is None:
            here = self.key[rows]
            self.key[rows] = np.where(here < SPIN, here | SPIN, here)
        else:
            pc = self.pc[rows]
            self.pc[rows] = np.where(m & (pc < SPIN), pc | SPIN, pc)
            self.refresh(rows)

    def _left(self, rows: Array) -> None:
        """Call the observer for CTAs whose last threads have exited."""
        assert self.observer is not None
        for cta in np.unique(rows % self.count).tolist():
            if (self.key[cta :: self.count] == EXIT).all():
                self.observer.exited(cta)

    def _idle(self) -> bool:
        """No warp is ready: release joins, barriers or operations. False if all have exited."""
        if self.agents.relieve():
            return True
        spinning = ((self.key >= SPIN) & (self.key < EXIT)).nonzero()[0]
        if len(spinning):
            pc = self.pc[spinning]
            self.pc[spinning] = np.where(pc < EXIT, pc & ~np.int32(SPIN), pc)
            self.refresh(spinning)
            self._spun()
            return True
        if (self.pc == EXIT).all():
            return False
        if self.joins.recheck() | self.named.recheck() | self.cluster_barriers.recheck():
            return True
        if self._may_fail() and self.mbarriers.fail_all():
            return True
        deadlock(self)
        return False

    def _spun(self) -> None:
        grid = self.grid
        grid.spins = grid.spins + 1 if grid.last_progress == self.progress else 0
        grid.last_progress = self.progress
        if grid.spins > PATIENCE:
            livelock(self, f"warps spin, and nothing has happened for {PATIENCE} rounds")

    def _may_fail(self) -> bool:
        """Whether waits may return false: only if something has happened since they last did.

        Under the random schedule some waits return false at random, so more rounds are needed.
        """
        grid = self.grid
        grid.failures = grid.failures + 1 if grid.last_failure == self.progress else 0
        grid.last_failure = self.progress
        return grid.failures < (50 if self.agents.random else 1)

    def _flush(self) -> None:
        """Issue the chains of products that are still open."""
        self.tensor.flush()
        self.tensor_memory.flush_all()

    def _end(self) -> None:
        self._flush()
        if self.observer is not None:
            self.observer.finished()
        for operation in self.agents.pending():
            self.agents.finish(operation)


def run(launch: Launch, allocations: Allocations, options: Options) -> LaunchResult:
    """Run a launch on the simulated machine.

    Global memory is read and written in place, within `allocations`; BLAS has one thread meanwhile.
    Raises Unsupported for PTX that is not modelled, Fault for an illegal access or operation,
    Deadlock, Livelock, and CheckFailed for a finding of the level "raise".
    """
    began = time.perf_counter()
    decoded = decode(launch.ptx, launch.kernel)
    grid = Grid(decoded, launch, allocations, options)
    result = LaunchResult(launch.kernel)
    with np.errstate(all="ignore"), one_blas_thread():
        while grid.waiting:
            machine = Machine(grid, grid.next_ctas(), result)
            try:
                machine.run()
            finally:
                result.warp_instructions += machine.executed
    grid.count(result)
    result.seconds = time.perf_counter() - began
    return result
