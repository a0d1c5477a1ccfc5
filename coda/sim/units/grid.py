"""A launch -> state shared by its waves of CTAs: parameters, variables, counters, CTA queue."""

from __future__ import annotations

import ctypes
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.decoded import Decoded
from coda.sim.ptx.program import SYNC
from coda.sim.types import Allocations, Fault, Launch, LaunchResult, Options
from coda.sim.units.memory import RESERVED, WINDOW, Global
from coda.sim.units.registers import Geometry

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Array = NDArray[Any]
SM_SMEM = 233472
SM_THREADS = 2048
SM_CTAS = 32
MOST_WARPS = 4096


def _aligned(n: int, align: int) -> int:
    return -(-n // align) * align


class Grid:
    """The state of a launch that outlives a wave of resident CTAs."""

    def __init__(
        self, decoded: Decoded, launch: Launch, allocations: Allocations, options: Options
    ) -> None:
        self.decoded, self.launch, self.options = decoded, launch, options
        self.geometry = Geometry(launch.grid, launch.block, launch.cluster)
        self._check()
        self.waiting = deque(range(self.geometry.ctas // self.geometry.cluster_size))
        self.runs = np.zeros(len(decoded.program.blocks), np.int64)
        self.last_failure = self.last_progress = -1
        self.spins = self.failures = 0
        self._kept: list[Array] = []
        self.notes: dict[str, Any] = {}
        self.memory: Global | None = None
        self.allocations = list(allocations)
        self.block = self._parameters()
        self.variables = self._variables()

    def _check(self) -> None:
        geometry, launch = self.geometry, self.launch
        if not 1 <= geometry.threads <= 1024:
            raise Fault(f"a launch with {geometry.threads} threads in a block")
        if any(n % c for n, c in zip(launch.grid, launch.cluster, strict=True)):
            raise Fault(f"a grid {launch.grid} that clusters {launch.cluster} do not divide")
        if geometry.cluster_size > 16:
            raise Fault(f"a cluster of {geometry.cluster_size} CTAs")

    def _buffer(self, nbytes: int, name: str, align: int = 128) -> Array:
        """Allocate memory of the launch that the kernel may access: uint8 [nbytes], aligned."""
        raw = np.zeros(nbytes + align, np.uint8)
        shift = -raw.ctypes.data % align
        self._kept.append(raw)
        out = raw[shift : shift + nbytes]
        self.allocations.append((out.ctypes.data, nbytes, name))
        return out

    def _parameters(self) -> Array:
        """The parameter block, uint8, copied from the launch's arguments."""
        kernel = self.decoded.program.kernel
        block = self._buffer(max(kernel.parameter_bytes, 8), "kernel parameters")
        self.parameters = block.ctypes.data
        for k, parameter in enumerate(kernel.parameters):
            at = ctypes.c_void_p.from_address(self.launch.args + 8 * k).value
            if at is None:
                raise Fault(f"kernel parameter {k} has no value")
            raw = ctypes.string_at(at, parameter.nbytes)
            block[parameter.offset : parameter.offset + parameter.nbytes] = np.frombuffer(
                raw, np.uint8
            )
        return block

    def _variables(self) -> dict[str, int]:
        """Name -> offset in a shared memory window, or address of a global or constant variable."""
        out: dict[str, int] = {}
        at, dynamic = RESERVED, []
        for name, variable in self.decoded.program.kernel.variables.items():
            if variable.space != "shared":
                buffer = self._buffer(max(variable.nbytes or 0, 1), f"variable {name}")
                buffer[: len(variable.data)] = np.frombuffer(variable.data, np.uint8)
                out[name] = buffer.ctypes.data
            elif variable.nbytes is None:
                dynamic.append((name, variable.align))
            else:
                at = _aligned(at, variable.align)
                out[name] = at
                at += variable.nbytes
        start = _aligned(at, max([16, *(align for _, align in dynamic)]))
        for name, _ in dynamic:
            out[name] = start
        self.shared_limit = start + self.launch.smem if self.launch.smem or dynamic else at
        if self.shared_limit > min(WINDOW, SM_SMEM):
            raise Fault(f"{self.shared_limit} bytes of shared memory for a CTA")
        return out

    def memory_for(self, machine: Machine) -> Global:
        """Global memory as a wave of CTAs sees it."""
        ranges = Allocations()
        for base, nbytes, name in self.allocations:
            ranges.add(base, nbytes, name)
        self.memory = Global(machine, ranges)
        return self.memory

    def next_ctas(self) -> Array:
        """The CTAs (launch order) of the clusters that become resident now."""
        geometry = self.geometry
        size, threads = geometry.cluster_size, _aligned(geometry.threads, 32)
        fit = min(SM_THREADS // threads, SM_SMEM // max(self.shared_limit, 1), SM_CTAS)
        room = max(self.options.sms, 1) * max(fit, 1)
        room = min(room, MOST_WARPS // geometry.warps_per_cta)
        count = min(max(room // size, 1), len(self.waiting))
        clusters = [self.waiting.popleft() for _ in range(count)]
        return np.concatenate([np.arange(c * size, (c + 1) * size) for c in clusters])

    def count(self, result: LaunchResult) -> None:
        """Write the instruction counts into the result."""
        for block, runs in zip(self.decoded.program.blocks, self.runs.tolist(), strict=True):
            for ins in block.instructions:
                if runs:
                    result.instructions[ins.op.split(".")[0]] += runs
                if ins.op.startswith(SYNC):
                    result.sync_sites[ins.line] = result.sync_sites.get(ins.line, 0) + runs
                    result.sync_text[ins.line] = ins.text
