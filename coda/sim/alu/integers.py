"""Integer and logic opcodes -> their entries: arithmetic, carry chains, shifts, logic."""

from __future__ import annotations

from itertools import product

import numpy as np

from coda.sim.alu import bits
from coda.sim.alu.opcodes import (
    DTYPE,
    Array,
    Run,
    Table,
    define,
    i32,
    i64,
    packed,
    u32,
    u64,
)

ALL = ("u16", "s16", "u32", "s32", "u64", "s64")
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def _unsigned(kind: str) -> str:
    return "u" + kind[1:]


def high(a: Array, b: Array) -> Array:
    """Upper half of the product of two integers of one type."""
    size, signed = a.dtype.itemsize, a.dtype.kind == "i"
    if size < 8:
        wide = {(2, True): i32, (2, False): u32, (4, True): i64, (4, False): u64}[size, signed]
        return (a.astype(wide) * b.astype(wide) >> wide(8 * size)).astype(a.dtype)
    x, y, low = a.view(u64), b.view(u64), u64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> u64(32), y & low, y >> u64(32)
    middle = x1 * y0 + (x0 * y0 >> u64(32))
    other = x0 * y1 + (middle & low)
    out = x1 * y1 + (middle >> u64(32)) + (other >> u64(32))
    if signed:  # a negative operand was read as one that is 2^64 larger
        out = out - np.where(a < 0, y, u64(0)) - np.where(b < 0, x, u64(0))
    return out.view(a.dtype)


def _divide(a: Array, b: Array) -> Array:
    """Quotient truncated towards zero; a division by zero, left open by the ISA, gives all ones."""
    zero = b == 0
    if a.dtype.kind == "u":
        quotient = np.floor_divide(a, b)
    else:
        plain = a.dtype.str.replace("i", "u")
        size = np.floor_divide(np.abs(a).view(plain), np.abs(b).view(plain)).view(a.dtype)
        quotient = np.where((a ^ b) < 0, -size, size)
    return np.where(zero, ~a.dtype.type(0), quotient) if np.count_nonzero(zero) else quotient


def _remainder(a: Array, b: Array) -> Array:
    """The remainder has the sign of the dividend; modulo zero it is the dividend."""
    zero = b == 0
    out = np.fmod(a, b)
    return np.where(zero, a, out) if np.count_nonzero(zero) else out


def _clamp(wide: Array) -> Array:
    return np.minimum(np.maximum(wide, i64(-(2**31))), i64(2**31 - 1)).astype(i32)


def _saturated(join: Run) -> Run:
    return lambda a, b: _clamp(join(a.astype(i64), b.astype(i64)))


def _distance(a: Array, b: Array, c: Array) -> Array:
    """sad: |a - b| + c, modulo the width."""
    return c + np.where(a < b, b - a, a - b)


def _arithmetic(table: Table) -> None:
    for t in ALL:
        u = _unsigned(t)
        define(table, f"add.{t}", np.add, u, u, u)
        define(table, f"sub.{t}", np.subtract, u, u, u)
        define(table, f"mul.lo.{t}", np.multiply, u, u, u)
        define(table, f"mul.hi.{t}", high, t, t, t)
        define(table, f"mad.lo.{t}", lambda a, b, c: a * b + c, u, u, u, u)
        define(table, f"mad.hi.{t}", lambda a, b, c: high(a, b) + c, t, t, t, t)
        define(table, f"min.{t}", np.minimum, t, t, t)
        define(table, f"max.{t}", np.maximum, t, t, t)
        define(table, f"div.{t}", _divide, t, t, t)
        define(table, f"rem.{t}", _remainder, t, t, t)
        define(table, f"sad.{t}", _distance, t, t, t, t)
        if t[0] == "s":
            define(table, f"neg.{t}", np.negative, u, u)
            define(table, f"abs.{t}", np.abs, t, t)
    for t, big in WIDE.items():
        wide = DTYPE[big]
        define(table, f"mul.wide.{t}", lambda a, b, w=wide: a.astype(w) * b.astype(w), big, t, t)
        define(
            table,
            f"mad.wide.{t}",
            lambda a, b, c, w=wide: a.astype(w) * b.astype(w) + c,
            *(big, t, t, big),
        )
    define(table, "add.sat.s32", _saturated(np.add), "T", "T", "T")
    define(table, "sub.sat.s32", _saturated(np.subtract), "T", "T", "T")
    define(
        table,
        "mad.hi.sat.s32",
        lambda a, b, c: _clamp(high(a, b).astype(i64) + c),
        *("T", "T", "T", "T"),
    )


