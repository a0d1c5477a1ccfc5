"""atom and red: addresses and operands of lanes -> new memory contents, lane by lane in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.alu.floats import from_bf16, from_f16, to_bf16, to_f16
from coda.sim.ptx.parse import WIDTH, Instruction
from coda.sim.units.lanes import spread
from coda.sim.units.memory import GENERIC, GRANULE, SHIFT

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
u32, u64, i64 = np.uint32, np.uint64, np.int64
_NUMBERS = {
    **{"b32": "u4", "u32": "u4", "s32": "i4", "b64": "u8", "u64": "u8", "s64": "i8"},
    **{"f32": "f4", "f64": "f8", "f16": "u2", "bf16": "u2", "f16x2": "u2", "bf16x2": "u2"},
    "b16": "u2",
}
_HALVES: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "f16": (from_f16, to_f16),
    "bf16": (from_bf16, to_bf16),
}
_FOLD: dict[str, Callable[..., Any]] = {
    "add": lambda old, x: old + x,
    "min": lambda old, x: np.fmin(old, x) if old.dtype.kind == "f" else np.minimum(old, x),
    "max": lambda old, x: np.fmax(old, x) if old.dtype.kind == "f" else np.maximum(old, x),
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "inc": lambda old, x: np.where(old >= x, old * 0, old + old.dtype.type(1)),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - old.dtype.type(1)),
}
_AT = {
    ("add", "i"): np.add,
    ("add", "u"): np.add,
    ("add", "f"): np.add,
    ("and", "u"): np.bitwise_and,
    ("or", "u"): np.bitwise_or,
    ("xor", "u"): np.bitwise_xor,
    ("min", "i"): np.minimum,
    ("min", "u"): np.minimum,
    ("max", "i"): np.maximum,
    ("max", "u"): np.maximum,
}


def combine(operation: str, kind: str, old: Array, values: list[Array]) -> Array:
    """New contents from old ones and operands, all as unsigned bits of type `kind`."""
    if operation == "cas":
        return np.where(old == values[0], values[1], old)
    number = _NUMBERS[kind]
    half = _HALVES.get(kind.removesuffix("x2"))
    if half is None:
        out = _FOLD[operation](old.view(number), values[0].view(number))
        return np.asarray(out).astype(number).view(old.dtype)
    up, down = half
    parts = [up(np.ascontiguousarray(x).view("u2")) for x in (old, values[0])]
    return down(_FOLD[operation](*parts)).view(old.dtype)


def combined(reduction: tuple[str, str], old: Array, new: Array) -> Array:
    """Bytes after a reduction (operation, type) of bytes."""
    operation, kind = reduction
    unit = f"u{WIDTH[kind] // 8}"
    return combine(operation, kind, old.view(unit), [new.view(unit)]).view(np.uint8)


class Atomics:
    """The unit that carries out atomics."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def run(
        self,
        ins: Instruction,
        g: Any,
        m: Any,
        base: Array,
        offset: int,
        operands: list[list[Array]],
        *,
        space: str,
        operation: str,
        kind: str,
        wanted: bool = True,
    ) -> Any:
        """Apply an operation for each active lane; return the old contents if `wanted`.

        Args:
            operands: one or two (cas) lists with a value for each vector element.
            space: "shared...", "global", or "" for generic addresses.
            operation, kind: such as "add" and "f32".

        Returns unsigned bits [warps, 32], of a vector [elements, warps, 32]; 0 if not `wanted`.
        """
        machine = self.machine
        size = WIDTH[kind] // 8
        count = len(operands[0])
        shape = machine.shape if count == 1 else (count, *machine.shape)
        old = np.zeros(shape, GRANULE[size])
        active = machine.active(m)
        if not active.any():
            return old
        shared, index = self._place(ins, g, active, space, base, offset, size * count)
        view = machine.shared.views[size] if shared else machine.memory.views[size]
        first = index[active] >> SHIFT[size]
        machine.progress += 1
        for k in range(count):
            values = [spread(x[k], machine.shape)[active] for x in operands]
            got = self._apply(view, first + k, operation, kind, values, wanted)
            if wanted:
                (old if count == 1 else old[k])[active] = got
        return old

    def _place(
        self, ins: Instruction, g: Any, active: Array, space: str, base: Array, offset: int, n: int
    ) -> tuple[bool, Array]:
        """(whether the memory is shared, byte index of each lane's operand in its array)."""
        machine = self.machine
        m = None if active.all() else active
        if not space:
            flags = spread((np.asarray(base, u64) & u64(GENERIC)) != 0, machine.shape)
            space = "shared" if flags[active].all() else "global"
        if space.startswith("shared"):
            index, _ = machine.shared.index(ins, g, m, base, offset, n)
            where = spread(index, machine.shape).astype(i64) << SHIFT[n]
            if machine.observer is not None:
                machine.observer.atomic(ins, g, m, "shared", where, n)
            return True, where
        a = spread(np.asarray(base, u64) + u64(offset & (2**64 - 1)), machine.shape)
        machine.memory.check(ins, g, m, a, n)
        if machine.observer is not None:
            machine.observer.atomic(ins, g, m, "global", a, n)
        return False, (a - u64(64)).astype(i64)

    def _apply(
        self, view: Array, at: Array, operation: str, kind: str, values: list[Array], wanted: bool
    ) -> Any:
        number = _NUMBERS[kind]
        ufunc = _AT.get((operation, number[0]))
        if not wanted and ufunc is not None and kind not in _NUMBERS_OF_HALVES:
            # ufunc.at would copy its operand, an array as large as all memory.
            places, which = np.unique(at, return_inverse=True)
            here = view[places].view(number)
            ufunc.at(here, which, values[0].view(number))
            view[places] = here.view(view.dtype)
            return None
        if len(at) > 1 and len(np.unique(at)) == len(at):
            old = view[at]
            view[at] = combine(operation, kind, old, values)
            return old
        out = np.empty(len(at), view.dtype)
        for k in range(len(at)):
            old = view[at[k : k + 1]]
            out[k] = old[0]
            view[at[k : k + 1]] = combine(operation, kind, old, [v[k : k + 1] for v in values])
        return out


_NUMBERS_OF_HALVES = ("f16", "bf16", "f16x2", "bf16x2")
