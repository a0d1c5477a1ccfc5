"""A logsumexp over the rows of a GEMM, in the simulator: partials of tiles, and their fold."""

import math

import pytest
import torch

import coda


@coda.block
def over_rows(
    x: coda.Tensor["N D"],
    w: coda.Tensor["M D"],
    shift: coda.Tensor["N 1", coda.f32],
):
    logits = (x @ w.T).cast(coda.f32) + shift
    return coda.logsumexp(logits, axis=0), coda.logsumexp(logits)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("rows", [200, 3])
def test_logsumexp_over_rows(arch, rows):
    """Ragged tiles, rows of −inf, one large row, then a row of +inf, and one of NaN."""
    generator = torch.Generator().manual_seed(rows)
    x, w = (torch.randn(n, 64, generator=generator).bfloat16() / 4 for n in (rows, 136))
    shift = torch.randn(rows, 1, generator=generator)
    for row, value in ((0, -math.inf), (1, 300.0), (2, math.inf), (2, math.nan)):
        shift[row] = value
        found = over_rows(x, w, shift, backend="sim", arch=arch)
        logits = x.double() @ w.double().T + shift.double()
        for one, axis in zip(found, (0, 1), strict=True):
            expected = torch.logsumexp(logits, axis)
            torch.testing.assert_close(one.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
