"""Scalar functions called by emitted kernels: DSL values -> DSL values, in float32.

A value is a float32 or a tuple of two: quack's `F2` (packed, Blackwell) or `Pair` (a column pair).
All three support `+ - *` and negation; every other function is applied here to each lane. Functions
that have whole numbers (`Scalar.of_ints`) also take an Int32 or Int64, and give one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from quack.epilogue.math import F2, pack, unpack

from coda.kernels.approximations import expm1_of, hypot_of, log1p_of, rotated

__all__ = ["pack", "unpack"]
_TYPES = {
    "bf16": cutlass.BFloat16,
    "f16": cutlass.Float16,
    "e4m3": cutlass.Float8E4M3FN,
    "e5m2": cutlass.Float8E5M2,
}
_LN_2 = 0.6931471805599453
_FACTORS = 8  # up to this exponent, products are cheaper than a power, and as exact


def lanes(fn: Callable[..., Any], *args: Any) -> Any:
    """Apply `fn` to scalars, or to each lane of tuples; scalars are broadcast to both lanes."""
    wide = [a for a in args if isinstance(a, tuple)]
    if not wide:
        return fn(*args)
    low, high = (fn(*(a[i] if isinstance(a, tuple) else a for a in args)) for i in (0, 1))
    return _like(wide[0], low, high)


def _like(a: Any, low: Any, high: Any) -> Any:
    """Two scalars as a tuple of the type of `a`; a subclass of F2 (16-bit loads) becomes an F2."""
    return (F2 if isinstance(a, F2) else type(a))._make((low, high))


def div(a: Any, b: Any) -> Any:
    """a / b."""
    return lanes(lambda x, y: x / y, a, b)


def floordiv(a: Any, b: Any) -> Any:
    """The whole quotient of whole numbers, up to 2²⁴ if they are floats, rounded down.

    A division that is correctly rounded does not reach the next whole number from below.
    """
    return lanes(lambda x, y: x // y if _is_whole(x) else cute.math.floor(x / y), _f(a), _f(b))


def recip(a: Any) -> Any:
    """1 / a, correctly rounded."""
    return lanes(lambda x: Float32(1.0) / x, a)


def rounded_bf16(a: Any) -> Any:
    """Round to bf16.

    A value is the upper half of its word, so two are unpacked by a shift and a mask.
    """
    low, high = a if isinstance(a, tuple) else (a, a)
    bits = _both(low, high, "bf16")
    wide = cute.make_rmem_tensor(2, Int32)
    wide[0], wide[1] = bits << 16, bits & Int32(-65536)
    found = cute.recast_tensor(wide, Float32)
    return _like(a, found[0], found[1]) if isinstance(a, tuple) else found[1]


def rounded_f16(a: Any) -> Any:
    """Round to f16."""
    low, high = a if isinstance(a, tuple) else (a, a)
    narrow = cute.make_rmem_tensor(2, cutlass.Float16)
    cute.recast_tensor(narrow, Int32)[0] = _both(low, high, "f16")
    found = narrow.load().to(Float32)
    return _like(a, found[0], found[1]) if isinstance(a, tuple) else found[1]


@dsl_user_op
def _both(low: Any, high: Any, to: str, *, loc: Any = None, ip: Any = None) -> Any:
    """Two values, rounded to a type of 16 bits, in one word: one instruction.

    A pair that is also stored shares it. LLVM would convert one value alone, or one twice, by an
    instruction that ptxas moves into the mainloop of sm_90a, where it reads the accumulator, so
    that products wait for each other (C7514).
    """
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (high, low)]
    text = f"cvt.rn.{to}x2.f32 $0, $1, $2;"
    return Int32(llvm.inline_asm(T.i32(), operands, text, "=r,f,f", has_side_effects=False))


def rounded_e4m3(a: Any) -> Any:
    """Round to e4m3."""
    return _rounded(a, "e4m3")


def rounded_e5m2(a: Any) -> Any:
    """Round to e5m2; infinite from 61440 on, where a GPU's conversion saturates."""
    return lanes(_to_infinity, a, _rounded(a, "e5m2"))


