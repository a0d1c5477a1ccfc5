"""What the derived backwards must look like, by the kernels of their Programs."""

import runpy
from pathlib import Path

import pytest
import torch

import coda
from coda.ir.graph import Input
from coda.kernels.gemm.kind import GEMM
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.rowwise.kind import ROWWISE
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower
from coda.lowering.program.access import Periodic, Tile
from coda.lowering.program.epilogue import SumRows
from coda.runtime.reference import run_reference

ROOT = Path(__file__).parents[2] / "examples"
T = coda.Tensor
SMALL = {"M": 256, "D": 128, "F": 512, "H": 4, "G": 2, "d": 32, "V": 1000}


def trained(block, sizes=SMALL, arch="sm_90a"):
    sizes = {s: sizes[s] for s in block.graph.symbols}
    wanted = [i.name for i in block.graph.inputs if i.name not in ("cos", "sin")]
    training = derive(block.graph, sizes, wanted)
    forward, backward = (
        lower(g, {s: sizes[s] for s in g.symbols}, arch)
        for g in (training.forward, training.backward)
    )
    return training, forward, backward


def example(name, block="layer"):
    return runpy.run_path(str(ROOT / f"{name}.py"))[block]


def passes(program):
    """Passes over rows that read or write more than a number a row."""
    return [
        k
        for k in program.kernels
        if k.kind is ROWWISE
        and any(isinstance(o.access, Tile | Periodic) for o in k.body.epilogue.operands)
    ]


