"""Comparison and selection opcodes -> their entries: setp, set, selp, slct, testp."""

from __future__ import annotations

from itertools import product

import numpy as np

from coda.sim.alu.floats import flush, from_bf16
from coda.sim.alu.opcodes import DTYPE, Array, Run, Table, define, f16, lanes, u16

_ORDERED: dict[str, Run] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
}
_UNSIGNED: dict[str, Run] = {
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
}
# An unordered comparison is the negation of one of these, so it is true for a NaN operand.
_OPPOSITE: dict[str, Run] = {
    **{"ltu": np.greater_equal, "leu": np.greater, "gtu": np.less_equal, "geu": np.less}
}
_FLOAT = (*_ORDERED, "equ", "neu", *_OPPOSITE, "num", "nan")
_JOIN: dict[str, Run] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _differ(a: Array, b: Array) -> Array:
    return (a < b) | (a > b)


def _unordered(a: Array, b: Array) -> Array:
    return (a != a) | (b != b)


def _compare_float(name: str) -> Run:
    """Ordered comparisons are false, unordered ones (…u) true, when an operand is a NaN."""
    if name in _OPPOSITE:
        opposite = _OPPOSITE[name]
        return lambda a, b: ~opposite(a, b)
    special: dict[str, Run] = {
        **{"ne": _differ, "equ": lambda a, b: ~_differ(a, b), "neu": np.not_equal},
        **{"nan": _unordered, "num": lambda a, b: ~_unordered(a, b)},
    }
    return special.get(name) or _ORDERED[name]


def _widened(run: Run) -> Run:
    return lambda a, b: run(from_bf16(a), from_bf16(b))


def _flushed(run: Run) -> Run:
    return lambda a, b: run(flush(a), flush(b))


def _comparisons() -> dict[tuple[str, str], Run]:
    """The function of each comparison (with `.ftz` if any) of each type."""
    out: dict[tuple[str, str], Run] = {}
    for name, kind in product(("eq", "ne"), ("b16", "b32", "b64")):
        out[name, kind] = _ORDERED[name]
    for name, kind in product(_ORDERED, ("u16", "u32", "u64", "s16", "s32", "s64")):
        out[name, kind] = _ORDERED[name]
    for name, kind in product(_UNSIGNED, ("u16", "u32", "u64")):
        out[name, kind] = _UNSIGNED[name]
    for name in _FLOAT:
        run = _compare_float(name)
        out.update({(name, kind): run for kind in ("f16", "f32", "f64")})
        out[name, "bf16"] = _widened(run)
        out[f"{name}.ftz", "f32"] = _flushed(run)
        out[f"{name}.ftz", "f16"] = _flushed(run)
    return out


def _both(run: Run, kind: str) -> Run:
    """Compare both halves of packed operands: two arrays, the low half's first."""
    view = f16 if kind == "f16" else u16

    def each(a: Array, b: Array) -> tuple[Array, Array]:
        out = run(lanes(a, view), lanes(b, view))
        return out[..., 0::2], out[..., 1::2]

    return each


def _setp(table: Table, name: str, kind: str, run: Run) -> None:
    base, _, ftz = name.partition(".")
    mark = f".{ftz}" if ftz else ""
    define(table, f"setp.{base}{mark}.{kind}", run, "pred", kind, kind)
    both = kind not in ("f16", "bf16")  # which have no second predicate
    if both:
        define(table, f"setp.{base}{mark}.{kind}|", _with_opposite(run), "pred|pred", kind, kind)
    for word, join in _JOIN.items():

        def one(a: Array, b: Array, p: Array, join: Run = join) -> Array:
            return join(run(a, b), p)

        def two(a: Array, b: Array, p: Array, join: Run = join) -> tuple[Array, Array]:
            first = run(a, b)
            return join(first, p), join(~first, p)

        op = f"setp.{base}.{word}{mark}.{kind}"
        define(table, op, one, "pred", kind, kind, "pred")
        if both:
            define(table, op + "|", two, "pred|pred", kind, kind, "pred")


def _with_opposite(run: Run) -> Run:
    def two(a: Array, b: Array) -> tuple[Array, Array]:
        out = run(a, b)
        return out, ~out

    return two


def _setp_packed(table: Table, name: str, kind: str, run: Run) -> None:
    """Packed halves: the first predicate is for the low half, the second for the high half."""
    base, _, ftz = name.partition(".")
    mark = f".{ftz}" if ftz else ""
    both = _both(run, kind)
    define(table, f"setp.{base}{mark}.{kind}x2|", both, "pred|pred", "b32", "b32")
    for word, join in _JOIN.items():

        def joined(a: Array, b: Array, p: Array, join: Run = join) -> tuple[Array, Array]:
            low, high = both(a, b)
            return join(low, p), join(high, p)

        op = f"setp.{base}.{word}{mark}.{kind}x2|"
        define(table, op, joined, "pred|pred", "b32", "b32", "pred")


def _set(table: Table, name: str, kind: str, run: Run) -> None:
    """set: all ones or 1.0 where the comparison holds."""
    base, _, ftz = name.partition(".")
    mark = f".{ftz}" if ftz else ""
    for to in ("u32", "s32", "f32"):
        yes = DTYPE[to](1) if to == "f32" else ~DTYPE[to](0)
        no = DTYPE[to](0)
        define(
            table,
            f"set.{base}{mark}.{to}.{kind}",
            lambda a, b, yes=yes, no=no: np.where(run(a, b), yes, no),
            *(to, kind, kind),
        )
        for word, join in _JOIN.items():
            define(
                table,
                f"set.{base}.{word}{mark}.{to}.{kind}",
                lambda a, b, p, yes=yes, no=no, join=join: np.where(join(run(a, b), p), yes, no),
                *(to, kind, kind, "pred"),
            )


def _selections(table: Table) -> None:
    kinds = ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")
    for kind in kinds:
        define(table, f"selp.{kind}", lambda a, b, p: np.where(p, a, b), "T", "T", "T", "pred")
        for test in ("s32", "f32"):  # -0.0 counts as >= 0, a NaN does not
            define(
                table,
                f"slct.{kind}.{test}",
                lambda a, b, c: np.where(c >= 0, a, b),
                *(kind, kind, kind, test),
            )
        define(
            table,
            f"slct.ftz.{kind}.f32",
            lambda a, b, c: np.where(flush(c) >= 0, a, b),
            *(kind, kind, kind, "f32"),
        )


def _properties(table: Table) -> None:
    """testp; zeros count as normal."""
    for kind in ("f32", "f64"):
        tiny = np.finfo(DTYPE[kind]).tiny
        tests: dict[str, Run] = {
            "finite": np.isfinite,
            "infinite": np.isinf,
            "number": lambda a: a == a,
            "notanumber": lambda a: a != a,
            "normal": lambda a, t=tiny: np.isfinite(a) & ((np.abs(a) >= t) | (a == 0)),
            "subnormal": lambda a, t=tiny: (np.abs(a) < t) & (a != 0),
        }
        for name, run in tests.items():
            define(table, f"testp.{name}.{kind}", run, "pred", kind)


def fill(table: Table) -> None:
    """Declare the comparisons and selections."""
    for (name, kind), run in _comparisons().items():
        _setp(table, name, kind, run)
        if kind not in ("f16", "bf16"):
            _set(table, name, kind, run)
        else:
            _setp_packed(table, name, kind, run)
    _selections(table)
    _properties(table)