def _to_infinity(x: Any, rounded: Any) -> Any:
    beyond = cute.math.abs(x) >= Float32(61440.0)
    return cutlass.select_(beyond, x * Float32(math.inf), rounded)


def byte_e5m2(a: Any) -> Any:
    """The byte of a value in e5m2, as a float32 number: the upper byte of its f16 encoding."""
    return lanes(_upper_half, rounded_e5m2(a))


def _upper_half(x: Any) -> Any:
    pair = cute.make_rmem_tensor(2, cutlass.Float16)
    pair[0] = pair[1] = Float32(x).to(cutlass.Float16)
    return Uint32(cute.recast_tensor(pair, Uint32)[0] >> 24).to(Float32)


def _rounded(a: Any, to: str) -> Any:
    return lanes(lambda x: x.to(_TYPES[to]).to(Float32), a)


# Casts that the user wrote, with torch's results.
cast_bf16, cast_f16, cast_e4m3, cast_e5m2 = rounded_bf16, rounded_f16, rounded_e4m3, rounded_e5m2


def cast_f32(a: Any) -> Any:
    """Return `a` unchanged: values are float32."""
    return a


def word(a: Any, b: Any, to: str) -> Any:
    """Pack two values, rounded to the 16-bit type `to`, into the bits of one float32."""
    return lanes(lambda x, y: cute.recast_tensor(_neighbours(x, y, to), Float32)[0], a, b)


def neighbours(a: Any, of: str) -> tuple[Any, Any]:
    """Unpack the two values of the 16-bit type `of` in the bits of a float32."""
    return lanes(lambda x: _half(x, of, 0), a), lanes(lambda x: _half(x, of, 1), a)


def _half(x: Any, of: str, lane: int) -> Any:
    """One of two 16-bit values in a word, as float32; of bf16, by a shift or a mask."""
    narrow = cute.make_rmem_tensor(2, _TYPES[of])
    cute.recast_tensor(narrow, Float32)[0] = x
    if of != "bf16":
        return narrow[lane].to(Float32)
    word = cute.recast_tensor(narrow, Int32)[0]
    wide = cute.make_rmem_tensor(1, Int32)
    wide[0] = word & Int32(-65536) if lane else word << 16
    return cute.recast_tensor(wide, Float32)[0]


def _neighbours(a: Any, b: Any, to: str) -> Any:
    pair = cute.make_rmem_tensor(2, Float32)
    pair[0], pair[1] = _f(a), _f(b)
    narrow = cute.make_rmem_tensor(2, _TYPES[to])
    narrow.store(pair.load().to(_TYPES[to]))
    return narrow


def square(a: Any) -> Any:
    """a · a."""
    return a * a


def absolute(a: Any) -> Any:
    """The absolute value."""
    return lanes(lambda x: maximum(x, -x) if _is_whole(x) else cute.math.abs(x), a)


def exp(a: Any) -> Any:
    """e^a."""
    if isinstance(a, F2):  # one product for both
        return exp2(a * math.log2(math.e))
    return lanes(lambda x: cute.math.exp(x, fastmath=True), a)


def exp2(a: Any) -> Any:
    """2^a."""
    return lanes(lambda x: cute.math.exp2(x, fastmath=True), a)


def log(a: Any) -> Any:
    """The natural logarithm."""
    return lanes(lambda x: cute.math.log2(x, approx=True) * _LN_2, a)


def expm1(a: Any) -> Any:
    """e^a - 1."""
    return lanes(expm1_of, a)


def log1p(a: Any) -> Any:
    """log(1 + a)."""
    return lanes(log1p_of, a)


def sqrt(a: Any) -> Any:
    """The square root."""
    return lanes(lambda x: cute.math.sqrt(x, approx=True), a)


def rsqrt(a: Any) -> Any:
    """1 / sqrt(a)."""
    return lanes(lambda x: cute.math.rsqrt(x, approx=True), a)


