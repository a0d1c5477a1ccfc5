"""Symbolic sizes: a dim is a polynomial over named symbols, such as `2*F`, `H*d` or `d/2`.

A dim is stored in normal form, so that two dims are equal exactly if they have the same size for
all sizes of their symbols. Coefficients may be fractions: `d/2` has a size if d is even.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache, reduce
from math import lcm
from operator import mul
from typing import NoReturn

from coda.errors import DimError

Monomial = tuple[str, ...]
Coefficient = int | Fraction


def _no_number(dim: object, *_: object) -> NoReturn:
    raise DimError(
        "a dim is a symbol while a block is traced, and has no value",
        found=str(dim),
        help="x * dim, x / dim and coda.sqrt(dim) compute with it; a size that Python has to know "
        "comes from outside the block",
    )


@dataclass(frozen=True, eq=False)
class Dim:
    """A polynomial: sorted (monomial, coefficient) terms without zero coefficients.

    A monomial is a sorted tuple of symbol names: 2*F + 1 is (((), 1), (("F",), 2)).
    """

    terms: tuple[tuple[Monomial, Coefficient], ...]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Dim):
            return self.terms == other.terms
        if isinstance(other, int) and self.symbols:
            _no_number(self)
        return isinstance(other, int) and self.constant == other

    def __hash__(self) -> int:
        return hash(self.terms)

    __float__ = __int__ = __index__ = _no_number
    __lt__ = __le__ = __gt__ = __ge__ = _no_number
    __pow__ = __rpow__ = __mod__ = __rtruediv__ = __rfloordiv__ = _no_number

    @staticmethod
    def of(value: object) -> Dim:
        """A dim from an int, a symbol's name, or a dim. Raises DimError for anything else."""
        if isinstance(value, Dim):
            return value if type(value) is Dim else Dim(value.terms)
        if isinstance(value, str):
            return Dim((((value,), 1),))
        if not isinstance(value, int | Fraction):
            raise DimError(
                "dims are computed with dims and whole numbers",
                found=repr(value),
                help="x * dim, x / dim and coda.sqrt(dim) give numbers",
            )
        return Dim((((), _plain(value)),) if value else ())

    @staticmethod
    def _from(terms: Iterable[tuple[Monomial, Coefficient]]) -> Dim:
        total: dict[Monomial, Coefficient] = {}
        for monomial, c in terms:
            total[monomial] = total.get(monomial, 0) + c
        return Dim(tuple(sorted((m, _plain(c)) for m, c in total.items() if c)))

    def __add__(self, other: Dim | Coefficient) -> Dim:
        return Dim._from((*self.terms, *Dim.of(other).terms))

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return Dim(tuple((m, -c) for m, c in self.terms))

    def __sub__(self, other: Dim | Coefficient) -> Dim:
        return self + -Dim.of(other)

    def __rsub__(self, other: Dim | Coefficient) -> Dim:
        return Dim.of(other) + -self

    def __mul__(self, other: Dim | int) -> Dim:
        pairs = ((a, b) for a in self.terms for b in Dim.of(other).terms)
        return Dim._from((tuple(sorted(a[0] + b[0])), a[1] * b[1]) for a, b in pairs)

    __rmul__ = __mul__

    def __floordiv__(self, other: Dim | int) -> Dim:
        """The exact quotient. Raises DimError if `other` does not divide this polynomial."""
        other = Dim.of(other)
        if not other.terms:
            raise DimError("a dim is divided by zero", found=f"({self}) // 0")
        if len(other.terms) != 1:
            raise DimError("a dim is divided by a product", found=f"({self}) // ({other})")
        ((divisor, by),) = other.terms
        terms: list[tuple[Monomial, Coefficient]] = []
        for m, c in self.terms:
            left = list(m)
            for s in divisor:
                if s not in left:
                    raise DimError(f"`{other}` does not divide `{self}`")
                left.remove(s)
            terms.append((tuple(left), Fraction(c) / by))
        quotient = Dim._from(terms)
        if isinstance(quotient._number, Fraction):
            raise DimError(f"`{other}` does not divide `{self}`")
        return quotient

    __truediv__ = __floordiv__

    @property
    def is_natural(self) -> bool:
        """Whether no coefficient is negative: the dim is 0 or more at all sizes of its symbols."""
        return all(c >= 0 for _, c in self.terms)

    @cached_property
    def symbols(self) -> frozenset[str]:
        """The names of the symbols that occur in this dim."""
        return frozenset(s for m, _ in self.terms for s in m)

    @property
    def _number(self) -> Coefficient | None:
        if not self.terms:
            return 0
        m, c = self.terms[0]
        return c if m == () and len(self.terms) == 1 else None

    @property
    def constant(self) -> int | None:
        """The value of a dim without symbols; None for any other dim, and for a fraction."""
        number = self._number
        return number if isinstance(number, int) else None

    def size(self, sizes: Mapping[str, int]) -> int:
        """The value under `sizes`. Raises DimError for a missing symbol or a fractional value."""
        if not self.symbols <= sizes.keys():
            missing = min(self.symbols - sizes.keys())
            raise DimError(
                f"dim `{missing}` has no size",
                found=", ".join(f"{k}={v}" for k, v in sizes.items()) or "no sizes",
                help=f"give `{missing}` a size",
            )
        whole, total = self._denominator, 0
        for monomial, c in self.terms:
            value = int(c * whole)
            for symbol in monomial:
                value *= sizes[symbol]
            total += value
        if whole == 1:
            return total
        if total % whole:
            raise DimError(
                f"dim `{self}` is not a whole number",
                found=", ".join(f"{s}={sizes[s]}" for s in sorted(self.symbols)),
            )
        return total // whole

    @cached_property
    def _denominator(self) -> int:
        """The least common denominator of the coefficients."""
        return lcm(*(Fraction(c).denominator for _, c in self.terms))

    def solve(self, size: int, known: Mapping[str, int]) -> tuple[str, int] | None:
        """Infer the one symbol that `known` lacks from the value `size` of this dim.

        Returns (symbol, its size), or None if there is no unique whole number. (H*d).solve(4096,
        {"d": 128}) is ("H", 32).
        """
        (unknown, *more) = sorted(self.symbols - known.keys()) or [""]
        mine = [(m, c) for m, c in self.terms if unknown in m]
        if not unknown or more or len(mine) != 1 or mine[0][0].count(unknown) != 1:
            return None
        rest = Dim(tuple(t for t in self.terms if t not in mine)).size(known)
        ((monomial, c),) = mine
        top, bottom = Fraction(c).as_integer_ratio()
        factor = reduce(mul, (known[s] for s in monomial if s != unknown), top)
        left = (size - rest) * bottom
        if factor == 0 or left % factor:
            return None
        return unknown, left // factor

    def substitute(self, dims: Mapping[str, Dim]) -> Dim:
        """This dim with each symbol in `dims` replaced by its dim."""
        total = Dim(())
        for m, c in self.terms:
            total = total + reduce(mul, (dims.get(s, Dim.of(s)) for s in m), Dim((((), c),)))
        return total

    def __str__(self) -> str:
        def term(m: Monomial, c: Coefficient) -> str:
            top, bottom = abs(Fraction(c)).as_integer_ratio()
            factors = [str(top)] if top != 1 or not m else []
            return "*".join([*factors, *m]) + (f"/{bottom}" if bottom != 1 else "")

        text = ""
        for m, c in sorted(self.terms, key=lambda t: (not t[0], t)):
            sign = "-" if c < 0 else ("+" if text else "")
            text += sign + term(m, c)
        return text or "0"


