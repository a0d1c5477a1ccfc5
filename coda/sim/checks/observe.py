"""Events of the machine -> calls of an observer; the checks and the counters are observers.

`Machine.observer` is None without observers, so that a hook costs one comparison. Terms:

- `row`: a warp's row in the register file. `machine.cta_of(row)` is its CTA (the slot of a resident
  one), `machine.warp_of(row)` its number in the CTA, `machine.cluster_of_row[row]` its cluster.
- `g`, `m`: the warps of a vector instruction (`machine.rows(g)` gives the rows as an array) and the
  active lanes, bool [warps, 32], None for all of them.
- shared memory is named by the index of a byte in `machine.shared.data`: CTA `i // WINDOW`, offset
  `i % WINDOW`. The key of an mbarrier is the index of its first byte.
- tensor memory of a CTA is `machine.tensor_memory.of(cta)`, uint32 [128 lanes, 512 columns].

An observer subclasses `Observer` and overrides the events it needs. It may append a `Finding` with
`machine.find(kind, message, ins, row, address)`, which raises if the check's level is "raise". A
function in `observers.MAKERS` makes the observers for the resident CTAs of a launch (one `Machine`
per wave), or none if its checks are off; state that must outlive a wave goes to
`machine.grid.notes`.

The life of an asynchronous operation (`agents.AsyncOp`): `issued` when the instruction has run,
`moves(op, step)` just before a step moves data, `completed` after the last one, before which it
has arrived at its mbarriers (`barrier_phase` may have been called on the way). The memory it
accesses is in `op.reads` and `op.writes`, filled at issue if known then: tuples (space, where,
nbytes) with `where` an int or an int64 array of first bytes of pieces of `nbytes` each; spaces
"shared", "global", and "tensor" with `where` = (cta, first lane, lanes, first column, columns).
Units: "tma", "bulk", "cp.async", "st.async", "wgmma", "tcgen05", "tcgen05.ld", "tcgen05.st",
"try_cancel". An instruction that waits for operations calls `waited` before it makes them complete,
with all operations that it waits for, complete or not (none for an mbarrier, which calls
`barrier_acquire` instead). The first block that uses the results of a tcgen05.ld (`block.needs`)
also waits for it, without a call.

Registers in flight: from `issued` (of a wgmma: `product`) to `waited`, `op.names` are the registers
that the operation writes and `op.sources` those that it reads (wgmma with A in registers), in each
warp of `op.rows`. Products up to a commit, or to any other event, are one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from coda.sim.ptx.parse import Instruction

if TYPE_CHECKING:
    from coda.sim.machine import Machine
    from coda.sim.ptx.program import BasicBlock
    from coda.sim.units.agents import AsyncOp

Array = NDArray[Any]


class Observer:
    """Does nothing; the base of checks and counters."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    # the course of execution

    def block(self, block: BasicBlock, number: int, g: Any, m: Any) -> None:
        """The warps run a block: it reads registers `block.uses`, then writes `block.writes`."""

    def finished(self) -> None:
        """All resident CTAs have exited; `machine.agents.pending()` has operations in flight."""

    def exited(self, cta: int) -> None:
        """The last thread of a CTA has exited; other CTAs may still run."""

    # generic accesses, by lanes

    def global_access(
        self, ins: Instruction, g: Any, m: Any, addresses: Array, nbytes: int, *, write: bool
    ) -> None:
        """Each active lane accesses `nbytes` of global memory at its address."""

    def shared_access(
        self, ins: Instruction, g: Any, m: Any, index: Array, nbytes: int, *, write: bool
    ) -> None:
        """Each active lane accesses `nbytes` of shared memory; reads come before the access.

        For ldmatrix and stmatrix `index` has one entry per row accessed by the warp, not per lane.
        """

    def atomic(
        self, ins: Instruction, g: Any, m: Any, space: str, where: Array, nbytes: int
    ) -> None:
        """Each active lane does an atomic operation; space is "shared" or "global"."""

    def matrix_access(
        self, ins: Instruction, row: int, index: Array, nbytes: int, *, write: bool
    ) -> None:
        """A warp accesses `nbytes` at each index of shared memory: alloc, tensormap.replace."""

    # asynchronous operations

    def product(self, ins: Instruction, rows: Array) -> None:
        """Warps execute a wgmma; its operation is `issued` later, with the rest of its chain."""

    def issued(self, op: AsyncOp) -> None:
        """An operation was handed to its unit."""

    def moves(self, op: AsyncOp, step: int) -> None:
        """A step of an operation is about to move data."""

    def completed(self, op: AsyncOp) -> None:
        """The last step of an operation has run."""

    def waited(self, ins: Instruction, row: int, ops: list[AsyncOp], *, reading: bool) -> None:
        """A warp has waited for operations, or (`reading`) for their reading of operands only."""

    # synchronisation

    def fence(self, ins: Instruction, g: Any, m: Any) -> None:
        """A fence, membar, griddepcontrol, or a fence of wgmma or tcgen05; `ins.op` says which."""

    def barrier_init(self, ins: Instruction, row: int, key: int) -> None:
        """mbarrier.init."""

    def barrier_arrive(self, ins: Instruction, row: int, key: int) -> None:
        """A warp arrives at an mbarrier (once for all its lanes at this key)."""

    def barrier_phase(self, key: int, completions: int) -> None:
        """A phase of an mbarrier has ended; it was number `completions` (the first is 1)."""

    def barrier_acquire(self, ins: Instruction, row: int, key: int) -> None:
        """A wait of a warp returned true: the phase before the current one is complete."""

    def named_arrive(self, ins: Instruction, row: int, key: tuple[int, int]) -> None:
        """A warp arrives at barrier (CTA, number), by bar.sync, bar.red or bar.arrive."""

    def named_acquire(self, ins: Instruction, row: int, key: tuple[int, int]) -> None:
        """A warp leaves barrier (CTA, number): all expected threads have arrived."""

    def cluster_arrive(self, ins: Instruction, row: int, cluster: int) -> None:
        """A warp arrives at the barrier of its cluster; `ins.op` says relaxed or release."""

    def cluster_acquire(self, ins: Instruction, row: int, cluster: int) -> None:
        """A warp leaves the barrier of its cluster."""

    # tensor maps in global memory

    def map_write(self, ins: Instruction, row: int, address: int) -> None:
        """tensormap.replace or tensormap.cp_fenceproxy; other stores call their own method."""

    def map_acquire(self, ins: Instruction, g: Any, m: Any, address: Array) -> None:
        """fence.proxy.tensormap::generic.acquire by each active lane, of the map at its address."""

    def map_use(self, ins: Instruction, row: int, address: int) -> None:
        """A TMA operation is about to read a map."""

    # tensor memory

    def tensor_alloc(self, ins: Instruction, row: int, cta: int, column: int, columns: int) -> None:
        """Columns of tensor memory were allocated in a CTA."""

    def tensor_dealloc(
        self, ins: Instruction, row: int, cta: int, column: int, columns: int
    ) -> None:
        """Columns of tensor memory were freed in a CTA."""


def executing(machine: Machine, g: Any, m: Any) -> list[int]:
    """The rows of the warps of an instruction that have active lanes."""
    rows = machine.rows(g)
    return (rows if m is None else rows[m.any(1)]).tolist()


class Several(Observer):
    """Forwards each event to several observers, in order: to those that override its method."""

    def __init__(self, machine: Machine, observers: list[Observer]) -> None:
        super().__init__(machine)
        for name in HOOKS:
            wanted = [o for o in observers if getattr(type(o), name) is not getattr(Observer, name)]
            told = [getattr(o, name) for o in wanted]
            if told:
                setattr(self, name, told[0] if len(told) == 1 else _tell(told))


def _tell(told: list[Callable[..., None]]) -> Callable[..., None]:
    def tell(*args: Any, **options: bool) -> None:
        for each in told:
            each(*args, **options)

    return tell


HOOKS = tuple(name for name in vars(Observer) if not name.startswith("_"))