def tanh(a: Any) -> Any:
    """The hyperbolic tangent."""
    return lanes(lambda x: cute.math.tanh(x, fastmath=True), a)


def sigmoid(a: Any) -> Any:
    """1 / (1 + e^-a) = (1 + tanh(a / 2)) / 2, by one instruction of the special-function unit."""
    half = lanes(lambda x: cute.math.tanh(x, fastmath=True), a * 0.5)
    return half * 0.5 + 0.5


def erf(a: Any) -> Any:
    """The error function."""
    return lanes(lambda x: cute.math.erf(x), a)


def erfc(a: Any) -> Any:
    """1 - erf(a), without cancellation in the upper tail."""
    return lanes(lambda x: cute.math.erfc(x), a)


def atan2(a: Any, b: Any) -> Any:
    """The angle of the point (b, a) in radians, from -π to π."""
    return lanes(lambda y, x: cute.math.atan2(y, x), _f(a), _f(b))


def asin(a: Any) -> Any:
    """The inverse sine, in radians."""
    return lanes(cute.math.asin, a)


def acos(a: Any) -> Any:
    """The inverse cosine, in radians."""
    return lanes(cute.math.acos, a)


def sinh(a: Any) -> Any:
    """The hyperbolic sine."""
    return lanes(cute.math.sinh, a)


def cosh(a: Any) -> Any:
    """The hyperbolic cosine."""
    return lanes(cute.math.cosh, a)


def asinh(a: Any) -> Any:
    """The inverse hyperbolic sine."""
    return lanes(cute.math.asinh, a)


def acosh(a: Any) -> Any:
    """The inverse hyperbolic cosine."""
    return lanes(cute.math.acosh, a)


def atanh(a: Any) -> Any:
    """The inverse hyperbolic tangent."""
    return lanes(cute.math.atanh, a)


def hypot(a: Any, b: Any) -> Any:
    """sqrt(a² + b²) without overflow; infinite if either is."""
    return lanes(hypot_of, _f(a), _f(b))


def fmod(a: Any, b: Any) -> Any:
    """The exact remainder of a / b, with the sign of a."""
    return lanes(lambda x, y: x % y, _f(a), _f(b))


def floor(a: Any) -> Any:
    """The largest whole number that is not above a."""
    return lanes(lambda x: cute.math.floor(x), a)


def ceil(a: Any) -> Any:
    """The least whole number that is not below a."""
    return lanes(lambda x: cute.math.ceil(x), a)


def truncated(a: Any) -> Any:
    """The whole number next to a, towards 0."""
    return lanes(lambda x: cute.math.trunc(x), a)


def nearest(a: Any) -> Any:
    """The nearest whole number; of two, the even one."""
    return lanes(lambda x: cute.math.roundeven(x), a)


def _random(seed: Any, row: Any, column: Any) -> Any:
    """A number in [0, 1) by pcg3d (Jarzynski and Olano, 2020), as `ir/scalars.py` describes it."""
    bits = cute.make_rmem_tensor(1, Float32)
    bits[0] = cutlass.select_(seed == seed, seed, Float32(0.0))
    words = (cute.recast_tensor(bits, Uint32)[0], row.to(Uint32), column.to(Uint32))
    x, y, z = (w * Uint32(1664525) + Uint32(1013904223) for w in words)
    x = x + y * z
    y = y + z * x
    z = z + x * y
    x, y, z = (w ^ (w >> 16) for w in (x, y, z))
    x = x + y * z
    y = y + z * x
    z = z + x * y
    return (z >> 8).to(Float32) * Float32(2.0**-24)


def random(seed: Any, row: Any, column: Any) -> Any:
    """A number in [0, 1) that follows from a seed and a position."""
    return lanes(_random, _f(seed), _f(row), _f(column))


def sin(a: Any) -> Any:
    """The sine of radians."""
    return lanes(lambda x: rotated(x, 0), a)


def cos(a: Any) -> Any:
    """The cosine of radians."""
    return lanes(lambda x: rotated(x, 1), a)


