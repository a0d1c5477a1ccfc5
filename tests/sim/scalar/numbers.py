"""Binary floating-point formats, exactly: bit patterns to fractions and back in any rounding."""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import isqrt


@dataclass(frozen=True)
class Format:
    """Widths, and what the codes at the top mean: "ieee", "nan" (one NaN code), "none"."""

    exponent: int
    mantissa: int
    specials: str = "ieee"

    @property
    def width(self):
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self):
        return 2 ** (self.exponent - 1) - 1

    @property
    def top(self):
        """The largest exponent field of a finite value, and its largest fraction."""
        last = 2**self.exponent - 1
        full = 2**self.mantissa - 1
        return {"ieee": (last - 1, full), "nan": (last, full - 1), "none": (last, full)}[
            self.specials
        ]


FORMATS = {
    "f64": Format(11, 52),
    "f32": Format(8, 23),
    "tf32": Format(8, 10),
    "f16": Format(5, 10),
    "bf16": Format(8, 7),
    "e5m2": Format(5, 2),
    "e4m3": Format(4, 3, "nan"),
    "e3m2": Format(3, 2, "none"),
    "e2m3": Format(2, 3, "none"),
    "e2m1": Format(2, 1, "none"),
}
NAN = None
INF = "infinite"


@dataclass(frozen=True)
class Number:
    """A signed magnitude: a Fraction, or INF. A NaN is None."""

    negative: bool
    size: Fraction | str

    @property
    def value(self):
        return -self.size if self.negative else self.size


def number(value):
    """A Number from a rational (zero is +0)."""
    return Number(value < 0, abs(Fraction(value)))


@lru_cache(None)
def decode(bits, name):
    """The Number of a bit pattern, NAN for any NaN."""
    form = FORMATS[name]
    fraction = bits % 2**form.mantissa
    power = bits >> form.mantissa & (2**form.exponent - 1)
    negative = bool(bits >> (form.width - 1) & 1)
    top, full = form.top
    if form.specials == "ieee" and power > top:
        return NAN if fraction else Number(negative, INF)
    if form.specials == "nan" and (power, fraction) == (top, full + 1):
        return NAN
    lead = Fraction(fraction, 2**form.mantissa) + (power > 0)
    return Number(negative, lead * Fraction(2) ** (max(power, 1) - form.bias))


def floor_log2(x):
    """The largest e with 2^e <= x."""
    n, d = x.numerator, x.denominator
    e = n.bit_length() - d.bit_length()
    return e if n << max(-e, 0) >= d << max(e, 0) else e - 1


def round_ratio(n, d, mode, negative, chance=(0, 1)):
    """n / d >= 0 to a whole number; the sign decides rm and rp, `chance` < 1 is added for rs."""
    low, rest = divmod(n, d)
    if mode == "rs":
        return low + (rest * chance[1] + chance[0] * d >= d * chance[1])
    if mode in ("rn", "rna"):
        return low + (2 * rest > d or (2 * rest == d and (mode == "rna" or low % 2 == 1)))
    up = {"rz": False, "rm": negative, "rp": not negative}[mode]
    return low + (up and rest > 0)


def round_whole(x, mode, negative):
    """A fraction >= 0 to a whole number."""
    return round_ratio(x.numerator, x.denominator, mode, negative)


def nan_bits(name):
    """The canonical NaN: all bits but the sign; where there is none, that is the largest value."""
    return 2 ** (FORMATS[name].width - 1) - 1


def encode(x, name, mode="rn", finite=False, chance=(0, 1)):
    """The bits of a Number (or NAN) in a format."""
    form = FORMATS[name]
    if x is NAN:
        return nan_bits(name)
    sign = x.negative << (form.width - 1)
    infinite = sign | (2**form.exponent - 1) << form.mantissa
    most = sign | form.top[0] << form.mantissa | form.top[1]
    clamped = finite or form.specials != "ieee"
    if x.size == INF:
        return most if clamped else infinite
    if x.size == 0:
        return sign
    # `whole` units of 2^(power - mantissa)
    power = max(floor_log2(x.size), 1 - form.bias)
    unit = power - form.mantissa
    n, d = x.size.numerator << max(-unit, 0), x.size.denominator << max(unit, 0)
    whole = round_ratio(n, d, mode, x.negative, chance)
    if whole == 2 ** (form.mantissa + 1):
        whole, power = whole // 2, power + 1
    field = power + form.bias if whole >= 2**form.mantissa else 0
    fraction = whole % 2**form.mantissa
    if (field, fraction) > form.top:
        toward_zero = mode == "rz" or mode == ("rp" if x.negative else "rm")
        return most if clamped or toward_zero else infinite
    return sign | field << form.mantissa | fraction


def root(size):
    """The square root, exact if rational, else with an error far below any rounding here."""
    scale = 2**700
    whole = isqrt(size.numerator * size.denominator * scale * scale)
    out = Fraction(whole, size.denominator * scale)
    return out if out * out == size else out + Fraction(1, size.denominator * scale * 2)


def subnormal(x, name):
    """Whether a Number is below the normal range of a format, and not zero."""
    return x is not NAN and x.size != INF and 0 < x.size < Fraction(2) ** (1 - FORMATS[name].bias)
