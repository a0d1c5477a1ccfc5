"""The backward kernels of flash-attention, compiled for placeholders: its classes, no functions.

A backward is three launches, or five where several heads of queries share one of keys:

    before      o, do, lse    ->  Σ do o and lse · log₂ e of each query, and dq in float32, zeroed
    main        q, k, v, do   ->  dk and dv, and dq added up in float32, in an order of its own
    after       dq in float32 ->  dq, scaled; so are dk and dv that several heads add to
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Float32
from quack.cache import jit_cache

from coda.kernels.attention.device import by_lanes
from coda.kernels.attention.flash_target import (
    DTYPES,
    compiled,
    fake_captured,
    fake_window,
    masked_by,
    placeholder,
    window_of,
)
from coda.kernels.attention.problem import VERSION, Backward

_THREADS = 384  # a producer warpgroup and two that multiply
_PER_WARPGROUP = 128


def _padded(rows: Any, heads: Any, batch: Any) -> Any:
    """A placeholder of numbers in float32 [batch, heads, rows], of whole tiles."""
    return placeholder(Float32, (batch, heads, rows), align=16)


@jit_cache
def _compile_before(problem: Backward, version: str) -> Any:
    """Compile the kernel before the main one; the arguments are the key of quack's disk cache."""
    from flash_attn.cute.flash_bwd_preprocess import FlashAttentionBackwardPreprocess

    one, dtype = problem.forward, DTYPES[problem.forward.dtype]
    batch, queries, heads, rows, elements = (cute.sym_int() for _ in range(5))
    o, do = (placeholder(dtype, (batch, queries, heads, one.width_v)) for _ in range(2))
    lse = placeholder(Float32, (batch, heads, queries))
    dlse = placeholder(Float32, (batch, heads, queries)) if problem.of_lse else None
    delta, lse_log2 = (_padded(rows, heads, batch) for _ in range(2))
    kernel = FlashAttentionBackwardPreprocess(
        dtype,
        one.width,
        one.width_v,
        problem.tile.rows,
        num_threads=2 * problem.tile.rows,  # two for each row at least: else it writes beyond
        hdim_multiple_of=problem.multiple,
    )
    sums = _padded(elements, heads, batch)
    arguments = [o, do, delta, lse, lse_log2, sums, None, None, dlse, None, None]
    arguments += [Float32(1.0), None, None]
    return compiled(kernel, arguments)


@jit_cache
def _compile_main(problem: Backward, version: str) -> Any:
    """Compile the main kernel; the arguments are the key of quack's disk cache."""
    from flash_attn.cute.utils import AuxData

    one, dtype = problem.forward, DTYPES[problem.forward.dtype]
    batch, queries, keys, groups, rows, elements = (cute.sym_int() for _ in range(6))
    heads = groups if one.sharing == 1 else cute.sym_int()
    q = placeholder(dtype, (batch, queries, heads, one.width))
    k = placeholder(dtype, (batch, keys, groups, one.width))
    v = placeholder(dtype, (batch, keys, groups, one.width_v))
    do = placeholder(dtype, (batch, queries, heads, one.width_v))
    dk = placeholder(dtype, (batch, keys, groups, one.width))
    dv = placeholder(dtype, (batch, keys, groups, one.width_v))
    if one.sharing > 1:
        dk, dv = (_padded(cute.sym_int(), groups, batch) for _ in range(2))
    lse_log2, delta = (_padded(rows, heads, batch) for _ in range(2))
    arguments = [q, k, v, do, lse_log2, delta, _padded(elements, heads, batch), dk, dv]
    arguments += [Float32(1.0), *[None] * 4, *fake_window(one.band), *[None] * 3]
    arguments += [AuxData(None, fake_captured(one)), None, None]
    return compiled(_kernel(problem), arguments)


def _kernel(problem: Backward) -> Any:
    """flash-attention's kernel object of a main kernel."""
    one, tile = problem.forward, problem.tile
    common: dict[str, Any] = {
        **masked_by(one.band),
        "qhead_per_kvhead": one.sharing,
        "tile_m": tile.rows,
        "tile_n": tile.columns,
        "deterministic": False,
        "has_aux_tensors": False,
        **_functions(problem),
    }
    if one.tensor_memory:
        from flash_attn.cute.flash_bwd_sm100 import FlashAttentionBackwardSm100

        return FlashAttentionBackwardSm100(
            one.width,
            one.width_v,
            cluster_size=2 if tile.pairs else 1,
            use_2cta_instrs=tile.pairs,
            **common,
        )
    from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90

    return FlashAttentionBackwardSm90(
        DTYPES[one.dtype],
        one.width,
        one.width_v,
        Q_stage=tile.stages_q,
        dO_stage=tile.stages_do,
        PdS_stage=tile.stages_ds,
        SdP_swapAB=tile.scores_transposed,
        dKV_swapAB=tile.keys_transposed,
        dQ_swapAB=False,
        AtomLayoutMSdP=1,
        AtomLayoutNdKV=tile.atoms_keys,
        AtomLayoutMdQ=tile.atoms_queries,
        num_threads=_THREADS,
        dQ_single_wg=tile.dq_by_one,
        **common,
    )


