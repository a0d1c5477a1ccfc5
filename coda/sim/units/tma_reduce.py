"""Old values in memory + new values -> the values after a bulk reduction.

Used by `cp.reduce.async.bulk.tensor` and by `cp.reduce.async.bulk`. Additions of f16 and bf16 are
done in f32 and rounded to nearest even, which is one rounding of the exact sum; f32 additions keep
subnormal values.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from coda.sim.alu.floats import from_bf16, from_f16, to_bf16, to_f16
from coda.sim.types import Unsupported
from coda.sim.units.tma import Coords, Mode, TensorMap, parts, window

Array = NDArray
Combine = Callable[[Array, Array], Array]

INTEGERS = ("u32", "s32", "u64", "s64")
HALVES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "f16": (from_f16, to_f16),
    "bf16": (from_bf16, to_bf16),
}
KINDS = {
    "add": ("u32", "s32", "u64", "f32", "f64", "f16", "bf16"),
    "min": (*INTEGERS, "f16", "bf16"),
    "max": (*INTEGERS, "f16", "bf16"),
    "inc": ("u32",),
    "dec": ("u32",),
    "and": ("b32", "b64", *INTEGERS),
    "or": ("b32", "b64", *INTEGERS),
    "xor": ("b32", "b64", *INTEGERS),
}
DTYPES = {"f32": np.float32, "f64": np.float64, "s32": np.int32, "s64": np.int64}


def _increment(old: Array, limit: Array) -> Array:
    return np.where(old >= limit, 0, old + old.dtype.type(1)).astype(old.dtype)


def _decrement(old: Array, limit: Array) -> Array:
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))


OPERATIONS: dict[str, Combine] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "inc": _increment,
    "dec": _decrement,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def combine(operation: str, kind: str, old: Array, new: Array) -> Array:
    """Combine `old` with `new`: bits of values of type `kind`, in unsigned arrays of one shape."""
    if kind not in KINDS.get(operation, ()):
        raise Unsupported(f"a reduction .{operation} of {kind}")
    run = OPERATIONS[operation]
    if kind in HALVES:
        widen, narrow = HALVES[kind]
        # fmin and fmax: of a number and a NaN, the number.
        run = {"min": np.fmin, "max": np.fmax}.get(operation, run)
        return narrow(run(widen(old), widen(new)))
    typed = DTYPES.get(kind, old.dtype)
    with np.errstate(all="ignore"):
        return run(old.view(typed), new.view(typed)).view(old.dtype)


def _overlaps(view: Array) -> bool:
    """Whether two items of a view may share memory."""
    reach = view.itemsize
    axes = zip(view.strides, view.shape, strict=True)
    for stride, count in sorted((s, n) for s, n in axes if n > 1):
        if stride < reach:
            return True
        reach += stride * (count - 1)
    return False


def reduce_box(
    tmap: TensorMap, coords: Coords, dense: Array, operation: str, mode: Mode = "tile"
) -> None:
    """Combine the part in bounds of a dense box into global memory; overlapping rows one by one."""
    kind = tmap.element.name.removesuffix(".ftz")
    boxes = dense.reshape(-1, tmap.box_bytes)
    for part, box in zip(parts(tmap, coords, mode), boxes, strict=True):
        found = window(tmap, part)
        if found is None:
            continue
        view, slices = found
        new = box.view(tmap.element.dtype).reshape(tmap.shape)[slices]
        if not _overlaps(view):
            view[...] = combine(operation, kind, np.ascontiguousarray(view), np.array(new))
            continue
        for row in np.ndindex(view.shape[:-1]):
            view[row] = combine(operation, kind, view[row].copy(), new[row].copy())
