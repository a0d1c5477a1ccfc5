"""The interface between host side and machine: Launch in, LaunchResult out, and the errors.

Nothing here depends on PTX or on the layout of registers in numpy; of each other's modules, both
sides import only this one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Schedule = Literal["eager", "late", "random"]
Level = Literal["off", "warn", "raise"]
Dim3 = tuple[int, int, int]

CHECK_KINDS = (
    "out-of-bounds",
    "misaligned",
    "uninitialised",
    "race",
    "in-flight",
    "exited",
    "leak",
)


# Words of global memory that a launch accessed: (first word, number of words) of an allocation
# -> uint8, 0: not accessed, 1: read, 2: written.
Touched = Mapping[tuple[int, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the runtime received it.

    `grid` and `cluster` count CTAs, `block` threads, as (x, y, z). `smem` is the dynamic shared
    memory in bytes; `args` is the address of the `void**` array that `cudaLaunchKernelEx` gets:
    element i points to the i-th kernel parameter. `attributes` maps ids of launch attributes to
    their raw values. `before` is the memory of launches that may still run when this one begins,
    since it has the attribute for programmatic launches.
    """

    kernel: str
    ptx: str
    cubin: bytes
    grid: Dim3
    block: Dim3
    cluster: Dim3
    smem: int
    args: int
    attributes: Mapping[int, bytes] = field(default_factory=dict)
    arch: str = "sm_90a"
    before: Touched = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """How to run: when asynchronous operations complete, which checks, and the budget.

    `checks` maps a kind of CHECK_KINDS to off, warn or raise; a kind that is absent is off.
    `instructions` bounds the warp instructions of one launch (0: no bound). `sms` is the number of
    multiprocessors, which bounds the number of resident CTAs. Raises ValueError for an unknown
    schedule or check.
    """

    schedule: Schedule = "eager"
    seed: int = 0
    checks: Mapping[str, Level] = field(default_factory=dict)
    instructions: int = 2_000_000_000
    sms: int = 8

    def __post_init__(self) -> None:
        unknown = sorted(set(self.checks) - set(CHECK_KINDS))
        if unknown:
            raise ValueError(f"no check is called {unknown[0]!r}; there are: {CHECK_KINDS}")
        if self.schedule not in ("eager", "late", "random"):
            raise ValueError(f"schedule is eager, late or random, not {self.schedule!r}")


@dataclass
class Finding:
    """A bug found by a check. `address` is in the memory that `message` names.

    `source` is "file:line" of the Python source, None without line information; `warp` is the
    number of the warp in its CTA, and `cta` the number of the CTA in the grid.
    """

    kind: str
    message: str
    kernel: str
    ptx_line: int
    ptx_text: str
    source: str | None
    warp: int
    cta: int
    address: int | None

    def short_text(self) -> str:
        """The instruction, without most of a long list of registers."""
        text = self.ptx_text
        return text if len(text) <= 120 else f"{text[:80]} ... {text[-35:]}"

    def __str__(self) -> str:
        where = f"{self.kernel[:60]}, PTX line {self.ptx_line}: {self.short_text()}"
        at = f" ({self.source})" if self.source else ""
        return f"{self.kind}: {self.message}; CTA {self.cta}, warp {self.warp}; {where}{at}"


@dataclass
class BytesMoved:
    """Bytes moved by a launch, of one tensor or one unit: with repetitions, and unique."""

    loaded: int = 0
    stored: int = 0
    unique_loaded: int = 0
    unique_stored: int = 0


@dataclass
class LaunchResult:
    """Findings and counters of a launch.

    `sync_sites` counts the executions of each synchronising instruction by its PTX line, zeros
    included: a wait that never ran was not tested; `sync_text` has their PTX. `flops` counts the
    tensor cores' alone, as 2 m n k. `per_allocation` is by name of the tensor, `per_unit` by unit
    (threads, tma, bulk, cp.async), `instructions` by mnemonic; `bank_conflicts` counts extra passes
    and `seconds` is the wall time of the simulation. `unfinished` is the memory of this launch, and
    of launches before it that may run until it has ended; empty if checks are off.
    """

    kernel: str
    findings: list[Finding] = field(default_factory=list)
    per_allocation: dict[str, BytesMoved] = field(default_factory=dict)
    per_unit: dict[str, BytesMoved] = field(default_factory=dict)
    flops: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    warp_instructions: int = 0
    bank_conflicts: int = 0
    sync_sites: dict[int, int] = field(default_factory=dict)
    sync_text: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    unfinished: dict[tuple[int, int], NDArray[np.uint8]] = field(default_factory=dict, repr=False)


class Allocations:
    """The ranges of global memory that a launch may access, in bytes, by address."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, str]] = []

    def add(self, base: int, nbytes: int, name: str) -> None:
        """Register [base, base + nbytes); overlapping ranges are allowed (views of one storage)."""
        k = bisect_right(self._starts, base)
        self._starts.insert(k, base)
        self._ranges.insert(k, (base, nbytes, name))

    def __iter__(self):  # noqa: ANN204
        """Yield (base, nbytes, name), by base."""
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def find(self, address: int, nbytes: int = 1) -> str | None:
        """Name of an allocation that holds the whole access, None when there is none."""
        for base, size, name in reversed(self._ranges[: bisect_right(self._starts, address)]):
            if base <= address and address + nbytes <= base + size:
                return name
        return None


class SimError(Exception):
    """Anything that stops a simulated launch. `placed`: the message names the instruction."""

    finding: Finding | None = None
    placed: bool = False


class Unsupported(SimError):
    """The PTX uses something that is not modelled; names the line and the instruction."""


class Deadlock(SimError):
    """Every thread waits; the message lists which warp waits for which barrier."""


class Livelock(SimError):
    """The launch exceeded its budget of instructions, or all warps only spin."""


class Fault(SimError):
    """An access or operation that hardware would refuse: out of bounds, misaligned, illegal."""


class CheckFailed(SimError):
    """A check of level "raise" found a bug."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding
