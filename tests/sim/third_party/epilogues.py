"""Every epilogue of quack's library: what it loads, what it writes, and the same in torch.

Sizes: acc [M, N]. Loads: `row` [N], `col` [M], `tile` [M, N], `pairs` [M, 2N] (values of two
neighbouring columns), a number. Writes: `tile`, `half` [M, N/2], `pairs`, sums over columns or rows
(kernels write a partial sum for each tile; `sum col`, `max col`, `lse col`, `sum row`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.sim.third_party.cases import BF16, F32, Case, Problem, empty, randn
from tests.sim.third_party.gemm import TILE

M, N, K = 256, 512, 128
HEAD = 64
Make = Callable[[], Any]

SHAPES = {
    "tile": (M, N),
    "half": (M, N // 2),
    "pairs": (M, 2 * N),
    "sum col": (M, N // TILE["tile_N"]),
    "max col": (M, N // TILE["tile_N"]),
    "lse col": (M, N // TILE["tile_N"]),
    "sum row": (M // TILE["tile_M"], N),
    "col": (M,),
    "heads": (M, N // HEAD),
}
FOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum col": lambda x: x.sum(-1),
    "max col": lambda x: x.amax(-1),
    "lse col": lambda x: x.logsumexp(-1),
    "sum row": lambda x: x.sum(-2),
}


def _load(kind: Any) -> Any:
    if not isinstance(kind, str):
        return kind
    if kind == "row":
        return torch.rand(1, N) + 0.5
    if kind == "col":
        return torch.rand(1, M) + 0.5
    if kind == "target":
        return torch.randint(0, N, (1, M), dtype=torch.int32)
    if kind == "table":
        angles = torch.rand(M, HEAD // 2) * 6.28
        return torch.stack([angles.cos(), angles.sin()], -1).reshape(M, HEAD)
    return randn(1, *SHAPES[kind])


def _problem(
    name: str,
    loads: Mapping[str, Any],
    writes: Mapping[str, str],
    reference: Callable[..., Mapping[str, Tensor]],
    tolerance: float = 2**-7,
) -> Problem:
    """A GEMM with an epilogue; `c` and `D` are the GEMM's own operands."""
    from quack.epilogue import library

    mod = eval(name, vars(library))
    a, b = randn(1, M, K), randn(1, N, K, scale=K**-0.5)
    operands = {n: _load(kind) for n, kind in loads.items()}

    def launch() -> dict[str, Tensor]:
        stores = {}
        for n, kind in writes.items():
            wide = kind in ("tile", "half", "pairs")
            stores[n] = empty(1, *SHAPES[kind], dtype=BF16 if wide else F32)
        arguments = {**operands, **stores}
        d, c = arguments.pop("D", None), arguments.pop("c", None)
        mod.gemm(a, b, d, c, epi_args=arguments, **TILE)
        return {n: FOLDS.get(kind, lambda x: x)(stores[n][0]) for n, kind in writes.items()}

    acc = a[0].float() @ b[0].float().T
    plain = {n: _reference_operand(x) for n, x in operands.items()}
    expected = reference(acc, **plain)
    exact = {n: 1e-4 for n, kind in writes.items() if kind not in ("tile", "half", "pairs")}
    return Problem(launch, dict(expected), tolerance, exact)


def _reference_operand(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x.ndim == 2 and x.shape[0] == 1:
        return x.T.float() if x.shape[1] == M and x.dtype != torch.int32 else x.float()
    return x[0].float() if x.ndim == 3 else x


def _lanes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, ::2], x[:, 1::2]


def _join(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y], -1).reshape(x.shape[0], -1)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _swiglu(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x) * y