def power(a: Any, b: Any) -> Any:
    """a^b as in C: NaN for a negative `a` and a fractional `b`; 1 for b = 0.

    A small literal integer `b` is expanded into multiplications when the kernel is compiled.
    """
    if isinstance(b, int | float) and abs(b) <= _FACTORS and b == int(b):
        return _product(recip(a) if b < 0 else a, abs(int(b)))
    return lanes(lambda x, y: cute.math.pow(x, y), _f(a), _f(b))


def _product(a: Any, count: int) -> Any:
    """The product of `count` factors `a`."""
    if count == 0:
        return lanes(lambda _: Float32(1.0), a)
    if count == 1:
        return a
    half = _product(a, count // 2)
    return half * half * a if count % 2 else half * half


def maximum(a: Any, b: Any) -> Any:
    """The larger of two values; NaN if either is NaN."""
    return lanes(lambda x, y: _larger(x, y, 1), _f(a), _f(b))


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two values; NaN if either is NaN."""
    return lanes(lambda x, y: _larger(x, y, -1), _f(a), _f(b))


def _larger(x: Any, y: Any, sign: int) -> Any:
    """The larger of two scalars, or the smaller with the sign -1."""
    if _is_whole(x):
        return _select(x > y if sign > 0 else x < y, x, y)
    return (cute.arch.fmax if sign > 0 else cute.arch.fmin)(x, y, nan=True)


def clamp(a: Any, low: Any, high: Any) -> Any:
    """min(max(a, low), high); NaN if any is NaN."""
    a = a if _is_infinite(low) else maximum(a, low)
    return a if _is_infinite(high) else minimum(a, high)


def _is_infinite(bound: Any) -> bool:
    """Whether a bound is a literal infinity, which needs no comparison."""
    return isinstance(bound, float) and math.isinf(bound)


def _is_whole(x: Any) -> bool:
    return isinstance(x, Int32 | cutlass.Int64)


def _f(a: Any) -> Any:
    return Float32(a) if isinstance(a, int | float) else a


def choose(fn: Callable[[Any, Any], Any], a: Any, b: Any, yes: Any, no: Any) -> Any:
    """Select `yes` where fn(a, b) holds, else `no`."""
    return lanes(lambda x, y, p, q: _select(fn(x, y), p, q), _f(a), _f(b), _f(yes), _f(no))


def _select(condition: Any, yes: Any, no: Any) -> Any:
    """One of two scalars; of whole numbers in the wider type, which the DSL would not keep."""
    if not _is_whole(yes):
        return cutlass.select_(condition, yes, no)
    wide = cutlass.Int64 if cutlass.Int64 in (type(yes), type(no)) else Int32
    return wide(cutlass.select_(condition, wide(yes), wide(no)))


def eq(a: Any, b: Any) -> Any:
    """1.0 where a == b, else 0.0."""
    return choose(lambda x, y: x == y, a, b, 1.0, 0.0)


def ne(a: Any, b: Any) -> Any:
    """1.0 where a != b, else 0.0."""
    return choose(lambda x, y: x != y, a, b, 1.0, 0.0)


def lt(a: Any, b: Any) -> Any:
    """1.0 where a < b, else 0.0."""
    return choose(lambda x, y: x < y, a, b, 1.0, 0.0)


def le(a: Any, b: Any) -> Any:
    """1.0 where a <= b, else 0.0."""
    return choose(lambda x, y: x <= y, a, b, 1.0, 0.0)


def gt(a: Any, b: Any) -> Any:
    """1.0 where a > b, else 0.0."""
    return choose(lambda x, y: x > y, a, b, 1.0, 0.0)


def ge(a: Any, b: Any) -> Any:
    """1.0 where a >= b, else 0.0."""
    return choose(lambda x, y: x >= y, a, b, 1.0, 0.0)


def where(condition: Any, yes: Any, no: Any) -> Any:
    """Select `yes` where the condition is not 0, else `no`."""
    return choose(lambda x, y: x != y, condition, 0.0, yes, no)
