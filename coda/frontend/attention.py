"""Attention as two contractions with a softmax between them; the compiler does not know its name.

    q [B, H, S, d], k [B, G, T, d], v [B, G, T, e]      G heads of keys, each for H / G of queries

    s = score(q kᵀ scale, b, h, i, j)       [B, H, S, T]
    s = where(mask(b, h, i, j), s, -inf)
    y = exp(s - lse) v                      [B, H, S, e], with lse = log(Σ_j exp s), [B, H, S, 1]

`score` and `mask` are elementwise functions of positions, as FlexAttention has them (Dong et al.,
2024): b, h, i and j are tensors of ints that broadcast, so that `table[b, i]` reads a table there.
A row without keys (all of them masked) gives 0, and its lse is -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from coda.errors import DimError, DtypeError, ShapeError, TraceError
from coda.frontend.ops import (
    einsum,
    exp,
    iota,
    log,
    logsumexp,
    maximum,
    sigmoid,
    stop_gradient,
    where,
)
from coda.frontend.refused import kind
from coda.frontend.tensor import Tensor
from coda.ir.dims import ONE, Dim, Shape, broadcast, show_shape
from coda.ir.graph import Expand
from coda.ir.types import f32

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of b, h, i and j
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # of s, b, h, i and j


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: Score | None = None,
    mask: Mask | None = None,
    scale: float | Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(score(q kᵀ scale)) v over the keys that a mask keeps; 0 where it keeps none.

    Args:
        q: [B, H, S, d].
        k, v: [B, G, T, d] and [B, G, T, e], of q's type; head h of q reads head h // (H / G).
        score: (s, b, h, i, j) -> the score of each pair; s is q kᵀ scale, of q's type. It is
            computed in float32, and rounded only if it is stored.
        mask: (b, h, i, j) -> a condition: whether query i reads key j.
        scale: 1 / √d if it is not given.
        sinks: [H], added to the scores of each row as one more key, whose value is 0.
        return_lse: whether to return (y, lse) with lse [B, H, S], of sinks and all keys; float32,
            or of q's type if that is wider.

    Returns:
        [B, H, S, e].

    Raises:
        ShapeError, DtypeError: for operands that do not fit.
        TraceError: for a score or a mask that is no function of these, or gives something else.
    """
    s = scores(q, k, score=score, mask=mask, scale=scale)
    lse = logsumexp(s, keepdims=True)
    if sinks is not None:
        lse = _with_sinks(lse, sinks, q)
    known = lse if mask is score is None else where(lse > -math.inf, lse, 0.0)
    y = weighted(exp(s - known), v)
    if not return_lse:
        return y
    return y, (lse if lse.dtype.size > f32.size else lse.cast(f32))[..., 0]


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: Score | None = None,
    mask: Mask | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """sigmoid(score(q kᵀ scale)) v, after Ramapuram et al. (2024); arguments as of `attention`.

    A score that adds -log T keeps the sum of the weights near that of a softmax.
    """
    return weighted(sigmoid(scores(q, k, score=score, mask=mask, scale=scale)), v)


