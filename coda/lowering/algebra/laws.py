"""The algebra: laws of sums as equations between graphs, each applied from left to right.

A sum over k is a contraction or a reduction. A value of size 1 along the summed axis does not
depend on it and may leave the sum (law 1); two sums may be exchanged (law 2); a reduction is a fold
of a monoid and may be split over tiles (law 3, `coda.ir.monoids`). No law knows a layer's name.

    Σ_k (x r) w = r Σ_k x w     RMSNorm's 1 / rms moves from the GEMM's operand to its epilogue
"""

from __future__ import annotations

from coda.ir.graph import Cast, Concat, Const, Contract, Map, Node, Permute, Reduce, Reshape
from coda.lowering.algebra.conditions import (
    are_two,
    both_are_computed,
    cancels_in_float32,
    column_factor_comes_late,
    factor_comes_late,
    gain_is_free,
    has_rounded,
    has_rows,
    lies_straight,
    other_is_computed,
    reciprocal_is_normal,
    rows_are_contiguous,
    shift_cancels,
    weights_are_known_late,
)
from coda.lowering.algebra.rewrite import ANY, ROWS_PERMUTED, WIDE, Law, Sides, law
from coda.lowering.algebra.roles import softmax


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


def _transposed(x: Node) -> Node:
    return Permute(x, (1, 0))


def _rows_permuted(x: Node) -> Node:
    return Permute(x, ROWS_PERMUTED)


def _over(fn: str, x: Node) -> Node:
    return Reduce(fn, x, -1)


def _weighted(x: Node, v: Node) -> Node:
    """Σ_k p v with p = softmax x."""
    return Reduce("softmax_mean", x, -1, v)


# Spelling: one form for expressions that users write in several ways.


@law(x="... K")
def square_of_product(x: Node) -> Sides:
    """x · x = x²."""
    return _mul(x, x), Map("square", (x,))


@law(x="... K")
def square_of_power(x: Node) -> Sides:
    """x ** 2 = x²."""
    return Map("pow", (x, Const(2.0, ANY))), Map("square", (x,))


@law(x="... K", r="... 1", when=reciprocal_is_normal)
def divide_by_row(x: Node, r: Node) -> Sides:
    """x / r = x · (1 / r): one reciprocal per row."""
    return _div(x, r), _mul(x, Map("recip", (r,)))


@law(x="... K", r="... 1", g="... K", unscaled=True, when=factor_comes_late)
def row_factor_outward(x: Node, r: Node, g: Node) -> Sides:
    """(x ⊙ r) ⊙ g = (x ⊙ g) ⊙ r: row factors last, where they can move past a contraction."""
    return _mul(_mul(x, r), g), _mul(_mul(x, g), r)


@law(x="... K", r="... 1")
def cast_inside_row_factor(x: Node, r: Node) -> Sides:
    """cast(x ⊙ r) = cast(x) ⊙ cast(r): a single rounding, of the stored value.

    Not to a type of a shorter range: what a scale brings into it may not fit without the scale.
    """
    return Cast(_mul(x, r), WIDE), _mul(Cast(x, WIDE), Cast(r, WIDE))


@law(x="... K", a="K", b="K", when=has_rows)
def shifts_together(x: Node, a: Node, b: Node) -> Sides:
    """(x + a) + b = x + (a + b): two shifts by vectors are one, by their sum."""
    return _add(_add(x, a), b), _add(x, _add(a, b))


# Law 1, pull out: a factor that does not depend on the summed axis leaves the sum.


@law(x="... K", r="... 1", w="* N K", unscaled=True, when=factor_comes_late)
def row_factor_past_contraction(x: Node, r: Node, w: Node) -> Sides:
    """Σ_k (x r) w = r Σ_k x w: the row factor is applied to the accumulator."""
    return _contract(_mul(x, r), w), _mul(_contract(x, w), r)


