"""Tensor memory of a CTA, uint32[128 lanes, 512 columns]: `tcgen05.ld`, `.st`, `.cp`, `.shift`.

An address is lane << 16 | column. Warp w of a warpgroup accesses lanes 32 w to 32 w + 31. Register
r of thread t holds this element, relative to the address, for a shape repeated N times:
    32x32b    lane t                     column r
    16x64b    lane t/4 + 8 (t % 2)       column 2 r + t/2 % 2
    16x128b   lane t/4 + 8 (r % 2)       column 4 (r/2) + t % 4
    16x256b   lane t/4 + 8 (r/2 % 2)     column 8 (r/4) + 2 (t % 4) + r % 2
    16x32bx2  lane t % 16                column r, plus the split offset for t >= 16
With pack::16b (unpack::16b), instead of column c, the low halves of columns 2 c and 2 c + 1.

`shift` moves rows towards lane 0 (row i takes row i + 1), the last of 32 stays: the row that
`cp.4x256b` then refreshes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from coda.sim.tensorcore.operands import (
    chunk_offsets,
    fetch,
    lines_of,
    six_bit_codes,
    tcgen05_matrix,
)
from coda.sim.types import Fault, Unsupported

Array = NDArray
LANES, COLUMNS = 128, 512
MOVE = re.compile(
    r"tcgen05\.(ld|st)\.sync\.aligned\.(32x32b|16x64b|16x128b|16x256b|16x32bx2)"
    r"\.x(\d+)(\.(?:un)?pack::16b)?\.b32"
)
COPY = re.compile(
    r"tcgen05\.cp\.cta_group::([12])\.(\d+)x(128|256)b(\.warp\w+(?:::\d\d_\d\d)?)?"
    r"(?:\.b8x16\.(b4x16_p64|b6x16_p32))?"
)
SHIFT = re.compile(r"tcgen05\.shift\.cta_group::([12])\.down")
PER_REPEAT = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}
# (rows, multicast): the first lane of each copy of each piece of 32, 64 or 128 rows.
COPY_LANES: dict[tuple[int, str | None], list[tuple[int, int, int]]] = {
    # (first row of the source, rows, first lane)
    (128, None): [(0, 128, 0)],
    (4, None): [(i, 1, 32 * i) for i in range(4)],
    (32, ".warpx4"): [(0, 32, 32 * i) for i in range(4)],
    (64, ".warpx2::02_13"): [(0, 64, 0), (0, 64, 64)],
    (64, ".warpx2::01_23"): [(0, 32, 0), (0, 32, 32), (32, 32, 64), (32, 32, 96)],
}


def split(address: int) -> tuple[int, int]:
    """Lane and column of an address in tensor memory."""
    lane, column = address >> 16, address & 0xFFFF
    if lane >= LANES or column >= COLUMNS:
        raise Fault(f"tensor memory has no lane {lane}, column {column}")
    return lane, column


@dataclass(frozen=True)
class Move:
    """A load from or store to tensor memory; `registers` of one thread."""

    load: bool
    shape: str
    repeat: int
    packed: bool

    @property
    def registers(self) -> int:
        return PER_REPEAT[self.shape] * self.repeat


@lru_cache(256)
def parse_move(op: str) -> Move:
    """The static part of `tcgen05.ld` or `tcgen05.st`."""
    match = MOVE.fullmatch(op)
    if match is None or (match[4] is not None and ("un" in match[4]) != (match[1] == "st")):
        raise Unsupported(f"tensor memory: {op}")
    form = Move(match[1] == "ld", match[2], int(match[3]), match[4] is not None)
    if form.repeat not in (1, 2, 4, 8, 16, 32, 64, 128) or form.registers > 128:
        raise Unsupported(f"tensor memory: {op}")
    return form


@lru_cache(256)
def _places(shape: str, registers: int, packed: bool, split_offset: int) -> tuple[Array, Array]:
    r, t = np.arange(registers)[:, None], np.arange(32)[None, :]
    match shape:
        case "32x32b":
            lane, column = t + 0 * r, r + 0 * t
        case "16x64b":
            lane, column = t // 4 + 8 * (t % 2) + 0 * r, 2 * r + t // 2 % 2
        case "16x128b":
            lane, column = t // 4 + 8 * (r % 2), 4 * (r // 2) + t % 4
        case "16x256b":
            lane, column = t // 4 + 8 * (r // 2 % 2), 8 * (r // 4) + 2 * (t % 4) + r % 2
        case _:
            lane, column = t % 16 + 0 * r, r + 0 * t
    column = column * (2 if packed else 1)
    return lane, column + split_offset * (t // 16) if shape == "16x32bx2" else column


@lru_cache(256)
def _width(shape: str, registers: int, packed: bool, split_offset: int) -> int:
    """Columns from the first to the last that a move accesses."""
    return int(_places(shape, registers, packed, split_offset)[1].max()) + 1 + packed


def _corner(form: Move, address: int, warp: int, split_offset: int) -> tuple[int, int]:
    """Lane and column of an address; Fault if warp `warp` may not access the whole shape there."""
    lane, column = split(address)
    first = 32 * (warp % 4)
    height = 32 if form.shape == "32x32b" else 16
    if not first <= lane or lane + height > first + 32 or lane % 16:
        raise Fault(f"tensor memory: warp {warp} reaches lanes {first} to {first + 31}, not {lane}")
    end = column + _width(form.shape, form.registers, form.packed, split_offset)
    if end > COLUMNS:
        raise Fault(f"tensor memory: column {end - 1} of {COLUMNS}")
    return lane, column


def move_places(form: Move, address: int, warp: int, split_offset: int = 0) -> tuple[Array, Array]:
    """Lane and column of each register and thread, [registers, 32]; packed: of the low half.

    `warp` is the number of the warp in its CTA. Raises Fault if it may not access a lane.
    """
    lane, column = _corner(form, address, warp, split_offset)
    lanes, columns = _places(form.shape, form.registers, form.packed, split_offset)
    return lanes + lane, columns + column


def load(form: Move, tmem: Array, address: int, warp: int, split_offset: int = 0) -> Array:
    """The registers that a warp loads, uint32 [registers, 32]."""
    if form.shape == "32x32b" and not form.packed:
        lane, column = _corner(form, address, warp, 0)
        return tmem[lane : lane + 32, column : column + form.registers].T.copy()
    lanes, columns = move_places(form, address, warp, split_offset)
    if not form.packed:
        return tmem[lanes, columns]
    low, high = tmem[lanes, columns], tmem[lanes, columns + 1]
    return (low & np.uint32(0xFFFF)) | high << np.uint32(16)


def store(
    form: Move, tmem: Array, address: int, warp: int, values: Array, split_offset: int = 0
) -> None:
    """Write the registers of a warp, uint32 [registers, 32], to tensor memory in place."""
    if form.shape == "32x32b" and not form.packed:
        lane, column = _corner(form, address, warp, 0)
        tmem[lane : lane + 32, column : column + form.registers] = values.T
        return
    lanes, columns = move_places(form, address, warp, split_offset)
    if form.packed:
        tmem[lanes, columns] = values & np.uint32(0xFFFF)
        tmem[lanes, columns + 1] = values >> np.uint32(16)
    else:
        tmem[lanes, columns] = values


@dataclass(frozen=True)
class Copy:
    """A copy from shared to tensor memory: `rows` of `row_bytes`, replicated to several lanes."""

    ctas: int
    rows: int
    row_bytes: int
    multicast: str | None
    unpack: str | None


@lru_cache(64)
def parse_copy(op: str) -> Copy:
    """The static part of `tcgen05.cp`."""
    match = COPY.fullmatch(op)
    if match is None:
        raise Unsupported(f"tensor memory: {op}")
    form = Copy(int(match[1]), int(match[2]), int(match[3]) // 8, match[4], match[5])
    known = (form.rows, form.multicast) in COPY_LANES
    wide = {4: (32,), 128: (16, 32)}.get(form.rows, (16,))
    if not known or form.row_bytes not in wide:
        raise Unsupported(f"tensor memory: {op}")
    return form


def copy_offsets(form: Copy, descriptor: int) -> Array:
    """Byte offsets in shared memory of the chunks that a copy reads, [rows, chunks]."""
    return chunk_offsets(tcgen05_matrix(descriptor), form.rows, form.row_bytes)


def copy_lanes(form: Copy, address: int) -> list[tuple[int, int, int]]:
    """(first row of the source, rows, first lane) of each piece that a copy writes."""
    lane, column = split(address)
    if column + form.row_bytes // 4 > COLUMNS:
        raise Fault(f"tensor memory: a copy to column {column}")
    pieces = COPY_LANES[form.rows, form.multicast]
    if lane + max(first + rows for _, rows, first in pieces) > LANES:
        raise Fault(f"tensor memory: a copy of {form.rows} rows to lane {lane}")
    return [(row, rows, lane + first) for row, rows, first in pieces]


def _decompressed(raw: Array, source: str) -> Array:
    """One element to a byte; the four bits of a 4-bit element become bits 2 to 5."""
    if source == "b6x16_p32":
        return six_bit_codes(raw)
    packed = raw.reshape(raw.shape[0], -1, 16)[..., :8]
    codes = np.stack([packed & 15, packed >> 4], -1)
    return (codes << 2).reshape(raw.shape)


def copy(
    form: Copy, smems: Sequence[Array], tmems: Sequence[Array], address: int, descriptor: int
) -> None:
    """Copy from the shared memory of each CTA of the group to its tensor memory."""
    lines = lines_of(copy_offsets(form, descriptor))
    column = split(address)[1]
    for smem, tmem in zip(smems, tmems, strict=True):
        raw = fetch(smem, lines)
        words = (_decompressed(raw, form.unpack) if form.unpack else raw).view(np.uint32)
        for row, rows, lane in copy_lanes(form, address):
            tmem[lane : lane + rows, column : column + words.shape[1]] = words[row : row + rows]


def parse_shift(op: str) -> int:
    """The number of CTAs of `tcgen05.shift`."""
    match = SHIFT.fullmatch(op)
    if match is None:
        raise Unsupported(f"tensor memory: {op}")
    return int(match[1])


def shift(tmems: Sequence[Array], address: int) -> None:
    """Move 31 rows of 32 bytes by one lane towards lane 0 in the tensor memory of each CTA."""
    lane, column = split(address)
    if lane % 32 or column + 8 > COLUMNS:
        raise Fault(f"tensor memory: shift at lane {lane}, column {column}")
    for tmem in tmems:
        rows = tmem[lane : lane + 32, column : column + 8]
        rows[:-1] = rows[1:].copy()
