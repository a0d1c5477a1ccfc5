"""Epilogue -> equal Epilogue with fewer operations per element, by factoring products.

A derivative is a sum of products with common factors: x·r in one, g·x·r·r in another. Products are
flattened; a common factor of both terms of a sum, or of both values of a choice, is factored out;
pairs of factors that several products share are computed once. Row factors and constants are
multiplied with each other first, once per row instead of once per element.

    a·r·s + b·r·s  ->  (a + b) · (r·s)

All values are float32: reordering a product changes its last bits alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from coda.ir.scalars import DIFFERENCE, NEGATION, PRODUCT, SCALARS, SQUARE, SUM
from coda.ir.types import has_reciprocal
from coda.lowering.program.access import ColumnVector, OneElement
from coda.lowering.program.epilogue import (
    Call,
    Epilogue,
    Expr,
    Literal,
    Load,
    Position,
    Stat,
    calls,
)
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program

MOST = 32  # factors of a product that is flattened
Factor = int  # a number in `_Products.atoms`


@dataclass(frozen=True)
class Product:
    """A constant times some factors, in the order of their occurrence."""

    number: float
    factors: tuple[Factor, ...]

    def times(self, other: Product) -> Product:
        """The product of two products."""
        return Product(self.number * other.number, self.factors + other.factors)

    def without(self, factors: Iterable[Factor]) -> Product:
        """The product without some of its factors."""
        left = list(self.factors)
        for factor in factors:
            left.remove(factor)
        return Product(self.number, tuple(left))


@dataclass(frozen=True)
class Function:
    """A scalar function, other than a product, of products."""

    fn: str
    args: tuple[Product, ...]


@dataclass(frozen=True)
class Pair:
    """The product of two factors, computed once for all products that contain both."""

    first: Factor
    second: Factor


Atom = Expr | Function | Pair  # an expression is a leaf here


def factor(program: Program) -> Program:
    """The Program with every kernel's epilogue factored."""

    def changed(kernel: Kernel[Any]) -> Kernel[Any]:
        body = kernel.body
        epilogue = factored_epilogue(body.epilogue)
        return replace(kernel, body=replace(body, epilogue=epilogue))

    return replace(program, kernels=tuple(map(changed, program.kernels)))


def factored_epilogue(epilogue: Epilogue) -> Epilogue:
    """An Epilogue whose stores and sinks compute the same values with fewer operations."""
    once_a_row = {
        o.name for o in epilogue.operands if isinstance(o.access, ColumnVector | OneElement)
    }
    groups = {s.name for s in epilogue.statistics if s.group}

    def once(leaf: Expr) -> bool:
        if isinstance(leaf, Load):
            return leaf.operand in once_a_row
        if isinstance(leaf, Position):
            return leaf.axis == "row"
        return isinstance(leaf, Stat) and leaf.name not in groups

    results = [*epilogue.stores, *epilogue.sinks]
    lanes = iter(factored([e for r in results for e in r.lanes], once))
    stores, sinks = (
        tuple(replace(r, lanes=tuple(next(lanes) for _ in r.lanes)) for r in some)
        for some in (epilogue.stores, epilogue.sinks)
    )
    return replace(epilogue, stores=stores, sinks=sinks)


def factored(exprs: Sequence[Expr], once: Callable[[Expr], bool]) -> list[Expr]:
    """Expressions of the same values, factored; unchanged if that is not less work.

    Args:
        exprs: the results of one kernel at one element or column pair.
        once: whether a leaf has one value for a whole row.
    """
    products = _Products(once)
    roots = [products.product(e) for e in exprs]
    products.share(roots)
    found = [products.expr(r) for r in roots]
    return min(found, list(exprs), key=lambda e: work(e, once))