@law(x="... K", w="* N K", c="* N 1", unscaled=True, when=column_factor_comes_late)
def column_factor_past_contraction(x: Node, w: Node, c: Node) -> Sides:
    """Σ_k x (w c) = cᵀ Σ_k x w: a factor of a column of each batch, which a token's key has."""
    return _contract(x, _mul(w, c)), _mul(_contract(x, w), _transposed(c))


@law(x="... K", r="... 1", b="K", w="N K", unscaled=True, when=factor_comes_late)
def affine_past_contraction(x: Node, r: Node, b: Node, w: Node) -> Sides:
    """Σ_k (x r + b) w = r Σ_k x w + Σ_k b w: the shift is a vector computed from weights."""
    return (
        _contract(_add(_mul(x, r), b), w),
        _add(_mul(_contract(x, w), r), _contract(b, w)),
    )


def _row_sums(w: Node) -> Node:
    """Σ_k w[n, k] as a row, [1, N]."""
    return Permute(_over("sum", w), (1, 0))


@law(x="... K", m="... 1", w="* N K", unscaled=True, when=shift_cancels)
def row_shift_past_contraction(x: Node, m: Node, w: Node) -> Sides:
    """Σ_k (x − m) w = Σ_k x w − m Σ_k w: a rank-one correction in the epilogue."""
    return _contract(_sub(x, m), w), _sub(_contract(x, w), _mul(m, _row_sums(w)))


@law(x="... K", m="... 1", g="K", w="N K", unscaled=True, when=cancels_in_float32)
def shifted_gain_past_contraction(x: Node, m: Node, g: Node, w: Node) -> Sides:
    """Σ_k (x − m) g w = Σ_k x (g w) − m Σ_k g w.

    The gain goes with the weight, so that the correction subtracts exactly what was added: a large
    mean cancels in float32, not after a rounding of x g.
    """
    return (
        _contract(_mul(_sub(x, m), g), w),
        _sub(_contract(x, _mul(w, g)), _mul(m, _row_sums(_mul(w, g)))),
    )


@law(x="... K", g="K", w="N K", choice=True, unscaled=True)
def gain_into_weight(x: Node, g: Node, w: Node) -> Sides:
    """Σ_k (x g) w = Σ_k x (g w): a gain along k is folded into the weight."""
    return _contract(_mul(x, g), w), _contract(x, _mul(w, g))


@law(x="* L K", g="* 1 K", u="* N L", when=gain_is_free)
def gain_past_contraction_over_rows(x: Node, g: Node, u: Node) -> Sides:
    """Σ_l u (x g) = g Σ_l u x: a weight's gradient reads x without its gain."""
    return _contract(u, _transposed(_mul(x, g))), _mul(_contract(u, _transposed(x)), g)


@law(x="* L K", r="* L 1", u="* N L", when=other_is_computed)
def row_factor_to_other_operand(x: Node, r: Node, u: Node) -> Sides:
    """Σ_l u (x r) = Σ_l (u r) x: the factor is applied where u is computed; x is read as it is.

    Softmax's gradient of v is eᵀ (r dO); a kernel that computes e stores P = e r as cheaply.
    """
    scaled = _transposed(_mul(_transposed(u), r))
    return _contract(u, _transposed(_mul(x, r))), _contract(scaled, _transposed(x))


@law(x="... M K", w="1 N K", when=rows_are_contiguous)
def batches_that_share_a_matrix(x: Node, w: Node) -> Sides:
    """Σ_k x[b] w, one w for all b: one contraction over the rows of all batches."""
    return _contract(x, w), _contract(x, Reshape(w, w.shape[-2:]))


@law(x="... K", y="... L", v="N K", w="N L", when=both_are_computed)
def contractions_together(x: Node, y: Node, v: Node, w: Node) -> Sides:
    """Σ_k x v + Σ_l y w = Σ_kl [x y] [v w]: two contractions are one, over both axes."""
    return (
        _add(_contract(x, v), _contract(y, w)),
        _contract(Concat((x, y), -1), Concat((v, w), -1)),
    )


