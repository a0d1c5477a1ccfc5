"""`wgmma.mma_async`: registers of warpgroups + matrix descriptors -> the new accumulators.

Registers are uint32[register, warp, lane]; four warps in a row make one warpgroup. All warpgroups
that execute the same instruction are computed in one batch, and so may be a chain of instructions
on the same accumulators (D += A0 B0, then A1 B1, ...). The bits of D do not depend on the batching:
each instruction of each warpgroup is one product of the same shape, and one addition in the order
of the instructions.

    D, f32 or s32   register i of lane t, warp w: row 16 w + t/4 + 8 (i/2 % 2), column
                    8 (i/4) + 2 (t % 4) + i % 2; f16 has two columns in one register
    A, registers    register j: row as above with 8 (j % 2); k = (t % 4) E + 4 E (j/2) + element,
                    where E elements fill a register

Sums: see `tensorcore.product`; the accumulator is added last, in f32. With f16 accumulators the sum
is rounded to f16 after each instruction; tf32 operands lose their 13 low bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.tensorcore.operands import (
    TYPES,
    Major,
    SharedLines,
    by_step,
    chain_offsets,
    check_lines,
    chunk_offsets,
    lines_of,
    operand_offsets,
    pieces,
    product,
    values,
    wgmma_matrix,
)
from coda.sim.types import Fault, Unsupported

Array = NDArray
PATTERN = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)(\.satfinite)?\.(\w+)\.(\w+)\.(\w+)"
)
FLOATS = {
    "f16": ({"f16", "f32"}, {"f16"}),
    "bf16": ({"f32"}, {"bf16"}),
    "tf32": ({"f32"}, {"tf32"}),
    "e4m3": ({"f16", "f32"}, {"e4m3", "e5m2"}),
    "e5m2": ({"f16", "f32"}, {"e4m3", "e5m2"}),
    "s8": ({"s32"}, {"s8", "u8"}),
    "u8": ({"s32"}, {"s8", "u8"}),
}


@dataclass(frozen=True)
class Wgmma:
    """The static part of an instruction. `d_registers` are those of one thread."""

    n: int
    k: int
    d: str
    a: str
    b: str
    a_in_registers: bool
    negate_a: bool = False
    negate_b: bool = False
    a_major: Major = "k"
    b_major: Major = "k"
    saturate: bool = False

    @property
    def element(self) -> int:
        """Bytes of an element of A and B."""
        return TYPES[self.a][0] // 8

    @property
    def d_registers(self) -> int:
        return self.n // (4 if self.d == "f16" else 2)

    @property
    def flops(self) -> int:
        """Multiplications and additions of one warpgroup."""
        return 2 * 64 * self.n * self.k


def _check_shape(op: str, n: int, k: int, d: str, a: str, b: str) -> None:
    if a not in FLOATS or d not in FLOATS[a][0] or b not in FLOATS[a][1]:
        raise Unsupported(f"wgmma: types {d}, {a}, {b} in {op}")
    integer = d == "s32"
    if not 8 <= n <= 256 or n % 8 or (integer and n > 32 and n % 16):
        raise Unsupported(f"wgmma: N = {n} in {op}")
    if k * TYPES[a][0] != 256:
        raise Unsupported(f"wgmma: K = {k} in {op}")


def _flag(text: str, meanings: dict[int, bool], op: str) -> bool:
    try:
        return meanings[int(text)]
    except (ValueError, KeyError):
        raise Unsupported(f"wgmma: immediate {text} in {op}") from None


def parse_wgmma(op: str, operands: Sequence[str]) -> Wgmma:
    """The static part of `op` with operands D, A, B, scale-d and the immediates of its form."""
    if ".sp." in op:
        raise Unsupported(f"wgmma: sparse matrices in {op}")
    match = PATTERN.fullmatch(op)
    if match is None:
        raise Unsupported(f"wgmma: {op}")
    n, k, (d, a, b) = int(match[1]), int(match[2]), match.group(4, 5, 6)
    _check_shape(op, n, k, d, a, b)
    registers = operands[1].strip().startswith("{")
    wide = TYPES[a][0] == 16
    wanted = 4 + (0 if d == "s32" else 2 + (2 - registers if wide else 0))
    if len(operands) != wanted or (match[3] is not None and d != "s32"):
        raise Unsupported(f"wgmma: {len(operands)} operands of {op}")
    negate = [_flag(x, {1: False, -1: True}, op) for x in operands[4:6]] or [False, False]
    flips = [_flag(x, {0: False, 1: True}, op) for x in operands[6:]]
    flips = [False] * (2 - len(flips)) + flips
    majors: list[Major] = ["mn" if flip else "k" for flip in flips]
    return Wgmma(
        n,
        k,
        d,
        a,
        b,
        a_in_registers=registers,
        negate_a=negate[0],
        negate_b=negate[1],
        a_major=majors[0],
        b_major=majors[1],
        saturate=match[3] is not None,
    )


@lru_cache(4096)
def a_pieces(form: Wgmma, descriptors: tuple[int, ...]) -> list[tuple[Any, int]]:
    """Shared memory that A of a chain is read from: 16 rows per warp, or all if MN-major."""
    at = np.concatenate([_chunks(form, d, 64, form.a_major).ravel() for d in descriptors])
    if form.a_major == "mn":
        return [pieces(at)]
    rows = at.reshape(len(descriptors), 4, -1)
    return [pieces(rows[:, warp]) for warp in range(4)]


@lru_cache(4096)
def b_piece(form: Wgmma, descriptors: tuple[int, ...]) -> tuple[Any, int]:
    """Shared memory that B of a chain is read from. See `pieces`."""
    return pieces(np.concatenate([_chunks(form, d, form.n, form.b_major) for d in descriptors]))


def _chunks(form: Wgmma, descriptor: int, rows: int, major: Major) -> Array:
    return chunk_offsets(wgmma_matrix(descriptor), rows, 32, form.element, major)


def element_offsets(form: Wgmma, descriptor: int, operand: str) -> Array:
    """Byte offsets of the elements of operand "a" [64, k] or "b" [n, k]."""
    rows, major = (64, form.a_major) if operand == "a" else (form.n, form.b_major)
    return operand_offsets(wgmma_matrix(descriptor), rows, form.k, form.element, major)


@lru_cache(2048)
def _lines(
    descriptors: tuple[int, ...], rows: int, element: int, major: Major, paired: bool
) -> SharedLines:
    """The lines of a chain's operand; `paired`: of 8 rows the even ones come first."""
    matrices = [wgmma_matrix(d) for d in descriptors]
    at = chain_offsets(matrices, rows, 32, element, major)
    if paired and major == "k":
        at = at.reshape(-1, 4, 2, at.shape[1]).swapaxes(1, 2).reshape(at.shape)
    return lines_of(at)


