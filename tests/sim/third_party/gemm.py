"""quack's GEMM in all its forms: one row of the tables below each, all against torch."""

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.sim.third_party.cases import BF16, F16, F32, Case, Problem, empty, randn

M, N, K = 512, 512, 320  # 16 tiles of 128 x 128: four of them for each of four blocks; 5 k-tiles


def _product(a: Tensor, b: Tensor) -> Tensor:
    return _multiplied(a) @ _multiplied(b).mT


def _multiplied(x: Tensor) -> Tensor:
    """What the tensor cores see of an operand: float32 is loaded as tf32, rounded to ten bits."""
    if x.dtype != F32:
        return x.float()
    return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(F32)


def _epilogue() -> Any:
    from quack.epilogue import library

    return library.identity_epi


def dense(
    m: int = M,
    n: int = N,
    k: int = K,
    dtype: torch.dtype = BF16,
    out: torch.dtype = BF16,
    batch: int = 1,
    **config: Any,
) -> Problem:
    """D = A Bᵀ."""
    a = randn(batch, m, k, dtype=dtype)
    b = randn(batch, n, k, dtype=dtype, scale=k**-0.5)

    def launch() -> dict[str, Tensor]:
        d = empty(batch, m, n, dtype=out)
        _epilogue().gemm(a, b, d, epi_args={}, **config)
        return {"D": d}

    return Problem(launch, {"D": _product(a, b)}, 2**-7 if out.itemsize == 2 else 1e-4)


def dynamic(semaphore: bool, **config: Any) -> Problem:
    """Tiles from a queue: a counter in memory on Hopper, cluster launch control on Blackwell."""
    a, b = randn(1, M, K), randn(1, N, K, scale=K**-0.5)

    def launch() -> dict[str, Tensor]:
        d = empty(1, M, N)
        counter = {"tile_count_semaphore": torch.zeros(1, dtype=torch.int32)} if semaphore else {}
        _epilogue().gemm(a, b, d, epi_args={}, is_dynamic_persistent=True, **counter, **config)
        return {"D": d}

    return Problem(launch, {"D": _product(a, b)})


def transposed_b(swap: bool = False, **config: Any) -> Problem:
    """B stored (k, n); with `swap` the kernel computes Dᵀ = B Aᵀ."""
    a, b = randn(M, K), randn(K, N, scale=K**-0.5)

    def launch() -> dict[str, Tensor]:
        d = empty(M, N)
        _epilogue().gemm(a, b, d, epi_args={}, b_kn=True, swap_ab=swap, **config)
        return {"D": d}

    return Problem(launch, {"D": a.float() @ b.float()})


def column_major(**config: Any) -> Problem:
    """A, B and D with their other axis contiguous: the weight gradient's form."""
    a, b = randn(1, K, M).mT, randn(1, K, N, scale=K**-0.5).mT

    def launch() -> dict[str, Tensor]:
        d = empty(1, N, M, dtype=F32).mT
        _epilogue().gemm(a, b, d, epi_args={}, **config)
        return {"D": d}

    return Problem(launch, {"D": _product(a, b)}, 1e-4)


def accumulate(**config: Any) -> Problem:
    """D += A Bᵀ by reducing stores."""
    a, b, d0 = randn(1, M, K), randn(1, N, K, scale=K**-0.5), randn(1, M, N, dtype=F32)

    def launch() -> dict[str, Tensor]:
        d = d0.clone()
        _epilogue().gemm(a, b, d, epi_args={}, add_to_output=True, **config)
        return {"D": d}

    return Problem(launch, {"D": _product(a, b) + d0}, 1e-4)


def ragged(**config: Any) -> Problem:
    """Sizes that no tile divides, into the middle of a larger matrix that must stay as it is."""
    m, n, k = 200, 328, 136
    a, b = randn(1, m, k), randn(1, n, k, scale=k**-0.5)

    def launch() -> dict[str, Tensor]:
        whole = torch.full((1, m + 64, n), 7.0, dtype=BF16)
        _epilogue().gemm(a, b, whole[:, :m], epi_args={}, **config)
        return {"D": whole}

    below = torch.full((1, 64, n), 7.0)
    return Problem(launch, {"D": torch.cat([_product(a, b), below], 1)})


STARTS = [0, 70, 70, 200, 384]  # rows of four experts; one has none


