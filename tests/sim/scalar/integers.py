"""Integer and logic opcodes on bit patterns."""

from tests.sim.scalar.comparisons import signed

ANY = lambda out: True  # noqa: E731  what the ISA leaves open


def reference(parts):
    name, mods, kind = parts[0], parts[1:-1], parts[-1]
    if name == "prmt":
        return _prmt(mods, kind)
    if name in ("dp2a", "dp4a"):
        return _dot(name, mods, kind)
    if kind == "pred":
        return lambda *xs: LOGIC[name](1, *xs)
    width = int(kind[1:])
    if name in LOGIC:
        return lambda *xs: LOGIC[name](2**width - 1, *xs)
    if name in BITS:
        return BITS[name](mods, kind, width)
    return _arithmetic(name, mods, kind, width)


LOGIC = {
    "and": lambda ones, a, b: a & b,
    "or": lambda ones, a, b: a | b,
    "xor": lambda ones, a, b: a ^ b,
    "not": lambda ones, a: a ^ ones,
    "cnot": lambda ones, a: int(a == 0),
}


def quotient(a, b):
    out = abs(a) // abs(b)
    return -out if (a < 0) != (b < 0) else out


def _halves(mods, width):
    """How much of a product is kept: shift and width."""
    if "wide" in mods:
        return 0, 2 * width
    return (width if "hi" in mods else 0), width


def _arithmetic(name, mods, kind, width):
    read = (lambda x, w=width: signed(x, w)) if kind[0] == "s" else (lambda x, w=width: x)
    if name in ("add", "sub", "addc", "subc", "madc") or (name == "mad" and "cc" in mods):
        return _chain(name, mods, kind, width, read)
    if name in ("mul24", "mad24"):
        return _24(name, mods, kind, read)
    if name in ("mul", "mad"):
        shift, out_width = _halves(mods, width)

        def product(a, b, c=0):
            out = (read(a) * read(b) >> shift) + read(c, out_width)
            if "sat" in mods:
                high = signed((read(a) * read(b) >> shift) % 2**width, width)
                out = min(max(high + read(c), -(2**31)), 2**31 - 1)
            return out % 2**out_width

        return product
    rules = {
        "div": lambda a, b: ANY if b == 0 else quotient(a, b),
        "rem": lambda a, b: ANY if b == 0 else a - b * quotient(a, b),
        "min": lambda a, b: max(min(a, b), 0) if "relu" in mods else min(a, b),
        "max": lambda a, b: max(max(a, b), 0) if "relu" in mods else max(a, b),
        "sad": lambda a, b, c: abs(a - b) + c,
        "neg": lambda a: -a,
        "abs": abs,
    }

    def run(*xs):
        out = rules[name](*map(read, xs))
        return out if callable(out) else out % 2**width

    return run


def _chain(name, mods, kind, width, read):
    """Sums, with the carry in as a last operand and the carry out as a second result."""
    shift, _ = _halves(mods, width)
    carries_in = name.endswith("c")

    def run(*xs):
        carry = xs[-1] if carries_in else 0
        a, b = xs[0], xs[1]
        if name.startswith("mad"):
            a, b = (read(a) * read(b) >> shift) % 2**width, xs[2]
        if "sat" in mods:
            exact = read(a) + read(b) if name == "add" else read(a) - read(b)
            return min(max(exact, -(2**31)), 2**31 - 1) % 2**32
        out = a - b - carry if name.startswith("sub") else a + b + carry
        result = out % 2**width
        return (result, int(not 0 <= out < 2**width)) if "cc" in mods else result

    return run


def _24(name, mods, kind, read):
    def run(a, b, c=0):
        low = [x % 2**24 for x in (a, b)]
        a, b = (signed(x, 24) if kind[0] == "s" else x for x in low)
        return ((a * b >> (16 if "hi" in mods else 0)) + c) % 2**32

    return run


def _parts(x, width, count, sign):
    out = [x >> width * k & (2**width - 1) for k in range(count)]
    return [signed(y, width) for y in out] if sign == "s" else out