@law(x="... K", r="... 1")
def row_factor_past_sum(x: Node, r: Node) -> Sides:
    """Σ_k x r = r Σ_k x."""
    return _over("sum", _mul(x, r)), _mul(_over("sum", x), r)


@law(x="... K", y="... K")
def sums_together(x: Node, y: Node) -> Sides:
    """Σ_k x + Σ_k y = Σ_k (x + y)."""
    return _add(_over("sum", x), _over("sum", y)), _over("sum", _add(x, y))


# One permutation of the rows of all operands leaves products and sums, which keep rows apart.


@law(x="... M K", y="... M K", when=are_two)
def permutation_past_product(x: Node, y: Node) -> Sides:
    """xᵖ yᵖ = (x y)ᵖ: rows that are permuted alike are multiplied as they are in memory."""
    return _mul(_rows_permuted(x), _rows_permuted(y)), _rows_permuted(_mul(x, y))


@law(x="... M K")
def permutation_past_sum(x: Node) -> Sides:
    """Σ_k xᵖ = (Σ_k x)ᵖ: rows are summed in the order in which they are in memory."""
    return _over("sum", _rows_permuted(x)), _rows_permuted(_over("sum", x))


# Law 2, swap: exchange two sums of a derivative if the forward has the other contraction.


@law(x="... K")
def negation_past_sum(x: Node) -> Sides:
    """Σ_k (−x) = −Σ_k x."""
    return _over("sum", Map("neg", (x,))), Map("neg", (_over("sum", x),))


@law(x="L K")
def transposed_twice(x: Node) -> Sides:
    """(xᵀ)ᵀ = x."""
    return _transposed(_transposed(x)), x


@law(x="... K", y="... N", w="* K N", choice=True, when=lies_straight)
def row_sum_exchanged(x: Node, y: Node, w: Node) -> Sides:
    """Σ_k x (Σ_n y w) = Σ_n y (Σ_k x w): two contractions, exchanged.

    Softmax's Σ dP P is Σ dO O: known before the contraction that gives dP, whose epilogue needs it.
    """
    return (
        _over("sum", _mul(x, _contract(y, w))),
        _over("sum", _mul(y, _contract(x, _transposed(w)))),
    )


@law(x="... K", y="... N", w="* N K", choice=True)
def row_sum_exchanged_transposed(x: Node, y: Node, w: Node) -> Sides:
    """Σ_k x (Σ_n y wᵀ) = Σ_n y (Σ_k x w): the same for a transposed weight."""
    return (
        _over("sum", _mul(x, _contract(y, _transposed(w)))),
        _over("sum", _mul(y, _contract(x, w))),
    )


# Law 3, split: reductions that are spelled out become folds of one monoid, combined tile by tile.


@law(x="... K")
def variance_as_moments(x: Node) -> Sides:
    """mean (x − mean x)² is one fold of (n, mean, Σ(x − mean)²), after Chan, Golub and LeVeque."""
    deviation = _sub(x, _over("mean", x))
    return _over("mean", Map("square", (deviation,))), _over("variance", x)


@law(x="... K")
def logsumexp_of_exponentials(x: Node) -> Sides:
    """log Σ exp x = logsumexp x, which cannot overflow."""
    return _log(_over("sum", _exp(x))), _over("logsumexp", x)


@law(x="... K", m="... 1")
def shifted_logsumexp(x: Node, m: Node) -> Sides:
    """log Σ exp(x − m) + m = logsumexp x, whatever m is subtracted."""
    return _add(_over("logsumexp", _sub(x, m)), m), _over("logsumexp", x)


@law(x="... K", m="... 1", when=has_rounded)
def shifted_log_softmax(x: Node, m: Node) -> Sides:
    """(x − m) − logsumexp(x − m) = x − logsumexp x."""
    shifted = _sub(x, m)
    return _sub(shifted, _over("logsumexp", shifted)), _sub(x, _over("logsumexp", x))


