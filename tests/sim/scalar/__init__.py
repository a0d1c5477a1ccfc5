"""What an arithmetic opcode does to one lane, stated in plain Python integers and fractions.

It is the independent statement that the vectorised table of coda.sim is tested against: operands
and results are bit patterns, and every rounding is of an exact rational number.
"""

import re

from tests.sim.scalar import comparisons, conversions, floats, integers
from tests.sim.scalar.numbers import FORMATS

PACKED = re.compile(r"^(u16|s16|f16|bf16|f32)x2$")
HALF = {"u16": 16, "s16": 16, "f16": 16, "bf16": 16, "f32": 32}


def reference(op):
    """The function of bit patterns for an opcode's key in the table; None if there is none."""
    op = re.sub(r":\d$", "", op)
    pair = op.endswith("|")
    parts = op.rstrip("|").split(".")
    name, kind = parts[0], parts[-1]
    if name == "cvt":
        return conversions.reference(parts)
    if name in ("setp", "set", "selp", "slct", "testp"):
        return comparisons.reference(parts, pair)
    if name == "mad" and kind in ("f32", "f64"):
        return floats.reference(["fma", *parts[1:]])
    packed = PACKED.match(kind)
    if packed:
        return _each(reference(".".join([*parts[:-1], packed[1]])), HALF[packed[1]])
    if kind in FORMATS:
        return floats.reference(parts)
    return integers.reference(parts)


def _each(run, width):
    """Apply a function to both parts of packed operands."""

    def both(*xs):
        low = run(*[x & ((1 << width) - 1) for x in xs])
        high = run(*[x >> width for x in xs])
        if callable(low) or callable(high):  # checks of an approximation, or of any NaN
            tests = [x if callable(x) else x.__eq__ for x in (low, high)]
            return lambda out: tests[0](out & ((1 << width) - 1)) and tests[1](out >> width)
        return low | high << width

    return both