def _swiglu_oai(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.clamp(max=7.0), y.clamp(-7.0, 7.0)
    return x * torch.sigmoid(1.702 * x) * (y + 1)


def _derivative(function: Callable[..., Tensor], *inputs: Tensor, by: Tensor) -> Any:
    """(gradients of the inputs, value) of an elementwise function; `by` is its cotangent."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [*torch.autograd.grad(out, leaves, by), out.detach()]


def _act(function: Callable[[Tensor], Tensor], out: str) -> Callable[..., dict[str, Tensor]]:
    return lambda acc: {"D": acc, out: function(acc)}


def _dact(acc: Tensor, c: Tensor) -> dict[str, Tensor]:
    dx, out = _derivative(_gelu, c, by=acc)
    return {"D": dx, "postact": out}


def _dact_dbias(acc: Tensor, c: Tensor) -> dict[str, Tensor]:
    return {**_dact(acc, c), "dbias": _dact(acc, c)["D"].sum(0)}


def _dgated(acc: Tensor, c: Tensor) -> dict[str, Tensor]:
    dx, dy, out = _derivative(_swiglu, *_lanes(c), by=acc)
    return {"D": _join(dx, dy), "postact": out}


def _dgated_moe(gate: Any, acc: Tensor, c: Tensor, score: Tensor) -> dict[str, Tensor]:
    dx, dy, out = _derivative(gate, *_lanes(c), by=acc * score)
    return {
        "D": _join(dx, dy),
        "postact": out * score,
        "dscore": (out * acc).sum(1),
        "dbias_g": dx.sum(0),
        "dbias_u": dy.sum(0),
    }


def _dgated_preact(acc: Tensor, c: Tensor) -> dict[str, Tensor]:
    x, y = _lanes(c)
    dx, dy, out = _derivative(_swiglu, x, y, by=acc)
    return {"D": _join(dx, dy), "postact": out, "dsum": (dx * x + dy * y).sum(1)}


def _dgated_norm(acc: Tensor, c: Tensor, rstd: Tensor) -> dict[str, Tensor]:
    dx, dy, out = _derivative(_swiglu, *_lanes(c), by=acc * rstd)
    return {"D": _join(dx, dy), "postact": out * rstd, "dsum": (out * acc).sum(1)}


def _dgated_rstd(acc: Tensor, c: Tensor, rstd: Tensor) -> dict[str, Tensor]:
    g, u = _lanes(c)
    dg, du, out = _derivative(_swiglu, g * rstd, u * rstd, by=acc)
    dsum = (dg * g + du * u).sum(1)
    return {"D": _join(dg * rstd, du * rstd), "postact": out, "dsum": dsum}


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    (x1, x2), (cos, sin) = _lanes(x), _lanes(table)
    return _join(x1 * cos - x2 * sin, x1 * sin + x2 * cos)


def _head_rstd(x: Tensor) -> Tensor:
    heads = x.reshape(M, -1, HEAD)
    return (heads.square().mean(-1) + 1e-6).rsqrt()


def _head_norm(acc: Tensor, w: Any = 1.0, **_: Any) -> Tensor:
    return acc * _head_rstd(acc).repeat_interleave(HEAD, 1) * w


def _norm_swiglu(acc: Tensor, rstd: Tensor, bias: Tensor) -> dict[str, Tensor]:
    x = acc * rstd + bias
    return {"D": x, "postact": _swiglu(*_lanes(x))}


def _rstd_gated(acc: Tensor, rstd: Tensor) -> dict[str, Tensor]:
    return {"postact": _swiglu(*_lanes(acc * rstd))}


def _rms_partial(acc: Tensor, c: Tensor, weight: Tensor) -> dict[str, Tensor]:
    y = acc + c
    return {"D": y * weight, "resid_out": y, "sqsum": y.square().sum(1)}


def _rms_bwd_partial(acc: Tensor, y: Tensor, rstd: Tensor, w: Tensor) -> dict[str, Tensor]:
    t, normal = acc * w, y * rstd
    return {"D": t * rstd, "dots": (t * normal).sum(1)}


def _rms_bwd(acc: Tensor, y: Tensor, w: Tensor, corr: Tensor, c: Any = 0.0) -> dict[str, Tensor]:
    return {"D": acc * w + c + y * corr, "dw": (acc * y).sum(0)}


def _rms_bwd_entry(acc: Tensor, c: Tensor, y: Tensor, rstd: Tensor, w: Tensor) -> dict[str, Tensor]:
    t, normal = acc * w, y * rstd
    return {"D": t * rstd + c, "dots": (t * normal).sum(1), "dw": (acc * normal).sum(0)}


def _affine(acc: Tensor, s: Tensor, t: Tensor, wg: Tensor, wb: Tensor) -> Tensor:
    return acc * s - t * wg + wb


def _ln_partial(acc: Tensor, c: Tensor, bias: Tensor, weight: Tensor) -> dict[str, Tensor]:
    y = acc + bias + c
    sums = {"hsum": y.sum(1), "sqsum": y.square().sum(1)}
    return {"D": y * weight, "resid_out": y, **sums}


def _dact_ln(acc: Tensor, c: Tensor, s: Tensor, t: Tensor) -> dict[str, Tensor]:
    dz, _ = _derivative(_gelu, c, by=acc)
    return {"D": dz * s, "r1": (dz * c).sum(1), "dwb": dz.sum(0), "dwg": (dz * t).sum(0)}


def _ln_bwd(
    acc: Tensor, c: Tensor, y: Tensor, w: Tensor, corr_mul: Tensor, corr_add: Tensor
) -> dict[str, Tensor]:
    dh = acc * w + c + y * corr_mul + corr_add
    return {"D": dh, "dw": (acc * y).sum(0), "dbias": dh.sum(0)}


def _lse_target(acc: Tensor, target: Tensor) -> dict[str, Tensor]:
    picked = acc.gather(1, target.long().reshape(-1, 1))[:, 0]
    return {"D": acc, "lse": acc.logsumexp(1), "target_logit": picked}


D = {"D": "tile"}
POST = {"D": "tile", "postact": "tile"}
C = {"c": "tile"}
PACKED = {"c": "pairs"}
DGATED = {"D": "pairs", "postact": "tile"}
NORM = {"qk": HEAD, "w": "row"}
LN = {"s": "col", "t": "col", "wg": "row", "wb": "row"}
FLAGS = "gated=False, has_c=False, has_rowvec=True, has_colvec=True"

# name in quack.epilogue.library: loads, writes, the same in torch
TABLE: dict[str, tuple[dict[str, Any], dict[str, str], Callable[..., Mapping[str, Tensor]]]] = {
    "identity_epi": ({}, D, lambda acc: {"D": acc}),
    "residual_epi": ({"res": "tile"}, D, lambda acc, res: {"D": acc + res}),
    "scaled_residual": ({**C, "alpha": 0.7}, D, lambda acc, c, alpha: {"D": acc * alpha + c}),
    "linear_epi": (
        {**C, "alpha": 0.7, "beta": -0.3, "bias_n": "row", "bias_m": "col"},
        D,
        lambda acc, c, alpha, beta, bias_n, bias_m: {"D": acc * alpha + c * beta + bias_n + bias_m},
    ),
    "norm_gelu": (
        {"rstd": "col", "weight": "row"},
        POST,
        lambda acc, rstd, weight: _act(_gelu, "postact")(acc * rstd * weight),
    ),
    "relu_mod": ({}, POST, _act(F.relu, "postact")),
    "relu_sq_mod": ({}, POST, _act(lambda x: F.relu(x).square(), "postact")),
    "dgelu_mod": (C, POST, _dact),
    "dgelu_dbias_mod": (C, {**POST, "dbias": "sum row"}, _dact_dbias),
    "rms_fused": (
        {"weight": "row"},
        {"D": "tile", "premult": "tile", "sqsum": "sum col"},
        lambda acc, weight: {
            "D": acc * weight,
            "premult": acc,
            "sqsum": acc.square().sum(1),
        },
    ),
    "dswiglu_mod": (PACKED, DGATED, _dgated),
    "dswiglu_moe_mod": (
        {**PACKED, "score": "col"},
        {**DGATED, "dscore": "sum col", "dbias_g": "sum row", "dbias_u": "sum row"},
        partial(_dgated_moe, _swiglu),
    ),
    "dswiglu_oai_moe_mod": (
        {**PACKED, "score": "col"},
        {**DGATED, "dscore": "sum col", "dbias_g": "sum row", "dbias_u": "sum row"},
        partial(_dgated_moe, _swiglu_oai),
    ),
    "dswiglu_dpreact_mod": (PACKED, {**DGATED, "dsum": "sum col"}, _dgated_preact),
    "dswiglu_norm_mod": (
        {**PACKED, "rstd": "col"},
        {**DGATED, "dsum": "sum col"},
        _dgated_norm,
    ),
    "dswiglu_rstd_preact_mod": (
        {**PACKED, "rstd": "col"},
        {**DGATED, "dsum": "sum col"},
        _dgated_rstd,
    ),
    "swiglu_mod": ({}, {"postact": "half"}, lambda acc: {"postact": _swiglu(*_lanes(acc))}),
    "norm_swiglu_mod": (
        {"rstd": "col", "bias": "row"},
        {"D": "tile", "postact": "half"},
        _norm_swiglu,
    ),
    "rstd_swiglu_epi": ({"rstd": "col"}, {"postact": "half"}, _rstd_gated),
    "rstd_swiglu_preact_epi": (
        {"rstd": "col"},
        {"D": "tile", "postact": "half"},
        lambda acc, rstd: {"D": acc, **_rstd_gated(acc, rstd)},
    ),
    "rope_epi": ({"table": "tile"}, D, lambda acc, table: {"D": _rotate(acc, table)}),
    "lse_partial_epi": (
        {"scale": 0.5},
        {"D": "tile", "sexp": "sum col"},
        lambda acc, scale: {"D": acc, "sexp": (acc * scale).exp().sum(1)},
    ),
    "lse_epi": (
        {},
        {"D": "tile", "lse": "lse col"},
        lambda acc: {"D": acc, "lse": acc.logsumexp(1)},
    ),
    "lse_target_epi": (
        {"target": "target"},
        {"D": "tile", "lse": "lse col", "target_logit": "col"},
        _lse_target,
    ),
    "rstd_lse_epi": (
        {"rstd": "col"},
        {"D": "tile", "lse": "lse col"},
        lambda acc, rstd: {"D": acc * rstd, "lse": (acc * rstd).logsumexp(1)},
    ),
    "amax_epi": (
        {},
        {"D": "tile", "amax": "max col"},
        lambda acc: {"D": acc, "amax": acc.abs().amax(1)},
    ),
    "head_rmsnorm_epi": (
        {"qk": HEAD},
        {"D": "tile", "rstd_out": "heads"},
        lambda acc, qk: {"D": _head_norm(acc), "rstd_out": _head_rstd(acc)},
    ),
    "qknorm_epi": (
        NORM,
        {"D": "tile", "rstd_out": "heads"},
        lambda acc, qk, w: {"D": _head_norm(acc, w), "rstd_out": _head_rstd(acc)},
    ),
    "qk_rope_epi": (
        {**NORM, "cs": "table"},
        D,
        lambda acc, qk, w, cs: {"D": _rotate(_head_norm(acc, w), cs.repeat(1, N // HEAD))},
    ),
    "qk_rope_ldg_epi": (
        {**NORM, "cs": "table"},
        D,
        lambda acc, qk, w, cs: {"D": _rotate(_head_norm(acc, w), cs.repeat(1, N // HEAD))},
    ),
    "rms_partial_epi": (
        {**C, "weight": "row"},
        {"D": "tile", "resid_out": "tile", "sqsum": "sum col"},
        _rms_partial,
    ),
    "rms_bwd_partial_epi": (
        {"y": "tile", "rstd": "col", "w": "row"},
        {"D": "tile", "dots": "sum col"},
        _rms_bwd_partial,
    ),
    "rms_bwd_apply_epi": (
        {**C, "y": "tile", "w": "row", "corr": "col"},
        {"D": "tile", "dw": "sum row"},
        _rms_bwd,
    ),
    "rms_bwd_apply_last_epi": (
        {"y": "tile", "w": "row", "corr": "col"},
        {"D": "tile", "dw": "sum row"},
        _rms_bwd,
    ),
    "rms_bwd_entry_epi": (
        {**C, "y": "tile", "rstd": "col", "w": "row"},
        {"D": "tile", "dots": "sum col", "dw": "sum row"},
        _rms_bwd_entry,
    ),
    f"linear_act_mod('silu', {FLAGS})": (
        {"mRowVecBroadcast": "row", "mColVecBroadcast": "col"},
        {"D": "tile", "mAuxOut": "tile"},
        lambda acc, mRowVecBroadcast, mColVecBroadcast: _act(F.silu, "mAuxOut")(
            acc + mRowVecBroadcast + mColVecBroadcast
        ),
    ),
    f"norm_act_mod('gelu_erf', {FLAGS})": (
        {"mRowVecBroadcast": "row", "mColVecBroadcast": "col"},
        {"D": "tile", "mAuxOut": "tile"},
        lambda acc, mRowVecBroadcast, mColVecBroadcast: _act(F.gelu, "mAuxOut")(
            acc * mRowVecBroadcast * mColVecBroadcast
        ),
    ),
    "dact_mod('gelu_tanh_approx')": (
        C,
        {"D": "tile", "mAuxOut": "tile"},
        lambda acc, c: {"D": _dact(acc, c)["D"], "mAuxOut": _dact(acc, c)["postact"]},
    ),
    "dgated_mod('swiglu', has_scale=False, has_reduce=False)": (
        PACKED,
        {"D": "pairs", "mAuxOut": "tile"},
        lambda acc, c: {"D": _dgated(acc, c)["D"], "mAuxOut": _dgated(acc, c)["postact"]},
    ),
    "sq_reduce_mod(has_c=True, has_rowvec=True, has_aux=True)": (
        {**C, "mRowVecBroadcast": "row"},
        {"D": "tile", "mAuxOut": "tile", "mColVecReduce": "sum col"},
        lambda acc, c, mRowVecBroadcast: {
            "D": (acc + c) * mRowVecBroadcast,
            "mAuxOut": acc + c,
            "mColVecReduce": (acc + c).square().sum(1),
        },
    ),
    "ln_affine_epi": (LN, D, lambda acc, **ln: {"D": _affine(acc, **ln)}),
    "ln_affine_gelu_epi": (
        LN,
        POST,
        lambda acc, **ln: _act(_gelu, "postact")(_affine(acc, **ln)),
    ),
    "ln_partial_epi": (
        {**C, "bias": "row", "weight": "row"},
        {"D": "tile", "resid_out": "tile", "hsum": "sum col", "sqsum": "sum col"},
        _ln_partial,
    ),
    "dgelu_ln_stats_epi": (
        {**C, "s": "col", "t": "col"},
        {"D": "tile", "r1": "sum col", "dwb": "sum row", "dwg": "sum row"},
        _dact_ln,
    ),
    "ln_bwd_apply_epi": (
        {**C, "y": "tile", "w": "row", "corr_mul": "col", "corr_add": "col"},
        {"D": "tile", "dw": "sum row", "dbias": "sum row"},
        _ln_bwd,
    ),
    "dgelu_dbias_epi": (
        C,
        {"D": "tile", "dwb": "sum row"},
        lambda acc, c: {"D": _dact(acc, c)["D"], "dwb": _dact(acc, c)["D"].sum(0)},
    ),
}

QUICK = {"rms_partial_epi": ("sm_90a",), "dswiglu_mod": ("sm_100a",)}
CASES = tuple(
    Case(f"epilogue {name}", partial(_problem, name, *row), quick=QUICK.get(name, ()))
    for name, row in TABLE.items()
)
