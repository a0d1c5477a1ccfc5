"""log1p, expm1 and clamp in kernels: to a few units in the last place, and at edges."""

import math

import pytest
import torch

import coda
from coda.runtime.simulate import device

T = coda.Tensor


@coda.block
def functions(x: T["M D", coda.f32]):
    return {
        "log1p": coda.log1p(x),
        "expm1": coda.expm1(x),
        "clamp": coda.clamp(x, -0.1, 0.1),
        "least": coda.clamp(x, low=0.1),
        "most": coda.clamp(x, high=0.1),
    }


def numbers():
    """Tiny to huge numbers of both signs, what lies around the bends, and no numbers."""
    scales = torch.logspace(-40, 38, 400, dtype=torch.float64)
    around = [-0.5, 1.0, -1.0, 88.0, 88.72, -30.0, math.log(2) / 2, -math.log(2) / 2, 0.1, -0.1]
    near = torch.tensor(around)[:, None] * (1 + torch.arange(-6, 7) * 2.0**-23)
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45])
    steps = torch.linspace(-1.5, 3.0, 500)
    found = [scales, -scales, near.flatten(), edges, steps, torch.linspace(-100, 100, 333)]
    flat = torch.cat([f.float() for f in found])
    return flat[: len(flat) // 16 * 16].reshape(-1, 16)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_to_a_few_units_in_the_last_place(arch):
    x = numbers()
    with device(arch, checks="raise"), torch.no_grad():
        found = functions(x)
    wide = x.double()
    for name, fn, most in (("log1p", torch.log1p, 5), ("expm1", torch.expm1, 2)):
        exact, y = fn(wide), found[name].double()
        # An exponential far from zero is as good as the device's own.
        good = exact.float().isfinite() & (wide < 88)
        unit = torch.ldexp(torch.tensor(1.0), torch.frexp(exact.float())[1] - 24).double()
        off = ((y - exact).abs() / unit.clamp(min=2.0**-149))[good]
        assert off.max() <= most, (name, off.max(), x[good][off.argmax()])
        assert torch.equal(y.isnan(), exact.isnan()), name
        assert torch.equal(
            y[~good & ~y.isnan()].isfinite(), exact.float()[~good & ~y.isnan()].isfinite()
        ), name
    plain = {"clamp": x.clamp(-0.1, 0.1), "least": x.clamp(0.1), "most": x.clamp(max=0.1)}
    for name, expected in plain.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0, equal_nan=True)