@law(x="... K", m="... 1", when=has_rounded)
def softmax_by_logsumexp(x: Node, m: Node) -> Sides:
    """exp(x − m) · (1 / Σ exp(x − m)) = exp(x − logsumexp x): one statistic instead of two.

    With +inf among the values the left side is NaN everywhere, the right only there.
    """
    e = _exp(_sub(x, m))
    return _mul(e, Map("recip", (_over("sum", e),))), softmax(x)


@law(x="... K", v="... K", when=weights_are_known_late)
def weights_past_contraction(x: Node, v: Node) -> Sides:
    """Σ exp(x − logsumexp x) v is one fold of (max, Σ e, Σ e v), rescaled where parts meet.

    So no kernel needs the weights' statistic before it sees the values. A weight of 0 times an
    infinite value is NaN on both sides.
    """
    return _over("sum", _mul(softmax(x), v)), _weighted(x, v)


@law(x="... K", v="... K")
def division_past_weights(x: Node, v: Node) -> Sides:
    """Σ exp(x) v · (1 / Σ exp x) is the same fold, which cannot overflow."""
    total = Map("recip", (_over("sum", _exp(x)),))
    return _mul(_over("sum", _mul(_exp(x), v)), total), _weighted(x, v)


@law(x="... K", m="... 1", v="... K")
def shifted_scores(x: Node, m: Node, v: Node) -> Sides:
    """The weights of x − m are those of x."""
    return _weighted(_sub(x, m), v), _weighted(x, v)


@law(x="... K", v="... K", r="... 1")
def row_factor_past_weights(x: Node, v: Node, r: Node) -> Sides:
    """Σ p (v r) = r Σ p v."""
    return _weighted(x, _mul(v, r)), _mul(_weighted(x, v), r)


@law(x="... K", v="... K", r="... 1", when=has_rounded)
def row_shift_past_weights(x: Node, v: Node, r: Node) -> Sides:
    """Σ p (v − r) = Σ p v − r: weights add up to 1."""
    return _weighted(x, _sub(v, r)), _sub(_weighted(x, v), r)


@law(x="... K", v="... K", u="... K", r="... 1", when=has_rounded)
def row_shift_of_first_past_weights(x: Node, v: Node, u: Node, r: Node) -> Sides:
    """Σ p ((v − r) − u) = Σ p (v − u) − r."""
    return _weighted(x, _sub(_sub(v, r), u)), _sub(_weighted(x, _sub(v, u)), r)


@law(x="... K", v="... K", u="... K", r="... 1", when=has_rounded)
def row_shift_of_second_past_weights(x: Node, v: Node, u: Node, r: Node) -> Sides:
    """Σ p (v − (u − r)) = Σ p (v − u) − (−r)."""
    return (
        _weighted(x, _sub(v, _sub(u, r))),
        _sub(_weighted(x, _sub(v, u)), Map("neg", (r,))),
    )


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
    shifts_together,
    batches_that_share_a_matrix,
    row_factor_past_contraction,
    column_factor_past_contraction,
    affine_past_contraction,
    shifted_gain_past_contraction,
    row_shift_past_contraction,
    gain_into_weight,
    gain_past_contraction_over_rows,
    row_factor_to_other_operand,
    contractions_together,
    row_factor_past_sum,
    sums_together,
    permutation_past_product,
    permutation_past_sum,
    weights_past_contraction,
    division_past_weights,
    shifted_scores,
    row_factor_past_weights,
    row_shift_past_weights,
    row_shift_of_first_past_weights,
    row_shift_of_second_past_weights,
)

EXCHANGES: tuple[Law, ...] = (
    negation_past_sum,
    transposed_twice,
    row_sum_exchanged,
    row_sum_exchanged_transposed,
)
