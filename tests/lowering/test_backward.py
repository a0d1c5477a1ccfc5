"""The derived backward as a Program: its gradients, its kernels, what it saves."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.block import Block
from coda.ir.evaluate import evaluate
from coda.ir.text import parse
from coda.ir.types import f64
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.algebra.training import MEMORY, derive
from coda.lowering.compiler import is_taken, lower
from coda.measure import random_inputs
from coda.runtime.reference import run_reference
from tests.lowering.test_random_blocks import SETTINGS, SIZES, blocks, values

ROOT = Path(__file__).parents[2] / "examples"


def sizes_of(graph, sizes):
    return {s: sizes[s] for s in graph.symbols}


def check(graph, inputs, sizes, memory="balanced", arch="sm_90a", tolerance=1e-8, lowered=None):
    """Gradients of the forward and backward Programs against autograd's, in float64.

    `lowered` are the sizes that they are lowered for, where these are not those of the arguments.
    """
    lowered = lowered or sizes
    floats = [i for i in graph.inputs if i.dtype.kind == "float"]
    leaves = [x.double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = evaluate(graph.roots, dict(zip(graph.inputs, leaves, strict=True)), sizes)
    outputs = [o * 1.0 for o in outputs]
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    wanted = [x for x in leaves if x.requires_grad]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    expected = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True
    )
    training = derive(graph, lowered, memory=memory, takes=is_taken)
    forward = lower(training.forward, sizes_of(training.forward, lowered), arch)
    plain = [x.detach() for x in leaves]
    found = run_reference(forward, plain, exact=True, sizes=sizes)
    for a, b in zip(outputs, found, strict=False):
        torch.testing.assert_close(b, a.detach(), rtol=1e-9, atol=1e-9)
    known = dict(zip([i.name for i in graph.inputs], plain, strict=True))
    known |= dict(zip(training.saved, found[len(outputs) :], strict=True))
    known |= {n: c for n, c in zip(training.cotangents, cotangents, strict=True) if n}
    if not training.requires_grad:
        assert all(e is None or not e.any() for e in expected)
        return None
    backward = lower(training.backward, sizes_of(training.backward, lowered), arch)
    given = [known[i.name] for i in training.backward.inputs]
    gradients = run_reference(backward, given, exact=True, sizes=sizes)
    mine = dict(zip(training.requires_grad, gradients, strict=True))
    for node, theirs in zip(floats, expected, strict=True):
        if node.name not in mine:
            assert theirs is None or not theirs.any()
        else:
            theirs = torch.zeros_like(mine[node.name]) if theirs is None else theirs
            torch.testing.assert_close(mine[node.name], theirs, rtol=tolerance, atol=tolerance)
    return backward


def check_rows(graph, memory, rows):
    """Programs that were lowered for another number of rows."""
    now = {**SIZES, "M": rows}
    backward = check(graph, values(graph, now), now, memory, lowered=SIZES)
    assert backward is None or "M" not in backward.fixed


@settings(SETTINGS, max_examples=50)
@given(blocks(), st.sampled_from(MEMORY))
def test_random_blocks(graph, memory):
    check_rows(graph, memory, 9)


@pytest.mark.slow
@settings(SETTINGS, max_examples=400)
@given(blocks(), st.sampled_from(MEMORY))
def test_many_random_blocks(graph, memory):
    for rows in (1, SIZES["M"], 9):
        check_rows(graph, memory, rows)


def test_torch_runs_behind_the_kernels_that_store_its_operands():
    """The concatenation goes to torch, and its first half is stored by a pass after two GEMMs."""
    graph = parse("""
        block late(%x: [M, D] f64, %b: [D] f64, %v: [D, D] f64, %w: [D, D] f64) {
          %0 = tanh %x
          %1 = add %0, %b
          %2 = slice %1 axis -1 from D/2 size D/2 step 1
          %3 = slice %1 axis -1 from 0 size D/2 step 1
          %4 = tanh %3
          %5 = concat %2, %4 axis -1
          %6 = contract %5, %w f64
          %7 = contract %1, %v f64
          return out0 = %6, out1 = %7
        }""")
    sizes = {"M": 5, "D": 64}
    for memory in MEMORY:
        check(graph, values(graph), sizes, memory)


def test_a_part_that_is_stored_early_is_no_view_of_a_whole_that_is_stored_late():
    graph = parse("""
        block early(%x: [M, D] f64, %b: [D] f64) {
          %0 = add %x, %b
          %1 = slice %0 axis -1 from D/2 size D/2 step 1
          %2 = slice %0 axis -1 from 0 size D/2 step 1
          %3 = tanh %2
          %4 = concat %1, %3 axis -1
          %5 = square %4
          %6 = mean %5 axis -1
          %7 = const 0.5 f64
          %8 = add %6, %7
          %9 = rsqrt %8
          %10 = mul %4, %9
          %11 = mean %10 axis -1
          return out = %11
        }""")
    for memory in MEMORY:
        check(graph, values(graph), {"M": 5, "D": 64}, memory)


ROTATED = """
block rotated(%x: [M, D] f64, %cos: [M, 16] f64, %sin: [M, 16] f64) {
  %0 = slice %x axis -1 from D/2 size D/2 step 1
  %1 = slice %x axis -1 from 0 size D/2 step 1
  %2 = tanh %1
  %3 = concat %0, %2 axis -1
  %4 = reshape %3 [M, D/32, 32]
  %5 = slice %4 axis -1 from 0 size 16 step 2
  %6 = reshape %cos [M, 1, 16]
  %7 = mul %5, %6
  %8 = slice %4 axis -1 from 1 size 16 step 2
  %9 = reshape %sin [M, 1, 16]
  %10 = mul %8, %9
  %11 = sub %7, %10
  %12 = reshape %11 [M, D/32, 16, 1]
  %13 = mul %8, %6
  %14 = mul %5, %9
  %15 = add %13, %14
  %16 = reshape %15 [M, D/32, 16, 1]
  %17 = concat %12, %16 axis -1
  %18 = reshape %17 [M, D]
  %19 = sigmoid %18
  %20 = mul %18, %x
  return out0 = OUT0, out1 = OUT1
}
"""


@pytest.mark.parametrize(
    "memory", ["balanced", *(pytest.param(m, marks=pytest.mark.slow) for m in ("min", "speed"))]
)
@pytest.mark.parametrize("roots", [("%19", "%3"), ("%18", "%20")], ids=["kernel", "columns"])
def test_what_stays_of_a_refused_attempt_keeps_its_place(roots, memory):
    """Its kernel (a sigmoid's operand), and the columns of a matrix narrower than the kernel."""
    graph = parse(ROTATED.replace("OUT0", roots[0]).replace("OUT1", roots[1]))
    check(graph, values(graph), SIZES, memory)


TWO_WAYS = """
block ways(%a: [M, 256] f64, %z: [M, 16] f64, %w: [8, 256] f64) {
  %0 = reshape %a [M, 16, 16]
  %1 = reshape %z [M, 16, 1]
  %2 = mul %0, %1
  %3 = reshape %z [M, 1, 16]
  %4 = add %2, %3
  %5 = reshape %4 [M, 256]
  %6 = contract %5, %w f64
  return out = %6
}
"""


@pytest.mark.parametrize("memory", MEMORY)
def test_one_matrix_that_is_read_by_heads_and_within_them(memory):
    graph = parse(TWO_WAYS)
    check(graph, random_inputs(graph, {"M": 5}), {"M": 5}, memory)


HEAD_NORM = """
block heads(%a: [M, 4*d] f64, %g: [M, 4*d] f64, %n: [d] f64, %w: [32, 4*d] f64) {
  %0 = reshape %a [M, 4, d]
  %1 = square %0
  %2 = mean %1 axis -1
  %3 = rsqrt %2
  %4 = mul %0, %3
  %5 = mul %4, %n
  %6 = reshape %5 [M, 4*d]
  %7 = mul %6, %g
  %8 = contract %7, %w f64
  return out = %8
}
"""


@pytest.mark.parametrize("d", [16, 64, 80])
def test_a_norm_of_heads_before_a_product_takes_few_passes(d):
    """Statistics of heads are read by groups of columns; torch does nothing."""
    graph = parse(HEAD_NORM)
    sizes = {"M": 5, "d": d}
    backward = check(graph, random_inputs(graph, sizes), sizes)
    assert not any(k.kind is TORCH for k in backward.kernels)
    assert len(backward.kernels) == (5 if d == 64 else 6)


SMALL = {"M": 5, "D": 32, "F": 24, "H": 2, "G": 1, "d": 32, "V": 50}


@pytest.mark.parametrize(
    "memory", [pytest.param(m, marks=[pytest.mark.slow] * (m != "balanced")) for m in MEMORY]
)
@pytest.mark.parametrize(
    "path", sorted(p for p in ROOT.glob("*.py") if p.stem != "demo"), ids=lambda p: p.stem
)
def test_examples(path, memory):
    for block in [
        v for v in runpy.run_path(str(path), run_name="x").values() if isinstance(v, Block)
    ]:
        graph = replace(block.graph_of(f64), constants=frozenset())  # the tables' gradients too
        dims = sizes_of(graph, SMALL)
        check(graph, random_inputs(graph, dims), dims, memory, tolerance=1e-6)


ADAPTED = """
block adapted(%x: [M, 64] f64, %w_norm: [64] f64, %w: [128, 64] f64, %a: [4, 64] f64,
    %b: [128, 4] f64, %v: [128, 64] f64, %c: [4, 64] f64, %d: [128, 4] f64) {
  %r = sum %x axis -1
  %h = mul %x, %r
  %n = mul %h, %w_norm
  %g0 = contract %n, %w f64
  %g1 = contract %n, %a f64
  %g2 = contract %g1, %b f64
  %g = add %g0, %g2
  %u0 = contract %n, %v f64
  %u1 = contract %n, %c f64
  %u2 = contract %u1, %d f64
  %u = add %u0, %u2
  %s = sigmoid %g
  %y = mul %s, %u
  return out = %y
}
"""


def test_siblings_of_several_kernels_are_saved_as_they_are():
    """A low-rank adapter beside each projection: parts of one wide product in two kernels."""
    graph = parse(ADAPTED)
    generator = torch.Generator().manual_seed(1)
    shapes = [[d.size({"M": 5}) for d in i.shape] for i in graph.inputs]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    check(graph, inputs, {"M": 5}, "balanced", tolerance=1e-8)


HEADS = """
block heads(%x: [M, 64] f64, %w: [64, 64] f64, %v: [64, 64] f64, %bias: [128] f64) {
  %heads = reshape %bias [4, 32]
  %b0 = slice %heads axis -1 from 0 size 16 step 1
  %b1 = slice %heads axis -1 from 16 size 16 step 1
  %b2 = reshape %b0 [64]
  %b3 = reshape %b1 [64]
  %q0 = contract %x, %w f64
  %q = add %q0, %b2
  %k0 = contract %x, %v f64
  %k = add %k0, %b3
  %k1 = sigmoid %k
  return q = %q, k = %k1
}
"""


def test_parts_of_other_rows_are_not_joined():
    """Gradients of parts of heads, sums over tokens, go beside each other within each head."""
    graph = parse(HEADS)
    generator = torch.Generator().manual_seed(1)
    shapes = [[d.size({"M": 5}) for d in i.shape] for i in graph.inputs]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    check(graph, inputs, {"M": 5}, "balanced", tolerance=1e-8)
