"""setp, set, selp, slct and testp on bit patterns."""

from tests.sim.scalar.floats import flushed, order
from tests.sim.scalar.numbers import FORMATS, INF, NAN, decode, subnormal

ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
JOIN = {"and": lambda a, b: a and b, "or": lambda a, b: a or b, "xor": lambda a, b: a != b}


def signed(x, width):
    return x - 2**width if x >= 2 ** (width - 1) else x


def compare(name, kind, mods):
    """The comparison of two bit patterns as a bool."""
    if kind in FORMATS:

        def run(a, b):
            a, b = (flushed(decode(x, kind), kind, mods) for x in (a, b))
            if NAN in (a, b):
                return name in ("nan", "equ", "neu", "ltu", "leu", "gtu", "geu")
            if name in ("num", "nan"):
                return name == "num"
            # the zeros are equal
            keys = [order(x)[0] for x in (a, b)]
            return ORDERED[name.removesuffix("u")](*keys)

        return run
    width = int(kind[1:])
    name = UNSIGNED.get(name, name)
    if kind[0] == "s":
        return lambda a, b: ORDERED[name](signed(a, width), signed(b, width))
    return ORDERED[name]


def reference(parts, pair):
    name, mods, kind = parts[0], parts[1:-1], parts[-1]
    if name == "selp":
        return lambda a, b, p: a if p else b
    if name == "slct":
        return _slct(mods, kind)
    if name == "testp":
        return lambda a: _property(mods[0], decode(a, kind), kind)
    join = next((JOIN[x] for x in mods if x in JOIN), None)
    if kind.endswith("x2"):
        return _packed(compare(mods[0], kind[:-2], mods), join)
    test = compare(mods[0], kind, mods)
    if name == "set":
        yes = {"f32": 0x3F800000, "u32": 0xFFFFFFFF, "s32": 0xFFFFFFFF}[mods[-1]]
        return lambda a, b, p=None: (
            yes if (test(a, b) if join is None else join(test(a, b), p)) else 0
        )
    return _setp(test, join, pair)


def _setp(test, join, pair):
    def run(a, b, p=None):
        first = test(a, b)
        out = [x if join is None else join(x, p) for x in (first, not first)]
        return tuple(map(int, out)) if pair else int(out[0])

    return run


def _packed(test, join):
    def run(a, b, p=None):
        out = [test(a >> s & 0xFFFF, b >> s & 0xFFFF) for s in (0, 16)]
        return tuple(int(x if join is None else join(x, p)) for x in out)

    return run


def _slct(mods, kind):
    if kind == "s32":
        return lambda a, b, c: a if signed(c, 32) >= 0 else b

    def run(a, b, c):
        x = flushed(decode(c, "f32"), "f32", mods)
        return b if x is NAN or order(x)[0] < 0 else a

    return run


def _property(name, x, kind):
    infinite = x is not NAN and x.size == INF
    return int(
        {
            "finite": x is not NAN and not infinite,
            "infinite": infinite,
            "number": x is not NAN,
            "notanumber": x is NAN,
            "normal": x is not NAN and not infinite and not subnormal(x, kind),
            "subnormal": subnormal(x, kind),
        }[name]
    )
