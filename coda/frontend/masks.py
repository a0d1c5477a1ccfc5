"""Masks and scores of `attention`, as functions of positions (b, h, i, j) -> condition or score.

    coda.attention(q, k, v, mask=coda.masks.every(coda.masks.causal, coda.masks.documents(ids)))

They are plain functions: one of your own is written in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from coda.frontend.attention import Mask, Score
from coda.frontend.library import softcap
from coda.frontend.ops import abs, floor, log, maximum, minimum, where
from coda.frontend.tensor import Tensor
from coda.ir.dims import Dim
from coda.ir.types import f32, i32


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Keys up to the query's own number, as torch's `is_causal`: j ≤ i."""
    return j <= i


def causal_from(first: int | Dim) -> Mask:
    """Keys up to the query's own position, if query 0 has the number `first`: j ≤ i + first.

    With T keys of which the last S are the queries' own, `first` is T - S.
    """
    return lambda b, h, i, j: j <= i + first


def sliding_window(size: int) -> Mask:
    """The query's own key and the size - 1 before it, after Beltagy et al. (2020)."""
    return lambda b, h, i, j: (j <= i) & (j > i - size)


def chunked(size: int) -> Mask:
    """Keys of the query's own chunk of `size` positions."""
    return lambda b, h, i, j: j // size == i // size


def documents(ids: Tensor) -> Mask:
    """Keys of the query's own document, by a number for each token: ids [B, S], ints."""
    return lambda b, h, i, j: ids[b, i] == ids[b, j]


def prefix(lengths: Tensor) -> Mask:
    """The first lengths[b] keys, and those up to the query's own: lengths [B], ints."""
    return lambda b, h, i, j: (j <= i) | (j < lengths[b].cast(i32))


def tree(ancestors: Tensor, cached: int | Dim) -> Mask:
    """All `cached` keys, and of the others, those of a query's ancestors in a tree of drafts.

    Args:
        ancestors: [S, S], bool: whether query i reads the key of query j.
        cached: the number of keys before those of the queries.
    """
    return lambda b, h, i, j: (j < cached) | ancestors[i, maximum(j - cached, 0)]


def block_diffusion(length: int | Dim, size: int) -> Mask:
    """The mask of block diffusion, after Arriola et al. (2025), for training.

    A row has `length` noisy tokens and then the clean ones, in blocks of `size`. Noisy tokens read
    their own block and the clean blocks before it; clean ones, clean blocks up to their own.
    """

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        of_i, of_j = (where(p >= length, p - length, p) // size for p in (i, j))
        clean = j >= length
        own = (of_i == of_j) & ~((i >= length) ^ clean)
        return own | (clean & (of_i > of_j))

    return mask


def every(first: Mask, *others: Mask) -> Mask:
    """Keys that all masks keep."""
    return _joined(lambda x, y: x & y, (first, *others))


def some(first: Mask, *others: Mask) -> Mask:
    """Keys that at least one mask keeps."""
    return _joined(lambda x, y: x | y, (first, *others))


def _joined(join: Callable[[Tensor, Tensor], Tensor], masks: tuple[Mask, ...]) -> Mask:
    return lambda b, h, i, j: reduce(join, (one(b, h, i, j) for one in masks))


# Scores.

_ROUNDING = 1e-5  # a distance where a bucket begins is in it, whatever its logarithm is rounded to


def alibi(slopes: Tensor) -> Score:
    """s - slopes[h] · (i - j), after Press et al. (2022); slopes [H]."""
    return lambda s, b, h, i, j: s + (slopes[h] * (j - i).cast(slopes.dtype)).cast(s.dtype)


def relative_bias(table: Tensor, *, far: int = 128, both_ways: bool = True) -> Score:
    """s + table[bucket of j - i, h], after T5 (Raffel et al., 2020).

    Args:
        table: [N, H], a bias for each bucket and head. Half of the buckets are for one distance
            each, the others for distances that grow up to `far` in equal ratios.
        far: the distance from which on all are in the last bucket.
        both_ways: whether keys after the query have half of the buckets, or are in the first.
    """

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        count = table.shape[0] // 2 if both_ways else table.shape[0]
        near = count // 2
        away = abs(j - i) if both_ways else maximum(i - j, 0)
        ratio = log(maximum(away, 1).cast(f32) / near) / log(far / near)
        grown = floor(ratio * (count - near) + _ROUNDING).cast(i32)
        bucket = where(away < near, away, minimum(grown + near, count - 1))
        bucket = where(j > i, bucket + count, bucket) if both_ways else bucket
        return s + table[bucket, h].cast(s.dtype)

    return score


def softcapped(cap: float) -> Score:
    """cap · tanh(s / cap), as Gemma 2 has it."""
    return lambda s, b, h, i, j: softcap(s, cap)
