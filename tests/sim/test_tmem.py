"""Loads, stores, copies and shifts of tensor memory against layouts stated as bits and strides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.sim.tensorcore import tmem
from coda.sim.types import Fault, Unsupported
from tests.sim.operands import put

few = settings(max_examples=100)
# The place of a thread's bits in a block of rows of w bits: extents and strides, fastest first.
# Threads, then values; a letter w is the width of a row times the number before it.
BITS = {
    "32x32b": ([(32, "1w")], [(32, 1)]),
    "16x64b": ([(2, "8w"), (2, 32), (8, "1w")], [(32, 1), (0, 64)]),
    "16x128b": ([(4, 32), (8, "1w")], [(32, 1), (2, "8w"), (0, 128)]),
    "16x256b": ([(4, 64), (8, "1w")], [(64, 1), (2, "8w"), (0, 256)]),
    "16x32bx2": ([(16, "1w"), (2, "half")], [(0, 1)]),
}
WIDTH = {"32x32b": 32, "16x64b": 64, "16x128b": 128, "16x256b": 256, "16x32bx2": 64}
SHAPES = [(s, 2**i) for s in BITS for i in range(8) if WIDTH[s] * 2**i <= 128 * 32 * 2]
SHAPES = [(s, n) for s, n in SHAPES if tmem.PER_REPEAT[s] * n <= 128]


def digits(index, modes):
    """Split an index into digits, the last mode taking what is left; their weighted sum."""
    total = 0
    for i, (extent, stride) in enumerate(modes):
        last = i == len(modes) - 1
        digit, index = (index, 0) if last or not extent else (index % extent, index // extent)
        total += digit * stride
    return total


def place(shape, repeat, register, thread):
    """(row, column) of a register of a thread in the block that a warp moves."""
    width = WIDTH[shape] * repeat
    known = {"1w": width, "8w": 8 * width, "half": width // 2}
    threads, bits = ([(e, known.get(s, s)) for e, s in modes] for modes in BITS[shape])
    bit = digits(thread, threads) + digits(32 * register, bits)
    return bit // width, bit % width // 32


@st.composite
def moves(draw):
    shape, repeat = draw(st.sampled_from(SHAPES))
    packed = draw(st.booleans())
    columns = WIDTH[shape] * repeat // 32 * (1 + packed)
    packed = packed and columns <= 512
    columns = WIDTH[shape] * repeat // 32 * (1 + packed)
    warp, column = draw(st.integers(0, 7)), draw(st.integers(0, 512 - columns))
    lane = 32 * (warp % 4) + (0 if shape == "32x32b" else draw(st.sampled_from([0, 16])))
    return shape, repeat, packed, warp, lane, column, draw(st.integers(0, 99))


@few
@given(moves())
def test_loads_and_stores_of_all_shapes(case):
    shape, repeat, packed, warp, lane, column, seed = case
    memory = np.random.default_rng(seed).integers(0, 2**32, (128, 512)).astype(np.uint32)
    split = repeat * (1 + packed)
    name = f"sync.aligned.{shape}.x{repeat}"
    load = tmem.parse_move(f"tcgen05.ld.{name}{'.pack::16b' * packed}.b32")
    store = tmem.parse_move(f"tcgen05.st.{name}{'.unpack::16b' * packed}.b32")
    got = tmem.load(load, memory, lane << 16 | column, warp, split)
    assert got.shape == (load.registers, 32)
    want, written = np.zeros_like(got), np.zeros_like(memory)
    for register, thread in np.ndindex(*got.shape):
        row, at = place(shape, repeat, register, thread)
        if packed:
            where = lane + row, slice(column + 2 * at, column + 2 * at + 2)
            low, high = (memory[where] & 0xFFFF).tolist()
            want[register, thread] = low | high << 16
            written[where] = low, high
        else:
            want[register, thread] = memory[lane + row, column + at]
            written[lane + row, column + at] = memory[lane + row, column + at]
    assert (got == want).all()
    memory[:] = 0
    tmem.store(store, memory, lane << 16 | column, warp, got, split)
    assert (memory == written).all()


def test_the_halves_of_a_split_load_lie_apart():
    memory = np.arange(128 * 512, dtype=np.uint32).reshape(128, 512)
    form = tmem.parse_move("tcgen05.ld.sync.aligned.16x32bx2.x4.b32")
    got = tmem.load(form, memory, 10, 0, 64)
    for register, thread in np.ndindex(4, 32):
        column = 10 + register + (64 if thread >= 16 else 0)
        assert got[register, thread] == memory[thread % 16, column]


COPIES = [("128x256b", 128, 32), ("128x128b", 128, 16), ("4x256b", 4, 32)]
COPIES += [("32x128b.warpx4", 32, 16)]
COPIES += [("64x128b.warpx2::02_13", 64, 16), ("64x128b.warpx2::01_23", 64, 16)]


def lanes_of(shape, row):
    """The lanes that get a row, by the warps that the PTX ISA names."""
    if shape.startswith("128x"):
        return [row]
    if shape.startswith("4x"):
        return [32 * row]
    if shape.endswith("warpx4"):
        return [row + 32 * warp for warp in range(4)]
    first, second = shape[-5:].split("_")
    warps = first if row < 32 else second
    return [row % 32 + 32 * int(warp) for warp in warps]


@pytest.mark.parametrize(("shape", "rows", "wide"), COPIES)
@pytest.mark.parametrize("ctas", [1, 2])
@pytest.mark.parametrize("span", [0, 32, 128])
def test_copies_from_shared_memory(shape, rows, wide, ctas, span):
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (ctas, rows, wide)).astype(np.uint8)
    smems, tmems = np.zeros((ctas, 32768), np.uint8), np.zeros((ctas, 128, 512), np.uint32)
    leading, stride = (2048, 128) if not span else (16, 8 * span)
    for smem, matrix in zip(smems, raw, strict=True):
        put(smem, 2048, matrix, span, "k", leading, stride)
    kind = {0: 0, 128: 2, 32: 6}[span]
    source = 2048 >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | kind << 61
    form = tmem.parse_copy(f"tcgen05.cp.cta_group::{ctas}.{shape}")
    tmem.copy(form, smems, tmems, 40, source)
    want = np.zeros_like(tmems)
    for cta, row in np.ndindex(ctas, rows):
        for lane in lanes_of(shape, row):
            want[cta, lane, 40 : 40 + wide // 4] = raw[cta, row].view(np.uint32)
    assert (tmems == want).all()
    assert sum(n for _, n, _ in tmem.copy_lanes(form, 40)) == np.count_nonzero(want[0, :, 40])


def test_copies_that_unpack():
    rng = np.random.default_rng(2)
    for name, bits, shift in (("b4x16_p64", 4, 2), ("b6x16_p32", 6, 0)):
        codes = rng.integers(0, 2**bits, (32, 16)).astype(np.uint8)
        smem, memory = np.full(8192, 0xA5, np.uint8), np.zeros((128, 512), np.uint32)
        for row in range(32):
            word = sum(int(c) << bits * i for i, c in enumerate(codes[row]))
            smem[16 * row : 16 * row + 2 * bits] = list(word.to_bytes(2 * bits, "little"))
        form = tmem.parse_copy(f"tcgen05.cp.cta_group::1.32x128b.warpx4.b8x16.{name}")
        tmem.copy(form, [smem], [memory], 0, 8 << 16 | 8 << 32 | 1 << 46)
        got = memory[:, :4].copy().view(np.uint8).reshape(4, 32, 16)
        assert (got == codes << shift).all()


def test_the_last_lane_is_refreshed_after_a_shift():
    """31 rows move towards lane 0; a copy of 4 rows then fills the last lane of each partition."""
    memory = np.arange(128 * 512, dtype=np.uint32).reshape(128, 512)
    before = memory.copy()
    assert tmem.parse_shift("tcgen05.shift.cta_group::2.down") == 2
    for lane in (0, 32, 64, 96):
        tmem.shift([memory], lane << 16 | 16)
    want = before.copy()
    for lane in range(128):
        if lane % 32 != 31:
            want[lane, 16:24] = before[lane + 1, 16:24]
    assert (memory == want).all()
    form = tmem.parse_copy("tcgen05.cp.cta_group::1.4x256b")
    tmem.copy(form, [np.full(4096, 1, np.uint8)], [memory], 31 << 16 | 16, 64 << 16 | 1 << 46)
    want[31::32, 16:24] = 0x01010101
    assert (memory == want).all()


@pytest.mark.parametrize(
    "op",
    [
        "tcgen05.ld.sync.aligned.16x256b.x64.b32",
        "tcgen05.ld.sync.aligned.32x32b.x3.b32",
        "tcgen05.ld.sync.aligned.32x32b.x2.unpack::16b.b32",
        "tcgen05.ld.red.sync.aligned.32x32b.x2.min.u32",
    ],
)
def test_moves_that_are_refused(op):
    with pytest.raises(Unsupported, match=r"tcgen05\.ld"):
        tmem.parse_move(op)


@pytest.mark.parametrize(
    "shape", ["32x128b", "64x128b", "64x256b.warpx2::02_13", "128x128b.warpx4", "4x128b"]
)
def test_copies_that_are_refused(shape):
    with pytest.raises(Unsupported, match=r"tcgen05\.cp"):
        tmem.parse_copy(f"tcgen05.cp.cta_group::1.{shape}")


def test_places_that_do_not_exist():
    memory = np.zeros((128, 512), np.uint32)
    form = tmem.parse_move("tcgen05.ld.sync.aligned.32x32b.x32.b32")
    for address, warp, word in (
        (32 << 16, 0, "warp 0 reaches lanes 0 to 31, not 32"),
        (16 << 16, 0, "not 16"),
        (490, 4, "column 521"),
        (600, 0, "column 600"),
        (128 << 16, 0, "lane 128"),
    ):
        with pytest.raises(Fault, match=word):
            tmem.load(form, memory, address, warp)
    with pytest.raises(Fault, match="shift"):
        tmem.shift([memory], 16 << 16)
    copy = tmem.parse_copy("tcgen05.cp.cta_group::1.32x128b.warpx4")
    with pytest.raises(Fault, match="lane 16"):
        tmem.copy_lanes(copy, 16 << 16)
    with pytest.raises(Fault, match="column 510"):
        tmem.copy_lanes(copy, 510)
