"""Floating-point opcodes on bit patterns: exact, rounded once; bounds of approximations."""

import math
from fractions import Fraction

from tests.sim.scalar.numbers import (
    FORMATS,
    INF,
    NAN,
    Number,
    decode,
    encode,
    number,
    root,
    subnormal,
)

MODES = ("rn", "rz", "rm", "rp")


# exact operations on Numbers; the mode only decides the sign of a sum that cancels


def add(a, b, mode):
    if a is NAN or b is NAN:
        return NAN
    if INF in (a.size, b.size):
        if a.size == b.size and a.negative != b.negative:
            return NAN
        return a if a.size == INF else b
    total = a.value + b.value
    if total:
        return number(total)
    if a.size == 0 and a.negative == b.negative:
        return a
    return Number(mode == "rm", Fraction(0))


def negate(a):
    return a if a is NAN else Number(not a.negative, a.size)


def mul(a, b, mode=None):
    if a is NAN or b is NAN:
        return NAN
    negative = a.negative != b.negative
    if INF in (a.size, b.size):
        return NAN if 0 in (a.size, b.size) else Number(negative, INF)
    return Number(negative, a.size * b.size)


def div(a, b, mode=None):
    if a is NAN or b is NAN or a.size == b.size == INF or a.size == b.size == 0:
        return NAN
    negative = a.negative != b.negative
    if a.size == INF or b.size == 0:
        return Number(negative, INF)
    return Number(negative, Fraction(0) if b.size == INF else a.size / b.size)


def sqrt(a, mode=None):
    if a is NAN or a.size == 0 or (a.size == INF and not a.negative):
        return a
    return NAN if a.negative else Number(False, root(a.size))


def order(x):
    """A key by which -0 < +0 and infinities come last."""
    size = Fraction(2) ** 4000 if x.size == INF else x.size
    return (-1 if x.negative else 1) * size, not x.negative


def extreme(largest, nan):
    def pick(a, b):
        if a is NAN or b is NAN:
            return NAN if nan or a is b else (b if a is NAN else a)
        return (max if largest else min)(a, b, key=order)

    return pick


def magnitude(a):
    return a if a is NAN else Number(False, a.size)


OPERATIONS = {
    "add": lambda mode, a, b: add(a, b, mode),
    "sub": lambda mode, a, b: add(a, negate(b), mode),
    "mul": lambda mode, a, b: mul(a, b),
    "fma": lambda mode, a, b, c: add(mul(a, b), c, mode),
    "div": lambda mode, a, b: div(a, b),
    "rcp": lambda mode, a: div(number(1), a),
    "sqrt": lambda mode, a: sqrt(a),
}


def reference(parts):
    """The function of an opcode whose type is a float type."""
    name, mods, kind = parts[0], parts[1:-1], parts[-1]
    mixed = [x for x in mods if x in FORMATS]  # add.f32.bf16: the type of the narrow operands
    if mixed:
        mods, kind, narrow = [x for x in mods if x not in FORMATS], mixed[0], kind
    else:
        narrow = None
    if name in ("neg", "abs", "copysign"):
        return _signs(name, mods, kind)
    if name in ("min", "max"):
        return _extrema(name, mods, kind)
    if "approx" in mods or "full" in mods:
        return approximate(name, mods, kind)
    mode = next((x for x in mods if x in MODES), "rn")
    assert set(mods) <= {*MODES, "ftz", "sat", "relu"}, parts
    narrow_count = {"fma": 2}.get(name, 1) if narrow else 0

    def run(*bits):
        kinds = [narrow] * narrow_count + [kind] * (len(bits) - narrow_count)
        xs = [flushed(decode(b, k), k, mods) for b, k in zip(bits, kinds, strict=True)]
        return finish(OPERATIONS[name](mode, *xs), kind, mode, mods)

    return run


def flushed(x, kind, mods):
    return Number(x.negative, Fraction(0)) if "ftz" in mods and subnormal(x, kind) else x


def finish(x, kind, mode, mods):
    """Round, then what .ftz, .sat and .relu do to the result."""
    if "sat" in mods and x is NAN:
        return 0
    out = decode(encode(x, kind, mode), kind)
    out = flushed(out, kind, mods)
    if "sat" in mods or "relu" in mods:
        if out is not NAN and (out.negative or out.size == 0):
            return 0
        if "sat" in mods and (out.size == INF or out.size > 1):
            out = number(1)
    return encode(out, kind)


