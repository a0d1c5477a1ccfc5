"""An epilogue -> the same, with its statistics computed in two passes over a row in registers.

A statistic that is taken in one pass corrects its state as it goes, and what it subtracts from the
values on the way is not what a store subtracts. If the row is in registers, a value t near all of
its values comes first, and then the total of terms in x - t. The store reads the same terms, so
they are computed once, and stay in registers:

    exp(x - logsumexp(x))     t = max(x), Σ = sum(exp(x - t))     exp(x - t) · (1 / Σ)
    (x - mean(x)) · s         t = mean(x), var = mean((x - t)²)   (x - t) · s

A mean comes first only if a sum of so many equal values is exact in float32, so that a row whose
values differ little loses no digits: 65536 values of bf16, 8192 of f16. They are scaled by a power
of two, so that their sum overflows no sooner than their mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, log2

from coda.ir.monoids import MONOIDS, PLAIN_SUM, Passes
from coda.ir.scalars import SCALARS, Term
from coda.ir.types import f32
from coda.lowering.program.epilogue import (
    Call,
    Epilogue,
    Expr,
    Literal,
    Load,
    Stat,
    Statistic,
    calls,
    rewritten,
    stat_names,
)


def in_passes(epilogue: Epilogue, width: int) -> Epilogue:
    """The epilogue of a row-wise kernel of `width` columns, with statistics in two passes.

    A statistic stays as it is if no other expression reads one of its terms.
    """
    for stat in epilogue.statistics:
        passes = MONOIDS[stat.monoid].passes
        if passes and stat.expr is not None and stat.width == width and not stat.group:
            epilogue = _split(epilogue, stat, stat.expr, passes)
    return epilogue


@dataclass(frozen=True)
class _Formula(Term):
    """An expression, as a term of a formula."""

    expr: Expr

    def apply(self, fn: str, *args: Term | float) -> _Formula:
        return _Formula(Call(fn, tuple(map(_expr, args))))


def _expr(value: Term | float) -> Expr:
    if isinstance(value, _Formula):
        return value.expr
    assert isinstance(value, float)
    return Literal(value)


def _split(epilogue: Epilogue, stat: Statistic, x: Expr, passes: Passes) -> Epilogue:
    """The epilogue with the statistic of `x` in two passes; as it was, if that saves nothing."""
    if MONOIDS[passes.near].average_of and not _sums_exactly(epilogue, x, stat.width):
        return epilogue
    near, value = _near(stat, x, passes)
    first = passes.bound(value) if passes.bound else value
    term = passes.term(_Formula(x), first)
    total = Statistic(f"{stat.name}_terms", passes.total, _expr(term), stat.width)
    terms = _Formula(Stat(total.name))
    same = [s for s in epilogue.statistics if (s.expr, s.monoid) == (x, stat.monoid)]
    means = [s for s in epilogue.statistics if (s.expr, s.monoid) == (x, passes.near)]
    changes: dict[Expr, Expr] = {Stat(s.name): _expr(passes.value(first, terms)) for s in same}
    changes |= {Stat(s.name, passes.near): _expr(value) for s in same}
    changes |= {Stat(s.name): _expr(value) for s in means}
    if passes.share:
        own = [_expr(passes.term(_Formula(x), _Formula(Stat(s.name)))) for s in same]
        changes |= dict.fromkeys(own, _expr(passes.share(term, terms)))
    gone = [*means, *same]
    at = min(map(epilogue.statistics.index, gone))
    before, after = epilogue.statistics[:at], epilogue.statistics[at:]
    after = tuple(s for s in after if s not in gone)
    change = rewritten(lambda expr: changes.get(expr))
    found = replace(epilogue, statistics=(*before, near, *after)).mapped(change)
    new = {c for c in calls([_expr(term)]) if near.name in stat_names([c])}
    if not new & {*calls(found.exprs)} - {*calls([_expr(first)])}:
        return epilogue
    before, after = found.statistics[: at + 1], found.statistics[at + 1 :]
    return replace(found, statistics=(*before, total, *after))


def _sums_exactly(epilogue: Epilogue, x: Expr, count: int) -> bool:
    """Whether a sum of `count` equal values of `x` has no more digits than a float32."""
    dtype = f32
    if isinstance(x, Load):
        dtype = {o.name: o.dtype for o in epilogue.operands}[x.operand]
    elif isinstance(x, Call):
        dtype = SCALARS[x.fn].rounds_to or f32
    return count << dtype.digits <= 1 << f32.digits


def _near(stat: Statistic, x: Expr, passes: Passes) -> tuple[Statistic, Term]:
    """The statistic of the first pass, and its value, from which t follows."""
    name = f"{stat.name}_near"
    t: Term = _Formula(Stat(name))
    if not MONOIDS[passes.near].average_of:
        return Statistic(name, passes.near, x, stat.width), t
    scale = 2.0 ** -ceil(log2(stat.width))
    found = Statistic(name, PLAIN_SUM, _expr(_Formula(x) * scale), stat.width)
    return found, t if stat.width * scale == 1.0 else t / (stat.width * scale)
