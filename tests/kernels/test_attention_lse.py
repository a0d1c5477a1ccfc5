"""The logsumexp of scores beside their attention: one kernel writes both, in float32."""

import pytest
import torch

import coda
from coda import masks
from coda.ir.attend import LSE, VALUE
from coda.ir.evaluate import evaluate
from coda.kernels.attention.kind import ATTENTION
from coda.measure import random_inputs
from coda.runtime.simulate import device
from tests.kernels.test_kernels import ARCHS

T = coda.Tensor


def beside(mask=None):
    @coda.block
    def f(q: T["B (G R) S d"], k: T["B G T d"], v: T["B G T e"]):
        return coda.attention(q, k, v, mask=mask, return_lse=True)

    return f


@coda.block
def by_hand(q: T["B H S d"], k: T["B H T d"], v: T["B H T e"]):
    """The second result is used, too, and by the rest of the block."""
    s = (q @ k.mT) * 0.25
    y = coda.softmax(s) @ v
    lse = coda.logsumexp(s.cast(coda.f32), keepdims=True)
    return y, y * coda.sigmoid(lse).cast(y.dtype)


@coda.block
def saved(q: T["B H S d"], k: T["B H T d"], v: T["B H T e"]):
    s = (q @ k.mT) * 0.25
    return coda.softmax(s) @ v, coda.logsumexp(s)


BANDS = {
    "causal": masks.causal,
    "no keys for 40 rows": lambda b, h, i, j: j <= i - 40,
    "window": masks.sliding_window(9),
    "all": None,
}
SMALL = {"B": 2, "G": 1, "R": 2, "S": 5, "T": 7, "d": 16, "e": 8}


def test_one_kernel_has_both_results():
    for mask in BANDS.values():
        program = beside(mask).lower("sm_90a", SMALL)
        assert [k.kind for k in program.kernels] == [ATTENTION]
        (kernel,) = program.kernels
        parts = [p.part for p in kernel.mainloop.parts]
        assert sorted(parts) == sorted((VALUE, LSE))
        lse = kernel.mainloop.buffer(LSE)
        assert program.buffers[lse].dtype == coda.f32
        assert f"{program.buffers[lse].nbytes(SMALL)}" == f"{2 * 2 * 5 * 4}"
        assert kernel.mainloop.problem(program.target, SMALL).lse


def test_a_logsumexp_that_nothing_reads_is_not_written():
    @coda.block
    def f(q: T["B H S d"], k: T["B H T d"], v: T["B H T e"]):
        return coda.attention(q, k, v)

    program = f.lower("sm_90a", {"B": 1, "H": 2, "S": 5, "T": 7, "d": 16, "e": 8})
    (kernel,) = program.kernels
    assert kernel.mainloop.buffer(LSE) is None
    assert not kernel.mainloop.problem(program.target, program.sizes).lse
    assert len(kernel.writes()) == 1


def test_a_narrow_logsumexp_is_rounded_by_a_kernel_after_it():
    """One that is returned in bf16; only the attention reads q, k and v."""
    program = saved.lower("sm_90a", {"B": 1, "H": 2, "S": 5, "T": 7, "d": 16, "e": 8})
    kinds = [k.kind.name for k in program.kernels]
    assert kinds == ["attention", "rows"]
    assert program.buffers[program.kernels[0].mainloop.buffer(LSE)].dtype == coda.f32


# Values of q: how they are made of random numbers.
VALUES = {
    "random": lambda q: q,
    "large": lambda q: q * 100,
    "equal scores": lambda q: q * 0 + 1,
    "one key": lambda q: q.sign() * 40,
    "tiny": lambda q: q * 1e-6,
}
CASES = {
    "no keys for 40 rows": {"B": 2, "G": 1, "R": 3, "S": 130, "T": 70, "d": 64, "e": 64},
    "causal": {"B": 1, "G": 2, "R": 1, "S": 64, "T": 200, "d": 128, "e": 64},
    "window": {"B": 1, "G": 1, "R": 2, "S": 1, "T": 129, "d": 40, "e": 64},
    "all": {"B": 1, "G": 1, "R": 2, "S": 33, "T": 1, "d": 192, "e": 128},
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_kernels(name, arch):
    """One compilation, for values of all kinds; later calls replay the first."""
    block, sizes = beside(BANDS[name]), CASES[name]
    q, k, v = random_inputs(block.graph, sizes)
    with device(arch, checks="raise") as gpu:
        for change in VALUES.values():
            inputs = (change(q), k, v)
            dims = {s: sizes[s] for s in ("G", "R")}
            found = block(*inputs, backend="sim", arch=arch, dims=dims)
            hold(found, block, inputs, sizes, ERRORS[arch])
        assert not gpu.report().findings


# Of the logsumexp. On sm_100a powers are polynomials for a part of the elements.
ERRORS = {"sm_90a": 5e-6, "sm_100a": 1.5e-4}


def hold(found, block, inputs, sizes, most):
    """The logsumexp within `most` and 1e-6 of the largest, -inf where it is, and the value."""
    known = dict(zip(block.graph.inputs, inputs, strict=True))
    y, lse = evaluate(block.graph.roots, known, sizes, torch.float64)
    none = torch.isneginf(lse)
    assert found[1].dtype == torch.float32
    assert torch.equal(torch.isneginf(found[1]), none)
    error = (found[1].double() - lse).masked_fill(none, 0.0).abs().amax()
    assert error <= most + 1e-6 * lse.masked_fill(none, 0.0).abs().amax()
    assert (found[0].double() - y).norm() <= 3e-3 * y.norm()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_a_block_reads_it(arch):
    sizes = {"B": 2, "H": 2, "S": 33, "T": 70, "d": 64, "e": 64}
    inputs = random_inputs(by_hand.graph, sizes)
    with device(arch, checks="raise") as gpu:
        found = by_hand(*inputs, backend="sim", arch=arch)
        known = dict(zip(by_hand.graph.inputs, inputs, strict=True))
        exact = evaluate(by_hand.graph.roots, known, sizes, torch.float64)
        for x, y in zip(found, exact, strict=True):
            assert (x.double() - y).norm() <= 4e-3 * y.norm()
        assert len(gpu.report().launches) == 2
        assert not gpu.report().findings
