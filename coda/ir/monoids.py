"""Monoids: what a sum over an axis becomes when it is split over tiles (law 3).

A reduction is `finish(fold(lift(x_i)))`, where `fold` is associative with an identity. So it may be
taken in parts (one part per tile of an epilogue), and the parts folded by whoever needs the total.
A part is one or more float32 planes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Warp:
    """How the lanes of a warp fold values, by functions of kernels/rowwise/math.py.

    Attributes:
        start: what makes each plane of a lane's state.
        step: an operator or a scalar function of (state, value); a function of the same module
            where the state has several planes.
        merge: state of each lane -> what all have.
    """

    start: tuple[str, ...]
    step: str
    merge: str


@dataclass(frozen=True)
class Monoid:
    """An associative fold with an identity, over tuples of planes.

    Attributes:
        name: the reduction's name in the text form.
        planes: names of the planes of one partial, in the order they are stored.
        partial: values along `dim` -> planes, that dim kept with size 1.
        merge: planes stacked along `dim`, with the number of values in each part (a tensor that
            broadcasts along `dim`) -> merged planes, that dim kept with size 1.
        finish: planes and the total count -> the reduction's value.
        sums: whether zero is harmless as padding (a plain sum).
        held: whether the result is held against the very values that it was taken of (a maximum
            equals one of them, a logsumexp normalises them), and so must see them as stored.
        chosen: whether the result is one of the values: its derivative asks which.
        tiled: whether a GEMM's epilogue takes it (quack's fold of maxima loses NaN).
        average_of: the monoid of which this is the average over all values; "" for none.
        counted: whether parts are merged by the number of values in each: the state of a fold is
            (count, *planes), by which two sweeps take it.
        also: the monoid whose value is the first plane; "" for none.
        sink: the op of an epilogue on quack that takes it over a tile, by the buffer's name.
        group: the op that takes it over groups of columns before the epilogue; "" for none.
        warp: how a warp takes it.
        nests: whether the reduction of all is that of the reductions of parts of one length.
        scan: values along `dim` -> the reduction of each with all before it; None where there is
            no such operation.
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
    nests: bool = True
    scan: Callable[[Tensor, int], Tensor] | None = None
    average_of: str = ""
    counted: bool = False
    also: str = ""
    sink: str = ""
    group: str = ""
    warp: Warp = Warp(("zero",), "+", "warp_sum")

    @property
    def is_plain_sum(self) -> bool:
        """Whether it is the sum of the values, and nothing is done to it afterwards."""
        return self.sums and not self.average_of

    def reduce(self, x: Tensor, dim: int) -> Tensor:
        """The whole reduction of `x` along `dim`, that dim kept with size 1."""
        return self.finish(self.partial(x, dim), x.shape[dim])

    def split(self, x: Tensor, dim: int, sizes: Sequence[int]) -> tuple[Parts, Tensor]:
        """Partials of consecutive chunks of `x` along `dim` (planes stacked there), and counts."""
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


def _identity(x: Tensor, dim: int, value: float) -> Tensor:
    """The fold of no values, which torch refuses for maxima and minima."""
    shape = list(x.shape)
    shape[dim] = 1
    return x.new_full(shape, value)


def _lse_partial(x: Tensor, dim: int) -> Parts:
    return (torch.logsumexp(x, dim, keepdim=True),)


def _moments(x: Tensor, dim: int) -> Parts:
    near = _pivot(x, dim, x.shape[dim])
    mean = near + (x - near).mean(dim, keepdim=True)
    return mean, (x - mean).square().sum(dim, keepdim=True)


def _pivot(x: Tensor, dim: int, count: int) -> Tensor | float:
    """A first value, near which sums lose nothing; 0 where `count` of it are too large."""
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
        warp=Warp(("lowest",), "maximum", "warp_max"),
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
        warp=Warp(("highest",), "minimum", "warp_min"),
    ),
    Monoid(
        "logsumexp",
        ("lse",),
        _lse_partial,
        lambda p, c, d: _lse_partial(p[0], d),
        lambda p, n: p[0],
        held=True,
        sink="LogSumExp({0!r})",
        warp=Warp(("lowest", "zero"), "lse_step", "warp_lse"),
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
        warp=Warp(("zero", "zero", "zero"), "moments_merge", "warp_moments"),
    ),
)

MONOIDS: dict[str, Monoid] = {row.name: row for row in _ROWS}
