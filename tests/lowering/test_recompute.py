"""Values that a kernel can compute from what it loads get no kernel of their own."""

import pytest
import torch

import coda
from coda.ir.evaluate import evaluate
from coda.lowering.compiler import lower
from coda.runtime.reference import run_reference

T = coda.Tensor
SIZES = {"M": 5, "D": 64, "F": 96, "H": 2, "d": 32}


@coda.block
def norm_of_heads_beside_a_product(x: T["M (H d)"], w: T["F (H d)"], v: T["(H d) F"], g: T["d"]):
    """The statistic of the heads is one of the kernel that subtracts the product."""
    e = coda.exp(x)
    heads = coda.rms_norm(e.reshape("M (H d) -> M H d"), g)
    return heads.reshape("M H d -> M (H d)") - coda.silu(e @ w.T) @ v.T


BLOCKS = [(norm_of_heads_beside_a_product, ["rows", "gemm", "gemm"])]


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
