"""Arrays of integers -> arrays of integers: bit fields, permutations, counts, dot products."""

from __future__ import annotations

from functools import cache, reduce

import numpy as np

from coda.sim.alu.opcodes import Array, Run, i8, i16, i32, i64, lanes, u8, u16, u32, u64

PERMUTATIONS = {
    # byte numbers of b:a for each low two bits of the selector, lowest byte of the result first
    "f4e": ((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)),
    "b4e": ((0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)),
    "rc8": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
    "ecl": ((0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)),
    "ecr": ((0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)),
    "rc16": ((0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)),
}


def shift16(join: Run) -> Run:
    """A shift of 16-bit values; the count has 32 bits."""
    return lambda a, n: join(a, np.minimum(n, u32(16)).astype(a.dtype))


def _byte(both: Array, number: Array) -> Array:
    return (both >> (number.astype(u64) << u64(3))).astype(u32) & u32(255)


@cache
def _copies(selector: int) -> tuple[tuple[type, int, int, int], ...]:
    """A permutation as copies (element type, index in the result, source operand, index in it)."""
    picks = [selector >> 4 * k & 15 for k in range(4)]
    out = []
    for k in (0, 2):
        first, second = picks[k], picks[k + 1]
        if first % 2 == 0 and second == first + 1:
            out.append((u16, k // 2, first // 4, first % 4 // 2))
        else:
            out += [(u8, n, picks[n] // 4, picks[n] % 4) for n in (k, k + 1)]
    return tuple(out)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: pick four bytes of b:a by the nibbles of the selector; bit 3 replicates the sign."""
    if not selector.ndim and not selector & 0x8888 and a.ndim and b.ndim:
        out = np.empty(np.broadcast_shapes(a.shape, b.shape), u32)
        for kind, to, source, at in _copies(int(selector)):
            step = 4 // np.dtype(kind).itemsize
            out.view(kind)[..., to::step] = (b if source else a).view(kind)[..., at::step]
        return out
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    out: Array = np.zeros((), u32)
    for k in range(4):
        pick = selector >> u32(4 * k)
        byte = _byte(both, pick & u32(7))
        sign = (byte >> u32(7)) * u32(255)
        out = out | (np.where(pick & u32(8), sign, byte) << u32(8 * k))
    return out


def permute_by(mode: str) -> Run:
    """prmt with a mode: the two low bits of the selector choose one of four permutations."""
    picks = np.array(PERMUTATIONS[mode], u32)

    def run(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(u64) | (b.astype(u64) << u64(32))
        row = selector & u32(3)
        out: Array = np.zeros((), u32)
        for k in range(4):
            out = out | (_byte(both, picks[:, k][row]) << u32(8 * k))
        return out

    return run


@cache
def _monomials(code: int) -> tuple[int, ...]:
    """A lop3 table as the AND terms (4: a, 2: b, 1: c) whose XOR it is."""
    values = [code >> k & 1 for k in range(8)]
    for bit in (1, 2, 4):
        values = [v ^ values[k ^ bit] if k & bit else v for k, v in enumerate(values)]
    return tuple(k for k, v in enumerate(values) if v)


def lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any boolean function of three bits: bit (4a + 2b + c) of the table, which is an immediate."""
    out: Array = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), u32)
    for k in _monomials(int(table.flat[0])):
        factors = [x for bit, x in ((4, a), (2, b), (1, c)) if k & bit]
        out ^= reduce(np.bitwise_and, factors) if factors else u32(0xFFFFFFFF)
    return out


def funnel(*, left: bool, wrap: bool) -> Run:
    """shf: shift the 64 bits b:a and keep the upper (left) or lower half."""

    def run(a: Array, b: Array, n: Array) -> Array:
        n = (n & u32(31) if wrap else np.minimum(n, u32(32))).astype(u64)
        both = a.astype(u64) | (b.astype(u64) << u64(32))
        if left:
            return ((both << n) >> u64(32)).astype(u32)
        return (both >> n).astype(u32)

    return run


def extract(a: Array, at: Array, length: Array) -> Array:
    """bfe: `length` bits of a from position `at`, sign extended for signed types."""
    width = a.dtype.itemsize * 8
    at, length = (at & u32(255)).astype(i64), (length & u32(255)).astype(i64)
    wide = a.astype(i64) if a.dtype.kind == "i" else a.astype(u64).view(i64)
    moved = np.right_shift(wide, np.minimum(at, i64(63)))
    if a.dtype.kind == "u":
        moved = np.right_shift(wide.view(u64), at.view(u64)).view(i64)
    # Shifting the field to the top and back drops the bits above it, or replicates its sign.
    kept = np.minimum(length, np.maximum(width - at, 1) if a.dtype.kind == "i" else i64(64))
    drop = np.maximum(64 - kept, 0)
    top = np.left_shift(moved, drop)
    back = np.right_shift(top, drop)
    if a.dtype.kind == "u":
        back = np.right_shift(top.view(u64), drop.view(u64)).view(i64)
    return np.where(length == 0, i64(0), back).astype(a.dtype)


def insert(a: Array, b: Array, at: Array, length: Array) -> Array:
    """bfi: `length` low bits of a put into b at position `at`."""
    kind = a.dtype.type
    at, length = (at & u32(255)).astype(kind), (length & u32(255)).astype(kind)
    ones = (np.left_shift(kind(1), length) - kind(1)).astype(kind)  # a shift by the width gives 0
    mask = np.left_shift(ones, at)
    return (b & ~mask) | (np.left_shift(a, at) & mask)


def leading_zeros(a: Array) -> Array:
    """clz: zero bits above the highest one bit; the width for zero."""
    width = a.dtype.itemsize * 8
    filled = a
    for step in (1, 2, 4, 8, 16, 32):
        if step < width:
            filled = filled | (filled >> a.dtype.type(step))
    return (width - np.bitwise_count(filled)).astype(u32)


def _without_sign(a: Array) -> Array:
    return np.where(a < 0, ~a, a).view(u32 if a.dtype == i32 else u64) if a.dtype.kind == "i" else a


def find(a: Array) -> Array:
    """bfind: position of the highest bit that is not the sign; all ones when there is none."""
    return u32(a.dtype.itemsize * 8 - 1) - leading_zeros(_without_sign(a))


def find_shift(a: Array) -> Array:
    """bfind.shiftamt: the left shift that brings that bit to the top."""
    count = leading_zeros(_without_sign(a))
    return np.where(count == a.dtype.itemsize * 8, u32(0xFFFFFFFF), count)


def reverse(a: Array) -> Array:
    """brev: the bits in opposite order."""
    kind = a.dtype.type
    width = a.dtype.itemsize * 8
    step = width // 2
    while step:
        mask = sum(((1 << step) - 1) << k for k in range(0, width, 2 * step))
        a = ((a >> kind(step)) & kind(mask)) | ((a & kind(mask)) << kind(step))
        step //= 2
    return a


def nth_set(mask: Array, base: Array, offset: Array) -> Array:
    """fns: position of the n-th set bit counted from `base`, downwards for a negative offset."""
    shape = np.broadcast_shapes(np.shape(mask), np.shape(base), np.shape(offset))
    wide, start, n = mask.astype(u64), base.astype(i64), offset.astype(i64)
    left = np.broadcast_to(np.maximum(np.abs(n), 1), shape).copy()
    step = np.where(n < 0, -1, 1)
    out = np.full(shape, 0xFFFFFFFF, u32)
    for k in range(32):
        at = start + step * k
        inside = (at >= 0) & (at < 32) & ((n != 0) | (k == 0))
        bit = inside & ((wide >> np.clip(at, 0, 31).astype(u64)) & u64(1)).astype(bool)
        out = np.where(bit & (left == 1), at.astype(u32), out)
        left = left - bit
    return out


def extend(*, wrap: bool) -> Run:
    """szext: the low n bits of a, extended to 32; n beyond that: a itself (clamp), or n % 32."""

    def run(a: Array, n: Array) -> Array:
        low = n & u32(31)
        shift = ((u32(32) - low) & u32(31)).astype(a.dtype)
        out = np.where(low == 0, a.dtype.type(0), np.right_shift(np.left_shift(a, shift), shift))
        return out if wrap else np.where(n >= 32, a, out)

    return run


def mask(*, wrap: bool) -> Run:
    """bmsk: `length` one bits from position `at`."""

    def run(at: Array, length: Array) -> Array:
        if wrap:
            at, length = at & u32(31), length & u32(31)
        length = np.minimum(length, u32(32))
        ones = np.left_shift(u64(1), length.astype(u64)) - u64(1)
        return np.left_shift(ones.astype(u32), at)

    return run


def dot(count: int, a_sign: str, b_sign: str, first: int) -> Run:
    """dp4a, dp2a: c plus the products of `count` parts of a with bytes of b from number `first`."""
    wide = {("u", 4): u8, ("s", 4): i8, ("u", 2): u16, ("s", 2): i16}[a_sign, count]
    narrow = u8 if b_sign == "u" else i8

    def run(a: Array, b: Array, c: Array) -> Array:
        x, y = lanes(a, wide).astype(i64), lanes(b, narrow).astype(i64)
        x = x.reshape(*x.shape[:-1], -1, count)
        y = y.reshape(*y.shape[:-1], -1, 4)[..., first : first + count]
        return (c.astype(i64) + (x * y).sum(-1)).astype(c.dtype)

    return run