def _functions(problem: Backward) -> dict[str, Any]:
    """The function of one score and its derivative, if there are any.

    On sm_90a the main kernel gives positions as if the rows of several heads were those of one.
    """
    one = problem.forward
    if not one.scores:
        return {}
    shared = 1 if one.tensor_memory else one.sharing
    names = {"score_mod": one.scores, "score_mod_bwd": problem.slope}
    return {name: by_lanes(text, shared) for name, text in names.items()}


@jit_cache
def _compile_after(problem: Backward, of: str, version: str) -> Any:
    """Compile the kernel that scales and rounds the sums of "dq", "dk" or "dv"."""
    from flash_attn.cute.flash_bwd_postprocess import FlashAttentionBackwardPostprocess

    one, tile = problem.forward, problem.tile
    dtype, width = DTYPES[one.dtype], one.width_v if of == "dv" else one.width
    queries = of == "dq"
    batch, rows, heads, elements = (cute.sym_int() for _ in range(4))
    order = None
    if one.tensor_memory:
        from flash_attn.cute.flash_bwd_sm100 import FlashAttentionBackwardSm100

        orders = FlashAttentionBackwardSm100.accum_tile_orders(tile.pairs, tile.columns)
        order = orders[0 if queries else 1]
    warpgroups = 1 if one.tensor_memory or (queries and tile.dq_by_one) else 2
    kernel = FlashAttentionBackwardPostprocess(
        dtype,
        width,
        int("".join(c for c in one.arch if c.isdigit())),
        tile.rows if queries else tile.columns,
        warpgroups * _PER_WARPGROUP,
        tile.atoms_queries if queries else tile.atoms_keys,
        not queries and tile.keys_transposed,
        use_2cta_instrs=queries and tile.pairs,
        cluster_size=2 if tile.pairs and not queries else 1,
        hdim_multiple_of=problem.multiple,
        accum_order=order,
    )
    sums, found = _padded(elements, heads, batch), placeholder(dtype, (batch, rows, heads, width))
    arguments = [sums, found, Float32(1.0), None, None, None, None]
    return compiled(kernel, arguments)


def backward(problem: Backward) -> dict[str, Callable[..., None]]:
    """The compiled kernels of a backward: "before", "main", and "dq", perhaps "dk" and "dv".

    `before` takes `before_arguments`, `main` takes `main_arguments`, the others `after_arguments`.
    """
    found = {"before": _compile_before(problem, VERSION)}
    found |= {of: _compile_after(problem, of, VERSION) for of in problem.summed}
    return found | {"main": _compile_main(problem, VERSION)}  # the last is whose PTX is kept


@dataclass(frozen=True)
class Operands:
    """The tensors of a backward, in bf16 or f16 but for those of numbers of rows, in float32.

    Attributes:
        q, do, o, dq: [B, S, H, d] and, of do and o, [B, S, H, e].
        k, v, dk, dv: [B, T, G, d] and, of v and dv, [B, T, G, e].
        lse: [B, H, S], the logsumexp of each row of scores.
        captured: the tensors that the function of scores reads, then sizes.
        dlse: its cotangent, or None.
        scratch: float32 tensors by name, of the shapes of `Backward.scratch`; those of "dk" and
            "dv" are 0.
    """

    q: Any
    k: Any
    v: Any
    o: Any
    do: Any
    lse: Any
    dlse: Any
    captured: tuple[Any, ...]
    dq: Any
    dk: Any
    dv: Any
    scratch: Mapping[str, Any]


def backward_arguments(
    problem: Backward, given: Operands, scale: float, ends: tuple[int, int]
) -> dict[str, tuple[Any, ...]]:
    """The arguments of each launch of `backward`, in order.

    Args:
        problem: what was compiled.
        given: the tensors.
        scale: the factor of q kᵀ.
        ends: lo and hi of the band lo ≤ j - i ≤ hi; ends that the problem lacks are ignored.
    """
    own, found = given.scratch, {"dq": given.dq, "dk": given.dk, "dv": given.dv}
    window = window_of(problem.forward.band, given.q.shape[1], given.k.shape[1], ends)
    rows = own["delta"], own["lse_log2"]
    before = [given.o, given.do, rows[0], given.lse, rows[1], own["dq"], None, None]
    before += [given.dlse, None, None, 1.0, None, None]
    main = [given.q, given.k, given.v, given.do, rows[1], rows[0], own["dq"]]
    main += [own.get("dk", given.dk), own.get("dv", given.dv), scale, *[None] * 4, *window]
    main += [*[None] * 3, (None, given.captured or None), None, None]
    arguments = {"before": tuple(before), "main": tuple(main)}
    for of in problem.summed:
        factor = 1.0 if of == "dv" else scale
        arguments[of] = (own[of], found[of], factor, *[None] * 4)
    return arguments
