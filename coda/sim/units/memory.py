"""Addresses of lanes -> loads and stores in shared memory and in the memory of this process.

Shared memory of all resident CTAs is one array, a window of 256 KiB for each CTA; the first 1024
bytes of a window belong to the system, as on hardware. A shared address is
`rank << 24 | offset`, the rank being that of the CTA in its cluster; a generic address of shared
memory has bit 62 set. No byte outside the allocations of a launch is ever accessed.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.parse import Instruction
from coda.sim.types import Allocations
from coda.sim.units.lanes import spread

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
u8, u16, u32, u64, i64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int64
RESERVED = 1024
WINDOW_BITS = 18
WINDOW = 1 << WINDOW_BITS
RANK = 24
OFFSET = (1 << RANK) - 1
GENERIC = 1 << 62
GRANULE: dict[int, str] = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4, 32: 5}


def _elements(gathered: Array, size: int, count: int) -> Array:
    """The elements of gathered granules, along a new first axis when there are several."""
    if count == 1:
        return gathered
    elements = np.ascontiguousarray(gathered)[..., None].view(f"u{size}")
    return np.ascontiguousarray(elements.transpose(2, 0, 1))


def _granules(values: list[Array], size: int, shape: tuple[int, ...]) -> Array:
    """Vector elements -> granules of up to 16 bytes, [*shape, 1]; 32 bytes: [*shape, 2]."""
    packed = np.empty((*shape, len(values)), f"u{size}")
    for k, value in enumerate(values):
        packed[..., k] = value
    total = size * len(values)
    return packed.view(GRANULE[min(total, 16)])


def _read(views: Any, index: Array, size: int, count: int) -> Array:
    """Gather `count` elements of `size` bytes per lane.

    `index` counts vectors in the view of their bytes; those of 32 bytes are two of 16.
    """
    total = size * count
    if total == 32:
        wide = np.stack([views[16][index], views[16][index + 1]], -1)
        return np.ascontiguousarray(wide.view(f"u{size}").transpose(2, 0, 1))
    return _elements(views[total][index], size, count)


def _write(
    views: Any, index: Array, m: Any, values: list[Any], size: int, shape: tuple[int, int]
) -> None:
    """Scatter the vector `values` of each active lane; `index` as in `_read`."""
    total = size * len(values)
    if len(values) == 1:
        granules = spread(values[0], shape)
    else:
        granules = _granules(values, size, shape)
        if total < 32:
            granules = granules[..., 0]
    if m is not None:
        index, granules = index[m], granules[m]
    if total == 32:
        views[16][index] = granules[..., 0]
        views[16][index + 1] = granules[..., 1]
    else:
        views[total][index] = granules


class SharedMemory:
    """Shared memory of the resident CTAs."""

    def __init__(self, machine: Machine, ctas: int, limit: int) -> None:
        self.machine, self.limit = machine, limit
        self.cluster = machine.geometry.cluster_size
        self.data = np.full(ctas * WINDOW, 0xFF, u8)
        self.windows = self.data.reshape(ctas, WINDOW)
        self.views = {n: self.data.view(t) for n, t in GRANULE.items()}
        first = np.arange(ctas) // self.cluster * self.cluster * WINDOW
        base = np.tile(first, machine.geometry.warps_per_cta)[:, None] + np.zeros((1, 32), i64)
        self.base = base
        self.shifted = {k: (base + RESERVED) >> k for k in range(6)}

    def index(
        self, ins: Instruction, g: Any, m: Any, a: Array, offset: int, total: int
    ) -> tuple[Array, Any]:
        """Indices of granules of `total` bytes, checked; inactive lanes get granule 0."""
        shift = SHIFT[total]
        x = (a if a.dtype == u32 else a.astype(u32)) + u32(offset & 0xFFFFFFFF)
        rank = None
        inside = x
        if self.cluster > 1:
            rank = x >> u32(RANK)
            inside = x & u32(OFFSET)
        at = inside - u32(RESERVED)
        if shift:  # low bits of a misaligned address become the highest, and fail the bound
            at = (at >> u32(shift)) | (at << u32(32 - shift))
        if m is not None:
            at = np.where(m, at, u32(0))
            rank = None if rank is None else np.where(m, rank, u32(0))
        bad = at.max() > ((self.limit - RESERVED - total) >> shift)
        if bad or (rank is not None and rank.max() >= self.cluster):
            self.refuse(ins, g, m, x, total)
        index = at + self.shifted[shift][g]
        if rank is not None:
            index = index + (rank.astype(i64) << (WINDOW_BITS - shift))
        return index, x

    def refuse(self, ins: Instruction, g: Any, m: Any, x: Array, total: int) -> None:
        """Raise for the first lane whose access is out of bounds or misaligned."""
        x = spread(x, self.machine.shape)
        active = np.ones(self.machine.shape, bool) if m is None else m
        for k, lane in zip(*np.nonzero(active), strict=True):
            at = int(x[k, lane])
            rank, inside = at >> RANK, at & OFFSET
            where = f"shared address {at:#x} ({total} bytes)"
            if rank >= self.cluster or not RESERVED <= inside <= self.limit - total:
                what = f"{where} outside the {self.limit} bytes of a CTA of {self.cluster}"
                self.machine.fault(ins, "out-of-bounds", what, g, int(k), at)
            if inside % total:
                self.machine.fault(ins, "misaligned", where, g, int(k), at)
        raise AssertionError("a check refused an access that is right")

    def load(
        self, ins: Instruction, g: Any, m: Any, a: Array, offset: int, *, size: int, count: int
    ) -> Array:
        """`count` elements of `size` bytes per lane, [warps, 32] or [count, warps, 32]."""
        total = size * count
        index, _ = self.index(ins, g, m, a, offset, total)
        if self.machine.observer is not None:
            self.machine.saw_shared(ins, g, m, index << SHIFT[total], total, write=False)
        return _read(self.views, 2 * index if total == 32 else index, size, count)

    def store(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        a: Array,
        offset: int,
        values: list[Any],
        *,
        size: int,
    ) -> None:
        """Store the vector `values` of each active lane."""
        if m is not None and not m.any():
            return
        total = size * len(values)
        index, _ = self.index(ins, g, m, a, offset, total)
        machine = self.machine
        if machine.observer is not None:
            machine.saw_shared(ins, g, m, index << SHIFT[total], total, write=True)
        machine.progress += 1
        index = spread(2 * index if total == 32 else index, machine.shape)
        _write(self.views, index, m, values, size, machine.shape)

    def locate(self, row: int, address: int) -> int:
        """Byte index in `data` of a shared address as warp `row` sees it."""
        return int(self.base[row, 0]) + (address >> RANK) * WINDOW + (address & OFFSET)

    def span(self, ins: Instruction, row: int, address: int, nbytes: int, align: int) -> int:
        """As `locate`, for a range of `nbytes`; Fault unless aligned and inside one CTA."""
        address &= 0xFFFFFFFF
        inside = address & OFFSET
        where = f"shared address {address:#x} ({nbytes} bytes)"
        if address >> RANK >= self.cluster or inside < RESERVED or inside + nbytes > self.limit:
            what = f"{where} outside the {self.limit} bytes of a CTA of {self.cluster}"
            self.machine.fault(ins, "out-of-bounds", what, row, None, address)
        if inside % align:
            what = f"{where}, which must be a multiple of {align}"
            self.machine.fault(ins, "misaligned", what, row, None, address)
        return self.locate(row, address)


class _Everything:
    """All memory of this process above its first 64 bytes, as a numpy array interface."""

    def __init__(self, typestr: str, itemsize: int) -> None:
        self.__array_interface__ = {
            "data": (64, False),
            "shape": ((1 << 47) // itemsize - 64 // itemsize,),
            "typestr": typestr,
            "version": 3,
        }


class Global:
    """Global memory: this process's own, within the allocations."""

    def __init__(self, machine: Machine, allocations: Allocations) -> None:
        self.machine = machine
        self.views = {n: np.asarray(_Everything(np.dtype(t).str, n)) for n, t in GRANULE.items()}
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.names: list[str] = []
        for base, nbytes, name in allocations:
            self.add(base, nbytes, name)

    def add(self, base: int, nbytes: int, name: str) -> None:
        """Allow [base, base + nbytes); called in order of base; ranges may overlap."""
        if self.starts and base < self.ends[-1]:
            self.ends[-1] = max(self.ends[-1], base + nbytes)
        else:
            k = bisect_right(self.starts, base)
            self.starts.insert(k, base)
            self.ends.insert(k, base + nbytes)
            self.names.insert(k, name)

    def holds(self, low: int, high: int) -> bool:
        """Whether one allocation holds [low, high)."""
        k = bisect_right(self.starts, low) - 1
        return k >= 0 and high <= self.ends[k]

    def check(self, ins: Instruction, g: Any, m: Any, a: Array, total: int) -> int:
        """Raise Fault for an access out of bounds or misaligned; return one valid address."""
        active = a if m is None else spread(a, self.machine.shape)[m]
        low, high = int(active.min()), int(active.max())
        aligned = total == 1 or not int(np.bitwise_or.reduce(active, axis=None)) & (total - 1)
        if not (aligned and self.holds(low, high + total)):
            self.refuse(ins, g, m, a, total)
        return low

    def refuse(self, ins: Instruction, g: Any, m: Any, a: Array, total: int) -> None:
        """Check lane by lane (lanes may access several allocations); raise Fault for a bad one."""
        a = spread(a, self.machine.shape)
        active = np.ones(self.machine.shape, bool) if m is None else m
        for k, lane in zip(*np.nonzero(active), strict=True):
            at = int(a[k, lane])
            where = f"global address {at:#x} ({total} bytes)"
            if not self.holds(at, at + total):
                what = f"{where} outside every allocation{self.near(at)}"
                self.machine.fault(ins, "out-of-bounds", what, g, int(k), at)
            if at % total:
                self.machine.fault(ins, "misaligned", where, g, int(k), at)

    def near(self, address: int) -> str:
        """Describe the allocation next to an address, for a message."""
        k = bisect_right(self.starts, address) - 1
        if k >= 0 and address - self.ends[k] < 1 << 20:
            past = address - self.ends[k]
            return f", {past} bytes after the end of {self.names[k]}"
        if k + 1 < len(self.starts) and self.starts[k + 1] - address < 1 << 20:
            return f", {self.starts[k + 1] - address} bytes before {self.names[k + 1]}"
        return ""

    def load(
        self, ins: Instruction, g: Any, m: Any, a: Array, offset: int, *, size: int, count: int
    ) -> Array:
        """`count` elements of `size` bytes per lane, [warps, 32] or [count, warps, 32]."""
        total = size * count
        a = np.asarray(a, u64) + u64(offset & 0xFFFFFFFFFFFFFFFF)
        if np.ndim(a) == 0:
            a = spread(a, self.machine.shape)
        if m is not None:
            if not m.any():
                shape = self.machine.shape
                return np.zeros((count, *shape) if count > 1 else shape, f"u{size}")
            a = np.where(m, a, u64(self.check(ins, g, m, a, total)))
        else:
            self.check(ins, g, None, a, total)
        if self.machine.observer is not None:
            self.machine.saw_global(ins, g, m, a, total, write=False)
        index = ((a - u64(64)) >> u64(SHIFT[min(total, 16)])).astype(i64)
        return _read(self.views, index, size, count)

    def store(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        a: Array,
        offset: int,
        values: list[Any],
        *,
        size: int,
    ) -> None:
        """Store the vector `values` of each active lane."""
        if m is not None and not m.any():
            return
        total = size * len(values)
        machine = self.machine
        a = np.asarray(a, u64) + u64(offset & 0xFFFFFFFFFFFFFFFF)
        self.check(ins, g, m, a, total)
        if machine.observer is not None:
            machine.saw_global(ins, g, m, a, total, write=True)
        machine.progress += 1
        index = ((spread(a, machine.shape) - u64(64)) >> u64(SHIFT[min(total, 16)])).astype(i64)
        _write(self.views, index, m, values, size, machine.shape)

    def span(self, ins: Instruction, row: int, low: int, high: int) -> None:
        """Raise Fault unless one allocation holds the range [low, high)."""
        if not self.holds(low, high):
            what = f"global addresses {low:#x} to {high:#x} outside every allocation"
            self.machine.fault(ins, "out-of-bounds", what + self.near(low), row, None, low)


