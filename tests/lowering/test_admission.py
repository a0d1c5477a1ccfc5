"""A kernel builder answers at once whether it can store a node, and says why where it cannot."""

import runpy
from pathlib import Path

import pytest
import torch

import coda
from coda.frontend.tensor import Tensor
from coda.ir.dims import Dim
from coda.ir.evaluate import evaluate
from coda.ir.graph import Graph, Input
from coda.ir.types import f32
from coda.lowering import compiler
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower
from coda.lowering.placement import place
from coda.lowering.placement.place import Partition
from coda.lowering.program.epilogue import PickColumn
from coda.runtime.reference import run_reference

ROOT = Path(__file__).parents[2] / "examples"
SIZES = {"M": 6, "D": 64, "H": 4, "d": 32}
SMALL = {"M": 256, "D": 128, "F": 192, "H": 4, "G": 2, "d": 32}
T = coda.Tensor


@coda.block
def two_distances(
    x: T["M D"], a: T["(H d) D"], b: T["(H d) D"], cos: T["M d/2"], sin: T["M d/2"], far: T["M d"]
):
    q = coda.rope((x @ a.T).reshape("M (H d) -> M H d"), cos, sin)
    k = coda.rope((x @ b.T).reshape("M (H d) -> M H/2 2*d"), far, far)
    return q.reshape("M H d -> M (H d)"), k.reshape("M H/2 2*d -> M (H d)")


