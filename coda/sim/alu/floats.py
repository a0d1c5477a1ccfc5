"""Arrays of floats -> arrays of floats in other formats and roundings: f32, 16, 8, 6 and 4 bits.

A narrow format is declared once, by its widths and special values; one function encodes into any
of them. Common operations (bf16, f16, fma) have a faster path with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from coda.sim.alu.opcodes import Array, Run, f16, f32, f64, i32, i64, u8, u16, u32, u64

_TINY = {np.dtype(x): np.array(np.finfo(x).tiny, x) for x in (f16, f32, f64)}
# Constants of hot functions are 0-d arrays: ufuncs convert them faster than numpy scalars.
_ONE, _16 = np.array(1, u32), np.array(16, u32)
_18, _EVEN, _REST = np.array(18, u32), np.array(0x3FFE, u32), np.array(0x7FFFF, u32)
_HALF, _HIGH = np.array(0x7FFF, u32), np.array(0xFFFF0000, u32)
_BELOW, _TIE = np.array(0x1FFFFFFF, u64), np.array(0x10000000, u64)
_SMALL = np.array(2.0**-125, f64)
_31, _UNIT = np.array(31, i32), np.array(1, i32)


def flush(x: Array) -> Array:
    """Subnormal values to zero of the same sign (`.ftz`)."""
    tiny = np.abs(x) < _TINY[x.dtype]
    return np.where(tiny, np.copysign(x.dtype.type(0), x), x) if np.count_nonzero(tiny) else x


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The sum rounded to nearest, and its exact error (a NaN if it overflows)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def to_odd(total: Array, error: Array) -> Array:
    """total + error (|error| <= ulp/2) truncated, with the last bit set if that was not exact.

    A value rounded to odd can be rounded again, to fewer bits, as if it were exact.
    """
    bits = np.ascontiguousarray(total).view(i64)
    past = (error != 0) & ((error < 0) != (total < 0))  # the rounding went away from zero
    odd = np.where(error != 0, (bits - past) | i64(1), bits).view(f64)
    return np.where(np.isfinite(total), odd, total)


def steer(near: Array, gap: Array, mode: str) -> Array:
    """The neighbour of `near` in rounding `mode`; `gap` has the sign of near - exact."""
    kind = near.dtype.type
    down, up = np.nextafter(near, kind(-np.inf)), np.nextafter(near, kind(np.inf))
    floor, ceil = np.where(gap > 0, down, near), np.where(gap < 0, up, near)
    if mode == "rz":
        return np.where(np.signbit(near), ceil, floor)
    return floor if mode == "rm" else ceil


def to_f32(x: Array, mode: str = "rn") -> Array:
    """f64 values rounded to f32."""
    near = x.astype(f32)
    if mode == "rn":
        return near
    return np.where(np.isfinite(x), steer(near, near.astype(f64) - x, mode), near)


def sum_rounded(a: Array, b: Array, mode: str) -> Array:
    """The exact sum of two f64 arrays, rounded once to f32."""
    total, error = two_sum(a, b)
    out = to_f32(to_odd(total, error), mode)
    if mode == "rm":  # a sum that cancels is -0, unless both are +0
        cancels = (total == 0) & ~((a == 0) & (b == 0) & ~np.signbit(a) & ~np.signbit(b))
        out = np.where(cancels, f32(-0.0), out)
    return out


def add_rounded(a: Array, b: Array, mode: str) -> Array:
    """a + b in f32, rounded once by `mode`, by correcting the nearest result by one ulp."""
    near, error = two_sum(a, b)
    if mode == "rn":
        return near
    if np.count_nonzero(error != error) or np.count_nonzero(near == 0):
        return sum_rounded(a.astype(f64), b.astype(f64), mode)  # overflow, or a zero's sign
    bits = near.view(i32)
    outward = (bits >> _31) | _UNIT  # step of the bits that moves the value towards +infinity
    if mode == "rm":
        return (bits - outward * (error < 0)).view(f32)
    if mode == "rp":
        return (bits + outward * (error > 0)).view(f32)
    return (bits - (((error < 0) ^ (near < 0)) & (error != 0))).view(f32)


def mul_rounded(a: Array, b: Array, mode: str) -> Array:
    """a * b in f32, rounded once; the product of two f32 values is exact in f64."""
    return a * b if mode == "rn" else to_f32(a.astype(f64) * b.astype(f64), mode)


def div_rounded(a: Array, b: Array, mode: str) -> Array:
    """a / b in f32, rounded once."""
    near = a / b
    if mode == "rn":
        return near
    wide = b.astype(f64)
    left = near.astype(f64) * wide - a.astype(f64)  # exact enough for its sign
    exact = ~np.isfinite(a) | ~np.isfinite(b) | (b == 0)
    return np.where(exact, near, steer(near, np.where(wide < 0, -left, left), mode))


def sqrt_rounded(x: Array, mode: str) -> Array:
    """The square root in f32, rounded once."""
    near = np.sqrt(x)
    if mode == "rn":
        return near
    gap = near.astype(f64) * near - x.astype(f64)
    return np.where(np.isfinite(near) & (x != 0), steer(near, gap, mode), near)


def fma_rounded(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """a * b + c in f32 with one rounding.

    Rounding the f64 sum is exact unless it is a tie of f32 or in the range of f32 subnormals.
    """
    product = a.astype(f64) * b.astype(f64)
    wide = c.astype(f64)
    if mode != "rn":
        return sum_rounded(product, wide, mode)
    total = product + wide
    tie = (total.view(u64) & _BELOW) == _TIE
    tiny = np.abs(total) < _SMALL
    if np.count_nonzero(tie) or np.count_nonzero(tiny):
        total, error = two_sum(product, wide)
        if np.count_nonzero((error != 0) & (tie | tiny)):
            total = to_odd(total, error)
    return total.astype(f32)


def to_bf16(x: Array, mode: str = "rn") -> Array:
    """Bits (u16) of f32 values rounded to bf16, to nearest or to zero; a NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(x).view(u32)
    if mode == "rn":
        rounded = bits >> _16
        rounded &= _ONE
        rounded += _HALF
        rounded += bits
    else:
        rounded = bits
    nan = x != x
    out = (rounded >> _16).astype(u16)
    return np.where(nan, u16(0x7FFF), out) if np.count_nonzero(nan) else out