def _plain(c: Coefficient) -> Coefficient:
    """Convert a whole fraction to an int."""
    return c.numerator if isinstance(c, Fraction) and c.denominator == 1 else c


Shape = tuple[Dim, ...]
ONE = Dim.of(1)


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order of axes that undoes a permutation."""
    return tuple(order.index(i) for i in range(len(order)))


def product(dims: Iterable[Dim]) -> Dim:
    """The number of elements of a shape."""
    return _product(tuple(dims))


@lru_cache(maxsize=100_000)
def _product(dims: Shape) -> Dim:
    return reduce(mul, map(Dim.of, dims), ONE)


def show_shape(shape: Shape) -> str:
    """The text of a shape in messages and in the text form: `[M, 2*F]`."""
    return "[" + ", ".join(map(str, shape)) + "]"


def broadcast(a: Shape, b: Shape) -> Shape | None:
    """The shape of two operands broadcast, aligned at the right; None if they do not broadcast."""
    rank = max(len(a), len(b))
    a, b = (ONE,) * (rank - len(a)) + a, (ONE,) * (rank - len(b)) + b
    out: list[Dim] = []
    for x, y in zip(a, b, strict=True):
        if x != y and ONE not in (x, y):
            return None
        out.append(y if x == ONE else x)
    return tuple(out)
