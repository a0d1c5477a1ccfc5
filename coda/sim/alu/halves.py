"""f16 and bf16 opcodes, single and packed -> their entries: computed wider, rounded once."""

from __future__ import annotations

import numpy as np

from coda.sim.alu.floats import flush, from_bf16, from_f16, to_bf16, to_f16, to_odd, two_sum
from coda.sim.alu.opcodes import Array, Run, Table, define, f16, f32, f64, packed, u16, u32
from coda.sim.alu.reals import EXTREMA, with_sat, xorsign


def _fma(a: Array, b: Array, c: Array) -> Array:
    """In f64, rounded to odd where inexact, so that the rounding to 16 bits is the only one."""
    return to_odd(*two_sum(a.astype(f64) * b, c.astype(f64)))


def _relu(a: Array, b: Array, c: Array) -> Array:
    out = _fma(a, b, c)
    return np.where(out <= 0, f64(0), out)


def _narrow_odd(x: Array) -> Array:
    """f64 to f32 rounded to odd."""
    near = x.astype(f32)
    wide = near.astype(f64)
    bits = near.view(u32)
    inexact = np.isfinite(near) & (wide != x)
    toward = bits - (np.abs(wide) > np.abs(x))
    return np.where(inexact, toward | u32(1), bits).view(f32)


def _bf16(x: Array) -> Array:
    return to_bf16(_narrow_odd(x) if x.dtype == f64 else x)


def _flushed(run: Run) -> Run:
    """`.ftz` of f16: subnormal operands and results become zero; the dtype of values is kept."""
    tiny = f32(2.0**-14)

    def zero(x: Array) -> Array:
        return x * (np.abs(x) >= tiny)

    def ftz(*xs: Array) -> Array:
        out = run(*map(zero, xs))
        return zero(out.astype(f16).astype(f32)) if out.dtype != f64 else _flush_rounded(out)

    return ftz


def _flush_rounded(out: Array) -> Array:
    return flush(out.astype(f16)).astype(f32)


OPERATIONS: dict[str, tuple[int, Run]] = {
    "add{,.rn}": (2, np.add),
    "sub{,.rn}": (2, np.subtract),
    "mul{,.rn}": (2, np.multiply),
    "fma.rn": (3, _fma),
    "fma.rn.relu": (3, _relu),
    "tanh.approx": (1, np.tanh),
    **{name: (2, run) for name, run in EXTREMA.items()},
    **{f"{name}.xorsign.abs": (2, xorsign(name)) for name in EXTREMA},
}
# Forms of f16 that bf16 does not have.
SATURATED = ("add{,.rn}", "sub{,.rn}", "mul{,.rn}", "fma.rn")
FLUSHED = (*SATURATED, "fma.rn.relu", *EXTREMA, *(f"{name}.xorsign.abs" for name in EXTREMA))


def _ftz_name(stem: str) -> str:
    """The opcode with `.ftz`: after the rounding if there is one, else after the name."""
    if stem.endswith("{,.rn}"):
        return stem + ".ftz"
    if stem.startswith("fma.rn"):
        return "fma.rn.ftz" + stem[6:]
    return stem[:3] + ".ftz" + stem[3:]


def _declare(table: Table, stem: str, kind: str, count: int, run: Run) -> None:
    """The single and the packed form of an operation on f32 values."""
    up, down = (from_f16, to_f16) if kind == "f16" else (from_bf16, _bf16)

    def one(*xs: Array) -> Array:
        return down(run(*[up(x) for x in xs]))

    define(table, f"{stem}.{kind}", one, "b16", *["b16"] * count)
    define(table, f"{stem}.{kind}x2", packed(one, u16, u32), "b32", *["b32"] * count)


def _exponentials(table: Table) -> None:
    _declare(table, "ex2.approx", "f16", 1, np.exp2)
    # bf16 has the exponent range of f32: a value is subnormal in both or in neither
    _declare(table, "ex2.approx.ftz", "bf16", 1, lambda x: flush(np.exp2(flush(x))))


def _signs(table: Table) -> None:
    """Signs are single bits, of a NaN too."""
    for kind in ("f16", "bf16"):
        for width, sign in (("", u16(0x8000)), ("x2", u32(0x80008000))):
            to = "b32" if width else "b16"
            define(table, f"neg.{kind}{width}", lambda a, s=sign: a ^ s, to, to)
            define(table, f"abs.{kind}{width}", lambda a, s=sign: a & ~s, to, to)
    for name, run in (("neg", np.negative), ("abs", np.abs)):
        _declare(table, f"{name}.ftz", "f16", 1, _flushed(run))


def fill(table: Table) -> None:
    """Declare the f16 and bf16 opcodes."""
    for stem, (count, run) in OPERATIONS.items():
        for kind in ("f16", "bf16"):
            _declare(table, stem, kind, count, run)
        if stem in FLUSHED:
            _declare(table, _ftz_name(stem), "f16", count, _flushed(run))
        if stem in SATURATED:
            _declare(table, f"{stem}.sat", "f16", count, with_sat(run))
            _declare(table, f"{_ftz_name(stem)}.sat", "f16", count, with_sat(_flushed(run)))
    _exponentials(table)
    _signs(table)