def _from_shared(form: Wgmma, smem: Array, which: Sequence[tuple[int, ...]], operand: str) -> Array:
    """Operand "a" or "b" for each (CTA, descriptors of a chain): f32, [..., rows, k of the chain].

    Columns of B are paired (see `_lines`) unless the accumulators are f16.
    """
    is_a, paired = operand == "a", operand == "b" and form.d != "f16"
    rows, name, major = (64, form.a, form.a_major) if is_a else (form.n, form.b, form.b_major)
    found = [_lines(key[1:], rows, form.element, major, paired) for key in which]
    for lines in found:
        check_lines(lines, smem.shape[1])
    starts = np.array([key[0] for key in which])[:, None, None] * (smem.shape[1] // 16)
    at = np.stack([lines.numbers for lines in found]) + starts
    got = values(smem.view(np.complex128).reshape(-1).take(at).view(np.uint8), name)
    if major == "k":
        return got
    if paired:
        got = got.reshape(*got.shape[:2], -1, 4, 2).swapaxes(3, 4).reshape(got.shape)
    return got.swapaxes(1, 2)


def a_from_registers(form: Wgmma, registers: Array) -> Array:
    """uint32[4, 4 * groups, 32] -> f32[groups, 64, k]."""
    per = 4 // form.element
    raw = np.ascontiguousarray(registers).view(np.uint8)
    elements = values(raw.reshape(4, -1, 128), form.a).reshape(2, 2, -1, 4, 8, 4, per)
    # [k half, row half, group, warp, lane / 4, lane % 4, element]
    return elements.transpose(2, 3, 1, 4, 0, 5, 6).reshape(-1, 64, form.k)


def unpack(form: Wgmma, d: Array) -> Array:
    """Accumulator registers [register, 4 * groups, 32] -> [groups, 64, n] as f32 or i32."""
    if form.d == "f16":
        halves = np.ascontiguousarray(d).view(np.float16).astype(np.float32)
        parts = halves.reshape(form.n // 8, 2, -1, 4, 8, 4, 2).transpose(2, 3, 1, 4, 0, 5, 6)
    else:
        typed = d.view(np.int32 if form.d == "s32" else np.float32)
        parts = typed.reshape(form.n // 8, 2, 2, -1, 4, 8, 4).transpose(3, 4, 1, 5, 0, 6, 2)
    return parts.reshape(-1, 64, form.n)


def pack(form: Wgmma, matrix: Array) -> Array:
    """[groups, 64, n] with paired columns, or f16 -> accumulator registers.

    Four columns of f32 or eight of f16 then belong to the four lanes of a row in order, so that the
    permutation moves items of 16 bytes.
    """
    wide = form.n // 8 * (1 if form.d == "f16" else 2)
    items = matrix.view(np.complex128).reshape(-1, 4, 2, 8, form.n // 8, wide * 8 // form.n)
    ordered = np.ascontiguousarray(items.transpose(4, 2, 5, 0, 1, 3))
    return ordered.view(np.uint32).reshape(form.d_registers, -1, 32)


Step = tuple[Array | Sequence[int], Sequence[int]]


def _products(form: Wgmma, smem: Array, ctas: Sequence[int], steps: Sequence[Step]) -> Array:
    """The product of each step for each warpgroup, [steps, groups, 64, n] in `pack`'s order."""
    if form.a_in_registers:
        parts = [a_from_registers(form, np.asarray(a)) for a, _ in steps]
        a = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
    else:
        a = _from_shared(
            form, smem, [(c, *(int(a[g]) for a, _ in steps)) for g, c in enumerate(ctas)], "a"
        )
    users: dict[tuple[int, ...], list[int]] = {}
    for g, cta in enumerate(ctas):
        users.setdefault((cta, *(int(b[g]) for _, b in steps)), []).append(g)
    shared = _from_shared(form, smem, list(users), "b")
    out = np.empty((len(steps), len(ctas), 64, form.n), np.float32)
    for b, groups in zip(shared, users.values(), strict=True):
        right = by_step(b, form.k).swapaxes(1, 2)
        for g in groups:
            out[:, g] = product(by_step(a[g], form.k), right)
    return out


def _sum_halves(form: Wgmma, d: Array, new: Array, keep: Array) -> Array:
    """Registers of f16 accumulators after the products `new`: rounded after each."""
    total = np.where(keep[:, None, None], unpack(form, d), np.float32(0)) if keep.any() else None
    with np.errstate(all="ignore"):
        for one in new:
            wide = one if total is None else total + one
            total = wide.astype(np.float16).astype(np.float32)
        assert total is not None
        return pack(form, total.astype(np.float16))


def _add(form: Wgmma, old: Array, new: Array) -> Array:
    """Registers of the old accumulators and of a product -> registers."""
    if form.d == "f32":
        return (old.view(np.float32) + new.view(np.float32)).view(np.uint32)
    if not form.saturate:
        return old + new
    total = old.view(np.int32).astype(np.int64) + new.view(np.int32)
    return np.clip(total, -(2**31), 2**31 - 1).astype(np.int32).view(np.uint32)


def accumulate(
    form: Wgmma,
    smem: Array,
    ctas: Sequence[int],
    steps: Sequence[Step],
    scale_d: Sequence[bool],
    d: Array,
) -> Array:
    """The accumulators after a chain of instructions of one form on the same registers.

    `smem` is uint8[ctas, bytes]; `ctas` has the CTA of each warpgroup. A step is (A, B): matrix
    descriptors, one for each warpgroup, or for A in registers uint32[4, 4 * groups, 32].
    `scale_d` (of the first step, per warpgroup): add to the old D, else replace it. `d` and the
    result are uint32 [registers, 4 * groups, 32]. Raises Fault for an operand out of bounds or
    a `d` of another shape.
    """
    if d.shape != (form.d_registers, 4 * len(ctas), 32):
        raise Fault(f"wgmma: accumulators {d.shape} of {len(ctas)} warpgroups, N = {form.n}")
    new = _products(form, smem, ctas, steps)
    if form.negate_a != form.negate_b:
        np.negative(new, out=new)
    keep = np.asarray(scale_d, bool)
    if form.d == "f16":
        return _sum_halves(form, d, new, keep)
    if form.d == "s32":
        new = new.astype(np.int32)
    registers = pack(form, new.reshape(-1, 64, form.n))
    registers = registers.reshape(form.d_registers, len(steps), *d.shape[1:])
    with np.errstate(all="ignore"):
        total = registers[:, 0]
        if keep.any():
            total = _add(form, d, total)
        if not keep.all():
            total = np.where(np.repeat(keep, 4)[:, None], total, registers[:, 0])
        for k in range(1, len(steps)):
            total = _add(form, total, registers[:, k])
    return total
