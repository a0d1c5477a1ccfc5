"""GEMMs that store their accumulators alone: what that means, and when it is chosen."""

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import coda
from coda import kernels
from coda.ir.evaluate import evaluate
from coda.ir.graph import Contract
from coda.ir.types import bf16
from coda.lowering.algebra.policy import DEFAULT_POLICY
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower, request, run_stages
from coda.lowering.explain import Explanation
from coda.lowering.program.baseline import unfused_price
from coda.lowering.program.kernel import kind_of
from coda.lowering.program.price import price, price_of
from coda.lowering.stages import Trial
from coda.runtime.reference import run_reference
from tests.lowering.test_random_blocks import SETTINGS, SIZES, blocks, values

LARGE = {"M": 2048, "D": 1024, "E": 1536}
EXAMPLES = Path(__file__).parents[2] / "examples"


def bare(graph, sizes, target="sm_90a", *, check=0):
    """The Program of a graph in which no GEMM computes anything but its accumulator."""
    asked = request(graph, sizes, target, frozen=False, policy=DEFAULT_POLICY)

    def run(**more):
        return run_stages(asked, lambda *_: False, Trial(check), **more)

    nodes = [n for k in run().kernels for n in k.nodes]
    return run(bare=dict.fromkeys((n for n in nodes if isinstance(n, Contract)), "asked for"))


def fused(program):
    """What GEMMs compute beside their contractions."""
    gemms = [k for k in program.kernels if k.kind.tiled]
    return [n for k in gemms for n in k.nodes if not isinstance(n, Contract)]


@settings(SETTINGS, max_examples=30)
@given(blocks())
def test_a_program_of_bare_gemms_means_what_its_block_means(graph):
    used = {s for i in graph.inputs for d in i.shape for s in d.symbols}
    sizes = {s: n for s, n in SIZES.items() if s in used}
    program = bare(graph, sizes, check=2)
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


def parts(graph, wanted=None):
    """A block, and the forward and backward of its training, each with the sizes that it has."""
    sizes = {s: LARGE[s] for s in graph.symbols}
    training = derive(graph, sizes, wanted)
    for part in (graph, training.forward, training.backward):
        yield part, {s: LARGE[s] for s in part.symbols}


def never_dearer_than_bare(graph):
    for part, sizes in parts(graph):
        assert not price(bare(part, sizes, "H200")).undercuts(price(lower(part, sizes, "H200")))


@settings(SETTINGS, max_examples=8)
@given(blocks(20, bf16))
def test_no_program_costs_more_than_with_all_its_gemms_bare(graph):
    never_dearer_than_bare(graph)


@pytest.mark.slow
@settings(SETTINGS, max_examples=200)
@given(blocks(20, bf16))
def test_no_program_of_many_costs_more_than_with_all_its_gemms_bare(graph):
    never_dearer_than_bare(graph)


def test_a_block_whose_epilogue_makes_more_kernels_has_bare_gemms():
    """Halves change places in no GEMM, so that its rotated values would be stored for them."""

    @coda.block
    def turned(
        x: coda.Tensor["M D"],
        w: coda.Tensor["E D"],
        cos: coda.Tensor["M 16"],
        sin: coda.Tensor["M 16"],
    ):
        y = x @ w.T
        heads = y.reshape(y.shape[0], y.shape[1] // 32, 32)
        z = y + coda.mean(coda.rope(heads, cos, sin).reshape(*y.shape), keepdims=True)
        first, second = coda.split(z, 2)
        z = coda.concat([second, coda.tanh(first)])
        return coda.rope(z.reshape(z.shape[0], z.shape[1] // 32, 32), cos, sin).reshape(*z.shape)

    program = lower(turned.graph, LARGE, "H200")
    asked = request(turned.graph, LARGE, "H200", frozen=False, policy=DEFAULT_POLICY)
    together = run_stages(asked, lambda *_: False, Trial(0))
    assert fused(together)
    assert not fused(program)
    assert price(program).undercuts(price(together))


def unfused(program):
    """The price of bare GEMMs and the rest fused."""
    known = {s: n for s, n in program.sizes.items() if s in program.fixed}
    return unfused_price(program, lambda node: kind_of(kernels.KINDS, node, known))


def programs(graph):
    """The Programs of a block, and of its training; tables of RoPE are not trained."""
    wanted = [i.name for i in graph.inputs if not i.name.startswith(("cos", "sin"))]
    for part, sizes in parts(graph, wanted):
        yield lower(part, sizes, "H200")


@settings(SETTINGS, max_examples=14)
@given(blocks(20, bf16))
def test_programs_beside_bare_gemms_with_the_rest_fused(graph):
    """What remains above is a launch for a number of all rows, and rereads of its operands."""
    for program in programs(graph):
        own = price_of(program, program.kernels)
        assert own.seconds <= 1.13 * unfused(program).seconds


@pytest.mark.slow
@settings(SETTINGS, max_examples=300)
@given(blocks(20, bf16))
def test_many_programs_beside_bare_gemms_with_the_rest_fused(graph):
    """Where numbers of all rows follow each other, launches for them are beside small matrices."""
    for program in programs(graph):
        own, ramp = price_of(program, program.kernels), program.target.rates.ramp
        assert own.seconds <= 1.13 * unfused(program).seconds + 2 * ramp


def test_the_examples_beside_bare_gemms_with_the_rest_fused():
    module = runpy.run_path(str(EXAMPLES / "llama_layer.py"))
    wanted = [i.name for i in module["layer"].graph.inputs if i.name not in ("cos", "sin")]
    for rows in (8192, 2048):
        sizes = {**module["DIMS"], "M": rows}
        for program in module["layer"].lower_training("H200", sizes, wanted=wanted):
            own = price_of(program, program.kernels)
            assert own.seconds < 0.95 * unfused(program).seconds
