"""flash-attention 4, forward and backward, against softmax(Q Kᵀ) V in float32."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.sim.third_party.cases import Case, Problem, randn

HOPPER = ("sm_90a",)

Rule = Callable[[Tensor, Tensor], Tensor]  # of the positions of queries and keys


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Rule | None = None,
    score: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of [batch, sequence, heads, width]."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    rows = torch.arange(q.shape[2])[:, None]
    columns = torch.arange(k.shape[2])[None]
    if score is not None:
        scores = score(scores, rows, columns)
    if mask is not None:
        scores = scores.masked_fill(~mask(rows, columns), -math.inf)
    out = scores.softmax(-1) @ v
    return out.transpose(1, 2), scores.logsumexp(-1)


def _inputs(s: int, h: int, hk: int, d: int, dv: int, sk: int) -> list[Tensor]:
    return [randn(1, s, h, d), randn(1, sk, hk, d), randn(1, sk, hk, dv)]


def forward(
    s: int = 384,
    h: int = 2,
    hk: int = 2,
    d: int = 128,
    dv: int = 0,
    sk: int = 0,
    mask: Rule | None = None,
    score: Any = None,
    **options: Any,
) -> Problem:
    """Output and log-sum-exp."""
    from flash_attn.cute.interface import _flash_attn_fwd

    q, k, v = _inputs(s, h, hk, d, dv or d, sk or s)
    out, lse = reference(q, k, v, mask, score)

    def launch() -> dict[str, Tensor]:
        found = _flash_attn_fwd(q, k, v, return_lse=True, **options)
        return {"out": found[0], "lse": found[1]}

    return Problem(launch, {"out": out, "lse": lse}, 2**-6, {"lse": 1e-4})


def backward(
    s: int = 256,
    h: int = 2,
    hk: int = 2,
    d: int = 128,
    mask: Rule | None = None,
    score: Any = None,
    **options: Any,
) -> Problem:
    """Gradients of queries, keys and values, through the public function."""
    from flash_attn.cute.interface import flash_attn_func

    return _gradients(
        partial(flash_attn_func, **options),
        lambda q, k, v: reference(q, k, v, mask, score)[0],
        _inputs(s, h, hk, d, d, s),
    )


def _gradients(ours: Any, theirs: Any, inputs: list[Tensor]) -> Problem:
    """The output and the gradients of queries, keys and values of a function of them."""
    cotangent = torch.randn_like(inputs[0])

    def gradients(function: Any, tensors: list[Tensor], cotangent: Tensor) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        found = torch.autograd.grad(out, leaves, cotangent)
        return {"out": out, **dict(zip(("dq", "dk", "dv"), found, strict=True))}

    expected = gradients(theirs, [t.float() for t in inputs], cotangent.float())
    return Problem(lambda: gradients(ours, inputs, cotangent), expected, 2**-5)


STARTS = [0, 100, 100, 256]


def _lengths() -> dict[str, Any]:
    """How the functions are told of sequences of several lengths in one tensor; one is empty."""
    starts = torch.tensor(STARTS, dtype=torch.int32)
    longest = max(e - s for s, e in itertools.pairwise(STARTS))
    return {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, mask: Rule | None) -> Tensor:
    spans = [(s, e) for s, e in itertools.pairwise(STARTS) if e > s]
    parts = [reference(q[None, s:e], k[None, s:e], v[None, s:e], mask)[0][0] for s, e in spans]
    return torch.cat(parts)


def varlen(causal: bool) -> Problem:
    """Sequences of several lengths in one tensor; one is empty."""
    from flash_attn.cute.interface import _flash_attn_fwd

    q, k, v = (randn(STARTS[-1], h, 128) for h in (2, 1, 1))

    def launch() -> dict[str, Tensor]:
        return {"out": _flash_attn_fwd(q, k, v, **_lengths(), causal=causal)[0]}

    return Problem(launch, {"out": _by_sequence(q, k, v, _causal if causal else None)}, 2**-6)


def varlen_backward(causal: bool) -> Problem:
    """Gradients of sequences of several lengths in one tensor."""
    from flash_attn.cute.interface import flash_attn_varlen_func

    return _gradients(
        partial(flash_attn_varlen_func, **_lengths(), causal=causal),
        partial(_by_sequence, mask=_causal if causal else None),
        [randn(STARTS[-1], 2, 128) for _ in range(3)],
    )


def _causal(row: Tensor, column: Tensor) -> Tensor:
    return column <= row


def _window(left: int, right: int) -> Rule:
    return lambda row, column: (column >= row - left) & (column <= row + right)


def _score_mod() -> Any:
    """Adds a slope along the distance of query and key: in the DSL."""
    import cutlass
    from cutlass import cute

    @cute.jit
    def slope(scores, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return scores + (q_idx - kv_idx).to(cutlass.Float32) * 0.01

    return slope


def _slope(scores: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return scores + (row - column) * 0.01


def _mask_mod() -> Any:
    """Keys at a multiple of three before or at the query: in the DSL."""
    from cutlass import cute

    @cute.jit
    def thirds(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        three = cute.full_like(kv_idx, 3)
        zero = cute.full_like(kv_idx, 0)
        return (kv_idx % three == zero) & (kv_idx <= q_idx)

    return thirds


def _thirds(row: Tensor, column: Tensor) -> Tensor:
    return (column % 3 == 0) & (column <= row)


def _grow_mod() -> Any:
    """Makes scores grow with the distance of query and key: in the DSL."""
    import cutlass
    from cutlass import cute

    @cute.jit
    def grow(scores, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return scores * (1.0 + (q_idx - kv_idx).to(cutlass.Float32) * 0.01)

    return grow


def _grow_mod_backward() -> Any:
    """The gradient through `_grow_mod`."""
    import cutlass
    from cutlass import cute

    @cute.jit
    def grow(gradient, scores, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return gradient * (1.0 + (q_idx - kv_idx).to(cutlass.Float32) * 0.01)

    return grow


def _grow(scores: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return scores * (1 + (row - column) * 0.01)


def _cap(scores: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return 2 * torch.tanh(scores / 2)


def _with(make: Any, build: dict[str, Any], **more: Any) -> Callable[[], Problem]:
    """A problem with functions in the DSL, which are made inside the device."""
    return lambda: make(**{name: one() for name, one in build.items()}, **more)


CASES = (
    Case("attention", partial(forward)),
    Case("attention, causal, GQA", partial(forward, hk=1, causal=True, mask=_causal)),
    Case("attention, width 64", partial(forward, d=64)),
    Case("attention, width 96", partial(forward, d=96)),
    Case("attention, widths 192 and 128", partial(forward, s=256, d=192, dv=128)),
    Case("attention, ragged", partial(forward, s=200, sk=328)),
    Case(
        "attention, window",
        partial(forward, window_size_left=70, window_size_right=30, mask=_window(70, 30)),
    ),
    Case("attention, varlen", partial(varlen, False)),
    Case("attention, varlen, causal", partial(varlen, True)),
    Case("attention, score_mod", _with(forward, {"score_mod": _score_mod}, score=_slope)),
    Case("attention, mask_mod", _with(forward, {"mask_mod": _mask_mod}, mask=_thirds)),
    Case("attention backward", partial(backward)),
    Case("attention backward, causal", partial(backward, causal=True, mask=_causal)),
    Case("attention backward, GQA", partial(backward, hk=1, causal=True, mask=_causal)),
    Case("attention backward, width 64", partial(backward, d=64, causal=True, mask=_causal)),
    Case(
        "attention backward, window",
        partial(backward, window_size=(70, 0), mask=_window(70, 0)),
    ),
    Case("attention backward, varlen", partial(varlen_backward, False)),
    Case("attention backward, varlen, causal", partial(varlen_backward, True)),
    Case("attention backward, softcap", partial(backward, softcap=2.0, score=_cap)),
    Case(
        "attention backward, score_mod",
        _with(
            backward,
            {"score_mod": _grow_mod, "score_mod_bwd": _grow_mod_backward},
            score=_grow,
        ),
    ),
    Case("attention backward, mask_mod", _with(backward, {"mask_mod": _mask_mod}, mask=_thirds)),
)
