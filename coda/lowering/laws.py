"""The algebra: laws of sums as equations, each applied from left to right.

`sum over k` is a contraction or a reduction. A value whose axis has size 1 does not depend on that
axis, and so may leave the sum (law 1); a reduction over an axis is a fold of a monoid, and may be
split over tiles (law 3, `coda.ir.monoids`). The names of layers do not occur here.
"""

from __future__ import annotations

from coda.ir.graph import Cast, Const, Contract, Map, Node, Permute, Reduce
from coda.lowering.rewrite import ANY, Law, Sides, law


def _mul(a: Node, b: Node) -> Node:
    return Map("mul", (a, b))


def _add(a: Node, b: Node) -> Node:
    return Map("add", (a, b))


def _sub(a: Node, b: Node) -> Node:
    return Map("sub", (a, b))


def _div(a: Node, b: Node) -> Node:
    return Map("div", (a, b))


def _exp(a: Node) -> Node:
    return Map("exp", (a,))


def _log(a: Node) -> Node:
    return Map("log", (a,))


def _contract(x: Node, w: Node) -> Node:
    return Contract(x, w, ANY)


def _over(fn: str, x: Node) -> Node:
    return Reduce(fn, x, -1)


# Spelling: one form for what can be written in several ways.


@law(x="... K")
def square_of_product(x: Node) -> Sides:
    """x · x = x²."""
    return _mul(x, x), Map("square", (x,))


@law(x="... K")
def square_of_power(x: Node) -> Sides:
    """x ** 2 = x²."""
    return Map("pow", (x, Const(2.0, ANY))), Map("square", (x,))


@law(x="... K", r="... 1")
def divide_by_row(x: Node, r: Node) -> Sides:
    """x / r = x · (1 / r): one reciprocal for each row."""
    return _div(x, r), _mul(x, Map("recip", (r,)))


@law(x="... K", r="... 1", g="... K")
def row_factor_outward(x: Node, r: Node, g: Node) -> Sides:
    """(x ⊙ r) ⊙ g = (x ⊙ g) ⊙ r: factors of a row last, where a contraction can give them up."""
    return _mul(_mul(x, r), g), _mul(_mul(x, g), r)


@law(x="... K", r="... 1")
def cast_inside_row_factor(x: Node, r: Node) -> Sides:
    """cast(x ⊙ r) = cast(x) ⊙ cast(r): only what is stored rounds, and once."""
    return Cast(_mul(x, r), ANY), _mul(Cast(x, ANY), Cast(r, ANY))


# Law 1, pull out: what does not depend on the summed axis leaves the sum.


@law(x="... K", r="... 1", w="N K")
def row_factor_past_contraction(x: Node, r: Node, w: Node) -> Sides:
    """Σ_k (x r) w = r Σ_k x w: a factor of the row is applied to the accumulator instead."""
    return _contract(_mul(x, r), w), _mul(_contract(x, w), r)


@law(x="... K", r="... 1", b="K", w="N K")
def affine_past_contraction(x: Node, r: Node, b: Node, w: Node) -> Sides:
    """Σ_k (x r + b) w = r Σ_k x w + Σ_k b w: the shift becomes a vector that only weights know."""
    return (
        _contract(_add(_mul(x, r), b), w),
        _add(_mul(_contract(x, w), r), _contract(b, w)),
    )


def _row_sums(w: Node) -> Node:
    """Σ_k w[n, k] as a row, [1, N]."""
    return Permute(_over("sum", w), (1, 0))


@law(x="... K", m="... 1", w="N K")
def row_shift_past_contraction(x: Node, m: Node, w: Node) -> Sides:
    """Σ_k (x − m) w = Σ_k x w − m Σ_k w: a rank-one correction in the epilogue."""
    return _contract(_sub(x, m), w), _sub(_contract(x, w), _mul(m, _row_sums(w)))


@law(x="... K", m="... 1", g="K", w="N K")
def shifted_gain_past_contraction(x: Node, m: Node, g: Node, w: Node) -> Sides:
    """Σ_k (x − m) g w = Σ_k x (g w) − m Σ_k g w.

    The gain goes with the weight, so that the correction subtracts exactly what was added: a large
    mean cancels in float32, not after a rounding of x g.
    """
    return (
        _contract(_mul(_sub(x, m), g), w),
        _sub(_contract(x, _mul(w, g)), _mul(m, _row_sums(_mul(w, g)))),
    )


@law(x="... K", g="K", w="N K", choice=True)
def gain_into_weight(x: Node, g: Node, w: Node) -> Sides:
    """Σ_k (x g) w = Σ_k x (g w): a gain along the summed axis goes with the weight."""
    return _contract(_mul(x, g), w), _contract(x, _mul(w, g))


@law(x="... K", r="... 1")
def row_factor_past_sum(x: Node, r: Node) -> Sides:
    """Σ_k x r = r Σ_k x."""
    return _over("sum", _mul(x, r)), _mul(_over("sum", x), r)


# Law 3, split: reductions written out become folds of one monoid, which can be taken in parts.


@law(x="... K")
def variance_as_moments(x: Node) -> Sides:
    """mean (x − mean x)² is one fold of (n, mean, Σ(x − mean)²), after Chan, Golub and LeVeque."""
    deviation = _sub(x, _over("mean", x))
    return _over("mean", Map("square", (deviation,))), _over("variance", x)


@law(x="... K")
def logsumexp_of_exponentials(x: Node) -> Sides:
    """log Σ exp x = logsumexp x, which does not overflow."""
    return _log(_over("sum", _exp(x))), _over("logsumexp", x)


@law(x="... K", m="... 1")
def shifted_logsumexp(x: Node, m: Node) -> Sides:
    """log Σ exp(x − m) + m = logsumexp x, whatever m is subtracted."""
    return _add(_over("logsumexp", _sub(x, m)), m), _over("logsumexp", x)


@law(x="... K", m="... 1")
def shifted_log_softmax(x: Node, m: Node) -> Sides:
    """(x − m) − logsumexp(x − m) = x − logsumexp x."""
    shifted = _sub(x, m)
    return _sub(shifted, _over("logsumexp", shifted)), _sub(x, _over("logsumexp", x))


@law(x="... K", m="... 1")
def softmax_by_logsumexp(x: Node, m: Node) -> Sides:
    """exp(x − m) · (1 / Σ exp(x − m)) = exp(x − logsumexp x): one statistic instead of two."""
    e = _exp(_sub(x, m))
    return _mul(e, Map("recip", (_over("sum", e),))), _exp(_sub(x, _over("logsumexp", x)))


LAWS: tuple[Law, ...] = (
    square_of_product,
    square_of_power,
    divide_by_row,
    variance_as_moments,
    logsumexp_of_exponentials,
    shifted_log_softmax,
    shifted_logsumexp,
    softmax_by_logsumexp,
    row_factor_outward,
    cast_inside_row_factor,
    row_factor_past_contraction,
    affine_past_contraction,
    shifted_gain_past_contraction,
    row_shift_past_contraction,
    gain_into_weight,
    row_factor_past_sum,
)
