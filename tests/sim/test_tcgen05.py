"""tcgen05 products against f64: operands, accumulators and scales are placed by plain loops."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.sim.tensorcore import tcgen05
from coda.sim.tensorcore.tcgen05 import MmaOperands, parse_mma
from coda.sim.types import Fault, Unsupported
from tests.sim.operands import address, offsets, put, random_matrix, size_of

FORMATS = {"f16": 0, "bf16": 1, "tf32": 2, "u8": 0, "s8": 1}
FORMATS |= {"e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5}
RESULT = {"f16": 0, "f32": 1, "s32": 2}
SPANS = {(0, 16): 0, (128, 32): 1, (128, 16): 2, (64, 16): 4, (32, 16): 6}
NARROW = ("e2m3", "e3m2", "e2m1")
K = {"f16": 16, "tf32": 8, "i8": 32, "f8f6f4": 32, "mxf8f6f4": 32, "mxf4": 64, "mxf4nvf4": 64}
few = settings(max_examples=30)


def describe(start, span, leading, stride, atom=16):
    fields = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46
    return fields | SPANS[span, atom] << 61


def instruct(kind, m, n, a, b, d="f32", negate=(0, 0), majors="kk", ids=(0, 0), scale=1, more=0):
    fa, fb = (1, 1) if kind.startswith("mxf4") else (FORMATS[a], FORMATS[b])
    out = fa << 7 | fb << 10 | negate[0] << 13 | negate[1] << 14 | n >> 3 << 17 | m >> 4 << 24
    out |= (majors[0] == "m") << 15 | (majors[1] == "m") << 16 | more
    if kind.startswith("mx"):
        return out | ids[1] << 4 | ids[0] << 29 | scale << 23
    return out | RESULT[d] << 4


def lane_of(m, ctas, n, row, column, offset=0):
    """CTA, lane and column of an element of D: layouts A, B, D and F of the PTX ISA."""
    if ctas == 2 and m == 128:
        return row // 64, row % 64 + 64 * (column >= n // 2), column % (n // 2)
    if m == 64:
        return 0, 32 * (row // 16) + row % 16 + offset, column
    return row // 128, row % 128, column


def pack(codes, name):
    """Codes [rows, k] of a narrow type as bytes: 16 elements in 16 bytes, packed, then padding."""
    bits = 4 if name == "e2m1" else 6
    out = np.zeros(codes.shape, np.uint8)
    for row in range(codes.shape[0]):
        for group in range(0, codes.shape[1], 16):
            word = sum(int(codes[row, group + i]) << bits * i for i in range(16))
            out[row, group : group + 16] = np.frombuffer(word.to_bytes(16, "little"), np.uint8)
    return out


def pairs(codes):
    """4-bit codes [rows, k] as bytes [rows, k / 2], the first of two in the low half."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def stored(codes, name, kind):
    """What shared memory holds of a matrix of codes."""
    if kind.startswith("mxf4"):
        return pairs(codes)
    return pack(codes, name) if name in NARROW else codes


def contained(codes, name, kind):
    """What tensor memory holds of the rows of A: bytes."""
    if kind.startswith("mxf4"):
        return pairs(codes)
    if name in NARROW:
        return codes << 2 if name == "e2m1" else codes
    return np.ascontiguousarray(codes).view(np.uint8)


def close(got, want, unit):
    assert np.abs(got - want).max() <= unit * max(1, np.abs(want).max())