@coda.block
def two_tables(x: T["M D"], w: T["(H d) D"], cos: T["M d/2"], sin: T["M d/2"], near: T["M d/2"]):
    heads = (x @ w.T).reshape("M (H d) -> M H d")
    q = coda.rope(heads[:, : SIZES["H"] // 2], cos, sin)
    k = coda.rope(heads[:, SIZES["H"] // 2 :], near, near)
    return coda.concat([q, k], axis=1)


@coda.block
def own_store(x: T["M D"], w: T["(H d) D"]):
    heads = (x @ w.T).reshape("M (H d) -> M H d")
    return coda.mean(heads * heads)


@coda.block
def many_matrices(x: T["M D"], w: T["(H d) D"]):
    y = (x @ w.T).cast(coda.f32)
    return y, y * 2.0, y * 3.0, y * 4.0, y * 5.0, y * 6.0, y * 7.0


@coda.block
def loaded_later(x: T["M D"], w: T["(H d) D"]):
    heads = (x @ w.T).reshape("M (H d) -> M H d")
    energy = coda.mean(heads * heads, keepdims=True)
    unit = heads * coda.rsqrt(energy + 1.0)
    return unit, coda.softmax(energy.reshape("M H 1 -> M H"))


CASES = [
    (two_distances, "the column pairs that its elements read have no common distance"),
    (two_tables, "its columns read different tables"),
    (own_store, "it has 4 columns where the kernel has 128"),
    (many_matrices, "shared memory does not hold 7 matrices"),
    (loaded_later, "it has 4 columns where the kernel has 128"),
]


@pytest.mark.parametrize(("block", "why"), CASES, ids=[b.__name__ for b, _ in CASES])
def test_what_a_gemm_cannot_store_is_computed_by_a_kernel_after_it(block, why):
    sizes = {s: SIZES[s] for s in block.graph.symbols}
    program = lower(block.graph, sizes)
    assert why in [u.why for u in program.unfused]
    first, *rest = program.kernels
    assert first.kind.name == "gemm"
    assert rest
    assert {k.kind.name for k in rest} == {"rows"}
    assert_exact(block, program, sizes)


def assert_exact(block, program, sizes):
    """Hold the outputs of a Program, without rounding, to those of its block."""
    torch.manual_seed(0)
    inputs = block.graph.inputs
    given = [torch.randn([d.size(sizes) for d in i.shape]).to(i.dtype.torch) for i in inputs]
    exact = evaluate(block.graph.roots, dict(zip(inputs, given, strict=True)), sizes)
    for found, wanted in zip(run_reference(program, given, exact=True), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted.double())


@coda.block
def no_room(x: T["M D"], w: T["D D"], u: T["D D"]):
    """Six functions of a product, each the operand of another one, then the product itself."""
    y = (x @ w.T).cast(coda.f32)
    found = [(y * float(i)) @ u.cast(coda.f32).T for i in range(2, 8)]
    return (*found, coda.softmax(y))


@coda.block
def room(x: T["M D"], w: T["D D"], u: T["D D"]):
    """As above, but the last function is only returned."""
    y = (x @ w.T).cast(coda.f32)
    found = [(y * float(i)) @ u.cast(coda.f32).T for i in range(2, 7)]
    return (*found, y * 7.0, coda.softmax(y))


@pytest.mark.parametrize(("block", "times"), [(no_room, 2), (room, 1)])
def test_a_product_is_computed_again_where_its_gemm_has_no_room_for_it(block, times):
    sizes = {"M": 6, "D": 64}
    program = lower(block.graph, sizes)
    product = program.kernels[0].mainloop
    assert [k.mainloop for k in program.kernels].count(product) == times
    assert "shared memory does not hold 7 matrices" in [u.why for u in program.unfused]
    assert_exact(block, program, sizes)


@coda.block
def picked(x: T["M D"], w: T["V D"], y: T["M", coda.i64]):
    return coda.pick(x @ w.T, y)


@coda.block
def diagonal(x: T["M D"], w: T["V D"]):
    logits = x @ w.T
    return coda.pick(logits, coda.iota(logits.shape[0]))


@pytest.mark.parametrize(("block", "count"), [(picked, 1), (diagonal, 0)])
def test_an_epilogue_picks_by_an_index_in_memory_alone(block, count):
    sizes = {"M": 6, "D": 32, "V": 40}
    program = lower(block.graph, sizes)
    (gemm,) = [k for k in program.kernels if k.kind.name == "gemm"]
    assert [type(s) for s in gemm.body.epilogue.sinks] == [PickColumn] * count
    torch.manual_seed(0)
    x, w = torch.randn(6, 32).bfloat16(), torch.randn(40, 32).bfloat16()
    y = torch.tensor([3, 39, 0, 7, 7, 20]) if count else torch.arange(6)
    (found,) = run_reference(program, [x, w, y][: 2 + count], exact=True)
    wanted = (x.double() @ w.double().T).gather(1, y[:, None])
    torch.testing.assert_close(found.double(), wanted)


def test_a_node_that_is_stored_elsewhere_is_still_computed_where_it_is_used():
    """The heads are normalised in the GEMM, by a statistic that it cannot store for the softmax."""
    program = lower(loaded_later.graph, SIZES)
    gemm, *_ = program.kernels
    assert [s.group for s in gemm.body.epilogue.statistics] == [SIZES["d"]]
    assert len(program.kernels) == 3


@coda.block
def gated_heads(x: T["M D"], a: T["(H d) D"], b: T["(H d) D"], g: T["d"]):
    heads = coda.swiglu(x @ a.T, x @ b.T).reshape("M (H d) -> M H d")
    return coda.rms_norm(heads, g, eps=0.5).reshape("M H d -> M (H d)")


def test_what_follows_a_statistic_of_heads_is_computed_with_it():
    """The number of columns is that of the heads, and the kernel has the columns of all heads."""
    program = lower(gated_heads.graph, SIZES)
    assert [k.kind.name for k in program.kernels] == ["gemm", "rows"]
    assert [s.group for s in program.kernels[1].body.epilogue.statistics] == [SIZES["d"]]
    assert_exact(gated_heads, program, SIZES)


def test_what_is_committed_is_written_where_a_part_of_it_has_no_layout(monkeypatch):
    """Three products side by side are one matrix; without the middle one they are two."""
    sizes = {"M": 6, "N": 32, "D": 64}
    x = Tensor(Input("x", (Dim.of("M"), Dim.of("D")), f32))
    a, b, c = (Tensor(Input(n, (Dim.of("N"), Dim.of("D")), f32)) for n in "abc")
    left, middle, right = x @ a.T, x @ b.T, x @ c.T
    outputs = [left, right, *(left + float(i) for i in range(1, 6))]
    inputs = tuple(t.node for t in (x, a, b, c))
    named = tuple((f"out{i}", t.node) for i, t in enumerate(outputs))
    graph = Graph("sides", inputs, named)
    products = tuple(t.node for t in (left, middle, right))
    siblings, contract = place.group_siblings, Partition.contract
    together = dict.fromkeys(products, products)
    monkeypatch.setattr(place, "group_siblings", lambda *a, **k: siblings(*a, **k) | together)
    monkeypatch.setattr(Partition, "contract", lambda p, n: (contract(p, n), p.keep(middle.node)))
    (gemm,) = lower(graph, sizes).kernels
    assert gemm.stored[0] == products
    assert len(gemm.stored) == 6


def test_nodes_are_placed_once(monkeypatch):
    """One partition for each choice of laws that has a Program, and none made anew."""
    runs, programs = [], []
    run, run_stages = Partition.run, compiler.run_stages

    def lowered(*args, **options):
        found = run_stages(*args, **options)
        programs.extend([found] if found else [])
        return found

    monkeypatch.setattr(Partition, "run", lambda self: runs.append(1) or run(self))
    monkeypatch.setattr(compiler, "run_stages", lowered)
    layers = [runpy.run_path(str(p))["layer"].graph for p in sorted(ROOT.glob("*_layer.py"))]
    qwen = runpy.run_path(str(ROOT / "qwen3_layer.py"))["layer"].graph
    backward = derive(qwen, {s: SMALL[s] for s in qwen.symbols}, memory="min").backward
    for graph in (*layers, backward):
        lower(graph, {s: SMALL[s] for s in graph.symbols})
    assert len(runs) == len(programs) > len(layers)


WIDENED = """
block widened(%x: [M, 1] f32, %w: [5] f32, %s: [M, 1] f32, %d: [M, 5] f32) {
  %1 = mul %d, %w                               : [M, 5] f32
  %2 = sum %1 axis -1                           : [M, 1] f32
  %3 = const 1.0 f32                            : [] f32
  %4 = div %3, %s                               : [M, 1] f32
  %5 = mul %2, %4                               : [M, 1] f32
  %6 = div %5, %s                               : [M, 1] f32
  %7 = permute %6 (1, 0)                        : [1, M] f32
  %8 = permute %x (1, 0)                        : [1, M] f32
  %9 = contract %7, %8 f32                      : [1, 1] f32
  %10 = mul %d, %4                              : [M, 5] f32
  %11 = sum %10 axis -2                         : [1, 5] f32
  return dx = %9, dw = %11
}
"""


def test_a_kernel_that_widened_reads_a_matrix_in_one_way():
    """`d` is a table of five columns to a kernel of one, and a tile once it has five."""
    graph, sizes = coda.parse(WIDENED).graph, {"M": 5}
    torch.manual_seed(0)
    given = [torch.rand([d.size(sizes) for d in i.shape]) + 1.0 for i in graph.inputs]
    exact = evaluate(graph.roots, dict(zip(graph.inputs, given, strict=True)), sizes)
    for found, right in zip(
        run_reference(lower(graph, sizes), given, exact=True), exact, strict=True
    ):
        torch.testing.assert_close(found.double(), right.reshape(found.shape).double())


def test_one_value_of_all_rows_is_stored_once():
    """The cast of a mean over all rows is no output of the kernel that reads them again."""
    block = coda.parse("""
        block spread(%x: [16, 8] f16) {
          %1 = slice %x axis -2 from 9 size 4 step 1
          %2 = cast %1 f32
          %3 = reshape %1 [32]
          %4 = cast %3 f32
          %5 = mean %4 axis -1
          %6 = reshape %5 [1, 1]
          %7 = sub %2, %6
          %8 = square %7
          %9 = reshape %8 [32]
          %10 = mean %9 axis -1
          %11 = reshape %10 []
          %12 = cast %11 f16
          %13 = reshape %5 []
          %14 = cast %13 f16
          return variance = %12, mean = %14
        }
    """)
    x = torch.randn(16, 8).half()
    found, rows = block(x, backend="reference"), x[9:13].float()
    assert found["mean"] == rows.mean().half()
    assert torch.allclose(found["variance"], rows.var(correction=0).half(), rtol=2e-3)