def to_bf16x2(high: Array, low: Array) -> Array:
    """Two f32 arrays rounded to nearest bf16 and packed into 32 bits."""
    if not (high.ndim and low.ndim):
        return (to_bf16(high).astype(u32) << _16) | to_bf16(low)
    total = high + low
    if np.count_nonzero(total != total):  # perhaps a NaN
        return (to_bf16(high).astype(u32) << _16) | to_bf16(low)
    top, bottom = high.view(u32), low.view(u32)
    out, other = top >> _16, bottom >> _16
    out &= _ONE
    other &= _ONE
    out += _HALF
    other += _HALF
    out += top
    other += bottom
    out &= _HIGH
    other >>= _16
    out |= other
    return out


@cache
def _codes(name: str) -> Array:
    """Table of codes (u32) by the upper 13 bits of an f32 and whether any lower bit is set.

    These decide a rounding to nearest: with at most 3 mantissa bits the fourth is the half.
    """
    index = np.arange(1 << 14, dtype=u32)
    return encode(((index >> _ONE) << u32(19) | (index & _ONE)).view(f32), name, finite=True)


def to_narrow(x: Array, name: str) -> Array:
    """encode(x, name, finite=True) of f32 values, by a table; for formats of at most 8 bits."""
    bits = x.view(u32)
    index = (bits >> _18) & _EVEN
    index |= (bits & _REST) != 0
    return _codes(name)[index]


def from_bf16(bits: Array) -> Array:
    """The f32 values of bf16 bits."""
    return (bits.astype(u32) << _16).view(f32)


def to_f16(x: Array) -> Array:
    """Bits (u16) of f32 or f64 values rounded to f16; a NaN becomes 0x7fff."""
    out = x.astype(f16).view(u16)
    nan = x != x
    return np.where(nan, u16(0x7FFF), out) if np.count_nonzero(nan) else out


def to_tf32(x: Array, mode: str = "rna", *, finite: bool = False) -> Array:
    """f32 bits (u32) with the mantissa rounded to 10 bits; a NaN becomes 0x7fffffff."""
    return np.where(x == x, encode(x, "tf32", mode, finite=finite) << u32(13), u32(0x7FFFFFFF))


def from_f16(bits: Array) -> Array:
    """The f32 values of f16 bits."""
    return bits.view(f16).astype(f32)


