"""`Time`: the modelled time of a kernel, part by part.

Each kind of kernel has a model of its own (`Kind.time`), of achieved rates (`Target.rates`), not of
peaks. Parts of a kernel that run at once wait for each other a little: a mainloop whose tensor
cores and whose operands both need 10 µs takes more than 10. For `overlapped`, that is a norm:

    overlapped(10, 10) = 11.2      overlapped(10, 5) = 10.03      overlapped(10, 0) = 10
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coda.lowering.program.target import Target

MOVE = 2  # instructions for each element that is loaded or stored, beside its functions
SHARPNESS = 6  # of the maximum in `overlapped`; infinite, if parts did not wait for each other
PARTS = ("launch", "mainloop", "feed", "epilogue", "memory")


@dataclass(frozen=True)
class Time:
    """Seconds of a kernel, which are the sum of its parts.

    Attributes:
        launch: from the end of the kernel before to the first instruction that counts, and the
            first and last bytes, for which nothing runs at once.
        mainloop: tensor cores, or instructions of a row-wise kernel, if nothing held them up.
        feed: what the mainloop waits for operands: their way into shared memory, too few stages,
            and the latency of a k-step.
        epilogue: what the epilogue takes when no mainloop hides it.
        memory: what global memory adds to these.
        bound: the largest of what runs at once, in words.
    """

    launch: float
    mainloop: float = 0.0
    feed: float = 0.0
    epilogue: float = 0.0
    memory: float = 0.0
    bound: str = "memory"

    @property
    def seconds(self) -> float:
        """The sum of the parts."""
        return self.launch + self.mainloop + self.feed + self.epilogue + self.memory

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part, by its name."""
        return {name: getattr(self, name) for name in PARTS}

    def scaled(self, factor: float) -> Time:
        """Each part, times a factor."""
        return _of_parts({part: factor * seconds for part, seconds in self.parts.items()})

    @property
    def said(self) -> str:
        """The parts beside the mainloop that take longest, in words."""
        rest = sorted(self.parts.items(), key=lambda part: -part[1])
        shown = [f"{name} {s * 1e6:.1f} µs" for name, s in rest if s >= 0.05e-6]
        return ", ".join(shown)


@dataclass(frozen=True)
class Sketch:
    """A kernel of contractions that is not placed yet, as far as its time depends on it.

    Attributes:
        problem: (M, N, K) of its contractions, concatenated along the columns.
        bits: of an element of their operands.
        read: bytes of their operands.
        written: bytes of the matrices that it stores.
    """

    problem: tuple[int, int, int]
    bits: int
    read: int
    written: int


def roofline(sketch: Sketch, target: Target) -> Time:
    """The time of a kernel that is as fast as tensor cores and memory let it be."""
    (m, n, k), rates = sketch.problem, target.rates
    tensor = 2 * m * n * k / (rates.tensor_of(sketch.bits) * target.multiprocessors)
    memory = (sketch.read + sketch.written) / rates.bandwidth
    return Time(rates.ramp, tensor, memory=overlapped(tensor, memory) - tensor)


def by_rows(target: Target, moved: float, issued: float, special: float) -> Time:
    """The time of a kernel that moves rows through its SMs, beside the instructions for them.

    Args:
        target: the GPU.
        moved: bytes from and to global memory.
        issued: instructions of threads.
        special: those of them for the special-function unit.
    """
    rates, sms = target.rates, target.multiprocessors
    memory = moved / rates.bandwidth
    issue, unit = issued / (rates.issue * sms), special / (rates.special * sms)
    work = max(issue, unit)
    parts = {"memory": memory, "instructions": issue, "special functions": unit}
    bound = max(parts, key=lambda part: parts[part])
    return Time(rates.ramp, mainloop=work, memory=overlapped(work, memory) - work, bound=bound)


def total(times: Iterable[Time]) -> Time:
    """Kernels one after the other: each part is the sum of theirs."""
    every = [t.parts for t in times]
    return _of_parts({part: sum(parts[part] for parts in every) for part in PARTS})


def _of_parts(parts: dict[str, float]) -> Time:
    launch, mainloop, feed, epilogue, memory = (parts[part] for part in PARTS)
    return Time(launch, mainloop, feed, epilogue, memory)


def overlapped(*parts: float) -> float:
    """The time of parts that run at once, each of which waits for the others a little."""
    longest = max(parts)
    if longest == 0:
        return 0.0
    return longest * sum((p / longest) ** SHARPNESS for p in parts) ** (1 / SHARPNESS)