def _signs(name, mods, kind):
    width = FORMATS[kind].width

    def run(a, b=None):
        if name != "copysign" and decode(a, kind) is NAN:
            return lambda out: decode(out, kind) is NAN  # with any sign and payload
        if mods:
            a = encode(flushed(decode(a, kind), kind, mods), kind)
        sign = a >> (width - 1)
        size = a % 2 ** (width - 1)
        if name == "copysign":
            return sign << (width - 1) | b % 2 ** (width - 1)
        return size | (name == "neg" and not sign) << (width - 1)

    return run


def _extrema(name, mods, kind):
    pick = extreme(name == "max", "NaN" in mods)

    def run(*bits):
        xs = [flushed(decode(b, kind), kind, mods) for b in bits]
        sign = sum(b >> (FORMATS[kind].width - 1) for b in bits) % 2
        if "abs" in mods:
            xs = [magnitude(x) for x in xs]
        out = xs[0]
        for x in xs[1:]:
            out = pick(out, x)
        if "xorsign" in mods and out is not NAN:
            out = Number(bool(sign), out.size)
        return encode(out, kind)

    return run


# approximations: (function of a double, relative error, absolute error) as the ISA documents them


def _exp2(x):
    return math.inf if x >= 1024 else 2.0**x


def _log2(x):
    return -math.inf if x == 0 else math.log2(x) if x > 0 else math.nan


def _over(x, y):
    if y == 0:
        return (
            math.nan
            if x == 0 or math.isnan(x)
            else math.copysign(math.inf, x) * math.copysign(1, y)
        )
    return x / y


def _rsqrt(x):
    return math.nan if x < 0 else _over(1.0, math.copysign(math.sqrt(abs(x)), x))


def _wave(f):
    return lambda x: math.nan if math.isinf(x) else f(x)


BOUNDS = {
    "ex2": (_exp2, 2**-22, 0),
    "lg2": (_log2, 2**-22, 2**-22),
    "rcp": (lambda x: _over(1.0, x), 2**-23, 0),
    "rsqrt": (_rsqrt, 2**-22.9, 0),
    "sqrt": (lambda x: math.nan if x < 0 else math.sqrt(x), 2**-23, 0),
    "sin": (_wave(math.sin), 0, 2**-20.5),
    "cos": (_wave(math.cos), 0, 2**-20.5),
    "tanh": (math.tanh, 2**-11, 0),
    "div": (_over, 2**-22, 0),
}
HALF_BOUNDS = {"f16": 2**-9.9, "bf16": 2**-7}


def double(bits, kind, mods):
    """The value of a bit pattern as a Python float (all but f64's are exact)."""
    x = flushed(decode(bits, kind), kind, mods)
    if x is NAN:
        return math.nan
    return (-1.0 if x.negative else 1.0) * (math.inf if x.size == INF else float(x.size))


def approximate(name, mods, kind):
    """A function of operands that gives a check of the result."""
    function, relative, absolute = BOUNDS[name]
    relative = max(relative, HALF_BOUNDS.get(kind, 0))
    gross = kind == "f64" and "ftz" in mods  # the lower halves of operand and result are zeros
    if gross:
        relative = 2**-20
    least = float(Fraction(2) ** (1 - FORMATS[kind].bias - FORMATS[kind].mantissa))
    tiny = float(Fraction(2) ** (1 - FORMATS[kind].bias))

    def run(*bits):
        if gross:
            bits = [b >> 32 << 32 for b in bits]
        xs = [double(b, kind, mods) for b in bits]
        want = math.nan if any(map(math.isnan, xs)) else function(*xs)
        if name == "div" and "approx" in mods and 2.0**126 < abs(xs[1]) < math.inf:
            want = xs[0] * math.copysign(0.0, xs[1])

        def check(out):
            got = double(out, kind, ())
            if gross and out % 2**32 and not math.isnan(got):
                return False
            if math.isnan(want) or math.isinf(got) or math.isinf(want):
                return encode(number_of(want), kind) == out or (
                    math.isnan(want) and math.isnan(got)
                )
            if "ftz" in mods and abs(want) < tiny * (1 - relative):
                return got == 0 and math.copysign(1, got) == math.copysign(1, want)
            if "ftz" in mods and abs(want) < tiny and got == 0:
                return True
            bound = max(abs(want) * relative, absolute, least if absolute == 0 else 0)
            return abs(got - want) <= bound and (want != 0 or got == 0)

        return check

    return run


def number_of(x):
    """The Number of a Python float."""
    if math.isnan(x):
        return NAN
    return Number(math.copysign(1, x) < 0, INF if math.isinf(x) else abs(Fraction(x)))
