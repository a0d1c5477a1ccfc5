"""f32 and f64 opcodes -> their entries: arithmetic in all roundings, extrema, approximations."""

from __future__ import annotations

from itertools import product

import numpy as np

from coda.sim.alu import exact
from coda.sim.alu.floats import (
    add_rounded,
    div_rounded,
    flush,
    fma_rounded,
    from_bf16,
    mul_rounded,
    sqrt_rounded,
)
from coda.sim.alu.opcodes import Array, Run, Table, define, f32, f64, packed, u32, u64

MODES = ("rn", "rz", "rm", "rp")
_ONE = np.array(1, f32)
_ZERO = np.array(0, f32)
_LEAST = np.array(-126, f32)
_MINUS_ZERO = np.array(0x80000000, u32)
_PLUS_ZERO = np.array(0, u32)


def with_ftz(run: Run) -> Run:
    """Subnormal operands and results are zeros."""
    return lambda *xs: flush(run(*map(flush, xs)))


def with_sat(run: Run) -> Run:
    """Results are clamped to [+0, 1]; a NaN becomes +0."""

    def clamped(*xs: Array) -> Array:
        out = run(*xs)
        kind = out.dtype.type
        return np.fmin(np.where(out > 0, out, kind(0)), kind(1))

    return clamped


def _pick(name: str, mode: str) -> Run:
    """The function of an f32 operation in a rounding mode."""
    nearest: dict[str, Run] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    if mode == "rn" and name in nearest:
        return nearest[name]
    table: dict[str, Run] = {
        "add": lambda a, b: add_rounded(a, b, mode),
        "sub": lambda a, b: add_rounded(a, -b, mode),
        "mul": lambda a, b: mul_rounded(a, b, mode),
        "fma": lambda a, b, c: fma_rounded(a, b, c, mode),
        "div": lambda a, b: div_rounded(a, b, mode),
        "rcp": lambda a: div_rounded(np.ones_like(a), a, mode),
        "sqrt": lambda a: sqrt_rounded(a, mode),
    }
    return table[name]


def _arithmetic(table: Table) -> None:
    for name, mode in product(("add", "sub", "mul", "fma"), MODES):
        run, count = _pick(name, mode), 3 if name == "fma" else 2
        names = [f"{name}.{mode}"] + ([name] if mode == "rn" and name != "fma" else [])
        for stem in names:
            _scalar(table, stem, run, count)
            two, ftz = packed(run, f32, u64), packed(with_ftz(run), f32, u64)
            define(table, f"{stem}.f32x2", two, *["f32x2"] * (count + 1))
            define(table, f"{stem}.ftz.f32x2", ftz, *["f32x2"] * (count + 1))
            _mixed(table, stem, name, run)
    for mode in MODES:  # another name of fma
        _scalar(table, f"mad.{mode}", _pick("fma", mode), 3)
    for name, mode in product(("div", "rcp", "sqrt"), MODES):
        run, count = _pick(name, mode), 2 if name == "div" else 1
        define(table, f"{name}.{mode}.f32", run, *["f32"] * (count + 1))
        define(table, f"{name}.{mode}.ftz.f32", with_ftz(run), *["f32"] * (count + 1))


def _scalar(table: Table, stem: str, run: Run, count: int) -> None:
    for mark, wrapped in (
        ("", run),
        (".ftz", with_ftz(run)),
        (".sat", with_sat(run)),
        (".ftz.sat", with_sat(with_ftz(run))),
    ):
        define(table, f"{stem}{mark}.f32", wrapped, *["f32"] * (count + 1))


def _mixed(table: Table, stem: str, name: str, run: Run) -> None:
    """f32 arithmetic whose factors, or first operand, are f16 or bf16."""
    widen: dict[str, Run] = {"bf16": from_bf16, "f16": lambda x: x.astype(f32)}
    narrow = {"add": 1, "sub": 1, "mul": 0, "fma": 2}[name]
    for kind, up in widen.items() if narrow else ():

        def mixed(*xs: Array, up: Run = up) -> Array:
            return run(*[up(x) for x in xs[:narrow]], xs[-1])

        sources = (*[kind] * narrow, "f32")
        define(table, f"{stem}.f32.{kind}", mixed, "f32", *sources)
        define(table, f"{stem}.sat.f32.{kind}", with_sat(mixed), "f32", *sources)


def maximum(a: Array, b: Array) -> Array:
    """The larger of two, the number if one is a NaN; +0 is larger than -0."""
    out = np.fmax(a, b)
    return _order_zeros(out, a, b, True)


def minimum(a: Array, b: Array) -> Array:
    """The smaller of two, the number if one is a NaN; -0 is smaller than +0."""
    out = np.fmin(a, b)
    return _order_zeros(out, a, b, False)


def maximum_nan(a: Array, b: Array) -> Array:
    """The larger of two, a NaN if one is."""
    out = np.maximum(a, b)
    return _order_zeros(out, a, b, True)


def minimum_nan(a: Array, b: Array) -> Array:
    """The smaller of two, a NaN if one is."""
    out = np.minimum(a, b)
    return _order_zeros(out, a, b, False)


def _order_zeros(out: Array, a: Array, b: Array, largest: bool) -> Array:
    """For operands +0 and -0 numpy returns either: replace it by the zero that PTX specifies."""
    wrong = _MINUS_ZERO if largest else _PLUS_ZERO
    if out.dtype != f32:
        zeros = (out == 0) & (np.signbit(out) == largest)
        other = (a == 0) & (np.signbit(a) != largest) | (b == 0) & (np.signbit(b) != largest)
        return np.where(zeros & other, -out, out)
    zeros = out.view(u32) == wrong
    if np.count_nonzero(zeros):
        right = _PLUS_ZERO if largest else _MINUS_ZERO
        other = (a.view(u32) == right) | (b.view(u32) == right)
        return np.where(zeros & other, right.view(f32), out)
    return out