@dataclass(frozen=True)
class Format:
    """A binary format: widths of exponent and mantissa, and which codes are not finite values."""

    name: str
    exponent: int
    mantissa: int
    infinity: bool = False  # the top exponent holds infinity and NaN, as in IEEE formats
    nan: bool = False  # only the code of all ones is a NaN

    @property
    def bias(self) -> int:
        """The exponent field minus the exponent."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def sign(self) -> int:
        """The place of the sign bit."""
        return self.exponent + self.mantissa

    @property
    def ones(self) -> int:
        """The code without a sign whose bits are all set: the canonical NaN, if there is one."""
        return (1 << self.sign) - 1

    @property
    def largest(self) -> int:
        """The code of the largest finite value."""
        if self.infinity:
            return self.ones - (1 << self.mantissa)
        return self.ones - self.nan

    def value(self, code: int) -> float:
        """The value of a code without its sign bit."""
        if code > self.largest:
            return float("inf") if code == self.largest + 1 and self.infinity else float("nan")
        power, fraction = divmod(code, 1 << self.mantissa)
        hidden = 1 << self.mantissa if power else 0
        return (fraction + hidden) * 2.0 ** (max(power, 1) - self.bias - self.mantissa)


FORMATS = {
    form.name: form
    for form in (
        Format("f16", 5, 10, infinity=True),
        Format("bf16", 8, 7, infinity=True),
        Format("tf32", 8, 10, infinity=True),
        Format("e4m3", 4, 3, nan=True),
        Format("e5m2", 5, 2, infinity=True),
        Format("e2m3", 2, 3),
        Format("e3m2", 3, 2),
        Format("e2m1", 2, 1),
    )
}
_ROUND: dict[str, Run] = {
    "rn": np.rint,
    "rz": np.floor,
    "rna": lambda size: np.floor(size + 0.5),
}


def _whole(scaled: Array, negative: Array, mode: str, chance: Array | None) -> Array:
    """Magnitudes rounded to whole numbers; stochastic rounding adds `chance`, in [0, 1)."""
    if chance is not None:
        return np.floor(scaled + chance)
    if mode in _ROUND:
        return _ROUND[mode](scaled)
    return np.where(negative == (mode == "rm"), np.ceil(scaled), np.floor(scaled))


def encode(
    x: Array, name: str, mode: str = "rn", *, finite: bool = False, chance: Array | None = None
) -> Array:
    """Codes (u32) of f32 or f64 values, rounded once; `finite`: saturated to the largest value."""
    form = FORMATS[name]
    negative, size = np.signbit(x), np.abs(x.astype(f64))
    lowest = 1 - form.bias
    power = np.where(size == 0, lowest, np.maximum(np.frexp(size)[1] - 1, lowest))
    scaled = np.ldexp(size, form.mantissa - power)
    whole = np.minimum(_whole(scaled, negative, mode, chance), 2.0 ** (form.mantissa + 2))
    # A carry out of the mantissa increments the exponent; subnormals have the lowest exponent.
    code = ((power - lowest).astype(i64) << form.mantissa) + whole.astype(i64)
    code = np.where(np.isfinite(size), code, i64(form.ones))
    if finite or not form.infinity:
        code = np.minimum(code, form.largest)
    else:
        away = mode not in ("rz", "rm", "rp") or (mode != "rz" and negative == (mode == "rm"))
        limit = np.where(away | np.isinf(size), form.largest + 1, form.largest)
        code = np.minimum(code, limit)
    code = code | (negative.astype(i64) << form.sign)
    return np.where(size == size, code, form.ones).astype(u32)


@cache
def decode_table(name: str) -> Array:
    """The f32 values of all bytes in a format of at most 8 bits; unused high bits are ignored.

    Beside FORMATS, the scale factors: ue8m0, a power of two, and ue4m3, an e4m3 without a sign.
    """
    if name == "ue8m0":
        return decode_scale(np.arange(256, dtype=u32))
    form = FORMATS[name.removeprefix("u")]
    half = [form.value(code) for code in range(form.ones + 1)]
    if name.startswith("u"):
        return np.array(half + half, f32)
    table = half + [-value for value in half]
    return np.array(table * (256 // len(table)), f32)


def decode(bits: Array, name: str) -> Array:
    """The f32 values of codes of a format of at most 8 bits (any unsigned array)."""
    return decode_table(name)[bits.astype(u8)]


def encode_scale(x: Array, *, up: bool, finite: bool) -> Array:
    """Codes (u32) of the power of two below or above |x| (ue8m0: exponent + 127, 255 a NaN)."""
    size = np.abs(x.astype(f64))
    fraction, power = np.frexp(size)  # size = fraction * 2^power, fraction in [1/2, 1)
    code = power + (126 + (up & (fraction > 0.5)) if up else 126)
    code = np.where(size == 0, 0, np.clip(code, 0, 255))
    code = np.minimum(np.where(np.isinf(size), 255, code), 254 if finite else 255)
    return np.where(size == size, code, 255).astype(u32)


def decode_scale(bits: Array) -> Array:
    """The f32 values of ue8m0 codes."""
    powers = np.ldexp(f32(1), bits.astype(np.int32) - 127)
    return np.where(bits == 255, f32(np.nan), powers)
