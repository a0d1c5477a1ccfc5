"""`tcgen05.mma`: matrix and instruction descriptors -> new accumulators in tensor memory.

One or two CTAs (even rank first) each hold M / ctas rows of A and N / ctas rows of B in shared
memory and their rows of D in tensor memory, in this layout:
    128 rows              row = lane
    64 rows, one CTA      row r in lane 32 (r/16) + r % 16, plus 16 if the address says so
    64 rows, two CTAs     row r in lane r for the first N/2 columns, in lane 64 + r for the others
A in tensor memory has the lanes of D, and 8 columns (32 bytes of K) for each step.

Scale factors are replicated to the four partitions of 32 lanes; each partition reads its own copy:
row r of A in lane r % 32, column r/32 of its copy, and row n of B likewise (of the half of N that
the partition works on, for 64 rows in two CTAs). A column has 4 bytes: the factors of the blocks of
K from byte SFA_ID or SFB_ID on.

Operands are scaled in f32, where that is exact, or in f64; see `tensorcore.product` for sums. The
accumulator is added last. The operands of a chain of instructions on the same D are fetched at
once; their products are added one by one, so that D does not depend on how a chain is cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coda.sim.alu.floats import decode_table
from coda.sim.tensorcore.operands import (
    TYPES,
    Major,
    SharedLines,
    by_step,
    chain_offsets,
    fetch,
    lines_of,
    pieces,
    product,
    tcgen05_matrix,
    values,
)
from coda.sim.tensorcore.tmem import COLUMNS, split
from coda.sim.types import Fault, Unsupported

Array = NDArray
Lanes = Array | slice
PATTERN = re.compile(
    r"tcgen05\.mma\.cta_group::([12])\.kind::(\w+?)(\.block_scale)?"
    r"(?:\.(scale_vec::[124]X|block16|block32))?(?:\.collector::a::(?:fill|use|lastuse|discard))?"
)
NARROW = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
KINDS: dict[str, dict[int, str]] = {
    "f16": {0: "f16", 1: "bf16"},
    "tf32": {2: "tf32"},
    "f8f6f4": NARROW,
    "i8": {0: "u8", 1: "s8"},
    "mxf8f6f4": NARROW,
    "mxf4": {1: "e2m1"},
    "mxf4nvf4": {1: "e2m1"},
}
RESULTS = {"f16": {0: "f16", 1: "f32"}, "tf32": {1: "f32"}, "f8f6f4": {0: "f16", 1: "f32"}}
DEPTH = {"f16": 16, "tf32": 8, "f8f6f4": 32, "i8": 32, "mxf8f6f4": 32, "mxf4": 64, "mxf4nvf4": 64}
# Scale factors per row, by the block size in the opcode and the kind.
SCALES = {
    "mxf8f6f4": {None: 1, "scale_vec::1X": 1, "block32": 1},
    "mxf4": {None: 2, "scale_vec::2X": 2, "block32": 2},
    "mxf4nvf4": {"scale_vec::2X": 2, "block32": 2, "scale_vec::4X": 4, "block16": 4},
}


@dataclass(frozen=True)
class Mma:
    """The static part of an instruction.

    Its operands are D, A, B, the instruction descriptor, the mask of lanes if `masked`, the
    addresses of both scales if `scales` is not 0, the predicate, and `scale_d` if written.
    """

    kind: str
    ctas: int
    a_in_tmem: bool
    scales: int = 0
    masked: bool = False
    scale_d: int = 0


def parse_mma(op: str, operands: Sequence[str]) -> Mma:
    """Parse the static part of `op`; Unsupported for sparse, weight-stationary, shifted forms."""
    for word, name in ((".sp", "sparse"), (".ws", "weight-stationary"), (".ashift", "shifted")):
        if word in op.split("cta_group")[0] or (word == ".ashift" and word in op):
            raise Unsupported(f"tcgen05: {name} products: {op}")
    match = PATTERN.fullmatch(op)
    if match is None or match[2] not in KINDS or (match[3] is not None) != (match[2] in SCALES):
        raise Unsupported(f"tcgen05: {op}")
    ctas, kind = int(match[1]), match[2]
    scales = SCALES[kind].get(match[4], -1) if kind in SCALES else 0
    if scales < 0 or (kind not in SCALES and match[4]):
        raise Unsupported(f"tcgen05: {op}")
    masked = not scales and operands[4].strip().startswith("{")
    rest = len(operands) - 5 - masked - (2 if scales else 0)
    scale_d = 0
    if rest == 1 and kind in ("f16", "tf32") and operands[-1].strip().isdigit():
        scale_d = int(operands[-1])
    elif rest != 0:
        raise Unsupported(f"tcgen05: {len(operands)} operands of {op}")
    if scale_d > 15:
        raise Unsupported(f"tcgen05: D scaled by 2 ** -{scale_d}")
    return Mma(kind, ctas, operands[1].strip().startswith("["), scales, masked, scale_d)


@dataclass(frozen=True)
class Shape:
    """A decoded instruction descriptor. `a`, `b`, `d` name the types; K follows from the kind."""

    m: int
    n: int
    k: int
    a: str
    b: str
    d: str
    negate: bool = False
    a_major: Major = "k"
    b_major: Major = "k"
    saturate: bool = False
    scale: str = ""
    a_id: int = 0
    b_id: int = 0


def _check_shape(form: Mma, shape: Shape, idesc: int) -> None:
    step = 8 if form.ctas == 1 and (form.scales or shape.m == 64) else 16
    sizes = {1: (128,) if form.scales else (64, 128), 2: (128, 256)}[form.ctas]
    if shape.m not in sizes or not step <= shape.n <= 256 or shape.n % step:
        raise Unsupported(f"tcgen05: {shape.m} x {shape.n} of {form} ({idesc:#010x})")
    for name, major in ((shape.a, shape.a_major), (shape.b, shape.b_major)):
        if major == "mn" and name in ("e2m1", "e2m3", "e3m2"):
            raise Unsupported(f"tcgen05: {name} transposed ({idesc:#010x})")
    if shape.a_major == "mn" and form.a_in_tmem:
        raise Unsupported(f"tcgen05: A in tensor memory transposed ({idesc:#010x})")
    if form.scales == 2 and (shape.a_id % 2 or shape.b_id % 2):
        raise Unsupported(f"tcgen05: scale ids {shape.a_id}, {shape.b_id}")
    if form.scales == 4 and (shape.a_id or shape.b_id):
        raise Unsupported(f"tcgen05: scale ids {shape.a_id}, {shape.b_id}")


@lru_cache(1024)
def decode_shape(form: Mma, idesc: int) -> Shape:
    """Decode an instruction descriptor; Unsupported if an unknown bit is set."""
    types, scaled = KINDS[form.kind], form.scales > 0
    known = 0x1F7F_FFB8 if not scaled else 0x7FFF_FFB0 & ~(7 << 24)
    if form.kind.startswith("mxf4"):
        known &= ~(1 << 12 | 3 << 15)
    if form.kind != "i8":
        known &= ~(1 << 3)
    else:
        known &= ~(3 << 13)
    a, b = types.get(idesc >> 7 & 7), types.get(idesc >> 10 & 7)
    if idesc & ~known or a is None or b is None:
        raise Unsupported(f"tcgen05: instruction descriptor {idesc:#010x} of {form}")
    if scaled:
        d, ue8m0 = "f32", bool(idesc >> 23 & 1)
        if not ue8m0 and form.kind != "mxf4nvf4":
            raise Unsupported(f"tcgen05: scales of {form.kind} in ue4m3")
        scale = "ue8m0" if ue8m0 else "ue4m3"
    else:
        d, scale = RESULTS.get(form.kind, {2: "s32"}).get(idesc >> 4 & 3, ""), ""
        if not d or (d == "f16" and "bf16" in (a, b)):
            raise Unsupported(f"tcgen05: result type {idesc >> 4 & 3} of {a} and {b}")
    shape = Shape(
        m=(idesc >> 24 & 31) << 4,
        n=(idesc >> 17 & 63) << 3,
        k=DEPTH[form.kind],
        a=a,
        b=b,
        d=d,
        negate=bool((idesc >> 13 ^ idesc >> 14) & 1),
        a_major="mn" if idesc >> 15 & 1 else "k",
        b_major="mn" if idesc >> 16 & 1 else "k",
        saturate=bool(not scaled and idesc >> 3 & 1),
        scale=scale,
        a_id=idesc >> 29 & 3 if scaled else 0,
        b_id=idesc >> 4 & 3 if scaled else 0,
    )
    _check_shape(form, shape, idesc)
    return shape


class MmaOperands(NamedTuple):
    """The operands of one instruction of a chain on the same D.

    `a` is a matrix descriptor, or the address of A in tensor memory; `scale_a` and `scale_b` are
    addresses in tensor memory, whose two highest bits are not part of the address.
    """

    a: int
    b: int
    idesc: int
    scale_a: int = 0
    scale_b: int = 0


class LanePiece(NamedTuple):
    """Lanes of D that get the rows `rows` of a CTA's A times the columns `columns` of B."""

    lanes: Lanes
    rows: slice
    columns: slice


