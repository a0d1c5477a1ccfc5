"""TMA, bulk copy, st.async and reduction instructions -> asynchronous operations.

A bulk instruction is issued once per warp for each distinct tuple of operands, as in hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.parse import Instruction
from coda.sim.units import tma
from coda.sim.units.agents import AsyncOp
from coda.sim.units.atomics import combined
from coda.sim.units.lanes import spread
from coda.sim.units.memory import OFFSET, RANK, WINDOW
from coda.sim.units.tma_reduce import reduce_box

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
Place = tuple[Array, int]


class Transfers:
    """Issues the operations of the copy engines."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.whole: dict[tma.TensorMap, bool] = {}

    # operands of lanes

    def each(self, g: Any, m: Any, *values: Any) -> list[tuple[int, int, tuple[int, ...]]]:
        """(row, first lane, operands) for each distinct tuple of operands in each warp."""
        machine = self.machine
        where = machine.active(m).nonzero()
        rows = machine.rows(g)[where[0]].tolist()
        columns = [spread(v, machine.shape)[where].tolist() for v in values]
        out: dict[tuple[int, ...], int] = {}
        for row, lane, *operands in zip(rows, where[1].tolist(), *columns, strict=True):
            out.setdefault((row, *operands), lane)
        return [(row, lane, tuple(operands)) for (row, *operands), lane in out.items()]

    @staticmethod
    def at(place: Place) -> Any:
        """The addresses of a place."""
        base, offset = place
        if not offset:
            return base
        bits = 8 * base.dtype.itemsize
        return base + base.dtype.type(offset & ((1 << bits) - 1))

    # destinations in a cluster

    def _window(self, row: int, rank: int) -> int:
        """The CTA (slot) of rank `rank` in the cluster of a warp."""
        machine = self.machine
        return (
            machine.cta_of(row) // machine.geometry.cluster_size * (machine.geometry.cluster_size)
            + rank
        )

    def targets(
        self, ins: Instruction, row: int, to: int, barrier: int, mask: int | None, *, pair: bool
    ) -> list[tuple[int, int]]:
        """(CTA, key of its mbarrier) for each destination CTA of a load, all at offset `to`."""
        machine = self.machine
        size = machine.geometry.cluster_size
        if mask is None:
            key = machine.shared.span(ins, row, barrier, 8, 8)
            return [(self._window(row, to >> RANK), key)]
        out = []
        for rank in range(16):
            if not mask >> rank & 1:
                continue
            if rank >= size:
                what = f"a multicast to CTA {rank} of a cluster of {size}"
                machine.fault(ins, "out-of-bounds", what, row, None, None)
            signalled = (rank & ~1) | (barrier >> RANK & 1) if pair else rank
            key = machine.shared.span(ins, row, signalled << RANK | (barrier & OFFSET), 8, 8)
            out.append((self._window(row, rank), key))
        return out

    # TMA

    def map_at(self, ins: Instruction, row: int, address: int) -> tma.TensorMap:
        """The tensor map at a global (or generic) address."""
        machine = self.machine
        if address % 64:
            where = f"a tensor map at {address:#x}"
            machine.fault(ins, "misaligned", where, row, None, address)
        machine.memory.span(ins, row, address, address + 64)
        if machine.observer is not None:
            machine.observer.map_use(ins, row, address)
        low = address - 64
        return machine.guard(
            ins, row, tma.TensorMap.decode, machine.memory.views[1][low : low + 64].tobytes()
        )

    def _touches(
        self, ins: Instruction, row: int, tmap: tma.TensorMap, coords: list[int], mode: tma.Mode
    ) -> None:
        if tmap not in self.whole:
            self.whole[tmap] = self.machine.memory.holds(*_extent(tmap))
        if self.whole[tmap]:
            return
        extent = tma.global_extent(tmap, coords, mode)
        if extent is None or self.machine.memory.holds(*extent):
            return
        starts, length = tma.global_rows(tmap, coords, mode)
        for start in starts.tolist():
            self.machine.memory.span(ins, row, start, start + length)

    def load(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        to: Place,
        source: Place,
        coords: list[Array],
        *,
        barrier: Place,
        mode: tma.Mode,
        multicast: Array | None,
        pair: bool,
    ) -> None:
        """cp.async.bulk.tensor from global to shared memory."""
        machine = self.machine
        extra = [] if multicast is None else [multicast]
        columns = (self.at(to), self.at(source), self.at(barrier), *coords, *extra)
        for row, _, (where, address, bar, *rest) in self.each(g, m, *columns):
            mask = rest.pop() if extra else None
            tmap = self.map_at(ins, row, address)
            nbytes = tma.moved_bytes(tmap, mode)
            machine.shared.span(ins, row, where, nbytes, 128)
            machine.guard(ins, row, self._touches, ins, row, tmap, rest, mode)
            targets = self.targets(ins, row, where, bar, mask, pair=pair)
            operation = self._box_load(ins, row, tmap, rest, mode, where & OFFSET, targets)
            machine.agents.issue(operation)

    def _box_load(
        self,
        ins: Instruction,
        row: int,
        tmap: tma.TensorMap,
        coords: list[int],
        mode: tma.Mode,
        base: int,
        targets: list[tuple[int, int]],
    ) -> AsyncOp:
        machine = self.machine
        nbytes = tma.moved_bytes(tmap, mode)

        def move() -> None:
            dense = tma.load_box(tmap, coords, mode)
            for cta, _ in targets:
                tma.write_shared(machine.shared.windows[cta], tmap, base, dense, mode)
            for _, key in targets:
                machine.mbarriers.complete_tx(ins, key, nbytes, row)

        signals = tuple(key for _, key in targets)
        operation = AsyncOp(ins, row, "tma", [move], signals=signals, nbytes=nbytes)
        operation.writes = [("shared", cta * WINDOW + base, nbytes) for cta, _ in targets]
        if machine.observer is not None:
            starts, length = tma.global_rows(tmap, coords, mode)
            operation.reads = [("global", starts, length)]
        return operation

    def store(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        to: Place,
        coords: list[Array],
        source: Place,
        *,
        mode: tma.Mode,
        reduction: str = "",
    ) -> None:
        """cp.async.bulk.tensor (or cp.reduce) from shared to global memory."""
        machine = self.machine
        columns = (self.at(source), self.at(to), *coords)
        for row, lane, (where, address, *rest) in self.each(g, m, *columns):
            tmap = self.map_at(ins, row, address)
            nbytes = tma.moved_bytes(tmap, mode)
            start = machine.shared.span(ins, row, where, nbytes, 128)
            machine.guard(ins, row, self._touches, ins, row, tmap, rest, mode)
            operation = self._box_store(ins, row, tmap, rest, mode, start, reduction)
            self._in_group(operation, row, lane, start, nbytes)

    def _box_store(
        self,
        ins: Instruction,
        row: int,
        tmap: tma.TensorMap,
        coords: list[int],
        mode: tma.Mode,
        start: int,
        reduction: str,
    ) -> AsyncOp:
        machine = self.machine
        held: list[Array] = []
        window = machine.shared.windows[start // WINDOW]

        def read() -> None:
            held.append(tma.read_shared(window, tmap, start % WINDOW, mode))

        def write() -> None:
            if reduction:
                machine.guard(ins, row, reduce_box, tmap, coords, held[0], reduction, mode)
            else:
                tma.store_box(tmap, coords, held[0], mode)

        operation = AsyncOp(ins, row, "tma", [read, write])
        if machine.observer is not None:
            starts, length = tma.global_rows(tmap, coords, mode)
            operation.writes = [("global", starts, length)]
        return operation

    def _in_group(self, operation: AsyncOp, row: int, lane: int, start: int, nbytes: int) -> None:
        operation.reads = [("shared", start, nbytes)]
        operation.nbytes = nbytes
        self.machine.agents.bulk.add((row, lane), operation)
        self.machine.agents.issue(operation)

    # bulk copies without a tensor map

    def _check_size(self, ins: Instruction, row: int, nbytes: int) -> None:
        if nbytes % 16:
            what = f"a bulk copy of {nbytes} bytes, which must be a multiple of 16"
            self.machine.fault(ins, "misaligned", what, row, None, nbytes)

    def _range(self, ins: Instruction, row: int, address: int, nbytes: int) -> slice:
        """A range of global memory as a slice of its bytes."""
        if address % 16:
            where = f"global address {address:#x} of a bulk copy"
            self.machine.fault(ins, "misaligned", where, row, None, address)
        self.machine.memory.span(ins, row, address, address + nbytes)
        return slice(address - 64, address - 64 + nbytes)

    def bulk_load(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        to: Place,
        source: Place,
        size: Array,
        *,
        barrier: Place,
        multicast: Array | None,
    ) -> None:
        """cp.async.bulk from global to shared memory."""
        machine = self.machine
        extra = [] if multicast is None else [multicast]
        columns = (self.at(to), self.at(source), size, self.at(barrier), *extra)
        for row, _, (where, address, nbytes, bar, *rest) in self.each(g, m, *columns):
            self._check_size(ins, row, nbytes)
            machine.shared.span(ins, row, where, nbytes, 16)
            part = self._range(ins, row, address, nbytes)
            mask = rest[0] if extra else None
            targets = self.targets(ins, row, where, bar, mask, pair=False)
            starts = [cta * WINDOW + (where & OFFSET) for cta, _ in targets]
            operation = self._bulk_in(ins, row, part, starts, nbytes, [k for _, k in targets])
            operation.reads = [("global", address, nbytes)]
            machine.agents.issue(operation)

    def _bulk_in(
        self,
        ins: Instruction,
        row: int,
        part: slice,
        starts: list[int],
        nbytes: int,
        keys: list[int],
    ) -> AsyncOp:
        machine = self.machine

        def move() -> None:
            data = machine.memory.views[1][part]
            for start in starts:
                machine.shared.data[start : start + nbytes] = data
            for key in keys:
                machine.mbarriers.complete_tx(ins, key, nbytes, row)

        operation = AsyncOp(ins, row, "bulk", [move], signals=tuple(keys), nbytes=nbytes)
        operation.writes = [("shared", start, nbytes) for start in starts]
        return operation

    def bulk_to_cluster(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        to: Place,
        source: Place,
        size: Array,
        *,
        barrier: Place,
        reduction: tuple[str, str] | None,
    ) -> None:
        """cp.async.bulk (or cp.reduce) from shared memory to that of a CTA of the cluster."""
        machine = self.machine
        columns = (self.at(to), self.at(source), size, self.at(barrier))
        for row, _, (where, address, nbytes, bar) in self.each(g, m, *columns):
            self._check_size(ins, row, nbytes)
            start = machine.shared.span(ins, row, where, nbytes, 16)
            first = machine.shared.span(ins, row, address, nbytes, 16)
            key = machine.shared.span(ins, row, bar, 8, 8)
            move = self._between(ins, row, first, start, nbytes, key, reduction)
            operation = AsyncOp(ins, row, "bulk", [move], signals=(key,), nbytes=nbytes)
            operation.reads = [("shared", first, nbytes)]
            operation.writes = [("shared", start, nbytes)]
            machine.agents.issue(operation)

    def _between(
        self,
        ins: Instruction,
        row: int,
        first: int,
        start: int,
        nbytes: int,
        key: int,
        reduction: tuple[str, str] | None,
    ) -> Callable[[], None]:
        machine = self.machine

        def move() -> None:
            data = machine.shared.data[first : first + nbytes].copy()
            target = machine.shared.data[start : start + nbytes]
            target[...] = data if reduction is None else combined(reduction, target, data)
            machine.mbarriers.complete_tx(ins, key, nbytes, row)

        return move

    def bulk_store(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        to: Place,
        source: Place,
        size: Array,
        *,
        reduction: tuple[str, str] | None,
    ) -> None:
        """cp.async.bulk (or cp.reduce) from shared to global memory."""
        machine = self.machine
        columns = (self.at(source), self.at(to), size)
        for row, lane, (where, address, nbytes) in self.each(g, m, *columns):
            self._check_size(ins, row, nbytes)
            start = machine.shared.span(ins, row, where, nbytes, 16)
            part = self._range(ins, row, address, nbytes)
            steps = self._bulk_out(start, part, nbytes, reduction)
            operation = AsyncOp(ins, row, "bulk", steps)
            operation.writes = [("global", address, nbytes)]
            self._in_group(operation, row, lane, start, nbytes)

    def _bulk_out(
        self, start: int, part: slice, nbytes: int, reduction: tuple[str, str] | None
    ) -> list[Callable[[], None]]:
        machine = self.machine
        held: list[Array] = []

        def read() -> None:
            held.append(machine.shared.data[start : start + nbytes].copy())

        def write() -> None:
            target = machine.memory.views[1][part]
            target[...] = held[0] if reduction is None else combined(reduction, target, held[0])

        return [read, write]

    # groups

    def commit(self, g: Any, m: Any) -> None:
        """cp.async.bulk.commit_group."""
        groups = self.machine.agents.bulk
        for key in self._threads(g, m, groups.committed):
            groups.commit(key)

    def wait(self, ins: Instruction, g: Any, m: Any, n: int, *, reading: bool) -> None:
        """cp.async.bulk.wait_group."""
        machine = self.machine
        groups = machine.agents.bulk
        for key in self._threads(g, m, groups.committed):
            if machine.observer is not None:
                machine.observer.waited(ins, key[0], groups.older(key, n), reading=reading)
            groups.wait(key, n, 1 if reading else 99)

    def _threads(self, g: Any, m: Any, known: Any) -> list[tuple[int, int]]:
        machine = self.machine
        if not known:
            return []
        place = {row: k for k, row in enumerate(machine.rows(g).tolist())}
        active = machine.active(m)
        return [(row, lane) for row, lane in known if row in place and active[place[row], lane]]

    # st.async

    def store_async(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        to: Place,
        values: list[Array],
        barrier: Place,
        *,
        reduction: tuple[str, str] | None = None,
    ) -> None:
        """st.async and red.async of each active lane."""
        machine = self.machine
        size = values[0].dtype.itemsize
        total = size * len(values)
        active = machine.active(m)
        wheres = spread(self.at(to), machine.shape)
        bars = spread(self.at(barrier), machine.shape)
        data = np.stack([spread(v, machine.shape) for v in values], -1)
        rows = machine.rows(g)
        for k, lane in zip(*np.nonzero(active), strict=True):
            row = int(rows[k])
            start = machine.shared.span(ins, row, int(wheres[k, lane]), total, total)
            key = machine.shared.span(ins, row, int(bars[k, lane]), 8, 8)
            raw = data[k, lane].copy().view(np.uint8)

            def move(start: int = start, raw: Array = raw, key: int = key, row: int = row) -> None:
                target = machine.shared.data[start : start + total]
                target[...] = raw if reduction is None else combined(reduction, target, raw)
                machine.mbarriers.complete_tx(ins, key, total, row)

            operation = AsyncOp(ins, row, "st.async", [move], signals=(key,), nbytes=total)
            operation.writes = [("shared", start, total)]
            machine.agents.issue(operation)


def _extent(tmap: tma.TensorMap) -> tuple[int, int]:
    """The first address of the whole tensor, and the one after its last."""
    sizes = zip(tmap.dims[1:], tmap.strides[1:], strict=True)
    last = tmap.base + sum((n - 1) * stride for n, stride in sizes)
    units = -(-tmap.dims[0] // tmap.element.unit)
    return tmap.base, last + units * tmap.element.stored
