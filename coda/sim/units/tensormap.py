"""`tensormap.replace`: a field's name + a value -> the changed words of a tensor map in memory.

The fields, masks and conversions are those of the stores that ptxas emits for the instruction:
rank counts from zero, boxes and sizes are stored less one, strides in units of 16 bytes.
"""

from __future__ import annotations

from numpy.typing import NDArray

from coda.sim.types import Fault, Unsupported

Array = NDArray
WORD = 0xFFFFFFFF
# name: (shift, mask) of the fields in the word of flags that are stored as they are given.
FLAGS = {
    "rank": (4, 0x70),
    "interleave_layout": (11, 0x1800),
    "fill_mode": (15, 0x8000),
    "swizzle_atomicity": (19, 0x380000),
}
INDEXED = {"box_dim": 5, "global_dim": 5, "global_stride": 4, "element_stride": 5}


def _put(words: Array, at: int, shift: int, mask: int, value: int) -> None:
    words[at] = (int(words[at]) & ~mask & WORD) | (value << shift & mask)


def _indexed(words: Array, name: str, i: int, value: int) -> None:
    if name == "global_dim":
        words[8 + i] = (value - 1) & WORD
    elif name == "global_stride":
        words[3 + i] = value >> 4 & WORD
        _put(words, 7, 4 * i, 15 << 4 * i, value >> 36)
    elif name == "element_stride":
        _put(words, 13, 3 * i, 7 << 3 * i, (value - 1) & WORD)
    elif i == 0:
        _put(words, 13, 24, 0xFF << 24, (value - 1) & WORD)
    else:
        _put(words, 14, 8 * (i - 1), 0xFF << 8 * (i - 1), (value - 1) & WORD)


def _element_type(words: Array, value: int) -> None:
    if value > 15:
        raise Fault(f"tensormap.replace: element type {value}")
    rounds = value in (11, 12)
    code = value - 4 if rounds else value if value <= 10 else value - 2
    _put(words, 2, 7, 0x780, code)
    if rounds:
        _put(words, 2, 16, 1 << 16, 1)


def replace(raw: Array, name: str, index: int | None, value: int) -> None:
    """Change field `name` (its element `index`, if it has several) of a map (128 uint8)."""
    words = raw.view("<u4")
    if name in INDEXED:
        if index is None or not 0 <= index < INDEXED[name]:
            raise Fault(f"tensormap.replace.{name} of element {index}")
        _indexed(words, name, index, value)
    elif name == "global_address":
        words[0], words[1] = value & WORD, value >> 32 & WORD
    elif name == "elemtype":
        _element_type(words, value)
    elif name == "swizzle_mode":
        _put(words, 2, 13, 0x6000, value & 3)
        _put(words, 2, 22, 1 << 22, value >> 2)
    elif name in FLAGS:
        shift, mask = FLAGS[name]
        _put(words, 2, shift, mask, value)
    else:
        raise Unsupported(f"tensormap.replace.{name}")
