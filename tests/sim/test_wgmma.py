"""Warpgroup products: plain loops put matrices into memory and registers, f64 multiplies."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.sim.tensorcore import wgmma
from coda.sim.tensorcore.wgmma import parse_wgmma
from coda.sim.types import Fault, Unsupported
from tests.sim.operands import MASKS, address, offsets, put, random_matrix, size_of

SPANS = {0: 0, 128: 1, 64: 2, 32: 3}
PAIRS = [("bf16", "bf16"), ("f16", "f16"), ("tf32", "tf32"), ("e4m3", "e5m2"), ("e5m2", "e4m3")]
PAIRS += [("e4m3", "e4m3"), ("s8", "u8"), ("u8", "s8"), ("s8", "s8"), ("u8", "u8")]
few = settings(max_examples=25)


def describe(start, span, leading, stride):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SPANS[span] << 62


def registers_of(matrix, d):
    """The accumulators of four warps, by the statement of the fragment in the PTX ISA."""
    n = matrix.shape[1]
    per = 2 if d == "f16" else 1
    out = np.zeros((n // 2 // per, 4, 32), np.uint32)
    for warp in range(4):
        for lane in range(32):
            for i in range(n // 2):
                row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
                column = 8 * (i // 4) + 2 * (lane % 4) + i % 2
                if d == "f16":
                    bits = int(np.float16(matrix[row, column]).view(np.uint16))
                    out[i // 2, warp, lane] |= np.uint32(bits << 16 * (i % 2))
                else:
                    kind = np.int32 if d == "s32" else np.float32
                    out[i, warp, lane] = kind(matrix[row, column]).view(np.uint32)
    return out


def a_registers(raw):
    """A [64, k] of raw elements in four registers of each thread."""
    size = raw.dtype.itemsize
    per = 4 // size
    out = np.zeros((4, 4, 32), np.uint32)
    for warp in range(4):
        for lane in range(32):
            for j in range(4):
                row = 16 * warp + lane // 4 + 8 * (j % 2)
                first = lane % 4 * per + j // 2 * 4 * per
                word = raw[row, first : first + per].tobytes()
                out[j, warp, lane] = int.from_bytes(word, "little")
    return out


def opcode(n, a, b, d, saturate=False):
    k = 32 // size_of(a)
    more = ".satfinite" if saturate else ""
    return f"wgmma.mma_async.sync.aligned.m64n{n}k{k}{more}.{d}.{a}.{b}"


def close(got, want, d, k):
    if d == "s32":
        assert (got == want).all()
    else:
        unit = 2.0**-10 if d == "f16" else 2.0**-20
        assert np.abs(got - want).max() <= unit * max(1, np.abs(want).max()) * 2


@st.composite
def products(draw):
    a, b = draw(st.sampled_from(PAIRS))
    d = "s32" if a in ("s8", "u8") else draw(st.sampled_from(["f32", "f16"]))
    d = "f32" if a in ("bf16", "tf32") else d
    n = draw(st.sampled_from([8, 16, 24, 32, 48, 64, 96, 128, 240, 256]))
    n = 32 if d == "s32" and n in (40, 56) else n
    majors = [draw(st.sampled_from(["k", "mn"])) if size_of(a) == 2 else "k" for _ in "ab"]
    registers = draw(st.booleans())
    majors[0] = "k" if registers else majors[0]
    spans = [draw(st.sampled_from([0, 32, 64, 128])) for _ in "ab"]
    if majors[1] == "mn" and n * 2 % max(16, spans[1]):
        spans[1] = 0
    negate = [draw(st.booleans()) and d != "s32" for _ in "ab"]
    places = [
        offsets(rows, size_of(name), span, major, draw(st.sampled_from([0, 1024])))
        for rows, name, span, major in zip((64, n), (a, b), spans, majors, strict=True)
    ]
    keep, seed = draw(st.booleans()), draw(st.integers(0, 999))
    return a, b, d, n, majors, registers, spans, negate, places, keep, seed


@few
@given(products())
def test_products_of_all_types_and_layouts(case):
    a, b, d, n, majors, registers, spans, negate, places, keep, seed = case
    rng = np.random.default_rng(seed)
    k = 32 // size_of(a)
    va, ra = random_matrix(rng, 64, k, a)
    vb, rb = random_matrix(rng, n, k, b)
    smem = rng.integers(0, 256, (2, 160 * 1024)).astype(np.uint8)
    put(smem[1], 2048, ra, spans[0], majors[0], *places[0])
    put(smem[1], 65536, rb, spans[1], majors[1], *places[1])
    words = ["p"] if d == "s32" else ["p", *("-1" if x else "1" for x in negate)]
    if size_of(a) == 2:
        flips = majors[1:] if registers else majors
        words += ["1" if m == "mn" else "0" for m in flips]
    form = parse_wgmma(opcode(n, a, b, d), ["{d}", "{a}" if registers else "%a", "%b", *words])
    old = rng.integers(-9, 9, (64, n)).astype(np.float64)
    left = a_registers(ra) if registers else [describe(2048, spans[0], *places[0])]
    step = (left, [describe(65536, spans[1], *places[1])])
    got = wgmma.accumulate(form, smem, [1], [step], [keep], registers_of(old, d))
    sign = -1 if negate[0] != negate[1] else 1
    want = sign * (va @ vb.T) + keep * old
    close(wgmma.unpack(form, got)[0].astype(np.float64), want, d, k)
    assert (got == registers_of(wgmma.unpack(form, got)[0], d)).all()


@few
@given(products())
def test_offsets_of_elements_and_chunks(case):
    a, b, d, n, majors, _, spans, _, places, _, _ = case
    flips = (
        ["1", "1", *("1" if m == "mn" else "0" for m in majors)] if size_of(a) == 2 else ["1", "1"]
    )
    words = [] if d == "s32" else flips
    form = parse_wgmma(opcode(n, a, b, d), ["{d}", "%a", "%b", "p", *words])
    bits = MASKS[spans[1]]
    at = wgmma.element_offsets(form, describe(65536 + 32, spans[1], *places[1]), "b")
    size = size_of(b)
    for row in (0, 1, n // 2 + 1, n - 1):
        for k in range(0, form.k, 3):
            place = 65536 + 32 + address(row, k, size, spans[1], majors[1], *places[1])
            assert at[row, k] == place ^ (place >> 3 & bits)
    starts, nbytes = wgmma.b_piece(form, (describe(65536 + 32, spans[1], *places[1]),))
    chunks = np.atleast_1d(starts)[:, None] + np.arange(0, nbytes, 16)
    assert sorted(chunks.ravel() // 16) == sorted(set(at.ravel() // 16))


def test_many_warpgroups_and_a_chain_at_once():
    """Three warpgroups of two CTAs, two steps: the same as one by one."""
    rng = np.random.default_rng(5)
    n, smem = 64, np.zeros((2, 65536), np.uint8)
    want = np.zeros((3, 64, n))
    old = rng.standard_normal((3, 64, n)).astype(np.float32)
    values = {}
    for cta in range(2):
        for i in range(2):
            va, ra = random_matrix(rng, 64, 16, "bf16")
            vb, rb = random_matrix(rng, n, 16, "bf16")
            put(smem[cta], 1024 + 8192 * i, ra, 32, "k", 16, 256)
            put(smem[cta], 32768 + 8192 * i, rb, 128, "mn", 1024, 1024)
            values[cta, i] = va, vb
    ctas, keep = [1, 0, 1], [True, False, True]
    for g, cta in enumerate(ctas):
        want[g] = sum(values[cta, i][0] @ values[cta, i][1].T for i in range(2)) + keep[g] * old[g]
    form = parse_wgmma(
        opcode(n, "bf16", "bf16", "f32"), ["{d}", "%a", "%b", "p", "1", "1", "0", "1"]
    )
    steps = [
        (
            [describe(1024 + 8192 * i, 32, 16, 256)] * 3,
            [describe(32768 + 8192 * i, 128, 1024, 1024)] * 3,
        )
        for i in range(2)
    ]
    d = np.concatenate([registers_of(x, "f32") for x in old], axis=1)
    got = wgmma.accumulate(form, smem, ctas, steps, keep, d)
    assert np.abs(wgmma.unpack(form, got) - want).max() < 1e-4


def test_integer_sums_wrap_or_saturate():
    ones = np.full((64, 32), 127, np.uint8)
    smem = np.zeros((1, 32768), np.uint8)
    put(smem[0], 0, ones, 32, "k", 16, 256)
    put(smem[0], 16384, ones[:8], 32, "k", 16, 256)
    step = ([describe(0, 32, 16, 256)], [describe(16384, 32, 16, 256)])
    old = np.full((64, 8), 2**31 - 5)
    for saturate, want in ((False, 2**31 - 5 + 127 * 127 * 32 - 2**32), (True, 2**31 - 1)):
        form = parse_wgmma(opcode(8, "s8", "s8", "s32", saturate), ["{d}", "%a", "%b", "p"])
        got = wgmma.accumulate(form, smem, [0], [step], [True], registers_of(old, "s32"))
        assert (wgmma.unpack(form, got) == want).all()


def test_not_a_number_and_infinity_go_through():
    a = torch.ones(64, 16, dtype=torch.bfloat16)
    a[0, 0], a[1, 0] = float("inf"), float("nan")
    raw = a.view(torch.int16).numpy().view(np.uint16)
    smem = np.zeros((1, 32768), np.uint8)
    put(smem[0], 0, raw, 0, "k", 1024, 128)
    put(smem[0], 16384, np.ones((8, 16), np.uint16) * 0x3F80, 0, "k", 128, 128)
    form = parse_wgmma(opcode(8, "bf16", "bf16", "f32"), ["{d}", "%a", "%b", "p", *"1100"])
    step = ([describe(0, 0, 1024, 128)], [describe(16384, 0, 128, 128)])
    d = np.full((4, 4, 32), 0x7FC00000, np.uint32)
    got = wgmma.unpack(form, wgmma.accumulate(form, smem, [0], [step], [False], d))[0]
    assert np.isinf(got[0]).all()
    assert np.isnan(got[1]).all()
    assert (got[2:] == 16).all()


@pytest.mark.parametrize(
    ("op", "operands", "word"),
    [
        ("wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16", "{d} a b p 1 1 0 0", "sparse"),
        ("wgmma.mma_async.sync.aligned.m64n8k256.s32.b1.b1.and.popc", "{d} a b p", "b1"),
        (opcode(12, "bf16", "bf16", "f32"), "{d} a b p 1 1 0 0", "N = 12"),
        (opcode(40, "s8", "s8", "s32"), "{d} a b p", "N = 40"),
        (opcode(8, "bf16", "f16", "f32"), "{d} a b p 1 1 0 0", "types"),
        (opcode(8, "bf16", "bf16", "f16"), "{d} a b p 1 1 0 0", "types"),
        (opcode(8, "bf16", "bf16", "f32"), "{d} a b p 1 1 0", "operands"),
        (opcode(8, "bf16", "bf16", "f32"), "{d} {a} b p 1 1 0 0", "operands"),
        (opcode(8, "bf16", "bf16", "f32"), "{d} a b p 2 1 0 0", "immediate 2"),
        (opcode(8, "e4m3", "e4m3", "f32"), "{d} a b p 1 1 0 0", "operands"),
        ("wgmma.mma_async.sync.aligned.m64n8k8.f32.bf16.bf16", "{d} a b p 1 1 0 0", "K = 8"),
    ],
)
def test_forms_that_are_refused(op, operands, word):
    with pytest.raises(Unsupported, match=word):
        parse_wgmma(op, operands.split())


def test_descriptors_and_shapes_that_are_refused():
    form = parse_wgmma(opcode(8, "bf16", "bf16", "f32"), ["{d}", "a", "b", "p", *"1100"])
    for bit in (14, 31, 46, 49, 52, 61):
        with pytest.raises(Unsupported, match="descriptor"):
            wgmma.a_pieces(form, (describe(0, 128, 16, 1024) | 1 << bit,))
    smem, d = np.zeros((1, 1024), np.uint8), np.zeros((4, 4, 32), np.uint32)
    step = ([describe(0, 128, 16, 1024)], [describe(0, 128, 16, 1024)])
    with pytest.raises(Fault, match="shared memory"):
        wgmma.accumulate(form, smem, [0], [step], [False], d)
    with pytest.raises(Fault, match="accumulators"):
        wgmma.accumulate(form, smem, [0], [step], [False], d[:3])
