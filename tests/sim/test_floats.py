"""Formats and roundings against ml_dtypes, torch and fractions: all values, or those near ties."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.sim.alu import floats
from coda.sim.alu.opcodes import f32, f64, u8, u16, u32
from tests.sim.scalar.numbers import decode, encode, number

OTHERS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
WIDTHS = {"e4m3": 8, "e5m2": 8, "e2m3": 6, "e3m2": 6, "e2m1": 4}


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def random_f32(count, seed=0):
    """Bits at random, half of them with few mantissa bits, so that ties occur."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, count, dtype=u32)
    bits[::2] &= u32(0xFFFFFFFF) << rng.integers(8, 24, len(bits[::2])).astype(u32)
    return bits.view(f32)


def around_one(count, seed=1):
    rng = np.random.default_rng(seed)
    return (random_f32(count, seed).view(u32) & u32(0x80FFFFFF) | u32(0x30000000)).view(f32) * (
        f32(2) ** rng.integers(-20, 45, count).astype(f32)
    )


@pytest.mark.parametrize("name", OTHERS)
def test_the_values_of_all_codes_are_those_of_ml_dtypes(name):
    codes = np.arange(2 ** WIDTHS[name], dtype=u8)
    want = codes.view(OTHERS[name]).astype(f32)
    got = floats.decode(codes, name)
    np.testing.assert_array_equal(got.view(u32)[want == want], want.view(u32)[want == want])
    assert np.isnan(got[want != want]).all()


@pytest.mark.parametrize("name", OTHERS)
def test_encoding_rounds_as_ml_dtypes_does(name):
    x = around_one(100_000)
    largest = float(ml_dtypes.finfo(OTHERS[name]).max)
    x = x[np.abs(x) <= largest]
    assert len(x) > 5_000
    mask = u8(2 ** WIDTHS[name] - 1)
    want = x.astype(OTHERS[name]).view(u8) & mask
    np.testing.assert_array_equal(floats.encode(x, name, finite=True), want)
    np.testing.assert_array_equal(floats.to_narrow(x, name), want)


@pytest.mark.parametrize("name", OTHERS)
def test_the_table_of_codes_gives_what_encode_gives(name):
    top = np.arange(2**16, dtype=u32) << u32(16)
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (top | u32(low)).view(f32)
        np.testing.assert_array_equal(
            floats.to_narrow(x, name), floats.encode(x, name, finite=True), err_msg=hex(low)
        )


def test_scale_factors_are_powers_of_two():
    codes = np.arange(256, dtype=u8)
    want = codes.view(ml_dtypes.float8_e8m0fnu).astype(f32)
    np.testing.assert_array_equal(floats.decode_scale(codes), want)
    np.testing.assert_array_equal(floats.decode_table("ue8m0"), want)
    for up in (False, True):
        found = floats.encode_scale(want, up=up, finite=True)
        np.testing.assert_array_equal(found[:255], codes[:255])
    ue4m3 = floats.decode_table("ue4m3")
    np.testing.assert_array_equal(ue4m3[:127], floats.decode_table("e4m3")[:127])


def test_bf16_and_f16_round_as_torch_does():
    x = random_f32(400_000)
    number_lanes = x == x
    for to, kind in ((floats.to_bf16, torch.bfloat16), (floats.to_f16, torch.float16)):
        want = torch.from_numpy(x).to(kind).view(torch.int16).numpy().view(u16)
        np.testing.assert_array_equal(to(x)[number_lanes], want[number_lanes])
        assert (to(x)[~number_lanes] == 0x7FFF).all()
    pairs = floats.to_bf16x2(x.reshape(-1, 32), x[::-1].reshape(-1, 32))
    np.testing.assert_array_equal(pairs >> u32(16), floats.to_bf16(x).reshape(-1, 32))
    np.testing.assert_array_equal(pairs & u32(0xFFFF), floats.to_bf16(x[::-1]).reshape(-1, 32))
    clean = np.where(number_lanes, x, f32(1)).reshape(-1, 32)
    np.testing.assert_array_equal(floats.to_bf16x2(clean, clean) >> u32(16), floats.to_bf16(clean))


@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_the_short_ways_to_16_bits_give_what_encode_gives(mode):
    x = random_f32(200_000, seed=3)
    np.testing.assert_array_equal(floats.to_bf16(x, mode), floats.encode(x, "bf16", mode))
    np.testing.assert_array_equal(floats.to_f16(x), floats.encode(x, "f16"))


SINGLES = st.floats(width=32, allow_nan=False, allow_infinity=False)


def one(x):
    return np.array([x], f32)


def bits(x):
    return int(x.view(u32)[0])


@given(
    c=SINGLES.filter(lambda x: 2.0**-120 < abs(x) < 2.0**100),
    i=st.integers(-3, 3),
    j=st.integers(-3, 3),
    split=st.integers(-20, 20),
    half=st.sampled_from([1, 2, 3]),
)
@settings(max_examples=250)
def test_fma_rounds_once_where_the_product_is_near_half_an_ulp(c, i, j, split, half):
    """The f64 sum lies on a tie of f32 although the exact sum lies beside it."""
    ulp = float(np.spacing(np.abs(f32(c))))
    a = f32(2.0**split * (1 + i * 2.0**-23))
    b = f32(ulp / 2 * half * 2.0**-split * (1 + j * 2.0**-23))
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(c)
    for mode in ("rn", "rz", "rm", "rp"):
        want = encode(number(exact), "f32", mode)
        got = bits(floats.fma_rounded(one(a), one(b), one(c), mode))
        assert exact == 0 or got == want, (mode, a, b, c)


@given(
    c=st.integers(-(2**23) - 3, 2**23 + 3),
    i=st.integers(-3, 3),
    j=st.integers(-3, 3),
    half=st.sampled_from([1, 2, 3, -1]),
)
@settings(max_examples=200)
def test_fma_rounds_once_where_the_result_is_subnormal(c, i, j, half):
    a = f32(2.0**-75 * (1 + i * 2.0**-23))
    b = f32(half * 2.0**-75 * (1 + j * 2.0**-23))
    c = f32(c * 2.0**-149)
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact:
        got = bits(floats.fma_rounded(one(a), one(b), one(c)))
        assert got == encode(number(exact), "f32")


@given(a=SINGLES, b=SINGLES, mode=st.sampled_from(["rz", "rm", "rp"]), near=st.booleans())
@settings(max_examples=300)
def test_directed_sums_are_exact_sums_rounded_once(a, b, mode, near):
    b = -float(np.nextafter(f32(a), f32(b))) if near and abs(a) < 1e38 else b
    exact = Fraction(a) + Fraction(b)
    got = bits(floats.add_rounded(one(a), one(b), mode))
    if exact:
        assert got == encode(number(exact), "f32", mode)
    else:
        assert decode(got, "f32").size == 0


@given(x=st.floats(allow_nan=False, allow_infinity=False), e=st.integers(-60, 60))
@settings(max_examples=300)
def test_a_sum_rounded_to_odd_can_be_rounded_again(x, e):
    y = float(np.spacing(abs(x)) * 2.0**e / 3) if abs(x) < 1e300 else 0.0
    total, error = floats.two_sum(np.array([x], f64), np.array([y], f64))
    odd = floats.to_odd(total, error)
    exact = Fraction(x) + Fraction(y)
    if exact and np.isfinite(total[0]):
        for mode in ("rn", "rz", "rm", "rp"):
            assert bits(floats.to_f32(odd, mode)) == encode(number(exact), "f32", mode)