@st.composite
def products(draw):
    kind = draw(st.sampled_from(["f16", "f16", "tf32", "f8f6f4", "f8f6f4", "i8"]))
    names = {"f16": ["f16", "bf16"], "tf32": ["tf32"], "i8": ["s8", "u8"]}
    a, b = (draw(st.sampled_from(names.get(kind, ["e4m3", "e5m2", *NARROW]))) for _ in "ab")
    ctas, big = draw(st.sampled_from([1, 2])), draw(st.booleans())
    m = {1: 64, 2: 128}[ctas] * (1 + big)
    n = draw(st.sampled_from([16, 32, 48, 96, 256])) if kind != "i8" else 64
    d = {"tf32": "f32", "i8": "s32"}.get(kind) or draw(st.sampled_from(["f32", "f16"]))
    d = "f32" if "bf16" in (a, b) else d
    in_tmem = draw(st.booleans())
    majors = [draw(st.sampled_from("km")) if x not in NARROW else "k" for x in (a, b)]
    majors[0] = "k" if in_tmem else majors[0]
    wide = 128 // size_of(a) if kind == "tf32" else 0
    if wide and (n // ctas) % wide:
        majors[1] = "k"
    spans = [draw(st.sampled_from([0, 32, 64, 128])) for _ in "ab"]
    for i, rows in enumerate((m // ctas, n // ctas)):
        if majors[i] == "m" and rows * size_of((a, b)[i]) % max(16, spans[i]):
            spans[i] = 0
        if rows * size_of((a, b)[i]) % 16:
            majors[i] = "k"
    more = [draw(st.booleans()) for _ in range(4)]
    return kind, a, b, d, ctas, m, n, in_tmem, majors, spans, more, draw(st.integers(0, 999))


def transposed_tf32(smem, start, codes):
    """MN-major with units of 32 bytes: 32 elements of one K make a line, 4 lines a pattern."""
    blocks = codes.shape[0] // 32
    for row, k in np.ndindex(codes.shape):
        at = start + row // 32 * 512 + k // 4 * 512 * blocks + k % 4 * 128 + row % 32 * 4
        at ^= (at >> 7 & 3) << 5
        smem[at : at + 4] = np.frombuffer(codes[row, k].tobytes(), np.uint8)
    return describe(start, 128, 512, 512 * blocks, 32)


def place(smem, start, codes, span, major):
    """Put a matrix into shared memory; its descriptor."""
    if major == "m" and codes.itemsize == 4:
        return transposed_tf32(smem, start, codes)
    where = offsets(codes.shape[0], codes.itemsize, span, "mn" if major == "m" else "k")
    put(smem, start, codes, span, "mn" if major == "m" else "k", *where)
    return describe(start, span, *where)


def put_a_in_tmem(tmems, column, codes, name, kind, m, ctas, n):
    """Each row of A in all lanes that hold accumulators of the row."""
    raw = contained(codes, name, kind).view(np.uint32)
    for row in range(m):
        for c in (0, n - 1):
            cta, lane, _ = lane_of(m, ctas, n, row, c)
            tmems[cta][lane, column : column + 8] = raw[row]


@few
@given(products())
def test_products_of_all_kinds_and_layouts(case):
    kind, a, b, d, ctas, m, n, in_tmem, majors, spans, (keep, na, nb, chain), seed = case
    na, nb = (na, nb) if kind != "i8" else (False, False)
    rng = np.random.default_rng(seed)
    smems = rng.integers(0, 256, (ctas, 160 * 1024)).astype(np.uint8)
    tmems = rng.integers(0, 2**32, (ctas, 128, 512)).astype(np.uint32)
    want, steps = np.zeros((m, n)), []
    idesc = instruct(kind, m, n, a, b, d, (na, nb), majors)
    for i in range(1 + chain):
        va, ca = random_matrix(rng, m, K[kind], a)
        vb, cb = random_matrix(rng, n, K[kind], b)
        want += va @ vb.T * (-1 if na != nb else 1)
        if in_tmem:
            put_a_in_tmem(tmems, 256 + 8 * i, ca, a, kind, m, ctas, n)
        left = 256 + 8 * i
        for cta, smem in enumerate(smems):
            rows = slice(cta * m // ctas, (cta + 1) * m // ctas)
            if not in_tmem:
                raw = stored(ca[rows], a, kind)
                left = place(smem, 1024 + 16384 * i, raw, spans[0], majors[0])
            rows = slice(cta * n // ctas, (cta + 1) * n // ctas)
            right = place(smem, 65536 + 32768 * i, stored(cb[rows], b, kind), spans[1], majors[1])
        steps.append(MmaOperands(left, right, idesc))
    places = [lane_of(m, ctas, n, *at) for at in np.ndindex(m, n)]
    cta, lane, column = (np.array(x).reshape(m, n) for x in zip(*places, strict=True))
    before = tmems.copy()
    word = {"s32": np.int32, "f32": np.float32, "f16": np.float16}[d]
    bits = {"s32": np.uint32, "f32": np.uint32, "f16": np.uint16}[d]
    old = rng.integers(-50, 50, (m, n)).astype(word)
    tmems[cta, lane, column] = old.view(bits)
    operands = ["[d]", "[a]" if in_tmem else "a", "b", "idesc", "{m}", "p"]
    form = parse_mma(f"tcgen05.mma.cta_group::{ctas}.kind::{kind}", operands)
    tcgen05.accumulate(form, smems, tmems, 0, steps, enable=keep, disabled=[0] * 4 * ctas)
    got = tmems[cta, lane, column].astype(bits).view(word).astype(np.float64)
    exact = want + keep * old.astype(np.float64)
    close(got, exact, 0 if d == "s32" else 2.0**-10 if d == "f16" else 2.0**-20)
    tmems[cta, lane, column] = before[cta, lane, column]
    assert (tmems == before).all()


SCALED = [
    ("mxf8f6f4", "block32", 1, "ue8m0"),
    ("mxf8f6f4", "scale_vec::1X", 1, "ue8m0"),
    ("mxf4", "", 2, "ue8m0"),
    ("mxf4nvf4", "scale_vec::2X", 2, "ue8m0"),
    ("mxf4nvf4", "block16", 4, "ue8m0"),
    ("mxf4nvf4", "scale_vec::4X", 4, "ue4m3"),
]


@st.composite
def scaled_products(draw):
    kind, spelled, count, scale = draw(st.sampled_from(SCALED))
    names = ["e2m1"] if kind != "mxf8f6f4" else ["e4m3", "e5m2", *NARROW]
    a, b = (draw(st.sampled_from(names)) for _ in "ab")
    ctas = draw(st.sampled_from([1, 2]))
    m = 128 * draw(st.integers(1, ctas))
    n = draw(st.sampled_from([32, 64, 96, 192, 256]))
    ids = [draw(st.integers(0, 3)) // count * count % 4 for _ in "ab"]
    return kind, spelled, count, scale, a, b, ctas, m, n, ids, draw(st.integers(0, 999))


def put_scales(tmem, column, codes, byte, first, partition):
    """Scale codes [rows, blocks] into one partition; row `first` of the operand comes first."""
    for r in range(first, len(codes)):
        at = r - first
        for i, code in enumerate(codes[r]):
            lane, shift = 32 * partition + at % 32, 8 * (byte + i)
            word = int(tmem[lane, column + at // 32]) & ~(0xFF << shift) | int(code) << shift
            tmem[lane, column + at // 32] = word


@few
@given(scaled_products())
def test_products_with_block_scales(case):
    kind, spelled, count, scale, a, b, ctas, m, n, ids, seed = case
    rng = np.random.default_rng(seed)
    va, ca = random_matrix(rng, m, K[kind], a)
    vb, cb = random_matrix(rng, n, K[kind], b)
    low, high = (120, 134) if scale == "ue8m0" else (1, 126)
    sa, sb = (rng.integers(low, high, (rows, count)).astype(np.uint8) for rows in (m, n))
    kinds = {"ue8m0": ml_dtypes.float8_e8m0fnu, "ue4m3": ml_dtypes.float8_e4m3fn}
    fa, fb = (s.view(kinds[scale]).astype(np.float64).repeat(K[kind] // count, 1) for s in (sa, sb))
    smems = np.zeros((ctas, 65536), np.uint8)
    tmems = rng.integers(0, 2**32, (ctas, 128, 512)).astype(np.uint32)
    for cta in range(ctas):
        rows = slice(cta * m // ctas, (cta + 1) * m // ctas)
        left = place(smems[cta], 1024, stored(ca[rows], a, kind), 32, "k")
        half = slice(cta * n // ctas, (cta + 1) * n // ctas)
        right = place(smems[cta], 32768, stored(cb[half], b, kind), 32, "k")
        for partition in range(4):
            narrow = ctas == 2 and m == 128
            first = n // 2 if narrow and partition > 1 else 0
            put_scales(tmems[cta], 300, sa[rows], ids[0], 0, partition)
            put_scales(tmems[cta], 320, sb, ids[1], first, partition)
    idesc = instruct(kind, m, n, a, b, ids=ids, scale=scale == "ue8m0")
    more = f".{spelled}" if spelled else ""
    form = parse_mma(
        f"tcgen05.mma.cta_group::{ctas}.kind::{kind}.block_scale{more}.collector::a::fill",
        ["[d]", "a", "b", "idesc", "[sa]", "[sb]", "p"],
    )
    step = MmaOperands(left, right, idesc, 300 | ids[0] << 30, 320)
    tcgen05.accumulate(form, smems, tmems, 0, [step], enable=False)
    want, exact = (va * fa) @ (vb * fb).T, np.abs(va * fa) @ np.abs(vb * fb).T
    for row in range(m):
        for column in (0, 1, n // 2 - 1, n // 2, n - 1):
            cta, lane, at = lane_of(m, ctas, n, row, column)
            got = float(tmems[cta, lane, at].view(np.float32))
            assert abs(got - want[row, column]) <= 2.0**-20 * exact[row, column]


def simple(rng, m=128, n=32, kind="f16", **more):
    """A product of one CTA: shared memory, tensor memory, values, step."""
    name = {"f16": "bf16", "i8": "s8", "tf32": "tf32"}[kind]
    d = "s32" if kind == "i8" else "f32"
    va, ca = random_matrix(rng, m, K[kind], name)
    vb, cb = random_matrix(rng, n, K[kind], name)
    smem, tmem = np.zeros(65536, np.uint8), np.zeros((128, 512), np.uint32)
    left, right = place(smem, 0, ca, 32, "k"), place(smem, 32768, cb, 32, "k")
    return (
        smem,
        tmem,
        va @ vb.T,
        MmaOperands(left, right, instruct(kind, m, n, name, name, d, **more)),
    )


def test_disabled_lanes_keep_their_values():
    smem, tmem, want, step = simple(np.random.default_rng(0))
    tmem[:] = np.float32(7).view(np.uint32)
    form = parse_mma("tcgen05.mma.cta_group::1.kind::f16", ["[d]", "a", "b", "i", "{m}", "p"])
    masks = [0x0F0F0F0F, 0, 0xFFFFFFFF, 1]
    tcgen05.accumulate(form, [smem], [tmem], 64, [step], enable=False, disabled=masks)
    got = tmem.view(np.float32)[:, 64:96]
    for lane in range(128):
        off = masks[lane // 32] >> lane % 32 & 1
        expected = np.full(32, 7.0) if off else want[lane]
        assert np.abs(got[lane] - expected).max() < 1e-4


def test_old_accumulators_are_scaled_down():
    smem, tmem, want, step = simple(np.random.default_rng(1))
    tmem[:] = np.float32(64).view(np.uint32)
    form = parse_mma("tcgen05.mma.cta_group::1.kind::f16", ["[d]", "a", "b", "i", "p", "3"])
    assert form.scale_d == 3
    assert not form.masked
    tcgen05.accumulate(form, [smem], [tmem], 0, [step], enable=True)
    assert np.abs(tmem.view(np.float32)[:, :32] - (want + 8)).max() < 1e-4


def test_half_the_lanes_at_lane_16():
    smem, tmem, want, step = simple(np.random.default_rng(2), m=64)
    form = parse_mma("tcgen05.mma.cta_group::1.kind::f16", ["[d]", "a", "b", "i", "p"])
    tcgen05.accumulate(form, [smem], [tmem], 16 << 16 | 100, [step], enable=False)
    for row in range(64):
        _, lane, _ = lane_of(64, 1, 32, row, 0, 16)
        assert np.abs(tmem.view(np.float32)[lane, 100:132] - want[row]).max() < 1e-4
        assert not tmem[lane - 16].any()


def test_integers_saturate_when_asked():
    for more, top in ((0, None), (8, 2**31 - 1)):
        smem, tmem, want, step = simple(np.random.default_rng(3), kind="i8", more=more)
        tmem[:] = np.int32(2**31 - 1).view(np.uint32)
        form = parse_mma("tcgen05.mma.cta_group::1.kind::i8", ["[d]", "a", "b", "i", "p"])
        tcgen05.accumulate(form, [smem], [tmem], 0, [step], enable=True)
        total = want.astype(np.int64) + 2**31 - 1
        wrapped = (total + 2**31) % 2**32 - 2**31
        expected = np.minimum(total, top) if top else wrapped
        assert (tmem.view(np.int32)[:, :32] == expected).all()


def test_extreme_scales_do_not_overflow_on_the_way():
    """2 ** 127 on one side and 2 ** -127 on the other leave the product as it is."""
    rng = np.random.default_rng(4)
    va, ca = random_matrix(rng, 128, 32, "e4m3")
    vb, cb = random_matrix(rng, 32, 32, "e4m3")
    smem, tmem = np.zeros(65536, np.uint8), np.zeros((128, 512), np.uint32)
    left, right = place(smem, 0, ca, 32, "k"), place(smem, 32768, cb, 32, "k")
    tmem[:, 300:304], tmem[:, 320] = 254, 0
    form = parse_mma(
        "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.scale_vec::1X",
        ["[d]", *"abi", "s", "t", "p"],
    )
    step = MmaOperands(left, right, instruct("mxf8f6f4", 128, 32, "e4m3", "e4m3"), 300, 320)
    tcgen05.accumulate(form, [smem], [tmem], 0, [step], enable=False)
    assert np.abs(tmem.view(np.float32)[:, :32] - va @ vb.T).max() < 1e-4
    tmem[5, 300] = 255
    tcgen05.accumulate(form, [smem], [tmem], 0, [step], enable=False)
    assert np.isnan(tmem.view(np.float32)[5, :32]).all()
    assert not np.isnan(tmem.view(np.float32)[6, :32]).any()


def test_chunks_of_the_operands():
    form = parse_mma("tcgen05.mma.cta_group::2.kind::f16", ["[d]", "a", "b", "i", "p"])
    shape = tcgen05.decode_shape(form, instruct("f16", 256, 64, "bf16", "bf16"))
    at = tcgen05.a_offsets(form, shape, describe(1024 + 32, 128, 16, 1024))
    assert at.shape == (128, 2)
    for row in (0, 3, 127):
        place = 1056 + address(row, 8, 2, 128, "k", 16, 1024)
        assert at[row, 1] == place ^ (place >> 3 & 0x70)
    assert tcgen05.b_offsets(form, shape, describe(0, 128, 16, 1024)).shape == (32, 2)
    steps = tuple(describe(32 * i, 128, 16, 1024) for i in range(4))
    assert tcgen05.b_pieces(form, shape, steps) == (0, 32 * 128)
    starts, nbytes = tcgen05.b_pieces(form, shape, steps[:2])
    assert (nbytes, len(starts), starts[0]) == (64, 32, 0)
    starts, nbytes = tcgen05.b_pieces(form, shape, steps[:1])
    assert sorted((starts[:, None] + np.arange(0, nbytes, 16)).ravel()) == sorted(
        tcgen05.b_offsets(form, shape, steps[0]).ravel()
    )


@pytest.mark.parametrize(
    ("op", "operands", "word"),
    [
        ("tcgen05.mma.sp.cta_group::1.kind::f16", "[d] a b [e] i p", "sparse"),
        ("tcgen05.mma.ws.cta_group::1.kind::f16", "[d] a b i p", "weight"),
        ("tcgen05.mma.cta_group::1.kind::f16.ashift", "[d] [a] b i p", "shifted"),
        ("tcgen05.mma.cta_group::1.kind::f16.block_scale", "[d] a b i [s] [t] p", "f16"),
        ("tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale", "[d] a b i [s] [t] p", "mxf4nvf4"),
        ("tcgen05.mma.cta_group::1.kind::mxf8f6f4", "[d] a b i p", "mxf8f6f4"),
        ("tcgen05.mma.cta_group::1.kind::f16", "[d] a b i p 16", "2 \\*\\* -16"),
        ("tcgen05.mma.cta_group::1.kind::i8", "[d] a b i p 1", "operands"),
    ],
)
def test_forms_that_are_refused(op, operands, word):
    with pytest.raises(Unsupported, match=word):
        parse_mma(op, operands.split())


def test_instruction_descriptors_that_are_refused():
    form = parse_mma("tcgen05.mma.cta_group::1.kind::f16", ["[d]", "a", "b", "i", "p"])
    good = instruct("f16", 128, 64, "bf16", "bf16")
    tcgen05.decode_shape(form, good)
    for bad in (1, 4, 8, 1 << 6, 1 << 23, 1 << 29, 1 << 30, 2 << 7, 2 << 4):
        with pytest.raises(Unsupported, match="tcgen05"):
            tcgen05.decode_shape(form, good ^ bad)
    for m, n in ((128, 8), (256, 64), (64, 4), (32, 64)):
        with pytest.raises(Unsupported, match=f"{m} x {n // 8 * 8} of"):
            tcgen05.decode_shape(form, instruct("f16", m, n, "bf16", "bf16"))
    with pytest.raises(Unsupported, match="result type"):
        tcgen05.decode_shape(form, instruct("f16", 128, 64, "bf16", "bf16", "f16"))
    narrow = parse_mma("tcgen05.mma.cta_group::1.kind::f8f6f4", ["[d]", "a", "b", "i", "p"])
    with pytest.raises(Unsupported, match="e2m1 transposed"):
        tcgen05.decode_shape(narrow, instruct("f8f6f4", 128, 64, "e4m3", "e2m1", majors="km"))
    four = parse_mma(
        "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16",
        ["[d]", *"abi", "s", "t", "p"],
    )
    for bad in (1 << 31, 1 << 15, 1 << 12, 1 << 24, 2 << 29):
        with pytest.raises(Unsupported, match="tcgen05"):
            tcgen05.decode_shape(four, instruct("mxf4nvf4", 128, 64, "e2m1", "e2m1") | bad)


def test_matrix_descriptors_and_places_that_are_refused():
    smem, tmem, _, step = simple(np.random.default_rng(5))
    form = parse_mma("tcgen05.mma.cta_group::1.kind::f16", ["[d]", "a", "b", "i", "p"])
    for bad in (1 << 14, 1 << 46, 1 << 49, 1 << 52, 1 << 53, 1 << 61):
        with pytest.raises(Unsupported, match="tcgen05"):
            tcgen05.accumulate(
                form, [smem], [tmem], 0, [step._replace(a=step.a ^ bad)], enable=False
            )
    for d, word in ((490, "column"), (16 << 16, "lane"), (128 << 16, "lane 128")):
        with pytest.raises(Fault, match=word):
            tcgen05.accumulate(form, [smem], [tmem], d, [step], enable=False)
    shape = tcgen05.decode_shape(form, step.idesc | 1 << 16)
    with pytest.raises(Unsupported, match="mn-major"):
        tcgen05.b_offsets(form, shape, describe(0, 128, 512, 512, 32))
    form = parse_mma("tcgen05.mma.cta_group::2.kind::f8f6f4", ["[d]", "a", "b", "i", "p"])
    shape = tcgen05.decode_shape(form, instruct("f8f6f4", 128, 16, "e5m2", "e5m2") | 1 << 16)
    with pytest.raises(Unsupported, match="8 elements of 1 byte"):
        tcgen05.b_offsets(form, shape, describe(0, 128, 512, 512))
