"""Values that a kernel can compute from what it loads get no kernel of their own."""

import runpy
from pathlib import Path

import pytest
import torch

import coda
from coda.ir.dims import ONE
from coda.ir.evaluate import evaluate
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower
from coda.runtime.reference import run_reference

EXAMPLE = Path(__file__).parents[2] / "examples" / "qwen3_layer.py"
T = coda.Tensor
SIZES = {"M": 5, "D": 64, "F": 96, "H": 2, "d": 32}


@coda.block
def norm_of_heads_beside_a_product(x: T["M (H d)"], w: T["F (H d)"], v: T["(H d) F"], g: T["d"]):
    """The statistic of the heads is one of the kernel that subtracts the product."""
    e = coda.exp(x)
    heads = coda.rms_norm(e.reshape("M (H d) -> M H d"), g)
    return heads.reshape("M H d -> M (H d)") - coda.silu(e @ w.T) @ v.T


def turned(x):
    """Both halves exchanged, and one of them passed through a function."""
    left, right = coda.split(x, 2)
    return coda.concat([right, coda.tanh(left)])


@coda.block
def returned_statistic(y: T["M D"], g: T["D"]):
    """The cast of a stored statistic is stored by the same kernel."""
    statistic = coda.logsumexp(y * g, keepdims=True)
    z = turned(y * coda.sigmoid(coda.logsumexp(statistic.reshape("M 1 -> M"))))
    z = turned(turned(z) * g)
    return z, statistic.cast(coda.f32)


BLOCKS = [
    (norm_of_heads_beside_a_product, ["rows", "gemm", "gemm"]),
    (returned_statistic, ["rows", "rows", "rows"]),
]


@pytest.mark.parametrize(("block", "kinds"), BLOCKS, ids=[b.__name__ for b, _ in BLOCKS])
def test_kernels_are_those_that_are_needed(block, kinds):
    sizes = {s: SIZES[s] for s in block.graph.symbols}
    program = lower(block.graph, sizes)
    assert [k.kind.name for k in program.kernels] == kinds
    torch.manual_seed(0)
    inputs = block.graph.inputs
    given = [torch.randn([d.size(sizes) for d in i.shape]).to(i.dtype.torch) for i in inputs]
    exact = evaluate(block.graph.roots, dict(zip(inputs, given, strict=True)), sizes)
    for found, wanted in zip(run_reference(program, given, exact=True), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted.double())


def test_factors_of_heads_are_computed_where_they_are_used():
    """The backward of QK-norm stores no number of a head: the kernels that read it compute it."""
    layer = runpy.run_path(str(EXAMPLE))["layer"].graph
    sizes = {"M": 256, "D": 128, "F": 192, "H": 4, "G": 2, "d": 32}
    backward = derive(layer, {s: sizes[s] for s in layer.symbols}, memory="min").backward
    program = lower(backward, {s: sizes[s] for s in backward.symbols})
    written = [n for k in program.kernels for group in k.stored for n in group]
    assert written
    assert not [n for n in written if n.shape[-1] == ONE and n.rank == 3]
