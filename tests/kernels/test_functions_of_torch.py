"""Functions that only imported operators use, in kernels: held against float64, and at edges."""

import pytest
import torch

import coda
from coda.frontend.tensor import apply
from coda.ir.scalars_of_torch import ROWS
from coda.runtime.simulate import device

T = coda.Tensor
SOME = [0.0, -0.0, 1e-30, 1e-3, 0.3, 0.5, 0.999, 1.0, 1.001, 2.0, 3.7, 60.0, 1e4, 1e30]


@coda.block
def functions(x: T["M D", coda.f32], y: T["M D", coda.f32]):
    return {row.name: apply(row.name, *(x, y)[: row.arity]) for row in ROWS}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_to_a_few_units_in_the_last_place(arch):
    one = torch.tensor([*SOME, float("inf"), float("nan")])
    one = torch.cat([one, -one])
    x, y = one.repeat(32, 1), one[:, None].repeat(1, 32)
    with device(arch, checks="raise"), torch.no_grad():
        found = functions(x.contiguous(), y.contiguous())
    for row in ROWS:
        wide = [t.double() for t in (x, y)[: row.arity]]
        exact = row.evaluate(*wide).float()
        close = {"rtol": 0.0 if row.exact else 1e-6, "atol": 0.0, "equal_nan": True}
        torch.testing.assert_close(found[row.name], exact, **close, msg=row.name)
