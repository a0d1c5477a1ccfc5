"""tcgen05 instructions -> allocations of tensor memory, and asynchronous operations on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.parse import Instruction
from coda.sim.tensorcore import tcgen05, tmem
from coda.sim.types import Deadlock
from coda.sim.units.agents import AsyncOp
from coda.sim.units.lanes import spread
from coda.sim.units.memory import OFFSET, RANK, WINDOW

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
COLUMNS = 512


@dataclass(slots=True)
class Tcgen05Chain:
    """Products on the same accumulators, in the order of their issue.

    It is one operation, issued at its commit or before the next other tcgen05 operation: no
    instruction can observe the accumulators before.
    """

    ins: Instruction
    row: int
    form: tcgen05.Mma
    shape: tcgen05.Shape
    ctas: list[int]
    d: int
    enable: bool
    masked: list[int]
    steps: list[tcgen05.MmaOperands]

    def goes_on(self, new: Tcgen05Chain) -> bool:
        """Whether `new` adds to the same accumulators in the same way."""
        same = (self.form, self.row, self.d, self.ctas, self.masked) == (
            new.form,
            new.row,
            new.d,
            new.ctas,
            new.masked,
        )
        scaled = bool(self.form.scales) and (self.shape.m, self.shape.n) == (
            new.shape.m,
            new.shape.n,
        )
        joins = scaled or self.shape == new.shape
        return same and joins and new.enable and not new.form.scale_d


class TensorMemory:
    """Tensor memory of all resident CTAs, and the unit that works on it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.memories: dict[int, Array] = {}
        self.allocated: dict[int, dict[int, int]] = {}
        self.chains: dict[int, Tcgen05Chain] = {}

    def of(self, cta: int) -> Array:
        """The tensor memory of a CTA, uint32 [128, 512]."""
        memory = self.memories.get(cta)
        if memory is None:
            memory = self.memories[cta] = np.full((128, COLUMNS), 0xFFFFFFFF, np.uint32)
        return memory

    def group(self, row: int, ctas: int) -> list[int]:
        """The CTAs (slots) of the CTA group of a warp, even rank first."""
        cta = self.machine.cta_of(row)
        return [cta] if ctas == 1 else [cta & ~1, cta | 1]

    # allocation

    def alloc(self, ins: Instruction, g: Any, place: Any, count: Array) -> None:
        """tcgen05.alloc by one warp of each CTA; the address goes to shared memory."""
        machine = self.machine
        base = spread(machine.transfers.at(place), machine.shape)
        counts = spread(count, machine.shape)
        for k, row in enumerate(machine.rows(g).tolist()):
            columns, cta = int(counts[k, 0]), machine.cta_of(row)
            if columns not in (32, 64, 128, 256, 512):
                what = f"an allocation of {columns} columns of tensor memory"
                machine.fault(ins, "barrier", what, row, None, None)
            used = self.allocated.setdefault(cta, {})
            column = self._free(used, columns)
            if column is None:
                held = ", ".join(f"{n} at {c}" for c, n in sorted(used.items()))
                raise Deadlock(
                    f"PTX line {ins.line}: {ins.text}: CTA {cta} waits for {columns} columns of "
                    f"tensor memory, and holds {held}"
                )
            used[column] = columns
            at = machine.shared.span(ins, row, int(base[k, 0]), 4, 4)
            machine.shared.views[4][at >> 2] = column
            machine.progress += 1
            if machine.observer is not None:
                index = np.array([at])
                machine.observer.matrix_access(ins, row, index, 4, write=True)
                machine.observer.tensor_alloc(ins, row, cta, column, columns)

    @staticmethod
    def _free(used: dict[int, int], columns: int) -> int | None:
        for column in range(0, COLUMNS, 32):
            end = column + columns
            if end <= COLUMNS and all(c >= end or c + n <= column for c, n in used.items()):
                return column
        return None

    def dealloc(self, ins: Instruction, g: Any, address: Array, count: Array) -> None:
        """tcgen05.dealloc."""
        machine = self.machine
        addresses = spread(address, machine.shape)
        counts = spread(count, machine.shape)
        for k, row in enumerate(machine.rows(g).tolist()):
            column, columns = int(addresses[k, 0]) & 0xFFFF, int(counts[k, 0])
            cta = machine.cta_of(row)
            used = self.allocated.setdefault(cta, {})
            if used.get(column) != columns:
                what = f"{columns} columns of tensor memory at {column}, which were not allocated"
                machine.fault(ins, "leak", what, row, None, column)
            del used[column]
            if machine.observer is not None:
                machine.observer.tensor_dealloc(ins, row, cta, column, columns)

    # loads and stores by warps

    def load(
        self,
        ins: Instruction,
        g: Any,
        form: tmem.Move,
        slots: Array,
        place: Any,
        *,
        split: int,
        early: tuple[frozenset[str], Callable[..., None] | None],
    ) -> None:
        """tcgen05.ld: the registers change when it completes.

        `early`: names of all registers written at completion, and a function that copies results
        to those among them that the load itself does not write.
        """
        names, moves = early
        machine = self.machine
        addresses = spread(machine.transfers.at(place), machine.shape)
        for k, row in enumerate(machine.rows(g).tolist()):
            address = int(addresses[k, 0])

            def move(row: int = row, address: int = address) -> None:
                memory, warp = self.of(machine.cta_of(row)), machine.warp_of(row)
                values = machine.guard(ins, row, tmem.load, form, memory, address, warp, split)
                machine.files.whole[32][slots, row] = values
                if moves is not None and not machine.agents.eager:
                    moves(machine, np.array([row]), None)

            operation = AsyncOp(ins, row, "tcgen05.ld", [move], stream=("tcgen05.ld", row))
            operation.rows, operation.registers, operation.names = (row,), slots, names
            operation.reads = self._touched(ins, row, form, address, split)
            machine.agents.issue(operation)

    def store(
        self, ins: Instruction, g: Any, form: tmem.Move, values: list[Array], place: Any, split: int
    ) -> None:
        """tcgen05.st."""
        machine = self.machine
        addresses = spread(machine.transfers.at(place), machine.shape)
        stacked = np.stack([spread(v, machine.shape) for v in values])
        for k, row in enumerate(machine.rows(g).tolist()):
            address, mine = int(addresses[k, 0]), stacked[:, k]

            def move(row: int = row, address: int = address, mine: Array = mine) -> None:
                memory, warp = self.of(machine.cta_of(row)), machine.warp_of(row)
                machine.guard(ins, row, tmem.store, form, memory, address, warp, mine, split)

            operation = AsyncOp(ins, row, "tcgen05.st", [move], stream=("tcgen05.st", row))
            operation.writes = self._touched(ins, row, form, address, split)
            machine.agents.issue(operation)

    def _touched(
        self, ins: Instruction, row: int, form: tmem.Move, address: int, split: int
    ) -> list[Any]:
        machine = self.machine
        if machine.observer is None:
            return []
        warp = machine.warp_of(row)
        lanes, columns = machine.guard(ins, row, tmem.move_places, form, address, warp, split)
        width = int(columns.max() - columns.min()) + 1 + form.packed
        height = int(lanes.max() - lanes.min()) + 1
        place = (machine.cta_of(row), int(lanes.min()), height, int(columns.min()), width)
        return [("tensor", place, 4)]

    def wait(self, ins: Instruction, g: Any, *, loads: bool) -> None:
        """tcgen05.wait::ld and ::st."""
        machine = self.machine
        kind = "tcgen05.ld" if loads else "tcgen05.st"
        for row in machine.rows(g).tolist():
            queue = machine.agents.streams.get((kind, row))
            if machine.observer is not None:
                machine.observer.waited(ins, row, list(queue or ()), reading=False)
            machine.agents.finish_stream((kind, row))

    # products and copies

    def _issue(self, operation: AsyncOp, ctas: list[int]) -> None:
        self.flush(ctas)
        operation.stream = ("tcgen05", ctas[0])
        self.machine.agents.issue(operation)

    def mma(
        self, ins: Instruction, g: Any, m: Any, form: tcgen05.Mma, operands: list[Any],
        *, enable: Any, disabled: list[Any],
    ) -> None:  # fmt: skip
        """tcgen05.mma by each active lane; operands are D, A, B, descriptor, and scales."""
        machine = self.machine
        for row, _, (on, d, *rest) in machine.transfers.each(g, m, enable, *operands, *disabled):
            step = tcgen05.MmaOperands(*rest[: len(operands) - 1])
            masked = rest[len(operands) - 1 :]
            ctas = self.group(row, form.ctas)
            shape = machine.guard(ins, row, tcgen05.decode_shape, form, step.idesc)
            machine.result.flops += 2 * shape.m * shape.n * shape.k
            self._extend(Tcgen05Chain(ins, row, form, shape, ctas, d, bool(on), masked, [step]))

    def _do(self, chain: Tcgen05Chain) -> None:
        machine = self.machine
        smems = [machine.shared.windows[c] for c in chain.ctas]
        tmems = [self.of(c) for c in chain.ctas]
        run = partial(tcgen05.accumulate, enable=chain.enable, disabled=chain.masked)
        machine.guard(chain.ins, chain.row, run, chain.form, smems, tmems, chain.d, chain.steps)

    def _extend(self, new: Tcgen05Chain) -> None:
        old = self.chains.get(new.ctas[0])
        if old is not None and old.goes_on(new):
            old.steps += new.steps
        else:
            self.flush(new.ctas)
            self.chains[new.ctas[0]] = new
        self.machine.progress += 1

    def flush(self, ctas: list[int]) -> None:
        """Issue the open chain of products of a group of CTAs."""
        chain = self.chains.pop(ctas[0], None)
        if chain is None:
            return
        agents, observer = self.machine.agents, self.machine.observer
        agents.count += len(chain.steps)
        if agents.eager and observer is None:
            self._do(chain)
            return
        operation = AsyncOp(chain.ins, chain.row, "tcgen05", [lambda: self._do(chain)])
        if observer is not None:
            self._describe(operation, chain)
        self._issue(operation, ctas)

    def flush_all(self) -> None:
        """Issue all open chains."""
        for cta in list(self.chains):
            self.flush([*self.chains[cta].ctas])

    def _describe(self, operation: AsyncOp, chain: Tcgen05Chain) -> None:
        """Record the memory that a chain of products reads and writes."""
        guard, form, shape = self.machine.guard, chain.form, chain.shape
        at = (chain.ins, chain.row)
        b, size = guard(*at, tcgen05.b_pieces, form, shape, tuple(step.b for step in chain.steps))
        narrow = shape.m // form.ctas == 64 and form.ctas == 2
        lane, column = tmem.split(chain.d)
        for cta in chain.ctas:
            operation.reads.append(("shared", b + cta * WINDOW, size))
            left = tuple(step.a for step in chain.steps)
            if form.a_in_tmem:
                operation.reads += self._a_places(cta, left, shape.m // form.ctas)
            else:
                a, nbytes = guard(*at, tcgen05.a_pieces, form, shape, left)
                operation.reads.append(("shared", a + cta * WINDOW, nbytes))
            if form.scales:
                operation.reads += self._scale_places(cta, chain)
            width = shape.n // 2 if narrow else shape.n
            operation.writes.append(("tensor", (cta, lane, 128 - lane, column, width), 4))

    @staticmethod
    def _a_places(cta: int, addresses: tuple[int, ...], rows: int) -> list[Any]:
        """Regions of tensor memory that hold A of a chain: 8 columns for each product."""
        ends: list[list[int]] = []
        for lane, column in sorted({tmem.split(address) for address in addresses}):
            if ends and ends[-1][0] == lane and ends[-1][2] == column:
                ends[-1][2] += 8
            else:
                ends.append([lane, column, column + 8])
        return [
            ("tensor", (cta, lane, min(128 - lane, rows), first, end - first), 4)
            for lane, first, end in ends
        ]

    @staticmethod
    def _scale_places(cta: int, chain: Tcgen05Chain) -> list[Any]:
        """Regions of tensor memory that hold the scales of a chain: one column per 32 rows."""
        rows = {(step.scale_a, chain.shape.m // chain.form.ctas) for step in chain.steps}
        rows |= {(step.scale_b, chain.shape.n) for step in chain.steps}
        return [
            ("tensor", (cta, 0, 128, tmem.split(at & 0x3FFFFFFF)[1], -(-count // 32)), 4)
            for at, count in sorted(rows)
        ]

    def copy(
        self, ins: Instruction, g: Any, m: Any, form: tmem.Copy, place: Any, descriptor: Any
    ) -> None:
        """tcgen05.cp from shared to tensor memory."""
        machine = self.machine
        to = machine.transfers.at(place)
        for row, _, (address, source) in machine.transfers.each(g, m, to, descriptor):
            ctas = self.group(row, form.ctas)
            smems = [machine.shared.windows[c] for c in ctas]
            tmems = [self.of(c) for c in ctas]
            args = (form, smems, tmems, address, source)

            def move(row: int = row, args: Any = args) -> None:
                machine.guard(ins, row, tmem.copy, *args)

            operation = AsyncOp(ins, row, "tcgen05", [move])
            if machine.observer is not None:
                at = machine.guard(ins, row, tmem.copy_offsets, form, source).ravel()
                column = tmem.split(address)[1]
                for cta in ctas:
                    operation.reads.append(("shared", at + cta * WINDOW, 16))
                    for _, rows, lane in tmem.copy_lanes(form, address):
                        where = (cta, lane, rows, column, form.row_bytes // 4)
                        operation.writes.append(("tensor", where, 4))
            self._issue(operation, ctas)

    def shift(self, ins: Instruction, g: Any, m: Any, ctas: int, place: Any) -> None:
        """tcgen05.shift."""
        machine = self.machine
        for row, _, (address,) in machine.transfers.each(g, m, machine.transfers.at(place)):
            group = self.group(row, ctas)

            def move(row: int = row, address: int = address, group: list[int] = group) -> None:
                machine.guard(ins, row, tmem.shift, [self.of(c) for c in group], address)

            operation = AsyncOp(ins, row, "tcgen05", [move])
            lane, column = tmem.split(address)
            where = [("tensor", (c, lane, 32, column, 8), 4) for c in group]
            operation.reads, operation.writes = list(where), list(where)
            self._issue(operation, group)

    def commit(
        self, ins: Instruction, g: Any, m: Any, ctas: int, place: Any, multicast: Any
    ) -> None:
        """tcgen05.commit: an arrival at an mbarrier once all earlier operations are complete."""
        machine = self.machine
        extra = [] if multicast is None else [multicast]
        at = machine.transfers.at(place)
        for row, _, (address, *mask) in machine.transfers.each(g, m, at, *extra):
            address &= 0xFFFFFFFF
            ranks = [r for r in range(16) if mask[0] >> r & 1] if mask else [address >> RANK]
            keys = [
                machine.shared.span(ins, row, r << RANK | (address & OFFSET), 8, 8) for r in ranks
            ]

            def move(row: int = row, keys: list[int] = keys) -> None:
                for key in keys:
                    machine.mbarriers.arrive_once(ins, key, row)

            operation = AsyncOp(ins, row, "tcgen05.commit", [move], signals=tuple(keys))
            self._issue(operation, self.group(row, ctas))
