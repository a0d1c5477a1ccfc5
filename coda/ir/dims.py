"""Dims: sizes as polynomials over named symbols, so that `2*F` and `H*d` can be compared.

A dim is known by its normal form; equality of dims is equality of polynomials, which is exact for
all sizes that the symbols may take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import mul

from coda.errors import DimError

Monomial = tuple[str, ...]


@dataclass(frozen=True)
class Dim:
    """An integer polynomial: sorted (monomial, coefficient) terms, no zero coefficients."""

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def of(value: Dim | int | str) -> Dim:
        """A dim from an int, a symbol's name, or a dim."""
        if isinstance(value, Dim):
            return value
        if isinstance(value, str):
            return Dim((((value,), 1),))
        return Dim((((), int(value)),) if value else ())

    @staticmethod
    def _from(terms: Iterable[tuple[Monomial, int]]) -> Dim:
        total: dict[Monomial, int] = {}
        for monomial, c in terms:
            total[monomial] = total.get(monomial, 0) + c
        return Dim(tuple(sorted((m, c) for m, c in total.items() if c)))

    def __add__(self, other: Dim | int) -> Dim:
        return Dim._from((*self.terms, *Dim.of(other).terms))

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return Dim(tuple((m, -c) for m, c in self.terms))

    def __sub__(self, other: Dim | int) -> Dim:
        return self + -Dim.of(other)

    def __mul__(self, other: Dim | int) -> Dim:
        pairs = ((a, b) for a in self.terms for b in Dim.of(other).terms)
        return Dim._from((tuple(sorted(a[0] + b[0])), a[1] * b[1]) for a, b in pairs)

    __rmul__ = __mul__

    def divide(self, other: Dim | int) -> Dim | None:
        """The exact quotient, or None where `other` does not divide this polynomial."""
        other = Dim.of(other)
        if not other.terms:
            return None
        rest, quotient = self, Dim(())
        lead_m, lead_c = other.terms[-1]
        while rest.terms:
            m, c = rest.terms[-1]
            missing = list(m)
            for s in lead_m:
                if s not in missing:
                    return None
                missing.remove(s)
            if c % lead_c:
                return None
            step = Dim(((tuple(missing), c // lead_c),))
            quotient, smaller = quotient + step, rest - step * other
            if len(smaller.terms) > len(rest.terms) + len(other.terms):
                return None
            rest = smaller
        return quotient

    @property
    def symbols(self) -> frozenset[str]:
        """The names that this dim depends on."""
        return frozenset(s for m, _ in self.terms for s in m)

    @property
    def constant(self) -> int | None:
        """The value of a dim without symbols, else None."""
        if not self.terms:
            return 0
        return self.terms[0][1] if self.terms[0][0] == () and len(self.terms) == 1 else None

    def size(self, sizes: Mapping[str, int]) -> int:
        """The value under `sizes`. Raises DimError for a symbol that has none."""
        missing = sorted(self.symbols - sizes.keys())
        if missing:
            raise DimError(
                f"dim `{missing[0]}` has no size",
                found=", ".join(f"{k}={v}" for k, v in sizes.items()) or "no sizes",
                help=f"give `{missing[0]}` a size",
            )
        return sum(reduce(mul, (sizes[s] for s in m), c) for m, c in self.terms)

    def substitute(self, dims: Mapping[str, Dim]) -> Dim:
        """This dim with symbols replaced."""
        total = Dim(())
        for m, c in self.terms:
            total = total + reduce(mul, (dims.get(s, Dim.of(s)) for s in m), Dim.of(c))
        return total

    def __str__(self) -> str:
        def term(m: Monomial, c: int) -> str:
            factors = [str(abs(c))] if abs(c) != 1 or not m else []
            return "*".join([*factors, *m])

        text = ""
        for m, c in sorted(self.terms, key=lambda t: (not t[0], t)):
            sign = "-" if c < 0 else ("+" if text else "")
            text += sign + term(m, c)
        return text or "0"


Shape = tuple[Dim, ...]
ONE = Dim.of(1)


def product(dims: Iterable[Dim]) -> Dim:
    """The number of elements of a shape."""
    return reduce(mul, dims, ONE)


def show_shape(shape: Shape) -> str:
    """`[M, 2*F]`, as it is written in messages and in the text form."""
    return "[" + ", ".join(map(str, shape)) + "]"


def broadcast(a: Shape, b: Shape) -> Shape | None:
    """The shape of an elementwise result, aligned at the right, or None where sizes differ."""
    rank = max(len(a), len(b))
    a, b = (ONE,) * (rank - len(a)) + a, (ONE,) * (rank - len(b)) + b
    out: list[Dim] = []
    for x, y in zip(a, b, strict=True):
        if x != y and ONE not in (x, y):
            return None
        out.append(y if x == ONE else x)
    return tuple(out)
