"""Row-wise kernels whose elements read columns of other elements, at several distances at once.

RoPE of neighbours and of halves of heads, halves of the row that change places, and any reduction
of what is computed so: each block is one kernel that reads each matrix once.
"""

import pytest
import torch

import coda
from coda.ir.evaluate import evaluate
from coda.lowering.program.cost import tensor_traffic
from coda.runtime.simulate import device
from tests.kernels.test_kernels import ARCHS

T = coda.Tensor
SLOW = pytest.mark.slow
SIZES = {"M": 37, "D": 256}


def heads(x):
    return x.reshape(x.shape[0], x.shape[1] // 32, 32)


def turned(x, cos, sin, *, interleaved):
    return coda.rope(heads(x), cos, sin, interleaved=interleaved).reshape(*x.shape)


def crossed(x):
    a, b = coda.split(x, 2)
    return coda.concat([b, coda.tanh(a)])


@coda.block
def softmax_of_pairs(x: T["M D", coda.f32], cos: T["M 16", coda.f32], sin: T["M 16", coda.f32]):
    """A maximum and a fold of powers of column pairs."""
    return coda.softmax(turned(x, cos, sin, interleaved=True))


@coda.block
def pairs_of_pairs(x: T["M D", coda.f32], cos: T["M 16", coda.f32], sin: T["M 16", coda.f32]):
    """Four columns for each element, and the largest of a row."""
    y = turned(turned(x, cos, sin, interleaved=True), cos, sin, interleaved=False)
    return y - coda.max(y, keepdims=True)


@coda.block
def two_layouts(x: T["M D", coda.f32], cos: T["M 16", coda.f32], sin: T["M 16", coda.f32]):
    """Pairs of three distances, 1, 16 and half a row, in one kernel with a sum over the rows."""
    y = turned(x, cos, sin, interleaved=True) * crossed(x)
    z = y + turned(x, cos, sin, interleaved=False)
    return z, coda.sum(z, axis=0)


@coda.block
def other_groups(x: T["M D", coda.f32], w: T["32", coda.f32]):
    """A norm of heads whose halves change places, so that elements read other heads' statistics."""
    y = coda.rms_norm(heads(x), w, eps=1e-3).reshape(*x.shape)
    return crossed(y) + coda.logsumexp(crossed(crossed(y)), keepdims=True)


@coda.block
def odd_distance(x: T["M D", coda.f32], y: T["M D", coda.f32]):
    """Halves of a row of no power of two, at whole vectors and at single columns."""
    return crossed(x) * y, coda.max(crossed(x) + crossed(y), axis=-1)


CASES = (
    (softmax_of_pairs, SIZES, 1),
    (pairs_of_pairs, SIZES, 1),
    (two_layouts, SIZES, 2),
    (other_groups, SIZES, 1),
    (odd_distance, {"M": 37, "D": 6 * 16}, 1),
    (odd_distance, {"M": 9, "D": 2 * 77}, 1),
)
QUICK = {("other_groups", "sm_90a"), ("two_layouts", "sm_100a")}


def arguments(block, sizes):
    generator = torch.Generator().manual_seed(0)
    shapes = [[d.size(sizes) for d in i.shape] for i in block.graph.inputs]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def slow(block, arch):
    return () if (block.__name__, arch) in QUICK else (SLOW,)


@pytest.mark.parametrize(
    ("block", "sizes", "launches", "arch"),
    [pytest.param(*c, a, marks=slow(c[0], a)) for c in CASES for a in ARCHS],
)
def test_elements_that_read_columns_elsewhere(block, sizes, launches, arch):
    program = block.lower(arch, sizes)
    assert len(program.kernels) == launches, program
    read = dict(tensor_traffic(program, program.kernels[0]).reads)
    assert read["x"] == 4 * sizes["M"] * sizes["D"]
    values = arguments(block, sizes)
    with device(arch):
        found = block(*values)
    found = found if isinstance(found, tuple) else (found,)
    given = dict(zip(block.graph.inputs, (v.double() for v in values), strict=True))
    exact = evaluate(block.graph.roots, given, sizes)
    for one, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=2e-5)
