"""Σ softmax(x) v as an online fold: in a GEMM's epilogue, in a row-wise kernel, on hostile values.

A weight of 0 times an infinite value is NaN, as it is written, and so in torch.
"""

import pytest
import torch

import coda
from tests.kernels.edges import differ, run
from tests.kernels.test_kernels import ARCHS

T, f32, INF, NAN = coda.Tensor, coda.f32, float("inf"), float("nan")
SLOW = pytest.mark.slow


def weighted(scores, values):
    return coda.sum(coda.softmax(scores) * values)


@coda.block
def of_products(x: T["M K"], w: T["N K"], mask: T["M N", f32], y: T["M N", f32]):
    """Of a GEMM's columns: as values, as scores, and as both."""
    h = (x @ w.T).cast(f32)
    logs = coda.log_softmax(h + mask)
    return {
        "entropy": -coda.sum(coda.exp(logs) * logs),
        "masked": weighted(h + mask, y),
        "values": weighted(y + mask, h),
    }


@coda.block
def of_rows(scores: T["M N"], mask: T["M N", f32], y: T["M N", f32]):
    """Of matrices in memory."""
    s = scores.cast(f32) + mask
    logs = coda.log_softmax(s)
    return {"entropy": -coda.sum(coda.exp(logs) * logs), "mean": weighted(s, y)}


def hostile(columns, generator):
    """Masks and values [M, columns], a row each for what is hostile to a fold of pairs."""
    mask = torch.zeros(12, columns)
    mask[1] = -INF
    mask[2, : columns - 1] = -INF
    mask[3, columns // 2 :] = -INF
    mask[4, 0], mask[5, columns - 1] = INF, NAN
    mask[6], mask[7] = -1e30, 3e4
    mask[8] = torch.linspace(-3e4, 3e4, columns)
    values = torch.randn(12, columns, generator=generator)
    values[9, 0], values[10, columns - 1] = INF, NAN
    values[3, columns - 1] = INF  # of weight 0
    values[11] = 1e6
    return mask, values


def held(found, reference, exact, scores, values):
    """Within the rounding of the scores: of weights, and of log Σ exp s − Σ p s, an entropy."""
    rounding = scores.nan_to_num(0, 0, 0).abs().amax(1).double() * 2**-23 + 2e-6
    for name, value in found.items():
        of = scores if name in ("entropy", "values") else values
        slack = (
            2 * rounding * (1 if name == "entropy" else of.nan_to_num(0, 0, 0).abs().amax(1) + 1)
        )
        for expected in (reference[name], exact[name]):
            wrong = differ(value, expected, slack)
            assert not wrong.any(), (name, wrong.nonzero()[:4], value[wrong], expected[wrong])


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("columns", [8, 131, 320])
def test_folds_of_pairs_in_a_gemm(columns, arch):
    generator = torch.Generator().manual_seed(0)
    mask, values = hostile(columns, generator)
    x, w = torch.zeros(12, 16).bfloat16(), torch.randn(columns, 16, generator=generator).bfloat16()
    x[:, 0] = 1.0
    found, reference, exact = run(of_products, (x, w, mask, values), arch)
    scores = x.float() @ w.float().T + mask.nan_to_num(0, 0, 0)
    held(found, reference, exact, scores.abs() + values.nan_to_num(0, 0, 0).abs(), values)


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("columns", [1, 131, 4096])
def test_folds_of_pairs_in_a_row(columns, arch):
    generator = torch.Generator().manual_seed(0)
    mask, values = hostile(columns, generator)
    scores = torch.randn(12, columns, generator=generator).bfloat16()
    found, reference, exact = run(of_rows, (scores, mask, values), arch)
    held(found, reference, exact, scores.float() + mask, values)
