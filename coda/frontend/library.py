"""Layers as plain functions of symbolic tensors, composed of primitives.

The compiler does not know their names: a layer of your own is written in the same way, in your own
file. `x` is [..., D] and a row is its last axis; weights of `linear` are [N, K], as in torch.
Elementwise functions return the shape of their operands broadcast.
"""

from __future__ import annotations

import math

from coda.errors import CodaError, ShapeError
from coda.frontend.ops import (
    abs,
    concat,
    erf,
    exp,
    log,
    log1p,
    logsumexp,
    max,
    maximum,
    mean,
    minimum,
    pick,
    rsqrt,
    sigmoid,
    split,
    square,
    stack,
    sum,
    tanh,
    uniform,
    where,
)
from coda.frontend.tensor import Tensor
from coda.ir.dims import Shape, product, show_shape


def rms_norm(x: Tensor, w: Tensor | None = None, eps: float = 1e-6, shift: float = 0.0) -> Tensor:
    """x / sqrt(mean x² + eps) · (shift + w), after Zhang and Sennrich (2019); [..., D].

    `w` is [D]; `shift=1` is for models that store the gain minus 1 (Gemma).
    """
    y = x * inverse_rms(x, eps)
    if w is None:
        return y
    return y * (w + shift if shift else w)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean x² + eps) of each row, [..., 1]."""
    return rsqrt(mean(x * x, keepdims=True) + eps)


def layer_norm(
    x: Tensor, w: Tensor | None = None, b: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x − mean x) / sqrt(var x + eps) · w + b, with w, b [D]; Ba, Kiros and Hinton (2016)."""
    deviation = x - mean(x, keepdims=True)
    y = deviation * rsqrt(mean(square(deviation), keepdims=True) + eps)
    y = y if w is None else y * w
    return y if b is None else y + b


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(Σ x² + eps) for each row."""
    return x * rsqrt(sum(x * x, keepdims=True) + eps)


def softmax(x: Tensor) -> Tensor:
    """exp(x − max x) / Σ exp(x − max x) for each row."""
    e = exp(x - max(x, keepdims=True))
    return e / sum(e, keepdims=True)


def log_softmax(x: Tensor) -> Tensor:
    """log softmax(x) for each row, without overflow."""
    shifted = x - max(x, keepdims=True)
    return shifted - log(sum(exp(shifted), keepdims=True))


def relu(x: Tensor) -> Tensor:
    """max(x, 0), with derivative 0 at 0; NaN stays NaN."""
    return where(x <= 0.0, 0.0, x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp x) = max(x, 0) + log1p(exp(−|x|)), accurate for all x without overflow."""
    return maximum(x, 0.0) + log1p(exp(-abs(x)))


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigmoid(x) = −softplus(−x), as accurate as `softplus`."""
    return minimum(x, 0.0) - log1p(exp(-abs(x)))


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x · Φ(x) by erf, or approximated by tanh; Hendrycks and Gimpel (2016).

    `approximate` is "none" or "tanh"; raises CodaError for any other value.
    """
    if approximate == "none":
        half = 0.5 * x
        return half + half * erf(x * math.sqrt(0.5))
    if approximate == "tanh":
        c = math.sqrt(2.0 / math.pi)
        half = 0.5 * x
        return half + half * tanh(x * (c + c * 0.044715 * square(x)))
    raise CodaError(
        "gelu is exact or approximated by tanh", found=repr(approximate), help='"none" or "tanh"'
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, after Shazeer (2020)."""
    return silu(gate) * up


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) · up, after Shazeer (2020)."""
    return gelu(gate, approximate) * up


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) · up, after Shazeer (2020)."""
    return relu(gate) * up


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x @ wᵀ + b, with w [N, K] and b [N]."""
    y = x @ w.T
    return y if b is None else y + b


def residual(x: Tensor, y: Tensor) -> Tensor:
    """x + y."""
    return x + y


