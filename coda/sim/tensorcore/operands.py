"""Matrix descriptors of wgmma and tcgen05 -> the bytes of an operand -> its exact f32 values.

An operand is a matrix of `rows` (M or N) by `k` elements in shared memory. K-major: one row is
contiguous along K; MN-major: K is the outer dimension. It is fetched in 16-byte chunks:
`chunk_offsets` lists their offsets in the order of the logical matrix, [rows, k] for K-major
and [k, rows] for MN-major, so that a fetch is one gather and a view.

With W the width of the swizzle in bytes and E = 16 / bytes of an element:
    K-major    r % 8 * W + r // 8 * SBO + bytes along K                       (none: W = 16)
    MN-major   r % (W/16 * E) * bytes + r // (W/16 * E) * LBO + k % 8 * W + k // 8 * SBO
K-major without a swizzle has LBO between the two 16-byte chunks of K; MN-major without one has LBO
and SBO exchanged. The swizzle is applied last, to the absolute address in shared memory, so a start
inside a swizzled row needs no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coda.sim.alu.floats import decode_table
from coda.sim.types import Fault, Unsupported
from coda.sim.units.tma import CHUNK, swizzled

Array = NDArray
Major = Literal["k", "mn"]
PERIOD = 1024


@dataclass(frozen=True)
class DescriptorLayout:
    """A matrix descriptor without its start: LBO and SBO in bytes, and a swizzle as in `tma`."""

    leading: int
    stride: int
    span: int
    atom: int = CHUNK


@dataclass(frozen=True)
class Matrix:
    """A decoded matrix descriptor."""

    start: int
    layout: DescriptorLayout


WGMMA_SPANS = {0: 0, 1: 128, 2: 64, 3: 32}
TCGEN05_SPANS = {0: (0, CHUNK), 1: (128, 32), 2: (128, CHUNK), 4: (64, CHUNK), 6: (32, CHUNK)}


def _bytes(descriptor: int, bit: int) -> int:
    return (descriptor >> bit & 0x3FFF) << 4


@lru_cache(4096)
def wgmma_matrix(descriptor: int) -> Matrix:
    """Decode a descriptor of wgmma; Unsupported if it uses a base offset or reserved bits."""
    if descriptor & 0x3FF1_C000_C000_C000 or descriptor >> 49 & 7:
        raise Unsupported(f"wgmma: matrix descriptor {descriptor:#018x} (base offset or others)")
    layout = DescriptorLayout(
        _bytes(descriptor, 16), _bytes(descriptor, 32), WGMMA_SPANS[descriptor >> 62]
    )
    return Matrix(_bytes(descriptor, 0), layout)


@lru_cache(4096)
def tcgen05_matrix(descriptor: int) -> Matrix:
    """Decode a descriptor of tcgen05; Unsupported if it uses a feature that is not modelled."""
    kind = descriptor >> 61
    # Bits 46 to 48 hold the constant 1; the offset of the pattern and absolute mode must be zero.
    if descriptor & 0x1FFE_0000_C000_C000 or descriptor >> 46 & 7 != 1 or kind not in TCGEN05_SPANS:
        raise Unsupported(f"tcgen05: matrix descriptor {descriptor:#018x}")
    span, atom = TCGEN05_SPANS[kind]
    layout = DescriptorLayout(_bytes(descriptor, 16), _bytes(descriptor, 32), span, atom)
    return Matrix(_bytes(descriptor, 0), layout)


@lru_cache(1024)
def _relative(
    layout: DescriptorLayout, rows: int, row_bytes: int, element: int, major: Major, phase: int
) -> Array:
    """Offsets of the chunks from the start, which is `phase` bytes into a period of 1024."""
    width = layout.span or CHUNK
    if major == "k":
        r, b = np.arange(rows)[:, None], np.arange(0, row_bytes, CHUNK)[None, :]
        along = b if layout.span else b // CHUNK * layout.leading
        at = r % 8 * width + r // 8 * layout.stride + along
    else:
        if rows * element % CHUNK:
            raise Unsupported(f"an MN-major operand of {rows} elements of {element} bytes")
        r = np.arange(0, rows * element, CHUNK)[None, :]
        k = np.arange(row_bytes // element)[:, None]
        # Rows of K in a pattern: 8, but 4 where the swizzle permutes units of 32 bytes.
        deep = 8 if layout.atom == CHUNK else 4
        across, down = layout.leading, layout.stride
        if not layout.span:
            across, down = down, across
        at = r % width + r // width * across + k % deep * width + k // deep * down
    return swizzled(at.astype(np.int64) + phase, layout.span, layout.atom) - phase


def chunk_offsets(
    matrix: Matrix, rows: int, row_bytes: int, element: int = 2, major: Major = "k"
) -> Array:
    """Byte offsets in shared memory, int64, of an operand's 16-byte chunks in logical order.

    `row_bytes`: bytes of one row along K; `element`: bytes of an element (used if MN-major).
    """
    phase = matrix.start % PERIOD
    return _relative(matrix.layout, rows, row_bytes, element, major, phase) + matrix.start


def pieces(chunks: Array) -> tuple[Any, int]:
    """Offsets of 16-byte chunks -> (offset, bytes) of one piece, or (offsets, bytes) of equal ones.

    Several pieces have a power of two of bytes, and begin at multiples of it.
    """
    at = np.unique(chunks)
    if int(at[-1]) - int(at[0]) == (len(at) - 1) * CHUNK:
        return int(at[0]), len(at) * CHUNK
    nbytes = CHUNK
    while not len(at) % 2 and not (at[::2] % (2 * nbytes)).any():
        if (at[1::2] - at[::2] != nbytes).any():
            break
        at, nbytes = at[::2], 2 * nbytes
    return at, nbytes


@lru_cache(1024)
def _chain(
    parts: tuple[tuple[int, DescriptorLayout], ...],
    rows: int,
    row_bytes: int,
    element: int,
    major: Major,
) -> Array:
    offsets = [
        _relative(layout, rows, row_bytes, element, major, at % PERIOD) + at for at, layout in parts
    ]
    return np.concatenate(offsets, axis=1 if major == "k" else 0)


def chain_offsets(
    matrices: Sequence[Matrix], rows: int, row_bytes: int, element: int = 2, major: Major = "k"
) -> Array:
    """As `chunk_offsets`, for operands that are concatenated along K."""
    base = matrices[0].start // PERIOD * PERIOD
    parts = tuple((matrix.start - base, matrix.layout) for matrix in matrices)
    return _chain(parts, rows, row_bytes, element, major) + base


def operand_offsets(
    matrix: Matrix, rows: int, k: int, element_bytes: int, major: Major = "k"
) -> Array:
    """Byte offsets in shared memory of the elements, int64 [rows, k]."""
    chunks = chunk_offsets(matrix, rows, k * element_bytes, element_bytes, major)
    inside = np.arange(0, CHUNK, element_bytes)
    flat = (chunks[..., None] + inside).reshape(chunks.shape[0], -1)
    return flat if major == "k" else flat.T


class SharedLines(NamedTuple):
    """Numbers of 16-byte lines of shared memory, and the first and the end of their range."""

    numbers: Array
    first: int
    end: int


def lines_of(offsets: Array) -> SharedLines:
    """The lines at byte offsets."""
    numbers = offsets >> 4
    return SharedLines(numbers, int(numbers.min()), int(numbers.max()) + 1)


def check_lines(lines: SharedLines, nbytes: int) -> None:
    """Raise Fault unless the lines are inside shared memory of `nbytes`."""
    if lines.first < 0 or lines.end << 4 > nbytes:
        where = f"bytes {lines.first << 4:#x} to {lines.end << 4:#x}"
        raise Fault(f"an operand at {where} in {nbytes:#x} of shared memory")


def fetch(smem: Array, lines: SharedLines) -> Array:
    """The lines of one CTA's shared memory, as uint8[..., 16 * lines in the last dimension]."""
    check_lines(lines, smem.size)
    return smem.view(np.complex128).take(lines.numbers).view(np.uint8)


