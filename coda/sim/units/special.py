"""Warp-level instructions (shfl, vote, match, redux, ...) -> functions on arrays [warps, 32].

`active` are the lanes that execute the instruction (None: all); `members` its membermask operand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.units.lanes import spread

Array = NDArray[Any]
u8, u16, u32, u64, i64, f32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int64, np.float32
LANE = np.arange(32, dtype=i64)[None, :]
BIT = (u64(1) << np.arange(32, dtype=u64)).astype(u32)[None, :]


def taking_part(active: Any, members: Array, shape: tuple[int, int]) -> Array:
    """Lanes that are active and named by the membermask, bool [warps, 32]."""
    named = spread((members & BIT) != 0, shape)
    return named if active is None else named & active


def bits(lanes: Array) -> Array:
    """Rows of 32 booleans as u32 [warps, 1], lane 0 in bit 0."""
    return np.packbits(lanes, axis=1, bitorder="little").view("<u4")


def shuffle(mode: str, shape: tuple[int, int], v: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """shfl.sync: (value of another lane, whether that lane is inside the segment)."""
    v = spread(v, shape)
    if mode == "bfly" and np.ndim(b) == 0 and np.ndim(c) == 0 and int(c) == 31:
        return v.take((LANE[0] ^ int(b)) & 31, axis=1), np.ones(shape, bool)
    b, c = np.asarray(b).astype(i64) & 31, np.asarray(c).astype(i64)
    clamp, segment = c & 31, (c >> 8) & 31
    low, high = LANE & segment, (LANE & segment) | (clamp & ~segment)
    if mode == "idx":
        source = low | (b & ~segment)
    elif mode == "bfly":
        source = LANE ^ b
    elif mode == "up":
        source = LANE - b
    else:
        source = LANE + b
    inside = (source >= high) if mode == "up" else (source <= high)
    source = np.where(inside, source, LANE)
    if source.shape[0] == 1:
        return v.take(source[0], axis=1), spread(inside, shape)
    return np.take_along_axis(v, spread(source, shape), 1), spread(inside, shape)


def vote(mode: str, active: Any, shape: tuple[int, int], p: Array, members: Array) -> Any:
    """vote.sync, [warps, 1]: all, any, uni as booleans, ballot as u32."""
    part = taking_part(active, members, shape)
    p = spread(p, shape)
    yes = p & part
    if mode == "ballot":
        return bits(yes)
    if mode == "any":
        return yes.any(1, keepdims=True)
    every = (p | ~part).all(1, keepdims=True)
    return every if mode == "all" else every | ~yes.any(1, keepdims=True)


def match_any(active: Any, shape: tuple[int, int], v: Array, members: Array) -> Array:
    """match.any.sync: for each lane the mask of the lanes with the same value."""
    part = taking_part(active, members, shape)
    v = spread(v, shape)
    same = (v[:, :, None] == v[:, None, :]) & part[:, None, :]
    return np.packbits(same, axis=2, bitorder="little").view("<u4")[..., 0]


def match_all(active: Any, shape: tuple[int, int], v: Array, members: Array) -> tuple[Array, Array]:
    """match.all.sync: the mask if all values are equal, else 0; and whether they are."""
    part = taking_part(active, members, shape)
    v = spread(v, shape)
    first = np.take_along_axis(v, part.argmax(1)[:, None], 1)
    equal = ((v == first) | ~part).all(1, keepdims=True)
    return np.where(equal, bits(part), u32(0)), equal


def elect(active: Any, shape: tuple[int, int], members: Array) -> tuple[Array, Array]:
    """elect.sync: the number of the lowest lane [warps, 1], and for each lane whether it is it."""
    if active is None and np.ndim(members) == 0 and members == u32(0xFFFFFFFF):
        return np.zeros((1, 1), u32), LANE == 0
    part = taking_part(active, members, shape)
    leader = part.argmax(1)[:, None].astype(u32)
    return leader, leader == LANE


_REDUCTIONS = {
    "add": (np.add, 0),
    "and": (np.bitwise_and, -1),
    "or": (np.bitwise_or, 0),
    "xor": (np.bitwise_xor, 0),
    "min": (np.minimum, None),
    "max": (np.maximum, None),
}


def reduce(
    mode: str, active: Any, shape: tuple[int, int], v: Array, members: Array, *, nan: bool = False
) -> Array:
    """redux.sync of integers or f32, [warps, 1]."""
    part = taking_part(active, members, shape)
    v = spread(v, shape)
    fold, neutral = _REDUCTIONS[mode]
    if v.dtype.kind == "f":
        worst = f32(-np.inf) if mode == "max" else f32(np.inf)
        if not nan:  # NaN only where every lane is one
            fold = np.fmax if mode == "max" else np.fmin
            worst = f32(np.nan)
        return fold.reduce(np.where(part, v, worst), axis=1, keepdims=True)
    if neutral is None:
        info = np.iinfo(v.dtype)
        neutral = info.max if mode == "min" else info.min
    filled = np.where(part, v, np.array(neutral).astype(v.dtype))
    return fold.reduce(filled, axis=1, keepdims=True, dtype=v.dtype)


def rows_to_fragments(rows: Array, *, transpose: bool) -> Array:
    """8x8 matrices of 16-bit elements [n, 8, 8] to one 32-bit register [n, 32]."""
    if transpose:
        rows = rows.transpose(0, 2, 1)
    return np.ascontiguousarray(rows).reshape(len(rows), 64).view(u32)


def fragments_to_rows(register: Array, *, transpose: bool) -> Array:
    """One 32-bit register [n, 32] to 8x8 matrices of 16-bit elements [n, 8, 8]."""
    rows = np.ascontiguousarray(register).view(u16).reshape(len(register), 8, 8)
    return np.ascontiguousarray(rows.transpose(0, 2, 1)) if transpose else rows


def fragment_bytes_to_columns(register: Array) -> Array:
    """stmatrix m16n8.trans.b8: a register [n, 32] of four bytes to the 8 stored rows of 16 bytes.

    Lane t holds rows t // 4 and t // 4 + 8 of columns 2 * (t % 4) and the next; the matrix is
    stored transposed.
    """
    pairs = np.ascontiguousarray(register).view(u8).reshape(len(register), 8, 4, 2, 2)
    return np.ascontiguousarray(pairs.transpose(0, 2, 4, 3, 1)).reshape(len(register), 8, 16)


def move_transposed(register: Array) -> Array:
    """movmatrix.trans of an 8x8 matrix of 16-bit elements."""
    return rows_to_fragments(fragments_to_rows(register, transpose=True), transpose=False)