def bias(x: Tensor, b: Tensor) -> Tensor:
    """x + b, with b [N]."""
    return x + b


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap)."""
    return cap * tanh(x * (1.0 / cap))


def dropout(x: Tensor, p: float, seed: int | Tensor) -> Tensor:
    """x / (1 − p) where `uniform(x.shape, seed)` is at least p, else 0.

    The backward makes the same mask again. Give each dropout of a model a seed of its own, and new
    ones in each step: an argument `coda.Tensor["1", coda.i64]`. Raises CodaError unless p is a
    number from 0 to 1.
    """
    if not isinstance(p, int | float) or not 0 <= p <= 1:
        raise CodaError("dropout takes a probability, from 0 to 1", found=repr(p), help="p=0.1")
    scale = 1.0 / (1.0 - p) if p < 1 else 0.0
    return where(uniform(x.shape, seed) >= p, x * scale, 0.0)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding, after Su et al. (2021).

    Args:
        x: [M, H, d] or [B, M, H, d], heads of d columns.
        cos, sin: [M, r/2] or [B, M, r/2], one angle for each pair of the r ≤ d rotated columns;
            columns from r on are unchanged.
        interleaved: column pairs are (2j, 2j + 1), as in Llama's own weights, else (j, j + r/2),
            as in Hugging Face's and NeoX's.

    Returns:
        The shape of x. Columns (a, b) of a pair become (a cos − b sin, b cos + a sin): with d = 4
        and not interleaved, [x0, x1, x2, x3] -> [x0 c0 − x2 s0, x1 c1 − x3 s1, x2 c0 + x0 s0,
        x3 c1 + x1 s1].

    Raises:
        ShapeError: for tables that do not match x.
    """
    if x.ndim < 3 or cos.shape != sin.shape or not 2 <= cos.ndim < x.ndim:
        raise ShapeError(
            "rope takes heads [..., M, H, d] and tables [M, r/2]",
            found=", ".join(show_shape(t.shape) for t in (x, cos, sin)),
            help='x.reshape("M (H d) -> M H d")',
        )
    half, d = cos.shape[-1], x.shape[-1]
    rotated = 2 * half
    if d != rotated and (rotated - d).is_natural:
        raise ShapeError(
            "rope rotates more columns than a head has",
            found=f"heads of {d} columns, tables of the angles of {rotated}",
            help="tables have one column for each pair; Hugging Face's repeat theirs: "
            f"cos[..., :{d // 2}]",
        )
    rest = None if rotated == d else x[..., rotated:]
    x = x if rest is None else x[..., :rotated]
    c, s = cos[..., None, :], sin[..., None, :]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = split(x, 2)
    rotated = (a * c - b * s, b * c + a * s)
    y = stack(rotated).reshape(*x.shape) if interleaved else concat(rotated)
    return y if rest is None else concat([y, rest])


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """logsumexp(logits) − logits[target] for each row, with torch's options.

    Args:
        logits: [..., V].
        target: [...], ints. A target outside [0, V) gives the loss NaN.
        ignore_index: rows with this target have loss 0 and are not counted in the mean.
        reduction: "mean" (over the rows that are not ignored) or "sum", both []; "none", [...].
        label_smoothing: the weight, from 0 to 1, of the mean loss over all classes.
        z_loss: the weight of an added logsumexp².

    Raises:
        ShapeError: for a target that does not match the logits.
        CodaError: for an option out of range.
    """
    if not 0 <= label_smoothing <= 1:
        raise CodaError("label_smoothing is a share, from 0 to 1", found=str(label_smoothing))
    logits, target, lead = _rows_and_classes("cross_entropy", logits, target)
    lse = logsumexp(logits, keepdims=True)
    loss = lse - pick(logits, target)
    if label_smoothing:
        smooth = lse - mean(logits, keepdims=True)
        loss = (1.0 - label_smoothing) * loss + label_smoothing * smooth
    if z_loss:
        loss = loss + z_loss * square(lse)
    return _reduced(loss, target, lead, ignore_index, reduction)


def nll_loss(
    log_probabilities: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """−log_probabilities[target] for each row of [..., V]; arguments as in `cross_entropy`."""
    x, target, lead = _rows_and_classes("nll_loss", log_probabilities, target)
    return _reduced(-pick(x, target), target, lead, ignore_index, reduction)


def _rows_and_classes(name: str, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Shape]:
    """Flatten [..., V] and [...] to [N, V] and [N]; also the leading axes. Raises ShapeError."""
    if target.dtype.kind != "int" or x.ndim < 2 or target.shape != x.shape[:-1]:
        raise ShapeError(
            f"{name} takes logits [..., V] and the number of a class for each row",
            found=f"{show_shape(x.shape)} and {show_shape(target.shape)} {target.dtype}",
            help='target: coda.Tensor["M", coda.i64]',
        )
    lead = target.shape
    if len(lead) == 1:
        return x, target, lead
    return x.reshape(product(lead), x.shape[-1]), target.reshape(product(lead)), lead


def _reduced(
    loss: Tensor, target: Tensor, lead: Shape, ignore_index: int, reduction: str
) -> Tensor:
    """Reduce the losses [N, 1] of the rows that are not ignored; `lead` is the shape for "none"."""
    counts = target[:, None] != ignore_index
    loss = where(counts, loss, 0.0)[:, 0]
    if reduction == "none":
        return loss.reshape(*lead) if len(lead) > 1 else loss
    total = sum(loss, axis=0)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / sum(counts.cast(loss.dtype)[:, 0], axis=0)
    raise CodaError(
        "a loss is reduced by mean, sum or none", found=repr(reduction), help='reduction="mean"'
    )