def _bf16(raw: Array) -> Array:
    return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _f16(raw: Array) -> Array:
    return raw.view(np.float16).astype(np.float32)


def _tf32(raw: Array) -> Array:
    return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _narrow(name: str) -> Callable[[Array], Array]:
    return lambda raw: decode_table(name).take(raw)


@cache
def _pairs() -> Array:
    """Table of both 4-bit values of each byte, low one first, as one 8-byte item."""
    codes = np.arange(256)
    table = decode_table("e2m1")
    return np.stack([table[codes & 15], table[codes >> 4]], -1).view(np.uint64)[:, 0]


def _e2m1(raw: Array) -> Array:
    return _pairs().take(raw).view(np.float32)


def _e2m1_padded(raw: Array) -> Array:
    chunks = raw.reshape(*raw.shape[:-1], -1, 2, 8)[..., 0, :]
    return _e2m1(chunks.reshape(*raw.shape[:-1], -1))


def six_bit_codes(raw: Array) -> Array:
    """16 codes of each 16 bytes, packed in the first 12 of them, lowest bits first."""
    triples = raw.reshape(*raw.shape[:-1], -1, 16)[..., :12].astype(np.uint32)
    triples = triples.reshape(*triples.shape[:-1], 4, 3)
    word = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
    codes = np.stack([word >> 6 * i & 63 for i in range(4)], -1)
    return codes.astype(np.uint8).reshape(raw.shape)


