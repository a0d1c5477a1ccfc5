"""The only module that imports flash-attention: its kernel classes, never its functions.

A compiled kernel takes tensors [batch, tokens, heads, columns] of any strides that are multiples of
16 bytes, with contiguous columns. Sizes, the scale and the ends of a band are arguments, and so are
the tensors that a function of scores reads. They travel where flash-attention has its scalars: of
tensors it would bound the positions itself, with two divisions for each score.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from quack.cache import jit_cache

from coda.kernels.attention.device import by_lanes
from coda.kernels.attention.problem import VERSION, Band, Forward, tile_of

DTYPES = {"bf16": cutlass.BFloat16, "f16": cutlass.Float16}
_CAPTURED = {"f32": Float32, "i32": Int32, "i64": cutlass.Int64, "bool": cutlass.Uint8} | DTYPES
_THREADS = 384  # a producer warpgroup and two or three that multiply
_STAGES = 2
SCHEDULER = 7  # arguments of the scheduler on sm_100a, of sequences of several lengths


@jit_cache
def _compile_forward(problem: Forward, version: str) -> Any:
    """Compile the forward kernel; the arguments are the key of quack's disk cache."""
    from flash_attn.cute.utils import AuxData

    dtype = DTYPES[problem.dtype]
    batch, queries, keys, groups = (cute.sym_int() for _ in range(4))
    heads = groups if problem.sharing == 1 else cute.sym_int()
    q = placeholder(dtype, (batch, queries, heads, problem.width))
    k = placeholder(dtype, (batch, keys, groups, problem.width))
    v = placeholder(dtype, (batch, keys, groups, problem.width_v))
    o = placeholder(dtype, (batch, queries, heads, problem.width_v))
    lse = placeholder(Float32, (batch, heads, queries)) if problem.lse else None
    arguments = [q, k, v, o, lse, Float32(1.0), *[None] * 5, *fake_window(problem.band), None]
    arguments += [None] if problem.tensor_memory else []  # scales of 8-bit operands
    arguments += [None, AuxData(None, fake_captured(problem))]  # first, lists of tiles
    arguments += [*[None] * SCHEDULER, Int32(1)] if problem.tensor_memory else [None, None]
    return compiled(_kernel(problem), arguments)


def compiled(kernel: Any, arguments: Sequence[Any]) -> Any:
    """A kernel of flash-attention, compiled for placeholders and the stream of a call."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    with _without_captured():
        return cute.compile(kernel, *arguments, stream, options="--enable-tvm-ffi")


def _kernel(problem: Forward) -> Any:
    """flash-attention's kernel object of a problem."""
    tile = tile_of(problem)
    common: dict[str, Any] = {
        **masked_by(problem.band),
        "pack_gqa": problem.sharing > 1 and tile.rows % problem.sharing == 0,
        "has_aux_tensors": False,
        "score_mod": by_lanes(problem.scores) if problem.scores else None,
    }
    if problem.tensor_memory:
        from flash_attn.cute.flash_fwd_sm100 import FlashAttentionForwardSm100

        return FlashAttentionForwardSm100(
            problem.width,
            problem.width_v,
            qhead_per_kvhead=problem.sharing,
            m_block_size=tile.rows,
            n_block_size=tile.columns,
            q_stage=1 if problem.width_v == 256 else 2,  # two tiles of Q exceed tensor memory
            is_static_persistent=False,  # its grid, the SMs of the GPU that compiles, is built in
            **common,
        )
    from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90

    return FlashAttentionForwardSm90(
        DTYPES[problem.dtype],
        problem.width,
        problem.width_v,
        problem.sharing,
        tile_m=tile.rows,
        tile_n=tile.columns,
        num_stages=_STAGES,
        num_threads=_THREADS,
        mma_pv_is_rs=tile.p_in_registers,
        intra_wg_overlap=True,
        **common,
    )


def placeholder(dtype: Any, shape: tuple[Any, ...], align: int = 0) -> Any:
    """A placeholder of any strides that are multiples of 16 bytes; float32 rows need 4 bytes.

    Args:
        dtype, shape: of the tensor.
        align: the bytes that strides are a multiple of, if they are others.
    """
    align = align or (16 if dtype.width < 32 else 4)
    step = 8 * align // dtype.width
    stride = (*(cute.sym_int64(divisibility=step) for _ in shape[1:]), 1)
    return cute.runtime.make_fake_tensor(dtype, shape, stride=stride, assumed_align=align)


@contextmanager
def _without_captured() -> Generator[None]:
    """Ignore a warning about captured tensors, of which there are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
        yield


def masked_by(band: Band) -> dict[str, bool]:
    """The arguments of a kernel's class that say how scores are masked."""
    ends = band.lower or band.upper
    return {"is_causal": band.diagonal, "is_local": not band.diagonal and ends}


def fake_window(band: Band) -> tuple[Any, Any]:
    """Placeholders of what `window_of` gives."""
    left, right = (Int32(0) if e and not band.diagonal else None for e in (band.lower, band.upper))
    return left, right


def fake_captured(problem: Forward) -> tuple[Any, ...] | None:
    """Placeholders of captured tensors, of any strides, and of sizes; None if there are none."""
    found: list[Any] = []
    for name, axes in problem.captured:
        shape = tuple(cute.sym_int() for _ in range(axes))
        stride = tuple(cute.sym_int64() for _ in range(axes))
        dtype = _CAPTURED[name]
        found.append(
            cute.runtime.make_fake_tensor(
                dtype, shape, stride=stride, assumed_align=dtype.width // 8
            )
        )
    return (*found, *(Int32(0) for _ in range(problem.numbers))) or None


def forward(problem: Forward) -> Callable[..., None]:
    """The compiled forward kernel: a function of `forward_arguments`."""
    return _compile_forward(problem, VERSION)


def forward_arguments(
    problem: Forward,
    tensors: tuple[Any, ...],
    scale: float,
    ends: tuple[int, int],
    captured: tuple[Any, ...] = (),
) -> tuple[Any, ...]:
    """The arguments of a launch.

    Args:
        problem: what was compiled.
        tensors: q [B, S, H, d], k [B, T, G, d], v [B, T, G, e], o [B, S, H, e], and lse [B, H, S],
            float32, or None.
        scale: the factor of q kᵀ.
        ends: lo and hi of the band lo ≤ j - i ≤ hi; ends that the problem lacks are ignored.
        captured: the tensors that the function of scores reads, then sizes.
    """
    queries, keys = tensors[0].shape[1], tensors[1].shape[1]
    window = window_of(problem.band, queries, keys, ends)
    found = [*tensors, scale, *[None] * 5, *window, None]
    given = (None, captured or None)
    if problem.tensor_memory:
        return (*found, None, None, given, *[None] * SCHEDULER, queries)
    return (*found, None, given, None, None)


def window_of(
    band: Band, queries: int, keys: int, ends: tuple[int, int]
) -> tuple[int | None, int | None]:
    """The keys before and after a query's own that a band keeps; None for all, or the diagonal.

    flash-attention counts keys from the last: query i is key i + T - S.
    """
    left = keys - queries - ends[0] if band.lower and not band.diagonal else None
    right = ends[1] - (keys - queries) if band.upper and not band.diagonal else None
    return left, right