def d_pieces(form: Mma, shape: Shape, d: int) -> list[LanePiece]:
    """Lanes and columns of the accumulators of one CTA; column 0 of D is at the address."""
    lane, column = split(d)
    rows = shape.m // form.ctas
    narrow = rows == 64 and form.ctas == 2
    if column + shape.n // (2 if narrow else 1) > COLUMNS:
        raise Fault(f"tcgen05: accumulators of {shape.n} columns at column {column}")
    if lane not in ((0, 16) if rows == 64 and form.ctas == 1 else (0,)):
        raise Fault(f"tcgen05: accumulators of {rows} rows at lane {lane}")
    if rows == 64 and not narrow:
        r = np.arange(64)
        return [LanePiece(r // 16 * 32 + r % 16 + lane, slice(0, 64), slice(0, shape.n))]
    half = shape.n // 2
    if form.scales:
        return [
            LanePiece(
                slice(32 * q, 32 * q + 32),
                slice(32 * q % rows, 32 * q % rows + 32),
                slice(q // 2 * half, q // 2 * half + half) if narrow else slice(0, shape.n),
            )
            for q in range(4)
        ]
    if narrow:
        return [
            LanePiece(slice(64 * h, 64 * h + 64), slice(0, 64), slice(h * half, h * half + half))
            for h in range(2)
        ]
    return [LanePiece(slice(0, 128), slice(0, 128), slice(0, shape.n))]


def _name(kind: str, name: str, where: str) -> str:
    """The stored form of a type: narrow types of kinds with 8-bit elements are padded."""
    if name in ("e2m1", "e2m3", "e3m2") and kind.endswith("f8f6f4"):
        return f"{name}.{where}"
    return name


def _offsets(descriptors: tuple[int, ...], name: str, rows: int, major: Major) -> Array:
    """Byte offsets of the chunks of a chain's operands, concatenated along K."""
    matrices, bits = [tcgen05_matrix(d) for d in descriptors], TYPES[name][0]
    for matrix in matrices:
        wide = matrix.layout.atom != 16
        if wide if major == "k" or bits != 32 else not wide:
            raise Unsupported(f"tcgen05: {name}, {major}-major, with {matrix.layout}")
    return chain_offsets(matrices, rows, 32, max(1, bits // 8), major)


@lru_cache(2048)
def _lines(descriptors: tuple[int, ...], name: str, rows: int, major: Major) -> SharedLines:
    return lines_of(_offsets(descriptors, name, rows, major))


def a_offsets(form: Mma, shape: Shape, descriptor: int) -> Array:
    """Byte offsets of the 16-byte chunks of A in the shared memory of each CTA."""
    name = _name(form.kind, shape.a, "p")
    return _offsets((descriptor,), name, shape.m // form.ctas, shape.a_major)


def b_offsets(form: Mma, shape: Shape, descriptor: int) -> Array:
    """Byte offsets of the 16-byte chunks of B in the shared memory of each CTA."""
    name = _name(form.kind, shape.b, "p")
    return _offsets((descriptor,), name, shape.n // form.ctas, shape.b_major)


@lru_cache(4096)
def a_pieces(form: Mma, shape: Shape, descriptors: tuple[int, ...]) -> tuple[Any, int]:
    """Shared memory of each CTA that A of a chain is read from, as `tensorcore.pieces`."""
    return pieces(np.concatenate([a_offsets(form, shape, d).ravel() for d in descriptors]))


@lru_cache(4096)
def b_pieces(form: Mma, shape: Shape, descriptors: tuple[int, ...]) -> tuple[Any, int]:
    """Shared memory of each CTA that B of a chain is read from, as `tensorcore.pieces`."""
    return pieces(np.concatenate([b_offsets(form, shape, d).ravel() for d in descriptors]))


def _b_rows(form: Mma, shape: Shape, smems: Sequence[Array], steps: Sequence[MmaOperands]) -> Array:
    """B of a chain as [n, k of the chain]."""
    name = _name(form.kind, shape.b, "p")
    descriptors = tuple(step.b for step in steps)
    lines = _lines(descriptors, name, shape.n // form.ctas, shape.b_major)
    parts = [values(fetch(smem, lines), name) for smem in smems]
    if shape.b_major == "mn":
        parts = [part.T for part in parts]
    return parts[0] if form.ctas == 1 else np.concatenate(parts)


def _a_rows(form: Mma, shape: Shape, smem: Array, steps: Sequence[MmaOperands]) -> Array:
    """A of a chain in one CTA as [rows, k of the chain]."""
    name = _name(form.kind, shape.a, "p")
    descriptors = tuple(step.a for step in steps)
    lines = _lines(descriptors, name, shape.m // form.ctas, shape.a_major)
    got = values(fetch(smem, lines), name)
    return got.T if shape.a_major == "mn" else got


def _a_lanes(form: Mma, shape: Shape, tmem: Array, step: MmaOperands, lanes: Lanes) -> Array:
    lane, column = split(step.a)
    if column + 8 > COLUMNS or lane % 16:
        raise Fault(f"tcgen05: A at lane {lane}, column {column}")
    raw = np.ascontiguousarray(tmem[lanes, column : column + 8]).view(np.uint8)
    return values(raw, _name(form.kind, shape.a, "b"))


def scale_places(address: int, first: int, partition: int, rows: int) -> tuple[Array, Array]:
    """Lane and column of the scale words of `rows` rows from row `first`, in one partition."""
    lane, column = split(address & 0x3FFF_FFFF)
    r = np.arange(first, first + rows)
    if lane or column + int(r[-1]) // 32 >= COLUMNS:
        raise Fault(f"tcgen05: {rows} scales at lane {lane}, column {column}")
    return 32 * partition + r % 32, column + r // 32


def _factors(form: Mma, shape: Shape, tmem: Array, places: tuple[Array, Array], byte: int) -> Array:
    """Scale of each element along K: [rows, k]."""
    words = tmem[places]
    codes = np.stack([words >> np.uint32(8 * (byte + i)) for i in range(form.scales)], -1)
    table = decode_table(shape.scale)
    return np.repeat(table.take(codes & np.uint32(0xFF)), shape.k // form.scales, axis=1)


def _scaled(
    form: Mma, tmem: Array, piece: LanePiece, steps: Sequence[MmaOperands], a: Array, b: Array
) -> Array:
    """The product of each step in one partition of 32 lanes, [steps, 32, columns]."""
    assert isinstance(piece.lanes, slice)
    partition, count = piece.lanes.start // 32, piece.columns.stop - piece.columns.start
    found = []
    for step, left, right in zip(steps, a, b, strict=True):
        shape = decode_shape(form, step.idesc)
        at = scale_places(step.scale_a, piece.rows.start, partition, 32)
        fa = _factors(form, shape, tmem, at, shape.a_id)
        at = scale_places(step.scale_b, 0, partition, count)
        fb = _factors(form, shape, tmem, at, shape.b_id)
        with np.errstate(all="ignore"):
            wide = np.float32 if _moderate(fa) and _moderate(fb) else np.float64
            new = product(left.astype(wide) * fa.astype(wide), (right.astype(wide) * fb).T)
            found.append(new.astype(np.float32))
    return np.stack(found)


def _moderate(factors: Array) -> bool:
    return bool(((factors >= 2.0**-50) & (factors <= 2.0**50)).all())


def _enabled(disabled: Sequence[int], cta: int) -> Array | None:
    """Mask of the lanes of one CTA that are written; None for all of them."""
    mask = np.array(disabled[4 * cta : 4 * cta + 4], np.uint32)
    if not mask.any():
        return None
    bits = mask[:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    return bits.reshape(128) == 0


def _sum(form: Mma, shape: Shape, old: Array, new: Array, enable: bool) -> Array:
    """D, as words, after adding the products `new` [steps, rows, columns] to `old` in order."""
    if shape.d == "s32":
        total = old.view(np.int32).astype(np.int64) if enable else np.int64(0)
        for one in new.astype(np.int64):
            total = total + one
            if shape.saturate:
                total = np.clip(total, -(2**31), 2**31 - 1)
        return np.asarray(total).astype(np.int32).view(np.uint32)
    half = shape.d == "f16"
    total = old.astype(np.uint16).view(np.float16).astype(np.float32) if half else old.view("f4")
    if form.scale_d:
        total = total * np.float32(2.0**-form.scale_d)
    for k, one in enumerate(new):
        total = one if k == 0 and not enable else total + one
        if half:
            total = total.astype(np.float16).astype(np.float32)
    if half:
        return total.astype(np.float16).view(np.uint16).astype(np.uint32)
    return total.view(np.uint32)


def _products(
    form: Mma,
    shape: Shape,
    smem: Array,
    tmem: Array,
    pieces: list[LanePiece],
    steps: Sequence[MmaOperands],
    b: Array,
) -> list[Array]:
    """The new values of each piece of the D of one CTA, [steps, rows, columns].

    `b` is [steps, n, k].
    """
    if form.a_in_tmem:
        left = [
            np.stack([_a_lanes(form, shape, tmem, s, piece.lanes) for s in steps])
            for piece in pieces
        ]
    else:
        rows = by_step(_a_rows(form, shape, smem, steps), shape.k)
        if not form.scales:
            whole = product(rows, b.swapaxes(1, 2))
            return [whole[:, piece.rows, piece.columns] for piece in pieces]
        left = [rows[:, piece.rows] for piece in pieces]
    both = zip(pieces, left, strict=True)
    if form.scales:
        return [_scaled(form, tmem, p, steps, a, b[:, p.columns]) for p, a in both]
    return [product(a, b[:, p.columns].swapaxes(1, 2)) for p, a in both]


def accumulate(
    form: Mma,
    smems: Sequence[Array],
    tmems: Sequence[Array],
    d: int,
    steps: Sequence[MmaOperands],
    *,
    enable: bool,
    disabled: Sequence[int] = (),
) -> None:
    """Execute a chain of instructions of one form and shape on the same D, in place.

    `smems` (uint8 [bytes]) and `tmems` (uint32 [128, 512]) have one item per CTA. `enable`: the
    first step adds to D, else it replaces D. `disabled`: mask of lanes not written, 4 words a CTA.
    """
    shape = decode_shape(form, steps[0].idesc)
    if len(smems) != form.ctas or len(tmems) != form.ctas or (len(steps) > 1 and form.scale_d):
        raise Fault(f"tcgen05: {len(smems)} CTAs, {len(steps)} steps for {form}")
    b = by_step(_b_rows(form, shape, smems, steps), shape.k)
    pieces, column = d_pieces(form, shape, d), split(d)[1]
    for cta, (smem, tmem) in enumerate(zip(smems, tmems, strict=True)):
        writes = _enabled(disabled, cta)
        # Compute all before the first write: D may alias A or the scales.
        results = _products(form, shape, smem, tmem, pieces, steps, b)
        for piece, new in zip(pieces, results, strict=True):
            view = tmem[:, column : column + new.shape[2]]
            lanes, kept = piece.lanes, -new if shape.negate else new
            if writes is not None:
                every = np.arange(128)[lanes]
                lanes, kept = every[writes[every]], kept[:, writes[every]]
            with np.errstate(all="ignore"):
                view[lanes] = _sum(form, shape, np.ascontiguousarray(view[lanes]), kept, enable)
