"""Patterns of opcodes -> entries of the table of arithmetic instructions.

`define(table, "add.{u32,s32}", np.add, "T", "T", "T")` declares two opcodes; "T" stands for the
last type of the opcode itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Run = Callable[..., Any]

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

DTYPE: dict[str, Any] = {
    **{"pred": np.bool_, "cc": np.bool_},
    **{"b8": u8, "u8": u8, "s8": i8, "b16": u16, "u16": u16, "s16": i16},
    **{"b32": u32, "u32": u32, "s32": i32, "b64": u64, "u64": u64, "s64": i64},
    **{"f16": f16, "bf16": u16, "f32": f32, "f64": f64, "f16x2": u32, "bf16x2": u32},
    **{"u16x2": u32, "s16x2": u32, "f32x2": u64},
}


@dataclass(frozen=True)
class Alu:
    """Semantics of an opcode: `run(*sources)`, the type of its result, the types of its sources.

    Each source is viewed as its type, with shape [warps, 32] (contiguous rows) or [warps, 1], or is
    a numpy scalar. `run` never writes to its sources.
    Two results are written "pred|pred" and come back as a tuple. The type "cc" is the carry flag:
    a last source or second result that the instruction's text does not name.
    """

    run: Run
    result: str
    sources: tuple[str, ...]


Table = dict[str, Alu]


def expand(pattern: str) -> Iterator[str]:
    """Expand `a{b,c}` as a shell does: "x.{u,s}32" gives x.u32 and x.s32."""
    parts, at = [], 0
    while (start := pattern.find("{", at)) >= 0:
        end = pattern.index("}", start)
        parts += [[pattern[at:start]], pattern[start + 1 : end].split(",")]
        at = end + 1
    parts.append([pattern[at:]])
    return map("".join, product(*parts))


def define(table: Table, pattern: str, run: Run, result: str, *sources: str) -> None:
    """Put the opcodes of a pattern into the table; "T" stands for the opcode's last type.

    An opcode that exists with other operands too has the number of its sources (`max.f32:3`) or
    the bar of its second result (`setp.eq.s32|`) in its key.
    """
    for op in expand(pattern):
        kind = re.sub(r"(:\d)?\|?$", "", op).rsplit(".", 1)[1]
        put = [kind if x == "T" else x for x in (result, *sources)]
        if op in table:
            raise ValueError(f"opcode {op} is declared twice")
        table[op] = Alu(run, put[0], tuple(put[1:]))


def lanes(x: Array, kind: Any) -> Array:
    """The parts of packed values as an array [warps, 32 * parts], lowest part first."""
    if not x.ndim or x.shape[-1] == 1:  # the same parts for each lane
        return np.repeat(np.reshape(x, (*x.shape[:-1], 1)), 32, -1).view(kind)
    return x.view(kind)


def packed(run: Run, part: Any, whole: Any) -> Run:
    """Apply `run` to each part of packed operands, e.g. to both f32 of an f32x2."""

    def each(a: Array, b: Array | None = None, c: Array | None = None) -> Array:
        a = lanes(a, part)
        if b is None:
            return run(a).view(whole)
        b = lanes(b, part)
        if c is None:
            return run(a, b).view(whole)
        return run(a, b, lanes(c, part)).view(whole)

    return each