def _six_padded(name: str) -> Callable[[Array], Array]:
    return lambda raw: decode_table(name).take(six_bit_codes(raw))


def _six(name: str) -> Callable[[Array], Array]:
    return lambda raw: decode_table(name).take(raw & 63)


# name: (bits that an element takes along K, raw bytes -> f32 values). tf32 drops the low 13 bits.
# Narrow types occur without gaps (e2m1), padded to 16 bytes for each 16 elements (.p), and one to a
# byte (.b), where the four bits of e2m1 are bits 2 to 5.
TYPES: dict[str, tuple[int, Callable[[Array], Array]]] = {
    "bf16": (16, _bf16),
    "f16": (16, _f16),
    "tf32": (32, _tf32),
    "e4m3": (8, _narrow("e4m3")),
    "e5m2": (8, _narrow("e5m2")),
    "s8": (8, lambda raw: raw.view(np.int8).astype(np.float32)),
    "u8": (8, lambda raw: raw.astype(np.float32)),
    "e2m1": (4, _e2m1),
    "e2m1.p": (8, _e2m1_padded),
    "e2m3.p": (8, _six_padded("e2m3")),
    "e3m2.p": (8, _six_padded("e3m2")),
    "e2m1.b": (8, lambda raw: decode_table("e2m1").take(raw >> 2 & 15)),
    "e2m3.b": (8, _six("e2m3")),
    "e3m2.b": (8, _six("e3m2")),
}


def values(raw: Array, name: str) -> Array:
    """The f32 values of bytes (uint8[..., n]) that hold elements of type `name`."""
    return TYPES[name][1](raw)


def by_step(rows: Array, k: int) -> Array:
    """Split an operand of a chain, [rows, steps * k], into [steps, rows, k]."""
    return rows.reshape(len(rows), -1, k).swapaxes(0, 1)


def product(a: Array, b: Array) -> Array:
    """Batched matrix product f32 [..., m, k] @ [..., k, n] -> [..., m, n].

    Products of operands of at most 11 significant bits are exact in f32. Their sum is rounded to
    f32 at each addition, in BLAS's order, which depends on the shape of one matrix: so each matrix
    must have the shape of one instruction, however many are batched. Hardware adds with fewer guard
    bits and in another order: results agree to a few units in the last place of the largest term.
    Sums of the 8-bit integers of one instruction (k = 32) are exact.
    """
    with np.errstate(all="ignore"):
        return np.matmul(a, b)
