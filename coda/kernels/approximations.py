"""Functions of one float32 by polynomials, for `device_math`: DSL values -> DSL values."""

from __future__ import annotations

import math
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, Uint64

_LOG2_E = 1.4426950408889634
# The binary digits of 2/π after two zeros, in words of 32 bits.
_TWO_OVER_PI = (0x28BE60DB, 0x9391054A, 0x7F09D5F4, 0x7D4D3770, 0x36D8A566, 0x4F10E410)


def _horner(z: Any, *coefficients: float) -> Any:
    """A polynomial in z by Horner's rule; the coefficient of the highest power comes first."""
    value = Float32(coefficients[0])
    for one in coefficients[1:]:
        value = cute.math.fma(z, value, Float32(one))
    return value


def _power_of_two(n: Any) -> Any:
    """2^n for an integer n from -126 to 127, by its exponent bits."""
    bits = cute.make_rmem_tensor(1, Int32)
    bits[0] = (n.to(Int32) + Int32(127)) << Int32(23)
    return cute.recast_tensor(bits, Float32)[0]


def expm1_of(x: Any) -> Any:
    """e^x - 1 = 2^n (e^r - 1) + (2^n - 1) with |r| <= ln 2 / 2, to 1.6 ulp; e^x above 88.

    r = x - n ln 2 by a two-part ln 2 (Cody and Waite, 1980); e^r - 1 = r + r² P(r), with P fitted
    for float32.
    """
    n = cute.math.roundeven(x * Float32(_LOG2_E))
    r = cute.math.fma(-n, Float32(0.693145751953125), x)
    r = cute.math.fma(-n, Float32(1.428606765330187e-06), r)
    p = _horner(r, 1.39337336e-3, 8.36323574e-3, 4.1666463e-2, 1.66665763e-1, 0.5)
    scale = _power_of_two(n)
    y = cute.math.fma(scale, cute.math.fma(r * r, p, r), scale - Float32(1.0))
    y = cutlass.select_(x > Float32(88.0), cute.math.exp(x, fastmath=True), y)
    return cutlass.select_(x < Float32(-30.0), Float32(-1.0), y)


def log1p_of(x: Any) -> Any:
    """log(1 + x) = 2 artanh s, s = x / (2 + x), for -1/2 < x < 1, to 1.3 ulp; else by log.

    Summed as in fdlibm (Sun Microsystems, 1993): x - (x²/2 - s (x²/2 + R(s²))).
    """
    s = x / (x + Float32(2.0))
    z, half = s * s, x * x * Float32(0.5)
    r = z * _horner(z, 0.268782109, 0.282324731, 0.400077194, 0.666666389)
    near = x - (half - s * (half + r))
    far = cute.math.log(x + Float32(1.0), fastmath=True)
    inside = cutlass.select_(x < Float32(1.0), near, far)
    return cutlass.select_(x > Float32(-0.5), inside, far)


def _quarters(x: Any) -> tuple[Any, Any]:
    """Reduce x = n π/2 + r with |r| <= π/4: the integer n and r, for |x| < 2²³.

    π/2 is subtracted in three parts (Cody and Waite, 1980).
    """
    number = cute.math.roundeven(x * Float32(0.6366197723675814))
    r = cute.math.fma(-number, Float32(1.5707963705062866), x)
    r = cute.math.fma(-number, Float32(-4.371138828673793e-08), r)
    r = cute.math.fma(-number, Float32(-1.7151245100058819e-15), r)
    return number.to(Int32), r


def _quarters_of_large(x: Any) -> tuple[Any, Any]:
    """As `_quarters`, for |x| = m · 2^shift >= 2²³ with m < 2²⁴, by Payne and Hanek (1983).

    n is modulo 4. Only the bits 2¹ to 2⁻⁶² of 2^shift · 2/π are multiplied by m: higher bits
    contribute whole turns.
    """
    single = cute.make_rmem_tensor(1, Float32)
    single[0] = x
    bits = cute.recast_tensor(single, Uint32)[0]
    shift = ((bits >> 23) & Uint32(255)) - Uint32(150)
    words = [Uint32(w) for w in _TWO_OVER_PI]
    for step in (64, 32):  # skip so many bits
        skip, rest = step // 32, len(words) - step // 32
        far = (shift & Uint32(step)) != Uint32(0)
        words = [cutlass.select_(far, words[i + skip], words[i]) for i in range(rest)]
    first, second, third = (Uint64(w) for w in words[:3])
    by = Uint64(shift & Uint32(31))
    window = (((first << 32) | second) << by) | ((third << by) >> 32)
    turns = window * Uint64((bits & Uint32(0x7FFFFF)) | Uint32(0x800000))
    number = Uint32((turns + Uint64(1 << 61)) >> 62)
    left = Int64(turns - (Uint64(number) << 62)).to(Float32) * Float32(math.pi / 2**63)
    below = x < Float32(0.0)
    number = number.to(Int32)
    return cutlass.select_(below, -number, number), cutlass.select_(below, -left, left)


def rotated(x: Any, quarter: int) -> Any:
    """sin(x + quarter · π/2), with an error of 2⁻²³, by polynomials for |r| ≤ π/4.

    The polynomials are those of Moshier's Cephes. The library's own function needs local memory
    for the table with which it reduces large arguments.
    """
    near, r = _quarters(x)
    size = cute.math.abs(x)
    large = (size >= Float32(2.0**23)) & (size < Float32(math.inf))
    far, left = _quarters_of_large(x)
    number = cutlass.select_(large, far, near) + Int32(quarter)
    r = cutlass.select_(large, left, r)
    z = r * r
    s = cute.math.fma(z, Float32(-1.9515295891e-4), Float32(8.3321608736e-3))
    s = cute.math.fma(z, s, Float32(-1.6666654611e-1))
    s = cute.math.fma(z * r, s, r)
    c = cute.math.fma(z, Float32(2.443315711809948e-5), Float32(-1.388731625493765e-3))
    c = cute.math.fma(z, c, Float32(4.166664568298827e-2))
    c = cute.math.fma(z * z, c, cute.math.fma(z, Float32(-0.5), Float32(1.0)))
    y = cutlass.select_((number & Int32(1)) == Int32(1), c, s)
    return cutlass.select_((number & Int32(2)) == Int32(2), -y, y)


def hypot_of(x: Any, y: Any) -> Any:
    """sqrt(x² + y²) = l sqrt(1 + (s / l)²) of the larger l; infinite if either is."""
    x, y = cute.math.abs(x), cute.math.abs(y)
    large, small = cutlass.select_(x > y, x, y), cutlass.select_(x > y, y, x)
    ratio = small / large
    found = large * cute.math.sqrt(Float32(1.0) + ratio * ratio)
    found = cutlass.select_(large == Float32(0.0), large + small, found)
    infinite = (x == Float32(math.inf)) | (y == Float32(math.inf))
    return cutlass.select_(infinite, Float32(math.inf), found)