EXTREMA: dict[str, Run] = {
    "max": maximum,
    "min": minimum,
    "max.NaN": maximum_nan,
    "min.NaN": minimum_nan,
}


_MAGNITUDES: dict[str, Run] = {
    **{"max": np.fmax, "min": np.fmin, "max.NaN": np.maximum, "min.NaN": np.minimum}
}


def xorsign(stem: str) -> Run:
    """The extremum of the magnitudes of f32 values, with the exclusive or of their signs."""
    pick = _MAGNITUDES[stem]

    def run(a: Array, b: Array) -> Array:
        size = pick(np.abs(a), np.abs(b))
        sign = (a.view(u32) ^ b.view(u32)) & _MINUS_ZERO
        return (size.view(u32) | sign).view(f32)

    return run


def _extrema(table: Table) -> None:
    for stem, pick in EXTREMA.items():
        name, _, nan = stem.partition(".")
        nan = f".{nan}" if nan else ""

        def three(a: Array, b: Array, c: Array, pick: Run = pick) -> Array:
            return pick(pick(a, b), c)

        def sizes(a: Array, b: Array, c: Array, three: Run = three) -> Array:
            return three(np.abs(a), np.abs(b), np.abs(c))

        for ftz, wrap in (("", lambda run: run), (".ftz", with_ftz)):
            op = f"{name}{ftz}{nan}"
            define(table, f"{op}.f32", wrap(pick), "f32", "f32", "f32")
            define(table, f"{op}.xorsign.abs.f32", wrap(xorsign(stem)), "f32", "f32", "f32")
            define(table, f"{op}.f32:3", wrap(three), "f32", "f32", "f32", "f32")
            define(table, f"{op}.abs.f32:3", wrap(sizes), "f32", "f32", "f32", "f32")
    define(table, "max.f64", maximum, "f64", "f64", "f64")
    define(table, "min.f64", minimum, "f64", "f64", "f64")


def _signs(table: Table) -> None:
    define(table, "neg.{f32,f64}", np.negative, "T", "T")
    define(table, "abs.{f32,f64}", np.abs, "T", "T")
    define(table, "neg.ftz.f32", lambda a: -flush(a), "T", "T")
    define(table, "abs.ftz.f32", lambda a: np.abs(flush(a)), "T", "T")
    define(table, "copysign.{f32,f64}", lambda a, b: np.copysign(b, a), "T", "T", "T")


def _quick_divide(a: Array, b: Array) -> Array:
    """div.approx: a divisor of magnitude above 2^126 has the reciprocal 0."""
    return np.where((np.abs(b) > f32(2.0**126)) & (b - b == 0), a * np.copysign(_ZERO, b), a / b)


def exp2_ftz(x: Array) -> Array:
    """2^x with subnormal results flushed; subnormal operands give 1 in any case."""
    out = np.exp2(x)
    below = x < _LEAST
    return np.where(below, _ZERO, out) if np.count_nonzero(below) else out


def _rsqrt(x: Array) -> Array:
    return (1.0 / np.sqrt(x.astype(f64))).astype(x.dtype)


def _upper_half(run: Run) -> Run:
    """A gross f64 approximation: the lower 32 bits are not read, and zero in the result."""
    high = u64(0xFFFFFFFF00000000)

    def gross(x: Array) -> Array:
        out = flush(run(flush((x.view(u64) & high).view(f64))))
        return (out.view(u64) & high).view(f64)

    return gross


APPROXIMATE: dict[str, Run] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: _ONE / x,
    "rsqrt": _rsqrt,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
}


def _approximations(table: Table) -> None:
    """These are exact up to the rounding to f32, so within the error that the ISA documents."""
    for name, run in APPROXIMATE.items():
        define(table, f"{name}.approx.f32", run, "T", "T")
        ftz = exp2_ftz if name == "ex2" else with_ftz(run)
        define(table, f"{name}.approx.ftz.f32", ftz, "T", "T")
    define(table, "tanh.approx.f32", np.tanh, "T", "T")
    define(table, "rsqrt.approx.f64", _rsqrt, "T", "T")
    define(table, "rsqrt.approx.ftz.f64", _upper_half(_rsqrt), "T", "T")
    define(table, "rcp.approx.ftz.f64", _upper_half(lambda x: f64(1) / x), "T", "T")
    for name, run in (("approx", _quick_divide), ("full", np.divide)):
        define(table, f"div.{name}.f32", run, "T", "T", "T")
        define(table, f"div.{name}.ftz.f32", with_ftz(run), "T", "T", "T")


def _doubles(table: Table) -> None:
    nearest: dict[str, Run] = {
        **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide},
        **{"sqrt": np.sqrt, "rcp": lambda x: f64(1) / x},
    }
    for name, mode in product((*nearest, "fma"), MODES):
        count = {"fma": 3, "sqrt": 1, "rcp": 1}.get(name, 2)
        run = nearest.get(name) if mode == "rn" else None
        define(
            table,
            f"{name}.{mode}.f64",
            run or exact.rounded(name, mode),
            *["f64"] * (count + 1),
        )
        if name == "fma":
            define(table, f"mad.{mode}.f64", exact.rounded(name, mode), *["f64"] * 4)
        if mode == "rn" and name in ("add", "sub", "mul"):
            define(table, f"{name}.f64", nearest[name], "T", "T", "T")


def fill(table: Table) -> None:
    """Declare the f32 and f64 opcodes."""
    _arithmetic(table)
    _extrema(table)
    _signs(table)
    _approximations(table)
    _doubles(table)