EXAMPLES = ["llama_layer", "qwen3_layer", "gpt2_layer"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_rows_are_not_built_into_a_backward(name):
    _, _, backward = trained(example(name))
    assert "M" not in backward.fixed


def test_program_of_the_backward(golden):
    """A whole layer; each mechanism alone is in stages/."""
    _, _, backward = trained(example("llama_layer"))
    golden("llama_layer_backward.program", str(backward))


@coda.block
def rms(x: T["M D"], g: T["D"], w: T["F D"], v: T["D F"]):
    return x + coda.silu(coda.rms_norm(x, g) @ w.T) @ v.T


@coda.block
def layer(x: T["M D"], g: T["D"], b: T["D"], w: T["F D"], c: T["F"], v: T["D F"]):
    return x + coda.gelu(coda.layer_norm(x, g, b) @ w.T + c) @ v.T


@pytest.mark.parametrize(("block", "statistics"), [(rms, 1), (layer, 2)])
def test_a_norms_backward_lies_in_the_gemms(block, statistics):
    """Statistics are sinks where the cotangent is made, applied in the epilogue of the dgrad."""
    _, _, backward = trained(block)
    assert not passes(backward)
    assert not any(k.kind is TORCH for k in backward.kernels)
    maker, dgrad, *_ = gemms(backward)
    along_rows = [s for s in maker.body.epilogue.sinks if not isinstance(s, SumRows)]
    assert len(along_rows) == statistics
    assert any(s.buffer == "dx" for s in dgrad.body.epilogue.stores)
    assert any(isinstance(s, SumRows) for k in gemms(backward) for s in k.body.epilogue.sinks)


def test_the_weight_gradient_reads_the_raw_activation():
    """The normalised input does not exist: the cotangent carries the row's factor."""
    _, _, backward = trained(rms)
    read = [
        k.mainloop.contracts[0].rhs.operands[0]
        for k in gemms(backward)
        if k.mainloop.contracts[0].rhs.operands
    ]
    assert any(isinstance(n, Input) and n.name == "x" for n in read)


def test_rope_of_q_k_and_v_is_one_pass_backward():
    """One pass over rows of q, k and v side by side, each read at its own columns."""
    _, forward, backward = trained(example("llama_layer"))
    (one,) = passes(backward)
    width = (SMALL["H"] + 2 * SMALL["G"]) * SMALL["d"]
    assert one.mainloop.width == width
    tiles = [o for o in one.body.epilogue.operands if isinstance(o.access, Tile)]
    spans = {o.name: o.access.span for o in tiles if o.access.span}
    assert {spans["d_q"], spans["d_k"], spans["d_v"]} == {(0, 128), (128, 64), (192, 64)}
    (stored,) = [s for s in one.body.epilogue.stores if isinstance(s.access, Tile)]
    assert not stored.span
    assert len(one.body.epilogue.statistics) == 1
    assert not passes(forward)


def test_outputs_are_kept_in_place_of_what_they_are_linear_in():
    """⟨Rᵀ dy, z⟩ = ⟨dy, R z⟩: the forward saves q, k and v, which it gives anyway."""
    training, forward, _ = trained(example("llama_layer"))
    roots = dict(training.forward.outputs)
    outputs = {roots[n] for n in ("x", "q", "k", "v")}
    assert sum(roots[n] in outputs for n in training.saved) >= 4
    stores = [s for k in gemms(forward) for s in k.body.epilogue.stores]
    wide = [s for s in stores if isinstance(s.access, Tile)]
    assert sum(s.buffer.startswith("saved") for s in wide) == 2  # x1, and gate with up


def test_qk_norms_backward_is_part_of_that_pass():
    """Statistics of heads and sums over rows for the gains, in the pass of RoPE's backward."""
    _, forward, backward = trained(example("qwen3_layer"))
    assert not passes(forward)
    (one,) = passes(backward)
    epilogue = one.body.epilogue
    assert {s.group for s in epilogue.statistics} == {0, SMALL["d"]}
    assert [isinstance(s, SumRows) for s in epilogue.sinks] == [True, True]


@coda.block
def normed_heads(x: T["B S D"], w: T["(H d) D"], g: T["d"], cos: T["S d/2"], sin: T["S d/2"]):
    q = coda.rms_norm((x @ w.T).reshape("B S (H d) -> B S H d"), g)
    return coda.rope(q, cos, sin)


def test_a_gain_of_heads_is_summed_in_that_pass_for_a_batch_of_sequences_too():
    """The sum goes over batch, sequence and heads: all rows of the pass and some of its columns."""
    sizes = {**SMALL, "B": 3, "S": 64}
    _, _, backward = trained(normed_heads, sizes)
    assert not any(k.kind is TORCH for k in backward.kernels)
    (one,) = passes(backward)
    assert [isinstance(s, SumRows) for s in one.body.epilogue.sinks] == [True]


def test_biases_of_siblings_have_one_gradient():
    """q, k and v of a LayerNorm block: one contraction for all weights, one sum for all biases."""
    _, _, backward = trained(example("gpt2_layer", "starcoder2_layer"))
    assert len(list(gemms(backward))) == 8
    (one,) = passes(backward)
    assert len(one.sunk) == 2  # biases, and what the mean takes of the weights' gradient
    assert all(s.span is None for s in one.body.epilogue.sinks)


def test_sums_that_are_only_returned_are_folded_together():
    _, _, backward = trained(example("llama_layer"))
    last = backward.kernels[-1]
    assert last.kind is ROWWISE
    assert len(last.body.folded) == 2
    assert sum(k.kind is GEMM for k in backward.kernels) == 8


@coda.block
def cotangents(x: T["M D"], w: T["D"], b: T["D"]):
    return x * w + b


def test_sums_over_rows_without_any_gemm():
    _, _, backward = trained(cotangents)
    one, fold = backward.kernels
    assert [len(k.body.epilogue.sinks) for k in (one, fold)] == [2, 0]
    assert len(fold.body.folded) == 2


@coda.block
def attention(q: T["M D"], k: T["N D"], v: T["N D"]):
    return coda.softmax(q @ k.T) @ v


def test_softmaxs_delta_is_known_before_the_contraction_that_needs_it():
    """Σ dP P = Σ dO O (law 2): dS is made in the epilogue of the GEMM that gives dP."""
    training, _, backward = trained(attention, {"M": 96, "N": 160, "D": 64})
    assert "out" in dict(training.forward.outputs)
    (delta,) = [k for k in backward.kernels if k.kind is ROWWISE]
    assert delta.mainloop.width == 64
    maker = next(gemms(backward))
    assert backward.kernels.index(delta) < backward.kernels.index(maker)
    loaded = {o.name for o in maker.body.epilogue.operands}
    assert {s.buffer for s in delta.body.epilogue.stores} <= loaded
    assert len(list(gemms(backward))) == 4


def test_the_gradients_of_attention():
    training, forward, backward = trained(attention, sizes := {"M": 9, "N": 16, "D": 8})
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 8), (16, 8), (16, 8), (9, 8)]
    *inputs, d = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = torch.softmax(leaves[0] @ leaves[1].T, -1) @ leaves[2]
    expected = torch.autograd.grad(out, leaves, d)
    found = run_reference(forward, inputs, exact=True, sizes=sizes)
    known = dict(zip(("q", "k", "v"), inputs, strict=True)) | {"d_out": d}
    known |= dict(zip(training.saved, found[1:], strict=True))
    given = [known[i.name] for i in backward.graph.inputs]
    for mine, theirs in zip(run_reference(backward, given, exact=True), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