class Generic:
    """Generic addresses: bit 62 set means shared memory."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def _halves(self, m: Any, a: Array, offset: int) -> tuple[Array, Any, Any]:
        a = spread(np.asarray(a, u64) + u64(offset & (2**64 - 1)), self.machine.shape)
        shared = (a & u64(GENERIC)) != 0
        active = np.ones(self.machine.shape, bool) if m is None else m
        return a, shared & active, ~shared & active

    def load(
        self, ins: Instruction, g: Any, m: Any, a: Array, offset: int, *, size: int, count: int
    ) -> Array:
        """As `load` of SharedMemory or Global, selected per lane."""
        a, shared, other = self._halves(m, a, offset)
        out = self.machine.memory.load(ins, g, other, a, 0, size=size, count=count)
        if shared.any():
            inside = self.machine.shared.load(ins, g, shared, a, 0, size=size, count=count)
            out = np.where(shared, inside, out)
        return out

    def store(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        a: Array,
        offset: int,
        values: list[Any],
        *,
        size: int,
    ) -> None:
        """As `store` of SharedMemory or Global, selected per lane."""
        a, shared, other = self._halves(m, a, offset)
        self.machine.memory.store(ins, g, other, a, 0, values, size=size)
        self.machine.shared.store(ins, g, shared, a, 0, values, size=size)
