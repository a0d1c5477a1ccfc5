"""`cvt` opcodes of narrow floats -> their entries: fp8, fp6, fp4, scale factors, fixed point.

Packed results have the first source in the upper half. `.relu` maps negative values and -0 to +0
and keeps a NaN; `.satfinite` saturates to the largest finite value.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from coda.sim.alu.floats import (
    decode,
    decode_scale,
    encode,
    encode_scale,
    from_bf16,
    from_f16,
    to_bf16,
    to_f16,
    to_narrow,
)
from coda.sim.alu.opcodes import Array, Run, Table, define, f32, f64, i8, i64, u8, u16, u32, u64

NARROW = ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")
_UNIT = np.array(0x7F7F, u16)


def relu(x: Array) -> Array:
    """Negative values to +0; a NaN stays."""
    return np.where((x <= 0) | np.signbit(x) & (x == x), f32(0), x)


def pack(high: Array, low: Array) -> Array:
    """Two 16-bit values in 32 bits."""
    return (high.astype(u32) << u32(16)) | low


def to_half(kind: str, mode: str, *, clamp: bool, finite: bool) -> Run:
    """A conversion of f32 to the bits of f16 or bf16."""

    def run(x: Array) -> Array:
        x = relu(x) if clamp else x
        if finite or (kind == "f16" and mode != "rn"):
            return encode(x, kind, mode, finite=finite).astype(u16)
        return to_f16(x) if kind == "f16" else to_bf16(x, mode)

    return run


def _two(x: Array, kind: str) -> tuple[Array, Array]:
    """The f32 values of the upper and the lower half of a packed register."""
    up = from_bf16 if kind == "bf16" else from_f16
    return up((x >> u32(16)).astype(u16)), up((x & u32(0xFFFF)).astype(u16))


def _narrow_pack(name: str, clamp: bool) -> Run:
    def run(high: Array, low: Array) -> Array:
        if clamp:
            high, low = relu(high), relu(low)
        top, bottom = to_narrow(high, name), to_narrow(low, name)
        if name == "e2m1":
            return ((top << u32(4)) | bottom).astype(u8)
        return ((top << u32(8)) | bottom).astype(u16)

    return run


def _narrow_unpack(name: str, down: Run) -> tuple[Run, Run]:
    """Two functions that unpack both values of a register: unscaled, and times a scale each."""
    shift = 4 if name == "e2m1" else 8

    def run(x: Array) -> Array:
        parts = (x >> x.dtype.type(shift), x)
        return pack(*[down(decode(part, name)) for part in parts])

    def scaled(x: Array, scale: Array) -> Array:
        high, low = decode(x >> x.dtype.type(shift), name), decode(x, name)
        factors = decode_scale(scale >> u16(8)), decode_scale(scale & u16(255))
        return pack(down(high * factors[0]), down(low * factors[1]))

    return run, scaled


def _narrow(table: Table) -> None:
    for name, clamp in product(NARROW, (False, True)):
        byte = "b8" if name == "e2m1" else "b16"
        mark = ".relu" if clamp else ""
        run = _narrow_pack(name, clamp)
        stem = f"cvt.rn.satfinite{mark}.{name}x2"
        define(table, f"{stem}.f32", run, byte, "f32", "f32")
        define(table, f"{stem}.f16x2", lambda x, f=run: f(*_two(x, "f16")), byte, "b32")
        define(table, f"{stem}.bf16x2", lambda x, f=run: f(*_two(x, "bf16")), byte, "b32")
        for kind, finite in (("f16", False), ("bf16", False), ("bf16", True)):
            unpack, scaled = _narrow_unpack(name, to_half(kind, "rn", clamp=clamp, finite=finite))
            sat = ".satfinite" if finite else ""
            define(table, f"cvt.rn{mark}{sat}.{kind}x2.{name}x2", unpack, "b32", byte)
            if kind == "bf16":
                op = f"cvt.rn{mark}{sat}.scaled::n2::ue8m0.bf16x2.{name}x2"
                define(table, op, scaled, "b32", byte, "b16")
        four = _stochastic_four(name, clamp)
        result = "b16" if name == "e2m1" else "b32"
        define(table, f"cvt.rs{mark}.satfinite.{name}x4.f32", four, result, *["f32"] * 4, "b32")


def _reverse16(x: Array) -> Array:
    out: Array = np.zeros((), u32)
    for k in range(16):
        out = out | ((x >> u32(k) & u32(1)) << u32(15 - k))
    return out


def _stochastic_four(name: str, clamp: bool) -> Run:
    """Each pair of sources shares 16 random bits; its first source takes them in reverse order."""
    shift = 4 if name == "e2m1" else 8

    def run(a: Array, b: Array, e: Array, f: Array, random: Array) -> Array:
        if name == "e2m1":  # a pair's bits are one byte of each half
            random = (
                (random & u32(0xFF0000FF))
                | ((random & u32(0xFF00)) << u32(8))
                | ((random & u32(0xFF0000)) >> u32(8))
            )
        first, second = random >> u32(16), random & u32(0xFFFF)
        chances = (_reverse16(first), first, _reverse16(second), second)
        out: Array = np.zeros((), u32)
        for x, bits in zip((a, b, e, f), chances, strict=True):
            chance = bits.astype(f64) * 2.0**-16
            code = encode(relu(x) if clamp else x, name, "rs", finite=True, chance=chance)
            out = (out << u32(shift)) | code
        return out.astype(u16) if name == "e2m1" else out

    return run


def _scales(table: Table) -> None:
    """ue8m0: powers of two, the scale factors of block-scaled formats."""
    for mode, finite in product(("rz", "rp"), (False, True)):

        def pair(high: Array, low: Array, up: bool = mode == "rp", finite: bool = finite) -> Array:
            top, bottom = (encode_scale(x, up=up, finite=finite) for x in (high, low))
            return ((top << u32(8)) | bottom).astype(u16)

        stem = f"cvt.{mode}{'.satfinite' if finite else ''}.ue8m0x2"
        define(table, f"{stem}.f32", pair, "b16", "f32", "f32")
        define(table, f"{stem}.bf16x2", lambda x, f=pair: f(*_two(x, "bf16")), "b16", "b32")

    def unpack(x: Array) -> Array:
        parts = (x >> u16(8), x & u16(255))
        return pack(*[to_bf16(decode_scale(part)) for part in parts])

    define(table, "cvt.rn.bf16x2.ue8m0x2", unpack, "b32", "b16")


def _fixed(table: Table) -> None:
    """s2f6: signed bytes in units of 1/64; a source or result is scaled by a power of two."""
    for clamp, scaled in product((False, True), (False, True)):
        mark = (".relu" if clamp else "") + (".scaled::n2::ue8m0" if scaled else "")
        extra = ["b16"] if scaled else []

        def down(high: Array, low: Array, scale: Array = _UNIT, clamp: bool = clamp) -> Array:
            out = []
            for x, factor in ((high, scale >> u16(8)), (low, scale & u16(255))):
                value = np.rint(x.astype(f64) / decode_scale(factor) * 64)
                value = np.fmax(np.fmin(value, 127), 0 if clamp else -128)
                out.append(np.where(value == value, value, 127).astype(i8).view(u8))
            return (out[0].astype(u16) << u16(8)) | out[1]

        stem = f"cvt.rn.satfinite{mark}.s2f6x2"
        define(table, f"{stem}.f32", down, "b16", "f32", "f32", *extra)
        define(
            table,
            f"{stem}.bf16x2",
            lambda x, *s, f=down: f(*_two(x, "bf16"), *s),
            *("b16", "b32", *extra),
        )
    for finite, clamp, scaled in product((False, True), repeat=3):
        mark = (".satfinite" if finite else "") + (".relu" if clamp else "")
        mark += ".scaled::n2::ue8m0" if scaled else ""
        run = _fixed_unpack(finite, clamp)
        define(table, f"cvt.rn{mark}.bf16x2.s2f6x2", run, "b32", "b16", *["b16"] * scaled)


def _fixed_unpack(finite: bool, clamp: bool) -> Run:
    down = to_half("bf16", "rn", clamp=clamp, finite=finite)

    def run(x: Array, scale: Array = _UNIT) -> Array:
        out = []
        for part, factor in ((x >> u16(8), scale >> u16(8)), (x & u16(255), scale & u16(255))):
            value = part.astype(u8).view(i8).astype(f32) / f32(64)
            out.append(down(value * decode_scale(factor)))
        return pack(*out)

    return run


def _packs(table: Table) -> None:
    """cvt.pack: two saturated integers in the low bits, c shifted into the upper ones."""
    for sign, width in product("us", (2, 4, 8, 16)):
        low, high = (
            (0, (1 << width) - 1) if sign == "u" else (-(1 << width - 1), (1 << width - 1) - 1)
        )

        def run(
            a: Array, b: Array, *c: Array, w: int = width, low: int = low, high: int = high
        ) -> Array:
            a, b = (
                np.clip(x.astype(i64), low, high).astype(u64) & u64((1 << w) - 1) for x in (a, b)
            )
            out = (a << u64(w)) | b
            return (out | (c[0].astype(u64) << u64(2 * w)) if c else out).astype(u32)

        if width == 16:
            define(table, f"cvt.pack.sat.{sign}16.s32", run, "b32", "s32", "s32")
        else:
            define(table, f"cvt.pack.sat.{sign}{width}.s32.b32", run, "b32", "s32", "s32", "b32")


def fill(table: Table) -> None:
    """Declare the conversions to and from narrow types."""
    _narrow(table)
    _scales(table)
    _fixed(table)
    _packs(table)
