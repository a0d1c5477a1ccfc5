"""`cvt` opcodes -> their entries: between integers and floats of 16 bits and more, and tf32.

Packed results have the first source in the upper half. Conversions to integers saturate. `.relu`
maps negative values and -0 to +0 and keeps a NaN; `.satfinite` saturates to the largest finite
value.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from coda.sim.alu import narrow
from coda.sim.alu.floats import (
    encode,
    flush,
    from_bf16,
    steer,
    to_bf16,
    to_bf16x2,
    to_f16,
    to_f32,
    to_odd,
    to_tf32,
    two_sum,
)
from coda.sim.alu.opcodes import (
    DTYPE,
    Array,
    Run,
    Table,
    define,
    f64,
    u16,
    u32,
)
from coda.sim.alu.reals import MODES, with_sat

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
WHOLE: dict[str, Run] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cast(kind: str) -> Run:
    return lambda a: a.astype(DTYPE[kind])


def _clip(kind: str) -> Run:
    to = np.iinfo(DTYPE[kind])

    def run(a: Array) -> Array:
        own = np.iinfo(a.dtype)
        low, high = max(own.min, to.min), min(own.max, to.max)
        return np.minimum(np.maximum(a, a.dtype.type(low)), a.dtype.type(high)).astype(to.dtype)

    return run


def _between_integers(table: Table) -> None:
    for to, a in product(INTEGERS, INTEGERS):
        define(table, f"cvt.{to}.{a}", _cast(to), to, a)
        own, other = np.iinfo(DTYPE[a]), np.iinfo(DTYPE[to])
        if own.min < other.min or own.max > other.max:
            define(table, f"cvt.sat.{to}.{a}", _clip(to), to, a)


def _to_integer(kind: str, how: Run, nan: int) -> Run:
    """f64 values to integers: rounded by `how`, saturated."""
    to = np.iinfo(DTYPE[kind])

    def run(x: Array) -> Array:
        whole = how(x)
        high = whole >= float(to.max)  # which float() may round up to the next power of two
        inside = np.where((whole != whole) | high, 0.0, np.maximum(whole, float(to.min)))
        out = inside.astype(to.dtype)
        out = np.where(high, to.dtype.type(to.max), out)
        return np.where(whole == whole, out, to.dtype.type(nan))

    return run


def _to_integers(table: Table) -> None:
    for to, (mode, how), a in product(INTEGERS, WHOLE.items(), ("f16", "bf16", "f32", "f64")):
        wide = a == "f64" or to in ("s64", "u64")
        low = np.iinfo(DTYPE[to])
        half = low.min if low.min else (low.max >> 1) + 1
        run = _to_integer(to, how, int(half) if wide else 0)
        up = _widen(a)

        def whole(x: Array, run: Run = run, up: Run = up) -> Array:
            return run(up(x))

        sat = "" if a == "bf16" else "{,.sat}"
        define(table, f"cvt.{mode}{sat}.{to}.{a}", whole, to, a)
        if a == "f32":

            def flushed(x: Array, whole: Run = whole) -> Array:
                return whole(flush(x))

            define(table, f"cvt.{mode}.ftz{{,.sat}}.{to}.{a}", flushed, to, a)


def _sum(a: Array) -> tuple[Array, Array]:
    """64-bit integers as (nearest f64, remainder)."""
    top = (a >> a.dtype.type(32)).astype(f64) * 2.0**32
    return two_sum(top, (a & a.dtype.type(0xFFFFFFFF)).astype(f64))


def _exact(a: Array) -> Array:
    """f64 values of integers, rounded to odd where 64 bits do not fit."""
    return a.astype(f64) if a.dtype.itemsize < 8 else to_odd(*_sum(a))


def _widen(kind: str) -> Run:
    """The f64 values of a type: exact, or rounded to odd."""
    if kind == "bf16":
        return lambda x: from_bf16(x).astype(f64)
    return _exact if kind in INTEGERS else _cast("f64")


def _narrow(to: str, mode: str) -> Run:
    """f64 values (rounded to odd, if at all) to a float type."""
    if to == "f64":
        return lambda x: x
    if to == "f32":
        return lambda x: to_f32(x, mode)
    if to == "f16" and mode == "rn":
        return to_f16
    return lambda x: encode(x, to, mode).astype(u16)


def _real(to: str, a: str, mode: str, marks: str) -> Run:
    """A conversion to a float type; a mode like `rni` rounds to whole numbers first."""
    up, down, clamp = _widen(a), _narrow(to, mode), with_sat(np.positive)
    ftz, sat, how = "ftz" in marks, "sat" in marks, WHOLE.get(mode)

    def run(x: Array) -> Array:
        wide = up(flush(x) if ftz and a == "f32" else x)
        wide = how(wide) if how else wide
        out = down(clamp(wide) if sat else wide)
        return flush(out) if ftz and to == "f32" else out

    def directed(x: Array) -> Array:
        near, left = _sum(x)
        out = near if mode == "rn" else steer(near, -left, mode)
        return clamp(out) if sat else out

    return directed if to == "f64" and a in ("u64", "s64") else run


# Fast paths of the common conversions.
QUICK: dict[str, Run] = {
    "cvt.f32.bf16": from_bf16,
    "cvt.f32.f16": _cast("f32"),
    "cvt.f64.f32": _cast("f64"),
    "cvt.rn.bf16.f32": to_bf16,
    "cvt.rz.bf16.f32": lambda x: to_bf16(x, "rz"),
    "cvt.rn.f16.f32": to_f16,
    **{f"cvt.rn.f32.{kind}": _cast("f32") for kind in INTEGERS},
    **{f"cvt.{mode}.f32.f32": how for mode, how in WHOLE.items()},
}
REALS = ("f16", "bf16", "f32", "f64")
EXACT = {"f16": ("f16", "f32", "f64"), "bf16": ("bf16", "f32", "f64"), "f32": ("f32", "f64")}


def _modes(to: str, a: str) -> tuple[str, ...]:
    """The rounding modes that a conversion can name ("": none)."""
    if to == a:
        return ("", *WHOLE)
    if to not in EXACT.get(a, ()):
        return MODES
    return ("", *MODES) if a == "bf16" else ("",)


def _to_reals(table: Table) -> None:
    for to, a in product(REALS, (*REALS, *INTEGERS)):
        ftz = ("", ".ftz", ".sat", ".ftz.sat") if "f32" in (to, a) else ("", ".sat")
        for mode, marks in product(_modes(to, a), ftz):
            if "sat" in marks and "bf16" in (to, a):
                continue
            op = f"cvt{'.' if mode else ''}{mode}{marks}.{to}.{a}"
            run = QUICK.get(op) or _real(to, a, mode or "rn", marks)
            define(table, op, run, "b16" if to in ("f16", "bf16") else to, a)


def _halves(table: Table) -> None:
    for kind, mode, clamp, finite in product(
        ("f16", "bf16"), ("rn", "rz"), (False, True), (False, True)
    ):
        one = narrow.to_half(kind, mode, clamp=clamp, finite=finite)
        stem = f"cvt.{mode}{'.relu' if clamp else ''}{'.satfinite' if finite else ''}"
        if clamp or finite:
            define(table, f"{stem}.{kind}.f32", one, "b16", "f32")
        two: Run = lambda a, b, one=one: narrow.pack(one(a), one(b))  # noqa: E731
        if stem == "cvt.rn" and kind == "bf16":
            two = to_bf16x2
        define(table, f"{stem}.{kind}x2.f32", two, "b32", "f32", "f32")
    for kind, clamp, finite in product(("f16", "bf16"), (False, True), (False, True)):
        stem = f"cvt.rs{'.relu' if clamp else ''}{'.satfinite' if finite else ''}"
        run = _stochastic_half(kind, clamp, finite)
        define(table, f"{stem}.{kind}x2.f32", run, "b32", "f32", "f32", "b32")


def _stochastic_half(kind: str, clamp: bool, finite: bool) -> Run:
    """The random bits are added to the mantissa bits that are cut off: 13 of f16, 16 of bf16."""
    count = 13 if kind == "f16" else 16

    def one(x: Array, random: Array) -> Array:
        chance = (random & u32((1 << count) - 1)).astype(f64) * 2.0**-count
        return encode(narrow.relu(x) if clamp else x, kind, "rs", finite=finite, chance=chance)

    def run(a: Array, b: Array, random: Array) -> Array:
        return narrow.pack(one(a, random >> u32(16)), one(b, random))

    return run


def _tf32(table: Table) -> None:
    for mode, clamp, finite in product(("rna", "rn", "rz"), (False, True), (False, True)):
        if mode == "rna" and clamp:
            continue
        stem = f"cvt.{mode}{'.satfinite' if finite else ''}{'.relu' if clamp else ''}"

        def run(x: Array, mode: str = mode, clamp: bool = clamp, finite: bool = finite) -> Array:
            return to_tf32(narrow.relu(x) if clamp else x, mode, finite=finite)

        define(table, f"{stem}.tf32.f32", run, "b32", "f32")


ORDERS = ((".ftz.sat.", ".sat.ftz."), (".relu.satfinite.", ".satfinite.relu."))


def _any_order(table: Table) -> None:
    """ptxas takes these modifiers in either order."""
    for op in [x for x in table if x.startswith("cvt.")]:
        for first, second in (*ORDERS, *(pair[::-1] for pair in ORDERS)):
            if first in op:
                table.setdefault(op.replace(first, second), table[op])


def fill(table: Table) -> None:
    """Declare the conversions."""
    _between_integers(table)
    _to_integers(table)
    _to_reals(table)
    _halves(table)
    _tf32(table)
    narrow.fill(table)
    _any_order(table)
