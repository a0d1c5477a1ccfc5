"""Operands for opcodes: the edges of their types against each other, then at random."""

import re

import numpy as np

from coda.sim.alu.table import DTYPE
from tests.sim.scalar.numbers import FORMATS


def width_of(kind):
    return 1 if DTYPE[kind] is np.bool_ else 8 * np.dtype(DTYPE[kind]).itemsize


def float_values(kind):
    """Patterns where a float format has its edges."""
    form = FORMATS[kind]
    one, least = form.bias << form.mantissa, 1 << form.mantissa
    infinity = (2**form.exponent - 1) << form.mantissa
    sizes = [0, 1, least - 1, least, least + 1, one - 1, one, one + 1, one + least // 2]
    sizes += [infinity - 1, infinity, infinity + 1, infinity | least // 2, infinity - least // 2]
    sizes += [
        one + 10 * least,
        one - 3 * least,
        one + 9 * least + 3,
        (form.bias + 31) << form.mantissa,
    ]
    sizes += [
        (form.bias + 24) << form.mantissa,
        one + least + least // 2,
        one + 2 * least + least // 4,
    ]
    if kind == "f32":
        sizes += [0x42FD0000, 0x43020000, 0x43150000, 0x42FE0000]  # powers at the ends of f32
        ties = [one + (1 << 15), one + (3 << 15), one + (1 << 12), one + (3 << 12), one + (1 << 19)]
        sizes += [
            *ties,
            one + (1 << 20),
            one + (1 << 21),
            one + (1 << 15) + 1,
            0x477FF000,
            0x477FEFFF,
        ]
        sizes += [
            0x43E40000,
            0x43E00000,
            0x43E80000,
            0x40E00000,
            0x40C00000,
            0x41E40000,
            0x3FE00000,
        ]
        sizes += [
            0x00400000,
            0x00400001,
            0x00200000,
            0x7F000000,
            0x7F000001,
            0x38800000,
            0x387FFFFF,
        ]
    sign = 1 << (form.width - 1)
    return [x | s for x in sizes for s in (0, sign)]


def integer_values(width):
    ones = 2**width - 1
    small = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 0x1B, 0xE8]
    top = 1 << (width - 1)
    return [x & ones for x in (*small, top, top - 1, top + 1, ones, ones - 1, 0x5555555555555555)]


def edges(kind):
    if kind in ("pred", "cc"):
        return [0, 1]
    if kind in FORMATS:
        return float_values(kind)
    return integer_values(width_of(kind))


def packed_edges(part):
    values = float_values(part) if part in FORMATS else integer_values(16)
    width = FORMATS[part].width if part in FORMATS else 16
    return [a | b << width for a, b in zip(values, values[7:] + values[:7], strict=True)]


def kinds_of(op, entry):
    """What the bits of each source mean: the types in an opcode's name, where they say more."""
    parts = re.sub(r"(:\d)?\|?$", "", op).split(".")
    kind = parts[-1]
    out = []
    for source in entry.sources:
        match = re.match(r"^(u16|s16|f16|bf16|f32)x2$", kind)
        if match and width_of(source) in (32, 64) and source not in ("f32", "s32"):
            out.append("packed:" + match[1])
        elif (
            source in ("b16", "bf16", "b32")
            and kind in FORMATS
            and FORMATS[kind].width == width_of(source)
        ):
            out.append(kind)
        else:
            out.append(source)
    return out


def regime(form, rng):
    """A band of exponents: where sums, products or their results are near one, tiny or huge."""
    top = 2**form.exponent - 2
    half = form.bias // 2
    centre = rng.choice([form.bias, form.bias, form.bias, 1, half, top - 1, form.bias + half])
    return range(max(centre - 3, 0), min(centre + 4, top))


def near(form, band, rng):
    """A value of a band of exponents, with any number of low bits zero."""
    cut = rng.randint(0, form.mantissa)
    low = rng.getrandbits(form.mantissa) >> cut << cut
    sign = rng.getrandbits(1) << (form.width - 1)
    return sign | rng.choice(band) << form.mantissa | low


def samples(op, entry, rng, lanes):
    """Operands for each lane: edges against edges, then bits at random, then values of a band."""
    kinds = kinds_of(op, entry)
    pools = [packed_edges(k[7:]) if k.startswith("packed:") else edges(k) for k in kinds]
    columns = [[rng.choice(pool) for _ in range(lanes)] for pool in pools]
    if len(pools) == 1:
        columns = [(rng.sample(pools[0], len(pools[0])) * lanes)[:lanes]]
    formats = sorted({k.removeprefix("packed:") for k in kinds} & set(FORMATS))
    compares = op.startswith("set")
    for lane in range(2 * lanes // 5 if len(pools) > 1 and not compares else 3 * lanes // 4, lanes):
        bands = {name: regime(FORMATS[name], rng) for name in formats}
        for k, kind in enumerate(kinds):
            columns[k][lane] = at_random(kind, width_of(entry.sources[k]), lane % 5 < 2, bands, rng)
    for k in range(1, len(kinds)):
        if kinds[k] == kinds[0]:  # equal and opposite operands
            for lane in range(0, lanes, 16):
                columns[k][lane] = columns[0][lane]
                columns[k][lane + 1] = columns[0][lane + 1] ^ (
                    1 << (width_of(entry.sources[k]) - 1)
                )
    if op.startswith("lop3"):
        columns[3] = [columns[3][0] & 255] * lanes
    if op.startswith(("shl", "shr", "bfe", "bfi", "szext", "bmsk", "shf")):
        for k in range(1, len(kinds)):
            if kinds[k] == "u32":
                columns[k] = [x if n % 3 else x % 70 for n, x in enumerate(columns[k])]
    return columns


def at_random(kind, width, any_bits, bands, rng):
    """One operand: any bits, or a value of its type's band, or an integer of any length."""
    bits = rng.getrandbits(width)
    if any_bits:
        return bits
    if kind in FORMATS:
        return near(FORMATS[kind], bands[kind], rng)
    if kind.startswith("packed:") and kind[7:] in FORMATS:
        form, band = FORMATS[kind[7:]], bands[kind[7:]]
        return near(form, band, rng) | near(form, band, rng) << form.width
    return bits >> rng.randrange(width) & -(1 << rng.randrange(12)) if kind[0] in "us" else bits


def array(column, kind):
    raw = f"u{max(width_of(kind) // 8, 1)}"
    values = np.array(column, raw).reshape(-1, 32)
    return values.astype(np.bool_) if width_of(kind) == 1 else values.view(DTYPE[kind])


def bits_of(result, kind):
    assert result.dtype == np.dtype(DTYPE[kind]), (result.dtype, kind)
    assert result.shape[1:] == (32,)
    raw = f"u{max(width_of(kind) // 8, 1)}"
    whole = np.ascontiguousarray(result)
    return (whole.astype(raw) if width_of(kind) == 1 else whole.view(raw)).ravel().tolist()
