"""ldmatrix and stmatrix: rows of matrices in shared memory <-> registers of the lanes of a warp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.parse import Instruction
from coda.sim.units import special
from coda.sim.units.lanes import spread

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
Form = tuple[str, int, bool]  # shape, how many, transposed


class Matrices:
    """The unit that moves 8x8 matrices of 16 bits, and their 8-bit relatives."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def _rows(self, ins: Instruction, g: Any, a: Array, offset: int, rows: int) -> Array:
        """Index of the 16-byte row that each of the first `rows` lanes addresses, [warps, rows]."""
        machine = self.machine
        m = None
        if rows < 32:
            m = np.zeros(machine.shape, bool)
            m[:, :rows] = True
        index, _ = machine.shared.index(ins, g, m, a, offset, 16)
        return spread(index, machine.shape)[:, :rows]

    def _saw(self, ins: Instruction, g: Any, index: Array, write: bool) -> None:
        observer = self.machine.observer
        if observer is not None:
            observer.shared_access(ins, g, None, index << 4, 16, write=write)

    def load(self, ins: Instruction, g: Any, a: Array, offset: int, form: Form) -> list[Array]:
        """The destination registers, each [warps, 32]."""
        shape, count, transpose = form
        per = 8 if shape == "m8n8" else 16
        index = self._rows(ins, g, a, offset, per * count)
        self._saw(ins, g, index, False)
        raw = np.ascontiguousarray(self.machine.shared.views[16][index])
        if shape == "m8n8":
            halves = raw.view(np.uint16).reshape(len(index), count, 8, 8)
            return [
                special.rows_to_fragments(halves[:, k], transpose=transpose) for k in range(count)
            ]
        matrices = raw.view(np.uint8).reshape(len(index), count, 16, 16).transpose(0, 1, 3, 2)
        return [self._bytes(matrices[:, k], half) for k in range(count) for half in (0, 1)]

    @staticmethod
    def _bytes(matrix: Array, half: int) -> Array:
        """8 rows of a 16x16 byte matrix: lane t gets bytes 4 * (t % 4) to + 3 of row t // 4."""
        rows = np.ascontiguousarray(matrix[:, 8 * half : 8 * half + 8])
        return rows.reshape(len(rows), 128).view(np.uint32)

    def store(
        self, ins: Instruction, g: Any, a: Array, offset: int, form: Form, values: list[Array]
    ) -> None:
        """Write the registers to shared memory."""
        machine = self.machine
        shape, count, transpose = form
        index = self._rows(ins, g, a, offset, 8 * count)
        self._saw(ins, g, index, True)
        machine.progress += 1
        for k, value in enumerate(values):
            register = spread(value, machine.shape)
            if shape == "m8n8":
                rows = special.fragments_to_rows(register, transpose=transpose)
            else:
                rows = special.fragment_bytes_to_columns(register)
            lines = rows.reshape(len(index), 8, -1).view(np.complex128)[..., 0]
            machine.shared.views[16][index[:, 8 * k : 8 * k + 8]] = lines