def _pairs(table: Table) -> None:
    """Minima and maxima that clamp at zero, and arithmetic on two 16-bit integers in a register."""
    joins = (("add", np.add), ("min", np.minimum), ("max", np.maximum))
    for (name, join), t in product(joins, ("u16", "s16")):
        define(table, f"{name}.{t}x2", packed(join, DTYPE[t], u32), "b32", "b32", "b32")
    for name, join in joins[1:]:

        def relu(a: Array, b: Array, join: Run = join) -> Array:
            return np.maximum(join(a, b), a.dtype.type(0))

        define(table, f"{name}.relu.s32", relu, "T", "T", "T")
        define(table, f"{name}.relu.s16x2", packed(relu, np.int16, u32), "b32", "b32", "b32")


def _add_carry(a: Array, b: Array, carry: Array | None = None) -> tuple[Array, Array]:
    out = a + b
    over = out < a
    if carry is None:
        return out, over
    total = out + carry.astype(a.dtype)
    return total, over | (total < out)


def _take_borrow(a: Array, b: Array, borrow: Array | None = None) -> tuple[Array, Array]:
    out = a - b
    under = a < b
    if borrow is None:
        return out, under
    total = out - borrow.astype(a.dtype)
    return total, under | (total > out)


def _chains(table: Table) -> None:
    """Extended precision: the carry goes through the condition code register (type "cc")."""
    for t in ("u32", "s32", "u64", "s64"):
        u = _unsigned(t)
        for stem, run in (("add", _add_carry), ("sub", _take_borrow)):
            define(table, f"{stem}.cc.{t}", run, f"{u}|cc", u, u)
            define(table, f"{stem}c.cc.{t}", run, f"{u}|cc", u, u, "cc")
            define(table, f"{stem}c.{t}", lambda a, b, c, f=run: f(a, b, c)[0], u, u, u, "cc")
        for half, multiply in (("lo", np.multiply), ("hi", high)):

            def mad(a: Array, b: Array, c: Array, *carry: Array, join: Run = multiply) -> tuple:
                product_ = join(a, b)
                return _add_carry(product_.view(DTYPE[f"u{8 * a.dtype.itemsize}"]), c, *carry)

            kinds = (t, t, u)
            define(table, f"mad.{half}.cc.{t}", mad, f"{u}|cc", *kinds)
            define(table, f"madc.{half}.cc.{t}", mad, f"{u}|cc", *kinds, "cc")
            define(table, f"madc.{half}.{t}", lambda *x, f=mad: f(*x)[0], u, *kinds, "cc")


def _24(half: str) -> Run:
    def run(a: Array, b: Array) -> Array:
        """Product of the low 24 bits: bits 31..0 of the result, or bits 47..16."""
        kind = a.dtype.type
        shift = kind(8)
        a, b = (a << shift) >> shift, (b << shift) >> shift
        wide = np.multiply(a, b, dtype=i64 if a.dtype.kind == "i" else u64)
        return (wide >> 16 if half == "hi" else wide).astype(a.dtype)

    return run