def scores(
    q: Tensor,
    k: Tensor,
    *,
    score: Score | None = None,
    mask: Mask | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """The scores [B, H, S, T], -inf where they are masked; arguments as of `attention`."""
    _check_operands(q, k)
    found = _by_heads("b g r i d, b g j d -> b g r i j", q, k)
    s = found * (q.shape[-1] ** -0.5 if scale is None else scale)
    b, h, i, j = _positions(s.shape)
    if score is not None:
        s = _score(score(s, b, h, i, j), s)
    if mask is not None:
        s = where(_mask(mask(b, h, i, j), s.shape), s, -math.inf)
    return s


def weighted(p: Tensor, v: Tensor) -> Tensor:
    """Σ_j p v: weights [B, H, S, T] and values [B, G, T, e] -> [B, H, S, e]. Raises ShapeError."""
    if v.ndim != 4 or not _meet(v.shape[0], p.shape[0]) or v.shape[2] != p.shape[3]:
        raise ShapeError(
            "attention takes values [B, G, T, e]",
            found=f"{show_shape(v.shape)} and weights {show_shape(p.shape)}",
        )
    return _by_heads("b g r i j, b g j e -> b g r i e", p, v)


def _check_operands(q: Tensor, k: Tensor) -> None:
    """Raise TraceError or ShapeError for queries and keys that do not fit."""
    if not all(isinstance(t, Tensor) for t in (q, k)):
        raise TraceError("attention takes tensors of the block", found=f"{kind(q)}, {kind(k)}")
    four = q.ndim == k.ndim == 4
    if not four or not _meet(q.shape[0], k.shape[0]) or q.shape[3] != k.shape[3]:
        raise ShapeError(
            "attention takes queries [B, H, S, d] and keys [B, G, T, d]",
            found=f"{show_shape(q.shape)} and {show_shape(k.shape)}",
            help='heads inside a token: x.reshape("B S (H d) -> B S H d").permute(0, 2, 1, 3)',
        )


def _meet(a: Dim, b: Dim) -> bool:
    return a == b or ONE in (a, b)


def _by_heads(text: str, x: Tensor, y: Tensor) -> Tensor:
    """An einsum of x [B, H, ...], with its heads split into those of y [B, G, ...]."""
    heads, groups = x.shape[1], y.shape[1]
    try:
        each = Dim.of(heads) // groups
    except DimError:
        raise ShapeError(
            "each head of keys serves a whole number of heads of queries",
            found=f"{heads} and {groups}",
            help='q: coda.Tensor["B (G R) S d"], k: coda.Tensor["B G T d"]',
        ) from None
    found = einsum(text, x.reshape(x.shape[0], groups, each, *x.shape[2:]), y)
    return found.reshape(found.shape[0], heads, *found.shape[3:])


def _positions(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The numbers of batch, head, query and key of each score, as tensors that broadcast."""
    b, h, i, j = (iota(d) for d in shape)
    return b[:, None, None, None], h[:, None, None], i[:, None], j


def _score(found: Any, s: Tensor) -> Tensor:
    """A score's result in the type of s. Raises TraceError, ShapeError and DtypeError."""
    if not isinstance(found, Tensor):
        raise TraceError("a score gives a tensor of the block", found=kind(found))
    if found.dtype.kind != "float":
        raise DtypeError("a score gives floats", found=str(found.dtype))
    if broadcast(found.shape, s.shape) != s.shape:
        raise ShapeError(
            "a score is a number for each b, h, i and j",
            found=f"{show_shape(found.shape)}, not {show_shape(s.shape)}",
            help="it may read s, positions, and tables at positions: table[b, i]",
        )
    found = found.cast(s.dtype)
    return found if found.shape == s.shape else Tensor(Expand(found.node, s.shape))


def _mask(found: Any, shape: Shape) -> Tensor:
    """The result of a mask function. Raises TraceError, DtypeError and ShapeError."""
    if not isinstance(found, Tensor) or found.dtype.kind != "bool":
        raise TraceError("a mask gives a condition", found=kind(found), help="j <= i")
    if broadcast(found.shape, shape) != shape:
        raise ShapeError(
            "a mask is a condition for each b, h, i and j",
            found=f"{show_shape(found.shape)}, not {show_shape(shape)}",
            help="it may read positions, and tables at positions: table[b, i]",
        )
    return found


def _with_sinks(lse: Tensor, sinks: Tensor, q: Tensor) -> Tensor:
    """log(exp lse + exp sink) of each row; [B, H, S, 1]. Raises ShapeError."""
    if not isinstance(sinks, Tensor) or sinks.shape != (q.shape[1],):
        raise ShapeError(
            "sinks are one number for each head of queries",
            found=show_shape(sinks.shape) if isinstance(sinks, Tensor) else kind(sinks),
            help=f"[{q.shape[1]}]",
        )
    sink = sinks.cast(q.dtype)[:, None, None]
    most = stop_gradient(maximum(lse, sink))
    most = where(most > -math.inf, most, 0.0)
    return most + log(exp(lse - most) + exp(sink - most))
