"""mma.sync: fragments are filled by the words of the PTX ISA, element by element."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.sim.tensorcore import mma
from coda.sim.types import Unsupported
from tests.sim.operands import random_matrix

# (m, k, A, B, D)
SHAPES = [(16, k, t, t, d) for k in (8, 16) for t, d in (("f16", "f16"), ("f16", "f32"))]
SHAPES += [(16, 8, "bf16", "bf16", "f32"), (16, 16, "bf16", "bf16", "f32")]
SHAPES += [(16, 4, "tf32", "tf32", "f32"), (16, 8, "tf32", "tf32", "f32")]
SHAPES += [(m, k, "f64", "f64", "f64") for m, k in ((8, 4), (16, 4), (16, 8), (16, 16))]
SHAPES += [
    (m, k, a, b, "s32")
    for m, k in ((8, 16), (16, 16), (16, 32))
    for a, b in (("s8", "u8"), ("u8", "u8"))
]
SHAPES += [
    (16, k, a, b, d)
    for k in (16, 32)
    for a, b in (("e4m3", "e5m2"), ("e5m2", "e5m2"))
    for d in ("f16", "f32")
]


def matrix(rng, rows, k, name):
    if name == "f64":
        x = rng.standard_normal((rows, k))
        return x, x.view(np.uint64)
    return random_matrix(rng, rows, k, name)


def put(registers, lane, index, code, size, word):
    """Element `index` of a thread's fragment, lowest bits of the first register first."""
    per = word // size
    shift = 8 * size * (index % per)
    registers[index // per, lane] |= registers.dtype.type(int(code) << shift)


def fragment_a(codes, size):
    """a_i of thread t (groupID = t / 4, t % 4): row, then column, as in the tables of the ISA."""
    m, k = codes.shape
    word = max(4, size)
    per = word // size
    out = np.zeros((m * k * size // 32 // word, 32), np.uint64 if word == 8 else np.uint32)
    for lane in range(32):
        group, inside = divmod(lane, 4)
        for i in range(m * k // 32):
            register, e = divmod(i, per)
            row = group if m == 8 or register % 2 == 0 else group + 8
            block = register if m == 8 else register // 2
            put(out, lane, i, codes[row, inside * per + e + 4 * per * block], size, word)
    return out


def fragment_b(codes, size):
    """Codes are [8, k]: column n of B is row n."""
    k, word = codes.shape[1], max(4, size)
    per = word // size
    out = np.zeros((8 * k * size // 32 // word, 32), np.uint64 if word == 8 else np.uint32)
    for lane in range(32):
        for i in range(k // 4):
            row = lane % 4 * per + i % per + i // per * 4 * per
            put(out, lane, i, codes[lane // 4, row], size, word)
    return out


def fragment_c(values, d):
    kind = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "s32": np.int32}[d]
    size, m = np.dtype(kind).itemsize, len(values)
    word = max(4, size)
    out = np.zeros((m * size // 4 // word, 32), np.uint64 if word == 8 else np.uint32)
    for lane in range(32):
        for i in range(m // 4):
            row = lane // 4 + 8 * (i // 2)
            code = kind(values[row, lane % 4 * 2 + i % 2]).view(f"u{size}")
            put(out, lane, i, code, size, word)
    return out


def opcode(m, k, a, b, d, more=""):
    return f"mma.sync.aligned.m{m}n8k{k}.row.col{more}.{d}.{a}.{b}.{d}"


@settings(max_examples=60)
@given(st.sampled_from(SHAPES), st.integers(0, 99))
def test_products_of_all_shapes(shape, seed):
    m, k, a, b, d = shape
    rng = np.random.default_rng(seed)
    frags, want = [], []
    for _ in range(3):  # warps
        va, ca = matrix(rng, m, k, a)
        vb, cb = matrix(rng, 8, k, b)
        old = rng.integers(-9, 9, (m, 8)).astype(np.float64)
        sa, sb = ca.itemsize, cb.itemsize
        frags.append((fragment_a(ca, sa), fragment_b(cb, sb), fragment_c(old, d)))
        want.append(va @ vb.T + old)
    form = mma.parse_mma_sync(opcode(*shape))
    stacked = [np.stack(parts, axis=1) for parts in zip(*frags, strict=True)]
    got = mma.mma_sync(form, *stacked)
    assert got.shape == stacked[2].shape
    unit = {"f16": 2.0**-10, "f32": 2.0**-20, "f64": 2.0**-48, "s32": 0}[d]
    for w in range(3):
        exact = np.abs(want[w]).max()
        kind = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "s32": np.int32}[d]
        out = mma.unpack(form, got)[w].astype(np.float64)
        assert np.abs(out - want[w]).max() <= unit * max(1, exact)
        assert (got[:, w] == fragment_c(out.astype(kind), d)).all()


def test_integers_wrap_or_saturate():
    a = np.full((4, 1, 32), 0x7F7F7F7F, np.uint32)
    c = np.full((4, 1, 32), 2**31 - 1, np.uint32)
    for more, want in (("", 127 * 127 * 32 - 2**31 - 1), (".satfinite", 2**31 - 1)):
        form = mma.parse_mma_sync(opcode(16, 32, "s8", "s8", "s32", more))
        assert (mma.mma_sync(form, a, a[:2], c).view(np.int32) == want).all()


@pytest.mark.parametrize(
    "op",
    [
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k16.col.row.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f16",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f16",
        "mma.sync.aligned.m16n8k16.row.col.satfinite.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32",
        "mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.e2m1.e2m1.f32",
        "mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32",
    ],
)
def test_forms_that_are_refused(op):
    with pytest.raises(Unsupported, match="mma"):
        mma.parse_mma_sync(op)