def _dot(name, mods, kind):
    a_kind, count = mods[-1], int(name[2])
    first = 2 if "hi" in mods else 0

    def run(a, b, c):
        x = _parts(a, 32 // count, count, a_kind[0])
        y = _parts(b, 8, 4, kind[0])[first:] if count == 2 else _parts(b, 8, 4, kind[0])
        return (c + sum(p * q for p, q in zip(x, y, strict=False))) % 2**32

    return run


def _prmt(mods, kind):
    mode = None if kind == "b32" else kind

    def run(a, b, c):
        source = [(a | b << 32) >> 8 * k & 255 for k in range(8)]
        s = c & 3
        if mode is None:
            out = []
            for k in range(4):
                pick = c >> 4 * k & 15
                byte = source[pick & 7]
                out.append((255 if byte > 127 else 0) if pick & 8 else byte)
        else:
            out = {
                "f4e": [source[s + k] for k in range(4)],
                "b4e": [source[(s - k) % 8] for k in range(4)],
                "rc8": [source[s]] * 4,
                "ecl": [source[max(k, s)] for k in range(4)],
                "ecr": [source[min(k, s)] for k in range(4)],
                "rc16": [source[2 * (s & 1) + k % 2] for k in range(4)],
            }[mode]
        return sum(byte << 8 * k for k, byte in enumerate(out))

    return run


def _shift(left):
    def make(mods, kind, width):
        def run(a, n):
            if left:
                return (a << min(n, width)) % 2**width
            value = signed(a, width) if kind[0] == "s" else a
            return (value >> min(n, width)) % 2**width

        return run

    return make


def _funnel(mods, kind, width):
    def run(a, b, n):
        n = n % 32 if "wrap" in mods else min(n, 32)
        both = a | b << 32
        return (both << n >> 32 if "l" in mods else both >> n) % 2**32

    return run


def _bfe(mods, kind, width):
    def run(a, at, length):
        at, length = at & 255, length & 255
        last = a >> min(at + length - 1, width - 1) & 1 if kind[0] == "s" and length else 0
        bits = [a >> at + k & 1 if k < length and at + k < width else last for k in range(width)]
        return sum(bit << k for k, bit in enumerate(bits))

    return run


def _bfi(mods, kind, width):
    def run(a, b, at, length):
        at, length = at & 255, length & 255
        for k in range(length):
            if at + k < width:
                b = b & ~(1 << at + k) | (a >> k & 1) << at + k
        return b

    return run


def _bfind(mods, kind, width):
    def run(a):
        if kind[0] == "s" and a >> (width - 1):
            a ^= 2**width - 1
        if a == 0:
            return 0xFFFFFFFF
        at = a.bit_length() - 1
        return width - 1 - at if "shiftamt" in mods else at

    return run


def _lop3(mods, kind, width):
    def run(a, b, c, table, q=None):
        out = 0
        for k in range(32):
            index = (a >> k & 1) * 4 + (b >> k & 1) * 2 + (c >> k & 1)
            out |= (table >> index & 1) << k
        if not mods:
            return out
        return out, int(q and out != 0) if mods[0] == "and" else int(q or out != 0)

    return run


def _szext(mods, kind, width):
    def run(a, n):
        if "clamp" in mods and n >= 32:
            return a
        n %= 32
        low = a % 2**n
        return (signed(low, n) if kind == "s32" and n else low) % 2**32

    return run


def _bmsk(mods, kind, width):
    def run(at, length):
        if "wrap" in mods:
            at, length = at % 32, length % 32
        return sum(1 << k for k in range(32) if at <= k < at + length)

    return run


def _fns(mods, kind, width):
    def run(mask, base, offset):
        if base > 31:
            return ANY
        n = signed(offset, 32)
        if n == 0:
            return base if mask >> base & 1 else 0xFFFFFFFF
        places = range(base, 32) if n > 0 else range(base, -1, -1)
        found = [k for k in places if mask >> k & 1]
        return found[abs(n) - 1] if len(found) >= abs(n) else 0xFFFFFFFF

    return run


BITS = {
    "shl": _shift(True),
    "shr": _shift(False),
    "shf": _funnel,
    "bfe": _bfe,
    "bfi": _bfi,
    "bfind": _bfind,
    "lop3": _lop3,
    "szext": _szext,
    "bmsk": _bmsk,
    "fns": _fns,
    "popc": lambda mods, kind, width: lambda a: bin(a).count("1"),
    "clz": lambda mods, kind, width: lambda a: width - a.bit_length(),
    "brev": lambda mods, kind, width: lambda a: int(f"{a:0{width}b}"[::-1], 2),
}
