"""`Time`: the modelled time of a kernel, part by part.

Each kind of kernel has a model of its own (`Kind.time`), of achieved rates (`Target.rates`), not of
peaks. Parts of a kernel that run at once wait for each other a little: a mainloop whose tensor
cores and whose operands both need 10 µs takes more than 10. For `overlapped`, that is a norm:

    overlapped(10, 10) = 11.2      overlapped(10, 5) = 10.03      overlapped(10, 0) = 10
"""

from __future__ import annotations

from dataclasses import dataclass

SHARPNESS = 6  # of the maximum in `overlapped`; infinite, if parts did not wait for each other


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
        names = ("launch", "mainloop", "feed", "epilogue", "memory")
        return {name: getattr(self, name) for name in names}

    @property
    def said(self) -> str:
        """The parts beside the mainloop that take longest, in words."""
        rest = sorted(self.parts.items(), key=lambda part: -part[1])
        shown = [f"{name} {s * 1e6:.1f} µs" for name, s in rest if s >= 0.05e-6]
        return ", ".join(shown)


def overlapped(*parts: float) -> float:
    """The time of parts that run at once, each of which waits for the others a little."""
    longest = max(parts)
    if longest == 0:
        return 0.0
    return longest * sum((p / longest) ** SHARPNESS for p in parts) ** (1 / SHARPNESS)
