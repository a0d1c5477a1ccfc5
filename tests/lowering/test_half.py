"""float16: no value leaves the range that torch's values keep, forward or backward."""

import pytest
import torch
import torch.nn.functional as F

import coda
from coda.ir.types import bf16, f16, f32, f64
from coda.lowering.algebra.training import MEMORY
from coda.measure import relative
from coda.runtime.simulate import device

T = coda.Tensor
SIZES = {"M": 16, "D": 256, "N": 128}
SCALES = ((1.0, 1.0), (2e3, 100.0), (1.2e4, 10.0), (1e-2, 1e-5), (1e-3, 1e-3))  # of x, of gains


@coda.block
def normed(x: T["M D"], g: T["D"], w: T["N D"]):
    return coda.rms_norm(x, g, eps=1e-6) @ w.T


@coda.block
def layer_normed(x: T["M D"], g: T["D"], b: T["D"], w: T["N D"]):
    return coda.layer_norm(x, g, b) @ w.T


@coda.block
def gated(x: T["M D"], g: T["D"], w: T["N D"], v: T["N D"], u: T["D N"]):
    h = coda.rms_norm(x, g)
    return x + coda.swiglu(h @ w.T, h @ v.T) @ u.T


@coda.block
def normed_between(x: T["M D"], w: T["N D"], g: T["N"], v: T["D N"]):
    return coda.rms_norm(x @ w.T, g) @ v.T


@coda.block
def normed_twice(x: T["M D"], y: T["M D"], g: T["D"], w: T["N D"], h: T["N"]):
    return coda.rms_norm(coda.rms_norm(x + y, g) @ w.T, h)


def wide(*tensors):
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def rms_norm(x, g):
    (y,) = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * g


def layer_norm(x, g, b):
    y, g, b = wide(x, g, b)
    return F.layer_norm(y, y.shape[-1:], g, b).to(x.dtype)


TORCHS = {
    normed: lambda x, g, w: rms_norm(x, g) @ w.T,
    layer_normed: lambda x, g, b, w: layer_norm(x, g, b) @ w.T,
    gated: lambda x, g, w, v, u: x + (F.silu(rms_norm(x, g) @ w.T) * (rms_norm(x, g) @ v.T)) @ u.T,
    normed_between: lambda x, w, g, v: rms_norm(x @ w.T, g) @ v.T,
    normed_twice: lambda x, y, g, w, h: rms_norm(rms_norm(x + y, g) @ w.T, h),
}


def made(block, size, gain):
    """Activations of a size, gains and shifts, and weights that keep products in the range."""
    generator = torch.Generator().manual_seed(0)
    largest = max(gain, 1.0) * (max(size, 1.0) if block is normed_between else 1.0)
    found = []
    for node in block.graph.inputs:
        shape = [d.size(SIZES) for d in node.shape]
        if node.rank == 1:
            x = torch.rand(shape, generator=generator) * gain
        else:
            scale = {"x": size, "y": size / 8}.get(node.name, 1 / 16 / largest)
            x = torch.randn(shape, generator=generator) * scale
        found.append(x.half())
    return found


def run(call, inputs, dtype=None):
    """The value and all gradients."""
    mine = [x.to(dtype or x.dtype, copy=True).requires_grad_() for x in inputs]
    y = call(*mine)
    d = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).half()
    return [t.detach().double() for t in (y, *torch.autograd.grad(y, mine, d.to(y.dtype)))]


def check(block, scales, call):
    inputs = made(block, *scales)
    exact, torchs = run(TORCHS[block], inputs, torch.float64), run(TORCHS[block], inputs)
    for a, b, c in zip(run(call, inputs), torchs, exact, strict=True):
        assert relative(a, c) <= 3 * relative(b, c)


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("block", TORCHS, ids=lambda b: b.__name__)
def test_values_and_gradients_are_as_exact_as_torchs(block, scales):
    check(block, scales, lambda *x: block(*x, backend="reference"))


@pytest.mark.parametrize("memory", MEMORY)
def test_however_much_is_saved(memory):
    check(gated, SCALES[1], lambda *x: gated(*x, memory=memory, backend="reference"))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("block", TORCHS, ids=lambda b: b.__name__)
def test_laws_that_leave_a_scale_for_later_ask_for_the_range(block, frozen):
    def unscaled(dtype):
        return {s.law.name for s in block.lower("sm_90a", sizes, dtype, frozen=frozen).steps}

    sizes = {s: SIZES[s] for s in block.graph.symbols}
    laws = {n for d in (bf16, f32, f64) for n in unscaled(d) if "past_contraction" in n}
    laws -= {"gain_past_contraction_over_rows"}
    assert laws
    assert not laws & unscaled(f16)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_kernels_keep_to_the_range(arch):
    with device(arch, checks="raise"):
        check(normed, SCALES[1], lambda *x: normed(*x, backend="sim"))
