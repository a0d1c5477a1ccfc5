"""Tensor maps against torch slicing, plain loops and the bit formula of the swizzle."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.sim.types import Fault, Unsupported
from coda.sim.units import tensormap, tma
from coda.sim.units.tma import TensorMap
from coda.sim.units.tma_reduce import combine, reduce_box

CODES = {"u8": 0, "u16": 1, "u32": 2, "s32": 3, "u64": 4, "s64": 5, "f16": 6, "f32": 7}
CODES |= {"f32.ftz": 8, "f64": 9, "bf16": 10, "b4x16": 11, "b4x16_p64": 12, "b6x16_p32": 13}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
few = settings(max_examples=60)


def encode(base, dims, strides, box, kind="bf16", span=0, steps=(), fill=0, flags=0):
    """The 64 bytes of a map; strides of dimensions 1 and up, in bytes."""
    rounds = kind == "tf32"
    words = [0] * 16
    words[0], words[1] = base & 0xFFFFFFFF, base >> 32
    words[2] = 2 | len(dims) - 1 << 4 | CODES["f32" if rounds else kind] << 7
    words[2] |= SWIZZLES[span] << 13 | fill << 15 | rounds << 16 | 1 << 18 | flags
    for i, stride in enumerate(strides):
        words[3 + i] = stride >> 4 & 0xFFFFFFFF
        words[7] |= stride >> 36 << 4 * i
    for i, dim in enumerate(dims):
        words[8 + i] = dim - 1
    words[13] = box[0] - 1 << 24 | sum(s - 1 << 3 * i for i, s in enumerate(steps))
    words[14] = sum(b - 1 << 8 * i for i, b in enumerate(box[1:]))
    return struct.pack("<16I", *words)


def aligned(shape, dtype, pad=0):
    """A numpy array whose first item is 128-byte aligned, filled with distinct values."""
    count = int(np.prod(shape)) + pad
    raw = np.zeros(count * np.dtype(dtype).itemsize + 128, np.uint8)
    skip = -raw.ctypes.data % 128
    flat = raw[skip : skip + count * np.dtype(dtype).itemsize].view(dtype)
    flat[:] = (np.arange(count) * 2654435761 >> 3).astype(dtype)
    return flat[: int(np.prod(shape))].reshape(shape)


@st.composite
def boxes(draw):
    """A tensor (outermost first), a box, element strides, and coordinates around the bounds."""
    rank = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]))
    size = np.dtype(dtype).itemsize
    inner = 16 // size * draw(st.integers(1, 4))
    dims = [16 // size * draw(st.integers(1, 6))]
    dims += [draw(st.integers(1, 7 if rank > 3 else 20)) for _ in range(rank - 1)]
    box = [inner] + [draw(st.integers(1, 4 if rank > 3 else 9)) for _ in range(rank - 1)]
    steps = [1] + [draw(st.sampled_from([1, 1, 1, 2, 3, 8])) for _ in range(rank - 1)]
    coords = [draw(st.integers(-b - 1, d + 1)) for b, d in zip(box, dims, strict=True)]
    return dtype, dims, box, steps, coords


def tensor(dtype, dims, box, steps, **more):
    data = aligned(dims[::-1], dtype)
    strides = data.strides[::-1][1:]
    kind = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}[data.itemsize]
    raw = encode(data.ctypes.data, dims, strides, box, kind, steps=steps, **more)
    return data, TensorMap.decode(raw + b"\xa5" * 64)


def expected(data, box, steps, coords):
    """The box, axis by axis in torch: indices that leave the tensor give zero."""
    out = torch.from_numpy(data.view(f"i{data.itemsize}").astype(np.int64))
    for d, (b, s, c) in enumerate(zip(box, steps, coords, strict=True)):
        axis = data.ndim - 1 - d
        at = torch.arange(c, c + b, s)
        inside = (at >= 0) & (at < out.shape[axis])
        out = out.index_select(axis, at.clamp(0, out.shape[axis] - 1))
        out = out * inside.view([-1] + [1] * d)
    return out.numpy().astype(data.dtype)


@few
@given(boxes())
def test_loads_are_slices(case):
    dtype, dims, box, steps, coords = case
    data, tmap = tensor(dtype, dims, box, steps)
    got = tma.load_box(tmap, coords)
    want = expected(data, box, steps, coords)
    assert got.view(dtype).tolist() == want.ravel().tolist()
    assert tmap.box_bytes == got.nbytes == tma.moved_bytes(tmap)


@few
@given(boxes())
def test_stores_write_what_is_in_bounds_and_nothing_else(case):
    dtype, dims, box, steps, coords = case
    data, tmap = tensor(dtype, dims, box, steps)
    before = data.copy()
    dense = np.full(tmap.box_bytes, 7, np.uint8)
    tma.store_box(tmap, coords, dense)
    mine = np.zeros(data.shape, bool)
    for at in np.ndindex(*data.shape):
        inside = True
        for d, c in enumerate(coords):
            x = at[data.ndim - 1 - d] - c
            inside &= 0 <= x < box[d] and x % steps[d] == 0
        mine[at] = inside
    filled = np.full(1, 7, np.uint8).repeat(data.itemsize).view(dtype)[0]
    assert (data == np.where(mine, filled, before)).all()


@few
@given(boxes())
def test_extent_and_rows_cover_the_bytes_in_bounds(case):
    dtype, dims, box, steps, coords = case
    data, tmap = tensor(dtype, dims, box, steps)
    index = expected(np.arange(1, data.size + 1).reshape(data.shape), box, steps, coords).ravel()
    touched = np.unique(index[index > 0] - 1) * data.itemsize + data.ctypes.data
    starts, length = tma.global_rows(tmap, coords)
    every = (starts[:, None] + np.arange(0, length, data.itemsize)).ravel() if length else []
    assert sorted(every) == touched.tolist()
    want = (touched[0], touched[-1] + data.itemsize) if len(touched) else None
    assert tma.global_extent(tmap, coords) == want


@few
@given(
    st.sampled_from([0, 32, 64, 128]),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(0, 2**32 - 1),
)
def test_shared_memory_holds_the_swizzled_box(span, half, rows, line, seed):
    width = min(span or 128, 32 * half)
    data = aligned((64, 128), np.uint8)
    raw = encode(data.ctypes.data, (128, 64), (128,), (width, rows), "u8", span)
    tmap, base = TensorMap.decode(raw), 128 * line
    smem = np.zeros(16384 + 128 * 41, np.uint8)
    dense = np.random.default_rng(seed).integers(1, 255, tmap.box_bytes).astype(np.uint8)
    tma.write_shared(smem, tmap, base, dense)
    bits = {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}[span]
    want = np.zeros_like(smem)
    for i, byte in enumerate(dense):
        address = base + i
        want[address ^ (address >> 3 & bits)] = byte
    assert (smem == want).all()
    assert (tma.read_shared(smem, tmap, base) == dense).all()
    chunks = [(base + i) ^ ((base + i) >> 3 & bits) for i in range(0, len(dense), 16)]
    assert tma.place(tmap, base).tolist() == chunks


def test_swizzle_with_atoms_of_32_bytes():
    data = aligned((64, 128), np.uint8)
    raw = encode(data.ctypes.data, (128, 64), (128,), (128, 16), "u8", 128, flags=1 << 19)
    for base in (0, 1024, 384):
        at = tma.place(TensorMap.decode(raw), base)
        for i, place in enumerate(at.tolist()):
            address = base + 16 * i
            pair, line = address >> 5 & 3, address >> 7 & 3
            assert place == (address & ~0x60) | (pair ^ line) << 5


def test_nan_fill_and_zero_fill():
    data = aligned((8, 8), np.float32)
    for fill in (0, 1):
        raw = encode(data.ctypes.data, (8, 8), (32,), (8, 4), "f32", fill=fill)
        got = tma.load_box(TensorMap.decode(raw), (4, 6)).view(np.float32).reshape(4, 8)
        assert (got[:2, :4] == data[6:, 4:]).all()
        rest = np.concatenate([got[:2, 4:].ravel(), got[2:].ravel()])
        assert np.isnan(rest).all() if fill else not rest.any()
    half = encode(data.ctypes.data, (8, 8), (16,), (8, 4), "f16", fill=1)
    assert np.isnan(tma.load_box(TensorMap.decode(half), (0, 100)).view(np.float16)).all()


def test_tf32_rounds_and_ftz_flushes():
    data = aligned((1, 8), np.float32)
    data[0] = [1 + 2**-11, 1 + 2**-10, 1 - 2**-13, -(1 + 2**-11), 2.0**-130, 0.0, np.inf, 3.25]
    raw = encode(data.ctypes.data, (8, 1), (32,), (8, 1), "tf32")
    got = tma.load_box(TensorMap.decode(raw), (0, 0)).view(np.float32)
    want = [1 + 2**-10, 1 + 2**-10, 1.0, -(1 + 2**-10), 2.0**-130, 0.0, np.inf, 3.25]
    assert got.tolist() == want
    raw = encode(data.ctypes.data, (8, 1), (32,), (8, 1), "f32.ftz")
    got = tma.load_box(TensorMap.decode(raw), (0, 0)).view(np.float32)
    assert got[4] == 0.0
    assert (got[:4] == data[0, :4]).all()


@given(st.lists(st.integers(-3, 12), min_size=4, max_size=4), st.integers(-4, 20))
@few
def test_gather_and_scatter_move_four_rows(rows, column):
    data = aligned((10, 16), np.uint16)
    tmap = TensorMap.decode(encode(data.ctypes.data, (16, 10), (32,), (8, 1), "u16"))
    coords = (column, *rows)
    got = tma.load_box(tmap, coords, "gather4").view(np.uint16).reshape(4, 8)
    for i, row in enumerate(rows):
        for j in range(8):
            x = column + j
            inside = 0 <= row < 10 and 0 <= x < 16
            assert got[i, j] == (data[row, x] if inside else 0)
    assert tma.moved_bytes(tmap, "gather4") == 64 == len(tma.place(tmap, 0, "gather4")) * 16
    before = data.copy()
    tma.store_box(tmap, coords, got.reshape(-1).view(np.uint8) * 0, "gather4")
    for at in np.ndindex(*data.shape):
        hit = at[0] in rows and 0 <= at[1] - column < 8
        assert data[at] == (0 if hit else before[at])


def test_gather_wants_single_rows_of_a_matrix():
    data = aligned((10, 16), np.uint16)
    tmap = TensorMap.decode(encode(data.ctypes.data, (16, 10), (32,), (8, 2), "u16"))
    with pytest.raises(Fault, match="gather4"):
        tma.load_box(tmap, (0, 1, 2, 3, 4), "gather4")


@pytest.mark.parametrize(("kind", "stored"), [("b4x16_p64", 8), ("b6x16_p32", 12)])
def test_narrow_elements_are_padded_to_16_bytes(kind, stored):
    data = aligned((4, 16 * stored), np.uint8)
    raw = encode(data.ctypes.data, (256, 4), (16 * stored,), (128, 2), kind, 128)
    tmap = TensorMap.decode(raw)
    got = tma.load_box(tmap, (128, 3)).reshape(2, 8, 16)
    assert (got[0, :, :stored].ravel() == data[3, 8 * stored :]).all()
    assert not got[0, :, stored:].any()
    assert not got[1].any()
    assert tmap.box_bytes == 256
    assert tma.global_rows(tmap, (128, 2))[1] == 8 * stored
    fresh = np.zeros_like(got)
    fresh[:, :, :stored] = 9
    tma.store_box(tmap, (0, 0), fresh.reshape(-1))
    assert (data[:2, : 8 * stored] == 9).all()
    with pytest.raises(Fault, match="splits"):
        tma.load_box(tmap, (8, 0))


def test_packed_four_bit_elements():
    data = aligned((4, 64), np.uint8)
    tmap = TensorMap.decode(encode(data.ctypes.data, (128, 4), (64,), (64, 2), "b4x16"))
    assert (tma.load_box(tmap, (64, 1)).reshape(2, 32) == data[1:3, 32:]).all()


@given(
    st.sampled_from(["add", "min", "max", "inc", "dec", "and", "or", "xor"]),
    st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8),
)
@few
def test_reductions_of_integers(operation, words):
    old, new = np.array(words[:4], np.uint32), np.array(words[4:], np.uint32)
    if operation in ("inc", "dec"):
        new[0], new[1], old[2] = old[0], max(int(old[1]) - 1, 0), 0
    scalar = {
        "add": lambda a, b: (a + b) % 2**32,
        "min": min,
        "max": max,
        "inc": lambda a, b: 0 if a >= b else a + 1,
        "dec": lambda a, b: b if a == 0 or a > b else a - 1,
        "and": int.__and__,
        "or": int.__or__,
        "xor": int.__xor__,
    }[operation]
    want = [scalar(int(a), int(b)) for a, b in zip(old, new, strict=True)]
    assert combine(operation, "u32", old, new).tolist() == want


def test_signed_minimum_and_halves():
    old, new = np.array([5, -7], np.int32), np.array([-6, 3], np.int32)
    got = combine("min", "s32", old.view(np.uint32), new.view(np.uint32))
    assert got.view(np.int32).tolist() == [-6, -7]
    rng = torch.Generator().manual_seed(0)
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        a, b = (torch.randn(4000, generator=rng).to(dtype) for _ in range(2))
        bits = [x.view(torch.int16).numpy().view(np.uint16) for x in (a, b)]
        for operation, run in (("add", torch.add), ("min", torch.minimum), ("max", torch.maximum)):
            want = run(a, b).view(torch.int16).numpy().view(np.uint16)
            assert (combine(operation, kind, *bits) == want).all()


@pytest.mark.parametrize(("operation", "kind"), [("inc", "s32"), ("min", "f32"), ("mul", "u32")])
def test_reductions_that_do_not_exist(operation, kind):
    with pytest.raises(Unsupported, match=kind):
        combine(operation, kind, np.zeros(4, np.uint32), np.zeros(4, np.uint32))


@few
@given(boxes())
def test_reduce_box_adds_in_bounds(case):
    dtype, dims, box, steps, coords = case
    dtype = {np.uint8: np.uint32, np.uint16: np.uint64}.get(dtype, dtype)
    unit = 16 // np.dtype(dtype).itemsize
    dims, box = [-(-x // unit) * unit if d == 0 else x for d, x in enumerate(dims)], list(box)
    box[0] = -(-box[0] // unit) * unit
    data, tmap = tensor(dtype, dims, box, steps)
    before = data.copy()
    dense = np.arange(tmap.box_bytes // np.dtype(dtype).itemsize, dtype=dtype)
    reduce_box(tmap, coords, dense.view(np.uint8), "add")
    added = expected(data - before, box, steps, coords)
    inside = expected(np.ones_like(data), box, steps, coords)
    assert (added == dense.reshape(added.shape) * inside).all()
    assert (data - before).sum() == added.sum()


def test_rows_that_overlap_are_reduced_in_turn():
    data = aligned((1, 4), np.uint32)
    data[:] = 0
    tmap = TensorMap.decode(encode(data.ctypes.data, (4, 3), (0,), (4, 3), "u32"))
    reduce_box(tmap, (0, 0), np.arange(12, dtype=np.uint32).view(np.uint8), "add")
    assert data[0].tolist() == [12, 15, 18, 21]


@pytest.mark.parametrize(
    ("flags", "word"),
    [(1 << 11, "interleave"), (1 << 3, "tiled"), (1 << 25, "tiled"), (3 << 19, "atomicity")],
)
def test_bits_that_are_not_modelled_are_refused(flags, word):
    data = aligned((8, 8), np.uint16)
    with pytest.raises(Unsupported, match=word):
        TensorMap.decode(encode(data.ctypes.data, (8, 8), (16,), (8, 8), "u16", flags=flags))


def test_impossible_maps_and_boxes():
    data = aligned((8, 64), np.uint16)
    at = data.ctypes.data
    with pytest.raises(Fault, match="multiple of 16"):
        TensorMap.decode(encode(at, (64, 8), (128,), (4, 8), "u16"))
    with pytest.raises(Fault, match="swizzle of 64"):
        TensorMap.decode(encode(at, (64, 8), (128,), (64, 8), "u16", 64))
    with pytest.raises(Fault, match="aligned"):
        TensorMap.decode(encode(at + 8, (64, 8), (128,), (64, 8), "u16"))
    tmap = TensorMap.decode(encode(at, (64, 8), (128,), (64, 8), "u16", 128))
    with pytest.raises(Fault, match="coordinates"):
        tma.load_box(tmap, (0,))
    with pytest.raises(Fault, match="128-byte"):
        tma.place(tmap, 64)
    with pytest.raises(Fault, match="shared memory"):
        tma.read_shared(np.zeros(1024, np.uint8), tmap, 128)


# What ptxas writes for tensormap.replace: (field, index, value) -> word, mask, bits.
FIELDS = [
    ("rank", None, 4, 2, 0x70, 0x40),
    ("box_dim", 0, 64, 13, 0xFF000000, 0x3F000000),
    ("box_dim", 1, 128, 14, 0xFF, 0x7F),
    ("box_dim", 4, 2, 14, 0xFF000000, 0x01000000),
    ("global_dim", 4, 77, 12, 0xFFFFFFFF, 76),
    ("element_stride", 4, 3, 13, 0x7000, 0x2000),
    ("elemtype", None, 10, 2, 0x780, 0x500),
    ("elemtype", None, 11, 2, 0x10780, 0x10380),
    ("elemtype", None, 12, 2, 0x10780, 0x10400),
    ("elemtype", None, 13, 2, 0x780, 0x580),
    ("elemtype", None, 15, 2, 0x780, 0x680),
    ("interleave_layout", None, 2, 2, 0x1800, 0x1000),
    ("swizzle_mode", None, 3, 2, 0x406000, 0x6000),
    ("swizzle_mode", None, 4, 2, 0x406000, 0x400000),
    ("swizzle_atomicity", None, 1, 2, 0x380000, 0x80000),
    ("fill_mode", None, 1, 2, 0x8000, 0x8000),
    ("global_stride", 0, 1 << 36 | 64, 3, 0xFFFFFFFF, 4),
    ("global_stride", 3, 1 << 36, 7, 0xF000, 0x1000),
]


@pytest.mark.parametrize(("name", "index", "value", "word", "mask", "bits"), FIELDS)
@pytest.mark.parametrize("start", [0, 0xFFFFFFFF])
def test_replaced_fields_are_the_words_that_ptxas_stores(
    name, index, value, word, mask, bits, start
):
    raw = np.full(32, start, np.uint32).view(np.uint8)
    tensormap.replace(raw, name, index, value)
    words = raw.view(np.uint32)
    assert words[word] & mask == bits
    assert words[word] & ~np.uint32(mask) == start & ~mask
    others = {word, 7} if name == "global_stride" else {word}
    others |= {3 + index} if name == "global_stride" else set()
    assert all(w == start for i, w in enumerate(words.tolist()) if i not in others)


def test_a_replaced_map_is_the_map_of_another_tensor():
    first, second = aligned((8, 64), np.uint16), aligned((5, 32), np.uint16)
    raw = np.frombuffer(
        encode(first.ctypes.data, (64, 8), (128,), (64, 8), "u16", 128) + bytes(64), np.uint8
    ).copy()
    tensormap.replace(raw, "global_address", None, second.ctypes.data)
    tensormap.replace(raw, "global_dim", 0, 32)
    tensormap.replace(raw, "global_dim", 1, 5)
    tensormap.replace(raw, "global_stride", 0, 64)
    want = encode(second.ctypes.data, (32, 5), (64,), (64, 8), "u16", 128)
    assert raw[:64].tobytes() == want
    got = tma.load_box(TensorMap.decode(raw.tobytes()), (0, 0)).view(np.uint16).reshape(8, 64)
    assert (got[:5, :32] == second).all()
    assert got.sum() == second.sum()
    with pytest.raises(Unsupported, match="colour"):
        tensormap.replace(raw, "colour", None, 0)
    with pytest.raises(Fault, match="box_dim"):
        tensormap.replace(raw, "box_dim", 5, 1)
