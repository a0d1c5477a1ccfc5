"""Matrices of every element type, and their places in shared memory, by plain loops."""

import ml_dtypes
import numpy as np

TYPES = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "tf32": np.float32,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "s8": np.int8,
    "u8": np.uint8,
}
MASKS = {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}


def size_of(name):
    return np.dtype(TYPES[name]).itemsize


def random_matrix(rng, rows, k, name):
    """(values as f64, codes as unsigned integers), both [rows, k]."""
    if name in ("s8", "u8"):
        info = np.iinfo(TYPES[name])
        x = rng.integers(info.min, info.max + 1, (rows, k)).astype(TYPES[name])
    else:
        x = rng.standard_normal((rows, k)).astype(np.float32).astype(TYPES[name])
    codes = x.view(f"u{x.dtype.itemsize}")
    if name == "tf32":
        x = (codes & np.uint32(0xFFFFE000)).view(np.float32)
    return x.astype(np.float64), codes


def address(row, k, size, span, major, leading, stride):
    """Offset of an element from the start of a canonical layout, before the swizzle.

    Units are core matrices of 8 lines of 16 bytes; a pattern is span / 16 of them side by side.
    """
    unit = 16 // size  # elements of a line
    wide = max(1, span // 16)  # lines side by side in a pattern
    line, across = (row, k) if major == "k" else (k, row)
    chunk, inside = divmod(across, unit)
    inside = line % 8 * wide * 16 + inside * size
    if major == "k":
        return line // 8 * stride + (chunk * 16 if span else chunk * leading) + inside
    block, part = divmod(chunk, wide)
    if span:
        return block * leading + line // 8 * stride + part * 16 + inside
    return block * stride + line // 8 * leading + inside


def put(smem, start, codes, span, major, leading, stride):
    """Write a matrix of codes into shared memory, element by element."""
    size = codes.dtype.itemsize
    for row in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            at = start + address(row, k, size, span, major, leading, stride)
            at ^= at >> 3 & MASKS[span]
            smem[at : at + size] = np.frombuffer(codes[row, k].tobytes(), np.uint8)


def offsets(rows, size, span, major, gap=0):
    """Byte offsets (leading, stride) that keep the parts of a matrix apart, `gap` bytes more."""
    if major == "k":
        return (128 * (rows // 8) + gap, 128) if not span else (16, 8 * span + gap)
    if span:
        blocks = -(-rows * size // span)
        return 8 * span + gap, (8 * span + gap) * blocks
    return 128 * (rows * size // 16) + gap, 128
