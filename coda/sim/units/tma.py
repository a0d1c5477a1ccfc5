"""Tensor map + coordinates -> the bytes that TMA moves, and their addresses.

The layout of the map is the one that ptxas writes for `tensormap.replace` (which it expands to
plain stores) and that host code of CuTe DSL fills in; bits that neither explains are refused.
A *dense* box is a contiguous array of bytes, dimension 0 fastest. Shared memory holds it swizzled;
`place` gives the offset of each 16-byte chunk of the dense box. Example: a box of 64 bf16 by 8 rows
is dense uint8 [8 * 128]; with a 128-byte swizzle, at a multiple of 1024 bytes, chunk c of row r is
at offset 128 r + 16 (c ^ r).

Elements out of bounds read as zero (or NaN) and count as moved bytes; they are never stored.
Element type tf32 rounds to nearest, ties away; f32 with flush loses subnormals; both only on loads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coda.sim.alu.floats import flush
from coda.sim.types import Fault, Unsupported

Array = NDArray
Mode = Literal["tile", "gather4"]
Coords = Sequence[int]
CHUNK = 16


@dataclass(frozen=True)
class Element:
    """A type: `unit` elements take `stored` bytes in global and `held` in shared memory."""

    name: str
    stored: int
    held: int
    unit: int = 1
    kind: str = "u"

    @property
    def dtype(self) -> np.dtype:
        """numpy type of one unit in global memory."""
        return np.dtype(f"{'u' if self.stored == self.held else 'V'}{self.stored}")

    @property
    def in_box(self) -> np.dtype:
        """numpy type of one unit in a dense box: the bytes of global memory, then padding."""
        if self.stored == self.held:
            return self.dtype
        packed = {"names": ["data"], "formats": [f"V{self.stored}"], "offsets": [0]}
        return np.dtype({**packed, "itemsize": self.held})  # type: ignore[call-overload]


def _same(name: str, size: int, kind: str = "u") -> Element:
    return Element(name, size, size, kind=kind)


# The four bits of the map, and bit 16, which rounds f32 to tf32.
ELEMENTS = {
    (0, 0): _same("u8", 1),
    (1, 0): _same("u16", 2),
    (2, 0): _same("u32", 4),
    (3, 0): _same("s32", 4, "i"),
    (4, 0): _same("u64", 8),
    (5, 0): _same("s64", 8, "i"),
    (6, 0): _same("f16", 2, "f"),
    (7, 0): _same("f32", 4, "f"),
    (8, 0): _same("f32.ftz", 4, "f"),
    (9, 0): _same("f64", 8, "f"),
    (10, 0): _same("bf16", 2, "f"),
    (7, 1): _same("tf32", 4, "f"),
    (8, 1): _same("tf32.ftz", 4, "f"),
    (11, 0): Element("b4x16", 1, 1, unit=2),
    (12, 0): Element("b4x16_p64", 8, 16, unit=16),
    (13, 0): Element("b6x16_p32", 12, 16, unit=16),
}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f64": 0x7FFFFFFFFFFFFFFF}
SPANS = {0: 0, 1: 32, 2: 64, 3: 128}
# Bits without effect on the data: promotion in L2 (17, 18), and bit 21.
HINTS = 1 << 17 | 1 << 18 | 1 << 21
KNOWN = 0xFFFF | 1 << 16 | HINTS | 3 << 19 | 1 << 22


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A tiled tensor map. Sizes, boxes and coordinates are in elements, strides in bytes.

    `counts` are the elements of a box per dimension: box / element stride, rounded up. `span` is
    the width of the swizzle in bytes (0: none) and `atom` the unit that it permutes.
    """

    base: int
    rank: int
    element: Element
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    span: int
    atom: int
    nan_fill: bool
    counts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        steps = zip(self.box, self.element_strides, strict=True)
        object.__setattr__(self, "counts", tuple(-(-b // s) for b, s in steps))
        self._check()

    def _check(self) -> None:
        unit = self.element.unit
        if self.base % CHUNK or any(s % CHUNK for s in self.strides[1:]):
            raise Fault(f"tensor map: base {self.base:#x} or strides {self.strides} not 16-aligned")
        if self.row_bytes % CHUNK or self.box[0] % unit:
            raise Fault(f"tensor map: rows of {self.row_bytes} bytes are no multiple of 16 bytes")
        if max(self.box) > 256:
            raise Fault(f"tensor map: box {self.box} has more than 256 elements in a dimension")
        if self.span and self.row_bytes > self.span:
            raise Fault(f"tensor map: rows of {self.row_bytes} bytes, swizzle of {self.span} bytes")
        if self.nan_fill and self.element.kind != "f":
            raise Fault(f"tensor map: NaN fill of {self.element.name}")

    @staticmethod
    def decode(raw: bytes) -> TensorMap:
        """Decode the first 64 of 128 bytes; Unsupported if an unknown bit is set."""
        return _decode(bytes(raw[:64]))

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row of the dense box."""
        return self.counts[0] // self.element.unit * self.element.held

    @cached_property
    def box_bytes(self) -> int:
        """Bytes of the dense box: a load adds them to the transaction count of its mbarrier."""
        return self.row_bytes * math.prod(self.counts[1:])

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense box as an array of units, dimension 0 last."""
        return (*self.counts[:0:-1], self.counts[0] // self.element.unit)


@lru_cache(4096)
def _decode(raw: bytes) -> TensorMap:
    words = [int(w) for w in np.frombuffer(raw, "<u4")]
    if len(words) != 16:
        raise Fault(f"a tensor map has 64 bytes, not {len(raw)}")
    flags, rank = words[2], (words[2] >> 4 & 7) + 1
    element = ELEMENTS.get((flags >> 7 & 15, flags >> 16 & 1))
    if flags & 15 != 2 or flags & ~KNOWN or words[15] or words[13] >> 15 & 0x1FF or rank > 5:
        raise Unsupported(f"a tensor map that is not tiled, or newer: flags {flags:#010x}")
    if element is None:
        raise Unsupported(f"tensor map: element type {flags >> 7 & 15}, flags {flags:#010x}")
    if flags >> 11 & 3:
        raise Unsupported("tensor map: interleaved layouts")
    if flags >> 22 & 1:
        raise Unsupported("tensor map: swizzle of 96 bytes")
    span, atomicity = SPANS[flags >> 13 & 3], flags >> 19 & 3
    if atomicity > 1 or (atomicity and span != 128):
        raise Unsupported(f"tensor map: swizzle atomicity {atomicity} at a width of {span} bytes")
    high = [words[7] >> 4 * i & 15 for i in range(4)]
    strides = [(words[3 + i] | high[i] << 32) << 4 for i in range(4)]
    box = [words[13] >> 24] + [words[14] >> 8 * i & 255 for i in range(4)]
    steps = [1] + [(words[13] >> 3 * i & 7) + 1 for i in range(1, 5)]
    return TensorMap(
        base=words[0] | words[1] << 32,
        rank=rank,
        element=element,
        dims=tuple(w + 1 for w in words[8 : 8 + rank]),
        strides=(element.stored, *strides[: rank - 1]),
        box=tuple(b + 1 for b in box[:rank]),
        element_strides=tuple(steps[:rank]),
        span=span,
        atom=32 if atomicity else CHUNK,
        nan_fill=bool(flags >> 15 & 1),
    )


class _Memory:
    """Memory of this process as a numpy array interface."""

    def __init__(
        self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], t: str
    ) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": t,
            "version": 3,
        }


Range = tuple[int, int]


class Part(NamedTuple):
    """The part of a box in bounds: a strided array of units in memory, its slices of the box."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    slices: tuple[slice, ...]

    @property
    def extent(self) -> Range:
        """Address range [first, end)."""
        beyond = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return self.address, self.address + beyond + self.strides[-1]


@lru_cache(1 << 14)
def _part(tmap: TensorMap, coords: tuple[int, ...]) -> Part | None:
    unit = tmap.element.unit
    if len(coords) != tmap.rank:
        raise Fault(f"{len(coords)} coordinates for a tensor of rank {tmap.rank}")
    if coords[0] % unit:
        raise Fault(f"coordinate {coords[0]} splits a group of {tmap.element.name} elements")
    address, shape, strides, slices = tmap.base, [], [], []
    for d in reversed(range(tmap.rank)):
        x, dim, step, count = coords[d], tmap.dims[d], tmap.element_strides[d], tmap.counts[d]
        if d == 0:
            x, dim, count = x // unit, -(-dim // unit), count // unit
        first, end = max(0, -(x // step)), min(count, -((x - dim) // step))
        if first >= end:
            return None
        address += (x + first * step) * tmap.strides[d]
        shape.append(end - first)
        strides.append(step * tmap.strides[d])
        slices.append(slice(first, end))
    # Ragged tensors are addressed around the end of memory, by large strides and indices.
    address &= (1 << 64) - 1
    return Part(address, tuple(shape), tuple(strides), tuple(slices))


def _view(tmap: TensorMap, part: Part) -> Array:
    dtype = tmap.element.dtype.str
    return np.asarray(_Memory(part.address, part.shape, part.strides, dtype))


def window(tmap: TensorMap, coords: Coords) -> tuple[Array, tuple[slice, ...]] | None:
    """(part in bounds of the box at `coords` as a view of memory, its slices of the box).

    The view has one item per unit of the element, dimension 0 last; the slices apply to a
    dense box of shape `tmap.shape`. None when the whole box is out of bounds.
    """
    part = _part(tmap, tuple(coords))
    return None if part is None else (_view(tmap, part), part.slices)


def global_extent(tmap: TensorMap, coords: Coords, mode: Mode = "tile") -> Range | None:
    """Address range [first, end) of the bytes in bounds; None if there are none."""
    found = [_part(tmap, tuple(one)) for one in parts(tmap, coords, mode)]
    extents = [part.extent for part in found if part is not None]
    if not extents:
        return None
    return min(e[0] for e in extents), max(e[1] for e in extents)


def global_rows(tmap: TensorMap, coords: Coords, mode: Mode = "tile") -> tuple[Array, int]:
    """(addresses of the contiguous runs in bounds, bytes of each run)."""
    starts, length = [], 0
    for one in parts(tmap, coords, mode):
        part = _part(tmap, tuple(one))
        if part is None:
            continue
        at = np.full(1, part.address, np.int64)
        for n, stride in zip(part.shape[:-1], part.strides[:-1], strict=True):
            at = (at[:, None] + np.arange(n, dtype=np.int64) * stride).ravel()
        starts.append(at)
        length = part.shape[-1] * part.strides[-1]
    return (np.concatenate(starts) if starts else np.zeros(0, np.int64)), length


def parts(tmap: TensorMap, coords: Coords, mode: Mode = "tile") -> list[Coords]:
    """Coordinates of the boxes that one instruction moves: four rows for gather4 and scatter4."""
    if mode == "tile":
        return [coords]
    if tmap.rank != 2 or tmap.box[1] != 1 or len(coords) != 5:
        raise Fault(f"gather4 wants rank 2, a box of one row and 5 coordinates: {tmap}, {coords}")
    return [(coords[0], row) for row in coords[1:]]


def moved_bytes(tmap: TensorMap, mode: Mode = "tile") -> int:
    """Bytes of shared memory that one instruction fills or reads."""
    return tmap.box_bytes * (4 if mode == "gather4" else 1)


def _in_bounds(tmap: TensorMap, dense: Array, slices: tuple[slice, ...]) -> Array:
    units = dense.view(tmap.element.in_box).reshape(tmap.shape)[slices]
    return units["data"] if tmap.element.stored != tmap.element.held else units


def _blank(tmap: TensorMap) -> Array:
    if not tmap.nan_fill:
        return np.zeros(tmap.box_bytes, np.uint8)
    pattern = NAN.get(tmap.element.name, 0x7FFFFFFF)
    count = tmap.box_bytes // tmap.element.held
    return np.full(count, pattern, tmap.element.dtype).view(np.uint8)


def _load(tmap: TensorMap, coords: Coords) -> Array:
    found = window(tmap, coords)
    if found is None:
        return _blank(tmap)
    view, slices = found
    if view.shape == tmap.shape and tmap.element.stored == tmap.element.held:
        dense = np.array(view, order="C", copy=True).reshape(-1).view(np.uint8)
    else:
        dense = _blank(tmap)
        _in_bounds(tmap, dense, slices)[...] = view
    return _converted(tmap.element.name, dense)


def _converted(name: str, dense: Array) -> Array:
    if not name.startswith("tf32") and name != "f32.ftz":
        return dense
    values = dense.view(np.float32)
    if name.endswith("ftz"):
        values = flush(values)
    if name.startswith("tf32"):
        bits = values.view(np.uint32)
        nearest = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        values = np.where(np.isfinite(values), nearest, bits)
    return np.ascontiguousarray(values).view(np.uint8)


def load_box(tmap: TensorMap, coords: Coords, mode: Mode = "tile") -> Array:
    """The dense box (uint8) at `coords`; for gather4 the four rows, stacked."""
    if mode == "tile":
        return _load(tmap, coords)
    return np.concatenate([_load(tmap, part) for part in parts(tmap, coords, mode)])


def store_box(tmap: TensorMap, coords: Coords, dense: Array, mode: Mode = "tile") -> None:
    """Write the part in bounds of a dense box to global memory."""
    for part, box in zip(parts(tmap, coords, mode), dense.reshape(-1, tmap.box_bytes), strict=True):
        found = window(tmap, part)
        if found is not None:
            found[0][...] = _in_bounds(tmap, box, found[1])


@lru_cache(1024)
def _places(base: int, nbytes: int, span: int, atom: int) -> Array:
    at = swizzled(np.arange(base, base + nbytes, CHUNK, dtype=np.int64), span, atom)
    at.flags.writeable = False
    return at


@lru_cache(1024)
def _lines(base: int, nbytes: int, span: int, atom: int) -> Array:
    return _places(base, nbytes, span, atom) >> 4


def swizzled(at: Array, span: int, atom: int = CHUNK) -> Array:
    """Offset after a swizzle of `span` bytes (0: none) of the byte at offset `at`.

    The number of the atom in a row of `span` bytes is xored with the number of the 128-byte line,
    modulo the atoms of a row: for 128 bytes, bits 4 to 6 with bits 7 to 9.
    """
    if not span:
        return at
    return at ^ ((at >> 7 & span // atom - 1) * atom)


def place(tmap: TensorMap, base: int, mode: Mode = "tile") -> Array:
    """Offsets in shared memory of the 16-byte chunks of the dense box that starts at `base`."""
    if base % 128:
        raise Fault(f"a box in shared memory must be 128-byte aligned, not at {base:#x}")
    return _places(base, moved_bytes(tmap, mode), tmap.span, tmap.atom)


def _shared(smem: Array, tmap: TensorMap, base: int, mode: Mode) -> tuple[Array, Array | slice]:
    nbytes = moved_bytes(tmap, mode)
    end = base + nbytes
    if base < 0 or end > smem.size:
        raise Fault(f"a box of bytes {base:#x} to {end:#x} in {smem.size:#x} of shared memory")
    if base % 128:
        raise Fault(f"a box in shared memory must be 128-byte aligned, not at {base:#x}")
    # 16-byte items: a gather of whole chunks is many times faster than one of bytes.
    lines = smem.view(np.complex128)
    if not tmap.span:
        return lines, slice(base >> 4, end >> 4)
    return lines, _lines(base, nbytes, tmap.span, tmap.atom)


def write_shared(
    smem: Array, tmap: TensorMap, base: int, dense: Array, mode: Mode = "tile"
) -> None:
    """Write a dense box at offset `base` of one CTA's shared memory (uint8 [16 * n])."""
    lines, at = _shared(smem, tmap, base, mode)
    lines[at] = dense.view(np.complex128)


def read_shared(smem: Array, tmap: TensorMap, base: int, mode: Mode = "tile") -> Array:
    """The dense box at offset `base` of one CTA's shared memory, a copy."""
    lines, at = _shared(smem, tmap, base, mode)
    return np.array(lines[at]).view(np.uint8)