def work(exprs: Iterable[Expr], once: Callable[[Expr], bool]) -> int:
    """FLOPs per element of some expressions; negations and row values cost nothing."""
    total, of_row = 0, dict[Expr, bool]()
    for call in calls(exprs):  # arguments first
        for x in call.args:
            if not isinstance(x, Call):
                of_row[x] = isinstance(x, Literal) or once(x)
        of_row[call] = all(of_row[x] for x in call.args)
        row = SCALARS[call.fn]
        if not row.is_negation and not of_row[call]:
            total += row.flops
    return total


@dataclass
class _Products:
    once: Callable[[Expr], bool]
    atoms: list[Atom] = field(default_factory=list[Atom])
    numbers: dict[Atom, Factor] = field(default_factory=dict[Atom, Factor])
    known: dict[Expr, Product] = field(default_factory=dict[Expr, Product])
    canonical: dict[tuple[float, frozenset[tuple[Factor, int]]], Product] = field(
        default_factory=dict[tuple[float, frozenset[tuple[Factor, int]]], Product]
    )
    left: dict[Product, Product] = field(default_factory=dict[Product, Product])
    made: dict[Product, Expr] = field(default_factory=dict[Product, Expr])
    rows: dict[Factor, bool] = field(default_factory=dict[Factor, bool])

    # From expressions to products.

    def product(self, expr: Expr) -> Product:
        """An expression as a product of factors."""
        if expr not in self.known:
            self.known[expr] = self.same(self.taken_apart(expr))
        return self.known[expr]

    def same(self, product: Product) -> Product:
        """The first known product with the same constant and factors, in any order."""
        key = product.number, frozenset(Counter(product.factors).items())
        return self.canonical.setdefault(key, product)

    def taken_apart(self, expr: Expr) -> Product:
        if isinstance(expr, Literal) and math.isfinite(expr.value) and expr.value:
            return Product(expr.value, ())
        if not isinstance(expr, Call):
            return self.single(expr)
        args = [self.product(a) for a in expr.args]
        row = SCALARS[expr.fn]
        if row.powers:
            product = self.of_powers(row.powers, expr.args, args)
            if product is not None:
                return product
        elif row.is_negation:
            return Product(-args[0].number, args[0].factors)
        elif row.signs:
            return self.sum(row.signs[1], args[0], args[1])
        elif row.chooses:
            return self.taken_out(expr.fn, args[1], args[2], args[:1])
        return self.single(Function(expr.fn, tuple(args)))

    def of_powers(
        self, powers: Sequence[float], exprs: Sequence[Expr], args: Sequence[Product]
    ) -> Product | None:
        """A product of powers 1 and 2 (and -1 of constants) as factors; None for other powers."""
        found = Product(1.0, ())
        for power, expr, arg in zip(powers, exprs, args, strict=True):
            if power == -1 and isinstance(expr, Literal) and has_reciprocal(expr.value):
                found = Product(found.number / expr.value, found.factors)
            elif power in (1, 2):
                for _ in range(int(power)):
                    found = found.times(arg)
            else:
                return None
        return found if len(found.factors) <= MOST else None

    def sum(self, sign: int, a: Product, b: Product) -> Product:
        """a + b or, by the sign, a - b, with common factors taken out."""
        if b.number < 0:
            sign, b = -sign, Product(-b.number, b.factors)
        return self.taken_out(SUM if sign > 0 else DIFFERENCE, a, b)

    def taken_out(self, fn: str, a: Product, b: Product, before: Sequence[Product] = ()) -> Product:
        """fn(*before, a, b) with the common factors of `a` and `b` taken out."""
        both = Counter(a.factors) & Counter(b.factors)
        common = [f for f in dict.fromkeys(a.factors) for _ in range(both[f])]
        rest = self.same(a.without(common)), self.same(b.without(common))
        return Product(1.0, tuple(common)).times(self.single(Function(fn, (*before, *rest))))

    def single(self, atom: Atom) -> Product:
        return Product(1.0, (self.factor(atom),))

    def factor(self, atom: Atom) -> Factor:
        """The number of an atom."""
        if atom not in self.numbers:
            self.numbers[atom] = len(self.atoms)
            self.atoms.append(atom)
        return self.numbers[atom]

    # Sharing.

    def is_once(self, factor: Factor) -> bool:
        """Whether a factor has one value for a whole row."""
        if factor not in self.rows:
            match self.atoms[factor]:
                case Function(args=args):
                    self.rows[factor] = all(self.is_once(f) for p in args for f in p.factors)
                case Pair(first=first, second=second):
                    self.rows[factor] = self.is_once(first) and self.is_once(second)
                case leaf:
                    self.rows[factor] = isinstance(leaf, Literal) or self.once(leaf)
        return self.rows[factor]

    def share(self, roots: Iterable[Product]) -> None:
        """Replace the pair of factors that most products share by one factor, until none recurs."""
        self.left = {p: p for p in self.computed(roots)}
        while True:
            counts: Counter[Pair] = Counter()
            for product in dict.fromkeys(self.left.values()):
                counts.update(self.pairs(product))
            if not counts:
                return
            best = max(
                counts, key=lambda p: (counts[p], self.is_once(p.first) or self.is_once(p.second))
            )
            if counts[best] < 2:
                return
            shared = self.factor(best)
            for key, product in self.left.items():
                self.left[key] = _replaced(product, best, shared)

    def computed(self, roots: Iterable[Product]) -> list[Product]:
        """All products to compute: the roots, and the arguments of functions in them."""
        found: dict[Product, None] = {}
        stack = list(roots)
        while stack:
            product = stack.pop()
            if product in found:
                continue
            found[product] = None
            for factor in product.factors:
                atom = self.atoms[factor]
                stack.extend(atom.args if isinstance(atom, Function) else ())
        return list(found)

    def pairs(self, product: Product) -> Counter[Pair]:
        """The pairs of a product's factors that cost an operation per element, with counts."""
        count = Counter(product.factors)
        found: Counter[Pair] = Counter()
        for a, b in combinations(sorted(count), 2):
            if not (self.is_once(a) and self.is_once(b)):
                found[Pair(a, b)] = min(count[a], count[b])
        for a, n in count.items():
            if n > 1 and not self.is_once(a):
                found[Pair(a, a)] = n // 2
        return found

    # From products to expressions.

    def expr(self, product: Product) -> Expr:
        """The expression that computes a product."""
        if product not in self.made:
            self.made[product] = self.put_together(self.left.get(product, product))
        return self.made[product]

    def put_together(self, product: Product) -> Expr:
        row = [self.atom(f) for f in product.factors if self.is_once(f)]
        element = [self.atom(f) for f in product.factors if not self.is_once(f)]
        number = product.number
        values = [f.value for f in row if isinstance(f, Literal)]
        if not element and len(values) == len(row):
            return Literal(math.prod(values, start=number))
        factors = [_multiplied(row)] if row else []
        if abs(number) != 1.0:
            factors = [_multiplied([*row, Literal(number)])]
        whole = _multiplied([*element, *factors])
        return Call(NEGATION, (whole,)) if number == -1.0 else whole

    def atom(self, factor: Factor) -> Expr:
        """The expression that computes a factor."""
        match self.atoms[factor]:
            case Function(fn=fn, args=args):
                return Call(fn, tuple(self.expr(p) for p in args))
            case Pair(first=first, second=second):
                return _multiplied([self.atom(first), self.atom(second)])
            case leaf:
                return leaf


def _multiplied(exprs: Sequence[Expr]) -> Expr:
    """The product of expressions, from left to right; x·x as a square."""
    out = exprs[0]
    for expr in exprs[1:]:
        out = Call(SQUARE, (out,)) if expr == out else Call(PRODUCT, (out, expr))
    return out


def _replaced(product: Product, pair: Pair, shared: Factor) -> Product:
    """A product with every occurrence of a pair of factors replaced by `shared`."""
    factors = list(product.factors)
    while True:
        left = list(factors)
        for one in (pair.first, pair.second):
            if one not in left:
                return Product(product.number, tuple(factors))
            left.remove(one)
        left.insert(min(factors.index(pair.first), len(left)), shared)
        factors = left
