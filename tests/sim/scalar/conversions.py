"""cvt on bit patterns."""

import re
from fractions import Fraction

from tests.sim.scalar.comparisons import signed
from tests.sim.scalar.floats import flushed, mul
from tests.sim.scalar.numbers import (
    INF,
    NAN,
    Number,
    decode,
    encode,
    floor_log2,
    number,
    round_whole,
)

WHOLE = {"rni": "rn", "rzi": "rz", "rmi": "rm", "rpi": "rp"}
INTEGER = re.compile(r"^[us](8|16|32|64)$")
MODES = ("rn", "rna", "rz", "rm", "rp", "rs")


def reference(parts):
    mods, to, a = parts[1:-2], parts[-2], parts[-1]
    if mods and mods[0] == "pack":
        return _pack(parts)
    known = {*WHOLE, *MODES, "ftz", "sat", "relu", "satfinite", "scaled::n2::ue8m0"}
    assert set(mods) <= known, parts
    if INTEGER.match(to):
        return (
            _from_integer_to_integer(to, a, mods) if INTEGER.match(a) else _to_integer(to, a, mods)
        )
    if "s2f6x2" in (to, a):
        return _fixed(to, a, mods)
    if to.endswith(("x2", "x4")):
        return _packed(to, a, mods)
    return lambda x: convert(x, to, a, mods)


def limits(kind):
    width = int(kind[1:])
    return (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if kind[0] == "s" else (0, 2**width - 1)


def integer(x, kind):
    return signed(x, int(kind[1:])) if kind[0] == "s" else x


def _from_integer_to_integer(to, a, mods):
    low, high = limits(to)

    def run(x):
        value = integer(x, a)
        return (min(max(value, low), high) if "sat" in mods else value) % 2 ** int(to[1:])

    return run


def _to_integer(to, a, mods):
    low, high = limits(to)
    width = int(to[1:])
    mode = next(WHOLE[x] for x in mods if x in WHOLE)

    def run(bits):
        x = flushed(decode(bits, a), a, mods)
        if x is NAN:
            return 2 ** (width - 1) if a == "f64" or width == 64 else 0
        if x.size == INF:
            return (low if x.negative else high) % 2**width
        whole = round_whole(x.size, mode, x.negative)
        return min(max(-whole if x.negative else whole, low), high) % 2**width

    return run


def value_of(bits, kind, mods):
    if kind == "ue8m0":
        return NAN if bits == 255 else number(Fraction(2) ** (bits - 127))
    if INTEGER.match(kind):
        return number(integer(bits, kind))
    x = decode(bits, kind)
    return flushed(x, kind, mods) if kind == "f32" else x  # .ftz is for f32 alone


def clamp_negative(x):
    return Number(False, Fraction(0)) if x is not NAN and x.negative else x


def convert(bits, to, a, mods, chance=(0, 1), factor=127):
    """One value from type a to a float type, multiplied by a power of two."""
    x = value_of(bits, a, mods)
    if factor != 127:
        x = mul(x, value_of(factor, "ue8m0", ()))
    for how, mode in WHOLE.items():
        if how in mods and x is not NAN and x.size != INF:
            x = Number(x.negative, Fraction(round_whole(x.size, mode, x.negative)))
    if "relu" in mods:
        x = clamp_negative(x)
    if "sat" in mods:
        if x is NAN or x.negative or x.size == 0:
            return 0
        if x.size == INF or x.size > 1:
            x = number(1)
    if to == "ue8m0":
        return _scale(x, mods)
    mode = next((m for m in mods if m in MODES), "rn")
    out = encode(x, to, mode, "satfinite" in mods, chance)
    if "ftz" in mods and to == "f32":
        out = encode(flushed(decode(out, to), to, mods), to)
    if to == "tf32":
        return 0x7FFFFFFF if x is NAN else out << 13
    return out


def _scale(x, mods):
    most = 254 if "satfinite" in mods else 255
    if x is NAN:
        return 255
    if x.size == INF:
        return most
    if x.size == 0:
        return 0
    power = floor_log2(x.size)
    if "rp" in mods and x.size != Fraction(2) ** power:
        power += 1
    return min(max(power + 127, 0), most)


WIDTH = {"f16": 16, "bf16": 16, "e2m1": 4, "f32": 32}


def _packed(to, a, mods):
    """Several values in a register; the first source is the highest."""
    count, kind = int(to[-1]), to[:-2]
    width = WIDTH.get(kind, 8)

    def run(*xs):
        chances, factors = [(0, 1)] * count, [127] * count
        if "rs" in mods:
            xs, chances = xs[:-1], random_parts(xs[-1], kind, count)
        if "scaled::n2::ue8m0" in mods:
            xs, factors = xs[:-1], [xs[-1] >> 8, xs[-1] & 255]
        own = a
        if a.endswith("x2"):
            own = a[:-2]
            part = WIDTH.get(own, 8)
            xs = [xs[0] >> part, xs[0] & (2**part - 1)]
            if own in ("e2m3", "e3m2"):
                xs = [x & 63 for x in xs]
        out = 0
        for x, chance, factor in zip(xs, chances, factors, strict=True):
            out = out << width | convert(x, kind, own, mods, chance, factor)
        return out

    return run


def random_parts(bits, kind, count):
    """The random bits of each source as a ratio, in units of the last kept place."""
    if count == 2:
        n = 13 if kind == "f16" else 16
        return [(x % 2**n, 2**n) for x in (bits >> 16, bits)]
    b = [bits >> 8 * k & 255 for k in range(4)]
    pairs = (b[3] << 8 | b[1], b[2] << 8 | b[0]) if kind == "e2m1" else (bits >> 16, bits & 0xFFFF)
    out = []
    for pair in pairs:
        out += [int(f"{pair:016b}"[::-1], 2), pair]
    return [(x, 2**16) for x in out]


def _fixed(to, a, mods):
    """s2f6: bytes in units of 1/64."""

    def down(bits, kind, scale):
        x, factor = decode(bits, kind), value_of(scale, "ue8m0", ())
        if x is NAN or factor is NAN:
            return 127
        if x.size == INF:
            return (0 if "relu" in mods else 128) if x.negative else 127
        whole = round_whole(x.size / factor.size * 64, "rn", x.negative)
        whole = -whole if x.negative else whole
        return max(min(whole, 127), 0 if "relu" in mods else -128) % 256

    def up(byte, scale):
        factor = value_of(scale, "ue8m0", ())
        if factor is NAN:
            return 0x7FFF
        x = number(Fraction(signed(byte, 8), 64) * factor.size)
        return encode(clamp_negative(x) if "relu" in mods else x, "bf16", "rn", "satfinite" in mods)

    scaled = "scaled::n2::ue8m0" in mods

    def run(*xs):
        scale = xs[-1] if scaled else 0x7F7F
        xs = xs[: len(xs) - scaled]
        if a == "s2f6x2":
            return up(xs[0] >> 8, scale >> 8) << 16 | up(xs[0] & 255, scale & 255)
        if a == "bf16x2":
            xs = (xs[0] >> 16, xs[0] & 0xFFFF)
        kind = a.removesuffix("x2")
        return down(xs[0], kind, scale >> 8) << 8 | down(xs[1], kind, scale & 255)

    return run


def _pack(parts):
    kind = parts[3]
    width = int(kind[1:])
    low, high = limits(kind)

    def run(a, b, c=0):
        a, b = (min(max(signed(x, 32), low), high) % 2**width for x in (a, b))
        return (c << 2 * width | a << width | b) % 2**32

    return run
