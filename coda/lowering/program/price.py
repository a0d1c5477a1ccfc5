"""A Program -> its price: the modelled time of a call, and what decides where this is not enough.

Choices are decided by modelled time, part by part (`time.py`). A difference that changes its sign
if one constant of the model is 10 % off is none: the Program with fewer bytes is taken, of two with
as many the one with fewer launches. A constant moves one part of the time, about in proportion:

    launch −9 µs, memory +8 µs    −1 µs, of which 10 % of the launch are 0.9: faster
    launch −9 µs, memory +8.5     −0.5 µs: fewer bytes decide

Equal kernels of two Programs cancel, so that a choice in one layer of many weighs as in one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from coda.lowering.program.cost import (
    held_bytes,
    kernel_time,
    launch_count,
    prepare_bytes,
    prepare_time,
    tensor_traffic,
)
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program
from coda.lowering.program.target import Target
from coda.lowering.program.time import Time, total

CALLS = 4  # calls that a version of the weights serves: the micro-batches of a training step
HELD = 16  # price of a byte resident between calls, in bytes of traffic per call
MOVES = 0.1  # how far a constant of the model may be off: its error on a GEMM (docs/model.md)


@dataclass(frozen=True)
class Price:
    """What a Program, or a part of one, costs in a call.

    Attributes:
        time: modelled seconds of all kernels, and of what is prepacked for them.
        moved: bytes of tensors in global memory, and those of what is prepacked. What CTAs pass to
            each other saves time and stays in L2: it is left out.
        launches: the number of kernels.
    """

    time: Time
    moved: int
    launches: int

    @property
    def seconds(self) -> float:
        """The modelled time."""
        return self.time.seconds

    def __add__(self, other: Price) -> Price:
        times = total((self.time, other.time))
        return Price(times, self.moved + other.moved, self.launches + other.launches)

    def undercuts(self, other: Price) -> bool:
        """Whether this is the price to choose of the two; False if they are equal."""
        parts = other.time.parts
        largest = max(abs(s - parts[part]) for part, s in self.time.parts.items())
        gain = other.seconds - self.seconds
        if abs(gain) > MOVES * largest:
            return gain > 0
        ours, theirs = ((p.moved, p.launches, p.seconds) for p in (self, other))
        return ours < theirs


NOTHING = Price(Time(0.0), 0, 0)


def price_of(program: Program, kernels: Iterable[Kernel[Any]]) -> Price:
    """The price of some kernels of a Program."""
    few = list(kernels)
    moved = sum(t.read_bytes + t.write_bytes for t in (tensor_traffic(program, k) for k in few))
    return Price(total(kernel_time(program, k) for k in few), moved, launch_count(program, few))


def price(program: Program) -> Price:
    """The price by which laws with a choice are decided.

    Unless weights are frozen, prepacking counts, for `CALLS` calls of each version of the weights,
    and a resident prepacked matrix costs the time of `HELD` times its bytes in each call.
    """
    found = price_of(program, program.kernels)
    if program.frozen:
        return found
    held = held_bytes(program)
    copied = prepare_time(program).scaled(1 / CALLS)
    moved = prepare_bytes(program) // CALLS + HELD * held
    return found + Price(total((copied, rent(held, program.target))), moved, 0)


def rent(held: int, target: Target) -> Time:
    """What bytes that stay resident between calls cost in each call."""
    return Time(launch=0.0, memory=HELD * held / target.rates.bandwidth)