def _products(table: Table) -> None:
    """Products of 24 bits, and dot products of bytes and half words."""
    for t, half in product(("u32", "s32"), ("lo", "hi")):
        run = _24(half)
        define(table, f"mul24.{half}.{t}", run, t, t, t)
        define(table, f"mad24.{half}.{t}", lambda a, b, c, f=run: f(a, b) + c, t, t, t, t)
    for a, b in product("us", "us"):
        kind = "u32" if a == b == "u" else "s32"
        sources = ("b32", "b32", kind)
        define(table, f"dp4a.{a}32.{b}32", bits.dot(4, a, b, 0), kind, *sources)
        define(table, f"dp2a.lo.{a}32.{b}32", bits.dot(2, a, b, 0), kind, *sources)
        define(table, f"dp2a.hi.{a}32.{b}32", bits.dot(2, a, b, 2), kind, *sources)


def _logic(table: Table) -> None:
    for t in ("pred", "b16", "b32", "b64"):
        define(table, f"and.{t}", np.bitwise_and, t, t, t)
        define(table, f"or.{t}", np.bitwise_or, t, t, t)
        define(table, f"xor.{t}", np.bitwise_xor, t, t, t)
        define(table, f"not.{t}", np.bitwise_not, t, t)
        if t != "pred":
            define(table, f"cnot.{t}", lambda a: (a == 0).astype(a.dtype), t, t)
    # numpy shifts by the width or more as PTX does: zeros come in, or copies of the sign.
    for t in ("32", "64"):
        define(table, f"shl.b{t}", np.left_shift, "T", "T", "u32")
        define(table, f"shr.{{b,u}}{t}", np.right_shift, "T", "T", "u32")
        define(table, f"shr.s{t}", np.right_shift, "T", "T", "s32" if t == "32" else "u32")
    for op in ("shl.b16", "shr.b16", "shr.u16", "shr.s16"):
        run = bits.shift16(np.left_shift if op[2] == "l" else np.right_shift)
        define(table, op, run, "T", "T", "u32")


def _fields(table: Table) -> None:
    define(table, "prmt.b32", bits.permute, "b32", "b32", "b32", "b32")
    for mode in bits.PERMUTATIONS:
        define(table, f"prmt.b32.{mode}", bits.permute_by(mode), *["b32"] * 4)
    define(table, "lop3.b32", bits.lop3, "b32", "b32", "b32", "b32", "b32")
    for name, join in (("and", np.logical_and), ("or", np.logical_or)):

        def lop3(a: Array, b: Array, c: Array, code: Array, q: Array, join: Run = join) -> tuple:
            out = bits.lop3(a, b, c, code)
            return out, join(out != 0, q)

        define(table, f"lop3.{name}.b32|", lop3, "b32|pred", *["b32"] * 4, "pred")
    for left, wrap in product((True, False), (True, False)):
        op = f"shf.{'l' if left else 'r'}.{'wrap' if wrap else 'clamp'}.b32"
        define(table, op, bits.funnel(left=left, wrap=wrap), "b32", "b32", "b32", "u32")
    for t in ("u32", "s32", "u64", "s64"):
        define(table, f"bfe.{t}", bits.extract, t, t, "u32", "u32")
        define(table, f"bfind.{t}", bits.find, "u32", t)
        define(table, f"bfind.shiftamt.{t}", bits.find_shift, "u32", t)
    define(table, "bfi.{b32,b64}", bits.insert, "T", "T", "T", "u32", "u32")
    define(table, "popc.{b32,b64}", lambda a: np.bitwise_count(a).astype(u32), "u32", "T")
    define(table, "clz.{b32,b64}", bits.leading_zeros, "u32", "T")
    define(table, "brev.{b32,b64}", bits.reverse, "T", "T")
    define(table, "fns.b32", bits.nth_set, "b32", "b32", "u32", "s32")
    for wrap in (True, False):
        mode = "wrap" if wrap else "clamp"
        define(table, f"szext.{mode}.{{u32,s32}}", bits.extend(wrap=wrap), "T", "T", "u32")
        define(table, f"bmsk.{mode}.b32", bits.mask(wrap=wrap), "b32", "u32", "u32")


def fill(table: Table) -> None:
    """Declare the integer opcodes."""
    _arithmetic(table)
    _pairs(table)
    _chains(table)
    _products(table)
    _logic(table)
    _fields(table)
