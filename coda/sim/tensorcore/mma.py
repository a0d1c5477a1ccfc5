"""`mma.sync`: fragments in the registers of a warp -> the fragment of D = A B + C.

Registers are [register, warp, lane], uint32 (uint64 for f64). With E elements in a register, thread
t holds, in register j and element e of it:
    A   row t/4 + 8 (j % 2) of 16, or t/4 of 8;  k = (t % 4) E + 4 E (j/2) + e, or 4 E j for 8 rows
    B   column t/4;                              k = (t % 4) E + 4 E j + e
    C   row t/4 + 8 (j/2), column 2 (t % 4) + j % 2; f16 has both columns in one register

Sums: see `tensorcore.product`; C is added last, and an f16 result is rounded once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from coda.sim.tensorcore.operands import TYPES, product, values
from coda.sim.types import Unsupported

Array = NDArray
PATTERN = re.compile(
    r"mma\.sync\.aligned\.m(\d+)n8k(\d+)\.row\.col(\.satfinite)?\.(\w+)\.(\w+)\.(\w+)\.(\w+)"
)
HALVES, BYTES, EIGHTS = {"f16"}, {"s8", "u8"}, {"e4m3", "e5m2"}
# type of A: (types of B, types of C and D, shapes as (m, k))
FORMS: dict[str, tuple[set[str], set[str], set[tuple[int, int]]]] = {
    "f16": ({"f16"}, {"f16", "f32"}, {(16, 8), (16, 16)}),
    "bf16": ({"bf16"}, {"f32"}, {(16, 8), (16, 16)}),
    "tf32": ({"tf32"}, {"f32"}, {(16, 4), (16, 8)}),
    "f64": ({"f64"}, {"f64"}, {(8, 4), (16, 4), (16, 8), (16, 16)}),
    **dict.fromkeys(BYTES, (BYTES, {"s32"}, {(8, 16), (16, 16), (16, 32)})),
    **dict.fromkeys(EIGHTS, (EIGHTS, {"f16", "f32"}, {(16, 16), (16, 32)})),
}


@dataclass(frozen=True)
class MmaSync:
    """A parsed instruction: D and C are m x 8 of type `d`, A is m x k, B is k x 8."""

    m: int
    k: int
    a: str
    b: str
    d: str
    saturate: bool = False

    @property
    def word(self) -> int:
        """Bytes of a register."""
        return 8 if self.a == "f64" else 4

    @property
    def per_register(self) -> int:
        """Elements of A and B in a register."""
        return 1 if self.a == "f64" else 32 // TYPES[self.a][0]


@lru_cache(256)
def parse_mma_sync(op: str) -> MmaSync:
    """Parse an opcode; Unsupported for a form that is not modelled."""
    match = PATTERN.fullmatch(op)
    if match is None:
        raise Unsupported(f"mma.sync: {op}")
    m, k, (d, a, b, c) = int(match[1]), int(match[2]), match.group(4, 5, 6, 7)
    known = FORMS.get(a)
    if known is None or b not in known[0] or d not in known[1] or c != d or (m, k) not in known[2]:
        raise Unsupported(f"mma.sync: {op}")
    if match[3] and d != "s32":
        raise Unsupported(f"mma.sync: {op}")
    return MmaSync(m, k, a, b, d, match[3] is not None)


def _elements(form: MmaSync, registers: Array, name: str) -> Array:
    """[registers, warps, 8, 4, elements of a register]."""
    held = np.ascontiguousarray(registers)
    flat = held.view(np.float64) if name == "f64" else values(held.view(np.uint8), name)
    return flat.reshape(held.shape[0], -1, 8, 4, form.per_register)


def a_matrix(form: MmaSync, registers: Array) -> Array:
    """Fragments of A -> [warps, m, k]."""
    tall = form.m // 8
    parts = _elements(form, registers, form.a)
    parts = parts.reshape(-1, tall, *parts.shape[1:])  # [k part, row half, warp, row, t % 4, e]
    return parts.transpose(2, 1, 3, 0, 4, 5).reshape(-1, form.m, form.k)


def b_matrix(form: MmaSync, registers: Array) -> Array:
    """Fragments of B -> [warps, k, 8]."""
    parts = _elements(form, registers, form.b)  # [k part, warp, column, t % 4, e]
    return parts.transpose(1, 0, 3, 4, 2).reshape(-1, form.k, 8)


def unpack(form: MmaSync, registers: Array) -> Array:
    """Fragments of C or D -> [warps, m, 8]."""
    held, tall = np.ascontiguousarray(registers), form.m // 8
    if form.d == "f16":
        parts = held.view(np.float16).astype(np.float32).reshape(tall, -1, 8, 4, 2)
        return parts.transpose(1, 0, 2, 3, 4).reshape(-1, form.m, 8)
    kind = {"f32": np.float32, "s32": np.int32, "f64": np.float64}[form.d]
    parts = held.view(kind).reshape(tall, 2, -1, 8, 4)
    return parts.transpose(2, 0, 3, 4, 1).reshape(-1, form.m, 8)


def pack(form: MmaSync, matrix: Array) -> Array:
    """[warps, m, 8] -> fragments of D."""
    parts = matrix.reshape(-1, form.m // 8, 8, 4, 2)
    if form.d == "f16":
        ordered = np.ascontiguousarray(parts.transpose(1, 0, 2, 3, 4).astype(np.float16))
        return ordered.view(np.uint32).reshape(form.m // 8, -1, 32)
    ordered = np.ascontiguousarray(parts.transpose(1, 4, 0, 2, 3))
    return ordered.view(f"u{ordered.itemsize}").reshape(form.m // 4, -1, 32)


def mma_sync(form: MmaSync, a: Array, b: Array, c: Array) -> Array:
    """Registers of D = A B + C, uint32 (f64: uint64) [register, warp, lane], shaped like C."""
    new = product(a_matrix(form, a), b_matrix(form, b))
    old = unpack(form, c)
    if form.d == "s32":
        total = old.astype(np.int64) + new.astype(np.int64)
        if form.saturate:
            total = np.clip(total, -(2**31), 2**31 - 1)
        return pack(form, total.astype(np.int32))
    with np.errstate(all="ignore"):
        return pack(form, old + new)
