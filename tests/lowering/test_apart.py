"""GEMMs that store their accumulators alone: what that means, and when it is chosen."""

import runpy
from pathlib import Path

import torch
from hypothesis import given, settings

from coda.ir.evaluate import evaluate
from coda.ir.graph import Contract
from coda.lowering.algebra.policy import DEFAULT_POLICY
from coda.lowering.compiler import lower, request, run_stages
from coda.lowering.explain import Explanation
from coda.lowering.program.price import price
from coda.lowering.stages import Trial
from coda.runtime.reference import run_reference
from tests.lowering.test_random_blocks import SETTINGS, SIZES, blocks, values

EXAMPLES = Path(__file__).parents[2] / "examples"


def bare(graph, sizes, target="sm_90a"):
    """The Program of a graph in which no GEMM computes anything but its accumulator."""
    asked = request(graph, sizes, target, frozen=False, policy=DEFAULT_POLICY)

    def run(**more):
        return run_stages(asked, lambda *_: False, Trial(2), **more)

    nodes = [n for k in run().kernels for n in k.nodes]
    return run(bare=dict.fromkeys((n for n in nodes if isinstance(n, Contract)), "asked for"))


def fused(program):
    """What GEMMs compute beside their contractions."""
    gemms = [k for k in program.kernels if k.kind.tiled]
    return [n for k in gemms for n in k.nodes if not isinstance(n, Contract)]


@settings(SETTINGS, max_examples=60)
@given(blocks())
def test_a_program_of_bare_gemms_means_what_its_block_means(graph):
    used = {s for i in graph.inputs for d in i.shape for s in d.symbols}
    sizes = {s: n for s, n in SIZES.items() if s in used}
    program = bare(graph, sizes)
    assert fused(program) == []
    inputs = values(graph, sizes)
    expected = evaluate(graph.roots, dict(zip(graph.inputs, inputs, strict=True)), sizes)
    found = run_reference(program, inputs, exact=True, sizes=sizes)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_an_epilogue_that_takes_the_tile_of_its_gemm_is_a_kernel_of_its_own():
    module = runpy.run_path(str(EXAMPLES / "gpt2_layer.py"))
    layer, sizes = module["starcoder2_layer"], module["STARCODER2_DIMS"]
    few = layer.lower("H200", {**sizes, "M": 2048})
    alone = [k for k in few.kernels if k.kind.tiled and len(k.nodes) == 1]
    assert len(alone) == 1
    assert "stores its accumulator alone" in str(Explanation(few))
    many = layer.lower("H200", {**sizes, "M": 8192})
    assert all(len(k.nodes) > 1 for k in many.kernels if k.kind.tiled)


def test_what_is_chosen_is_cheaper_than_all_that_fits_in_epilogues():
    module = runpy.run_path(str(EXAMPLES / "gpt2_layer.py"))
    layer, sizes = module["starcoder2_layer"], {**module["STARCODER2_DIMS"], "M": 2048}
    asked = request(layer.graph, sizes, "H200", frozen=True, policy=DEFAULT_POLICY)
    together = run_stages(asked, lambda *_: False, Trial(0))
    chosen = lower(layer.graph, sizes, "H200", frozen=True)
    assert price(chosen).undercuts(price(together))
    assert price(chosen).seconds < 0.95 * price(together).seconds
    assert Explanation(chosen).seconds < Explanation(chosen).baseline
