"""Monoids: a table of reductions, each with its split into partials and their merge (law 3).

A reduction is `finish(fold(lift(x_i)))`, where `fold` is associative with an identity. So it can be
computed as partials (one for each tile of an epilogue), which a later kernel merges. A partial is
one or more float32 planes:

    variance of x [M, N] in tiles of n columns: planes mean, m2 [M, N / n] -> merge -> m2 / N [M, 1]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coda.ir.scalars import Term

Parts = tuple[Tensor, ...]
_MOST = 3.4028234663852886e38  # the largest finite float32


@dataclass(frozen=True)
class Warp:
    """How the threads of a row reduce values, by functions of kernels/rowwise/math.py.

    Attributes:
        start: the functions that return the identity, one for each plane of a thread's state.
        step: an operator or a scalar function of (state, value); if the state has several planes,
            a function of (state, several values).
        merge: function of two states -> the state of both.
        finish: function of a state -> the value; "" if the state is the value.
    """

    start: tuple[str, ...]
    step: str
    merge: str
    finish: str = ""


@dataclass(frozen=True)
class Passes:
    """How a fold of values x in registers is computed in two passes: a value near all, then terms.

    Attributes:
        near: the monoid of t, the value near all of them.
        term: (x, t) -> the term of a value.
        total: the monoid of the terms.
        value: (t, total of the terms) -> the fold's value.
        bound: what is applied to t first; None for nothing.
        share: (term, total) -> term(x, value), if it follows from them; None if it does not.
    """

    near: str
    term: Callable[[Term, Term], Term]
    total: str
    value: Callable[[Term, Term], Term]
    bound: Callable[[Term], Term] | None = None
    share: Callable[[Term, Term], Term] | None = None


@dataclass(frozen=True)
class Monoid:
    """An associative fold with an identity, over tuples of planes.

    Attributes:
        name: the reduction's name in the text form.
        planes: names of the planes of one partial, in storage order.
        partial: values along `dim` -> planes, that dim kept with size 1.
        merge: planes stacked along `dim`, with the number of values in each part (a tensor that
            broadcasts along `dim`) -> merged planes, that dim kept with size 1.
        finish: planes and the total count -> the reduction's value.
        sums: whether zero is harmless as padding (a plain sum).
        held: whether the result is later compared with the reduced values (a maximum equals one
            of them, a logsumexp normalises them), and so must be computed from them as stored.
        chosen: whether the result is one of the values; its derivative selects that value.
        tiled: whether a GEMM's epilogue can compute it (quack's maximum loses NaN).
        average_of: the monoid of which this is the average over all values; "" for none.
        counted: whether the merge needs the number of values in each partial: the state of a fold
            is (count, *planes).
        also: the monoid whose value is the first plane; "" for none.
        sink: the quack epilogue op that reduces over a tile, formatted with the buffer's name.
        rows: the op that reduces over the rows of a tile, formatted likewise; "" for none.
        group: the op that reduces over groups of columns before the epilogue; "" for none.
        warp: how the threads of a row compute it.
        passes: how they compute it in two passes; None if one does as well.
        of_pairs: whether it reduces pairs of a score and a value (`Reduce.value`), here the real
            and the imaginary part of `x`.
        nests: whether reducing the reductions of parts of equal length gives the reduction of all.
        scan: values along `dim` -> their inclusive scan; None if there is no such operation.
    """

    name: str
    planes: tuple[str, ...]
    partial: Callable[[Tensor, int], Parts]
    merge: Callable[[Parts, Tensor, int], Parts]
    finish: Callable[[Parts, int], Tensor]
    sums: bool = False
    held: bool = False
    chosen: bool = False
    tiled: bool = True
    of_pairs: bool = False
    nests: bool = True
    scan: Callable[[Tensor, int], Tensor] | None = None
    average_of: str = ""
    counted: bool = False
    also: str = ""
    sink: str = ""
    rows: str = ""
    group: str = ""
    warp: Warp = Warp(("zero",), "+", "sum_merge")
    passes: Passes | None = None

    @property
    def is_plain_sum(self) -> bool:
        """Whether it is the sum of the values, with an identity as `finish`."""
        return self.sums and not self.average_of

    def reduce(self, x: Tensor, dim: int) -> Tensor:
        """The reduction of `x` along `dim`, which is kept with size 1."""
        return self.finish(self.partial(x, dim), x.shape[dim])

    def split(self, x: Tensor, dim: int, sizes: Sequence[int]) -> tuple[Parts, Tensor]:
        """Partials of consecutive chunks of `x` along `dim`, of the lengths `sizes`.

        Returns the planes, each with one element per chunk along `dim`, and the lengths as a tensor
        that broadcasts with them.
        """
        chunks = [self.partial(c, dim) for c in torch.split(x, list(sizes), dim)]
        planes = tuple(torch.cat(p, dim) for p in zip(*chunks, strict=True))
        shape = [1] * x.ndim
        shape[dim] = len(sizes)
        return planes, torch.tensor(list(sizes), dtype=x.dtype, device=x.device).reshape(shape)


def _sum(x: Tensor, dim: int) -> Parts:
    return (x.sum(dim, keepdim=True),)


def _merge_sum(p: Parts, counts: Tensor, dim: int) -> Parts:
    return (p[0].sum(dim, keepdim=True),)


def _amax(x: Tensor, dim: int) -> Parts:
    return (x.amax(dim, keepdim=True) if x.shape[dim] else _identity(x, dim, -torch.inf),)


def _amin(x: Tensor, dim: int) -> Parts:
    return (x.amin(dim, keepdim=True) if x.shape[dim] else _identity(x, dim, torch.inf),)


def _product(x: Tensor, dim: int) -> Parts:
    return (x.prod(dim, keepdim=True),)


def _identity(x: Tensor, dim: int, value: float) -> Tensor:
    """The reduction of no values, which torch does not define for maxima and minima."""
    shape = list(x.shape)
    shape[dim] = 1
    return x.new_full(shape, value)


def _lse_partial(x: Tensor, dim: int) -> Parts:
    return (torch.logsumexp(x, dim, keepdim=True),)


def _weighted(x: Tensor, dim: int) -> Parts:
    """log Σ exp s and Σ exp(s) v / Σ exp s of pairs s + i v; without a weight, the mean is Σ 0 v.

    So a part of scores −inf, whose weights are 0, adds nothing to others, but NaN if a value is
    infinite or NaN: 0 v, as it is written. The mean is corrected by that of what it leaves.
    """
    score, value = x.real, x.imag
    most = torch.finfo(score.dtype).max
    top = _amax(score, dim)[0].clamp(-most, most)
    weight = (score - top).exp()
    total = weight.sum(dim, keepdim=True)
    some = torch.where(total == 0, 1, total)
    near = (weight * value).sum(dim, keepdim=True) / some
    near = torch.where(near.isfinite(), near, 0)
    rest = (weight * (value - near)).sum(dim, keepdim=True) / some
    return top + total.log(), near + rest


def _finish_weighted(planes: Parts, count: int) -> Tensor:
    """The mean; NaN where softmax is, for a score +inf or all −inf. Of no values it is 0."""
    logsumexp, mean = planes
    return torch.where(logsumexp.isinf(), torch.nan, mean) if count else mean


def _moments(x: Tensor, dim: int) -> Parts:
    near = _pivot(x, dim, x.shape[dim])
    mean = near + (x - near).mean(dim, keepdim=True)
    return mean, (x - mean).square().sum(dim, keepdim=True)


def _pivot(x: Tensor, dim: int, count: int) -> Tensor | float:
    """The first value along `dim`, as an offset: sums of x - offset do not cancel.

    It is 0 if `count` times the first value would overflow.
    """
    if not x.shape[dim]:
        return 0.0
    first = x.narrow(dim, 0, 1).detach()
    return torch.where(first.abs() < torch.finfo(x.dtype).max / count, first, 0.0)


def _merge_moments(p: Parts, counts: Tensor, dim: int) -> Parts:
    """Chan, Golub, LeVeque (1983): M2 = Σ M2_i + Σ n_i (mean_i − mean)²."""
    means, m2 = p
    total = counts.sum(dim, keepdim=True)
    near = _pivot(means, dim, 1)
    mean = near + ((means - near) * (counts / total)).sum(dim, keepdim=True)
    spread = (counts * (means - mean).square()).sum(dim, keepdim=True)
    return mean, m2.sum(dim, keepdim=True) + spread


_ROWS = (
    Monoid(
        "sum",
        ("sum",),
        _sum,
        _merge_sum,
        lambda p, n: p[0],
        sums=True,
        scan=torch.cumsum,
        sink="ColVecReduce({0!r})",
        rows="RowVecReduce({0!r})",
        group="GroupSum({0!r})",
    ),
    Monoid(
        "mean",
        ("sum",),
        _sum,
        _merge_sum,
        lambda p, n: p[0] / n,
        sums=True,
        average_of="sum",
        sink="ColVecReduce({0!r})",
        group="GroupMean({0!r})",
    ),
    Monoid(
        "max",
        ("max",),
        _amax,
        lambda p, c, d: _amax(p[0], d),
        lambda p, n: p[0],
        held=True,
        chosen=True,
        tiled=False,
        warp=Warp(("lowest",), "maximum", "max_merge"),
    ),
    Monoid(
        "min",
        ("min",),
        _amin,
        lambda p, c, d: _amin(p[0], d),
        lambda p, n: p[0],
        held=True,
        chosen=True,
        tiled=False,
        warp=Warp(("highest",), "minimum", "min_merge"),
    ),
    Monoid(
        "prod",
        ("product",),
        _product,
        lambda p, c, d: _product(p[0], d),
        lambda p, n: p[0],
        tiled=False,
        warp=Warp(("one",), "*", "prod_merge"),
    ),
    Monoid(
        "logsumexp",
        ("lse",),
        _lse_partial,
        lambda p, c, d: _lse_partial(p[0], d),
        lambda p, n: p[0],
        held=True,
        sink="LogSumExp({0!r})",
        rows="RowLogSumExp({0!r})",
        warp=Warp(("least_finite", "zero"), "lse_step", "lse_merge", "lse_finish"),
        passes=Passes(
            "max",
            lambda x, t: (x - t).to("exp"),
            "sum",
            lambda t, total: t + total.to("log"),
            bound=lambda t: t.to("clamp", -_MOST, _MOST),
            share=lambda term, total: term * total.to("recip"),
        ),
    ),
    Monoid(
        "softmax_mean",
        ("logsumexp", "mean"),
        _weighted,
        lambda p, c, d: _weighted(torch.complex(*p), d),
        _finish_weighted,
        held=True,
        of_pairs=True,
        nests=False,
        also="logsumexp",
        sink="SoftmaxMean({0!r})",
        warp=Warp(
            ("least_finite", "zero", "zero"), "weighted_step", "weighted_merge", "weighted_finish"
        ),
    ),
    Monoid(
        "variance",
        ("mean", "m2"),
        _moments,
        _merge_moments,
        lambda p, n: p[1] / n,
        nests=False,
        counted=True,
        also="mean",
        sink="Moments({0!r})",
        warp=Warp(("zero", "zero", "zero"), "moments_step", "moments_merge"),
        passes=Passes("mean", lambda x, t: (x - t).to("square"), "mean", lambda t, total: total),
    ),
)

MONOIDS: dict[str, Monoid] = {row.name: row for row in _ROWS}
(PLAIN_SUM,) = (row.name for row in _ROWS if row.is_plain_sum)