def grouped(gather: bool = False, **config: Any) -> Problem:
    """Rows of one matrix by expert, perhaps gathered: cu_seqlens_m and A_idx."""
    starts = torch.tensor(STARTS, dtype=torch.int32)
    total, experts = STARTS[-1], len(STARTS) - 1
    b = randn(experts, N, K, scale=K**-0.5)
    x = randn(100 if gather else total, K)
    rows = torch.randint(0, 100, (total,), dtype=torch.int32) if gather else None

    def launch() -> dict[str, Tensor]:
        d = empty(total, N)
        indices = {"A_idx": rows} if gather else {}
        _epilogue().gemm(x, b, d, epi_args={}, cu_seqlens_m=starts, **indices, **config)
        return {"D": d}

    a = x if rows is None else x[rows.long()]
    spans = itertools.pairwise(STARTS)
    found = [_product(a[s:e], b[i]) for i, (s, e) in enumerate(spans)]
    return Problem(launch, {"D": torch.cat(found)})


def grouped_k(**config: Any) -> Problem:
    """A weight gradient for each expert: the contracted axis is cut, cu_seqlens_k."""
    from quack.gemm import gemm

    starts = torch.tensor(STARTS, dtype=torch.int32)
    total, experts = STARTS[-1], len(STARTS) - 1
    a, b = randn(total, 256).mT, randn(total, 256, scale=0.1).mT

    def launch() -> dict[str, Tensor]:
        d = empty(experts, 256, 256, dtype=F32)
        gemm(a, b, d, None, None, cu_seqlens_k=starts, **config)
        return {"D": d}

    spans = itertools.pairwise(STARTS)
    found = [_product(a[:, s:e], b[:, s:e]) for s, e in spans]
    return Problem(launch, {"D": torch.stack(found)}, 1e-4)


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _blocked(scales: Tensor) -> Tensor:
    """Scale factors [rows, blocks] in the order that tensor memory takes: (1, rm, rk, 32, 4, 4)."""
    rows, blocks = scales.shape
    out = torch.zeros(1, -(-rows // 128), -(-blocks // 4), 32, 4, 4)
    r, b = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    out[0, r // 128, b // 4, r % 32, r // 32 % 4, b % 4] = scales
    return out


def _scaled_operand(rows: int, k: int, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values as stored, scales as stored, what they mean) of a block-scaled operand."""
    vector = 16 if form == "nvfp4" else 32
    if form == "nvfp4":
        scales = torch.randint(1, 8, (rows, k // vector)).float() / 4
        stored = _blocked(scales).to(torch.float8_e4m3fn)
    else:
        scales = 2.0 ** torch.randint(-3, 3, (rows, k // vector)).float()
        stored = _blocked(scales).to(torch.float8_e8m0fnu)
    if form == "mxfp8":
        values = torch.randn(rows, k).to(torch.float8_e4m3fn)
        meaning = values.float()
    else:
        codes = torch.randint(0, 16, (rows, k), dtype=torch.uint8)
        meaning = FP4[codes.long()]
        values = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.float4_e2m1fn_x2)
    return values[None], stored, meaning * scales.repeat_interleave(vector, 1)


def block_scaled(form: str, **config: Any) -> Problem:
    """mxfp8, mxfp4 or nvfp4 operands with a scale for each 32 or 16 elements."""
    k = 512
    (a, sfa, a_ref), (b, sfb, b_ref) = (_scaled_operand(r, k, form) for r in (M, N))
    name = {"mxfp8": "mxfp8_e4m3"}.get(form, form)

    def launch() -> dict[str, Tensor]:
        d = empty(1, M, N)
        _epilogue().gemm(
            a, b, d, epi_args={}, SFA=sfa, SFB=sfb, bs_format_a=name, bs_format_b=name, **config
        )
        return {"D": d}

    return Problem(launch, {"D": (a_ref @ b_ref.T)[None]})


def quantised_output(**config: Any) -> Problem:
    """SwiGLU of column pairs, stored as fp8 with a scale for each 32 columns."""
    from quack.epilogue import library

    a, b = randn(1, M, K), randn(1, N, K, scale=K**-0.5)
    wide = N // 2

    def launch() -> dict[str, Tensor]:
        values = empty(1, M, wide, dtype=E4M3)
        scales = torch.zeros(1, M // 128, wide // 128, 32, 4, 4, dtype=torch.float8_e8m0fnu)
        stores = {"postact": values, "postact_sf": scales}
        library.swiglu_quant_mod.gemm(a, b, None, epi_args=stores, **config)
        each = scales[0].float().permute(0, 3, 2, 1, 4).reshape(M, wide // 32)
        return {"postact": values[0].float() * each.repeat_interleave(32, 1)}

    acc = _product(a, b)[0]
    expected = torch.nn.functional.silu(acc[:, ::2]) * acc[:, 1::2]
    return Problem(launch, {"postact": expected}, 2**-4)


TILE = {"tile_M": 128, "tile_N": 128, "cluster_M": 1, "cluster_N": 1}
PAIR = {**TILE, "tile_M": 256, "cluster_M": 2}  # on Blackwell: one product by two blocks
HOPPER, BLACKWELL = ("sm_90a",), ("sm_100a",)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _case(
    name: str, make: Any, arches: tuple[str, ...] = (*HOPPER, *BLACKWELL), **more: Any
) -> Case:
    return Case(f"gemm {name}", make, arches, **more)


CASES = (
    _case("persistent", partial(dense, **TILE), quick=HOPPER),
    _case("one tile a block", partial(dense, 256, 256, persistent=False, **TILE), HOPPER),
    _case("batched", partial(dense, 256, 128, batch=3, **TILE)),
    _case("float16", partial(dense, 256, 256, dtype=F16, out=F16, **TILE)),
    _case("float32 output", partial(dense, 256, 256, out=F32, **TILE)),
    _case("tf32", partial(dense, 256, 256, dtype=F32, out=F32, **TILE), BLACKWELL),
    _case("fp8 e4m3", partial(dense, 256, 256, dtype=E4M3, **TILE)),
    _case("fp8 e5m2", partial(dense, 256, 256, dtype=E5M2, **TILE)),
    _case("cooperative", partial(dense, **{**TILE, "tile_M": 256}), HOPPER),
    _case("ping-pong", partial(dense, pingpong=True, **TILE), HOPPER),
    _case("wide tile", partial(dense, **{**TILE, "tile_N": 256})),
    _case("narrow tile", partial(dense, 256, 320, **{**TILE, "tile_N": 160}), HOPPER),
    _case("two CTAs", partial(dense, **PAIR), BLACKWELL, quick=BLACKWELL),
    _case("two CTAs, wide", partial(dense, **{**PAIR, "tile_N": 256}), BLACKWELL),
    _case("multicast along m", partial(dense, **{**TILE, "cluster_M": 2})),
    _case("multicast along n", partial(dense, **{**TILE, "cluster_N": 2})),
    _case("multicast 2x2", partial(dense, **{**TILE, "cluster_M": 2, "cluster_N": 2})),
    _case("multicast of pairs", partial(dense, **{**PAIR, "cluster_N": 2}), BLACKWELL),
    _case("split-K 2", partial(dense, 256, 256, split_k=2, **TILE)),
    _case("split-K 3", partial(dense, 256, 256, 384, split_k=3, **TILE)),
    _case("split-K 2 parallel", partial(dense, 256, 256, split_k=2, split_k_mode=1, **TILE)),
    _case("dynamic", partial(dynamic, True, **TILE), HOPPER),
    _case("dynamic", partial(dynamic, False, **TILE), BLACKWELL),
    _case("dynamic, two CTAs", partial(dynamic, False, **PAIR), BLACKWELL),
    _case("B stored (k, n)", partial(transposed_b, **TILE)),
    _case("swapped operands", partial(transposed_b, swap=True, **TILE)),
    _case("all transposed", partial(column_major, **TILE)),
    _case("add to output", partial(accumulate, **TILE)),
    _case("ragged", partial(ragged, **TILE)),
    _case("grouped", partial(grouped, **TILE)),
    _case("grouped, gathered", partial(grouped, gather=True, **TILE)),
    _case(
        "grouped, TMA gather", partial(grouped, gather=True, use_tma_gather=True, **TILE), BLACKWELL
    ),
    _case("grouped along k", partial(grouped_k, **TILE)),
    *(
        _case(f"{f}", partial(block_scaled, f, **TILE), BLACKWELL)
        for f in ("mxfp8", "mxfp4", "nvfp4")
    ),
    _case("mxfp8, two CTAs", partial(block_scaled, "mxfp8", **PAIR), BLACKWELL),
    _case("mxfp8 output", partial(quantised_output, **TILE), BLACKWELL),
    _case("nvfp4, two CTAs", partial(block_scaled, "nvfp4", **PAIR), BLACKWELL),
)
