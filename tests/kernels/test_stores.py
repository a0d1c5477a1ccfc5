"""Stores and sums of epilogues that quack has no operator for, on both archs."""

import math
from dataclasses import replace

import pytest
import torch

import coda
from coda.kernels.gemm.mainloop import gemms
from coda.lowering.configure import size_partials
from coda.lowering.program.target import Config
from coda.lowering.program.text import program_source
from coda.measure import measure, measure_gradients, random_inputs, relative
from coda.runtime.reference import run_reference
from coda.runtime.simulate import device, run_simulated
from tests.kernels.test_kernels import ARCHS, hold

T = coda.Tensor
HEADS = {"M": 150, "D": 64, "H": 4, "d": 64}


@coda.block
def heads(x: T["M D"], w: T["(H d) D"], g: T["d"], cos: T["M d/2"], sin: T["M d/2"]):
    """QK-norm and interleaved RoPE: in training two matrices of neighbouring pairs."""
    q = (x @ w.T).reshape("M (H d) -> M H d")
    return coda.rope(coda.rms_norm(q, g, eps=1e-6), cos, sin, interleaved=True)


def test_qk_norm_and_interleaved_rope_are_one_kernel_in_training():
    forward, _ = heads.lower_training("sm_90a", HEADS)
    (gemm,) = gemms(forward)
    assert forward.kernels == (gemm,)
    assert [len(s.lanes) for s in gemm.body.epilogue.stores] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_two_matrices_of_neighbouring_pairs(arch):
    inputs = random_inputs(heads.graph, HEADS)
    with device(arch, checks="raise") as gpu:
        hold(measure_gradients(heads, heads.graph, inputs, "sim", dims=HEADS), spread=1.0)
        assert not gpu.report().findings


@coda.block
def crowded(x: T["M K"], w: T["N K"], a: T["M N"], b: T["M N"], g: T["N"], r: T["M 1", coda.f32]):
    """Much at each point: a kernel pauses, and sums over rows are taken column by column."""
    y = (x @ w.T) * g
    s = r.cast(x.dtype)
    return {
        "p": y * a * s,
        "q": (y - b) * s,
        "rows": coda.sum(y * a),
        "columns": coda.sum(y * b, axis=0),
        "more": coda.sum(y * y, axis=0),
    }


@pytest.mark.parametrize(
    "sizes",
    [
        {"M": 300, "N": 328, "K": 40},
        pytest.param({"M": 129, "N": 64, "K": 64}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("arch", [pytest.param("sm_90a", marks=pytest.mark.slow), "sm_100a"])
def test_sums_over_rows_beside_several_stores(arch, sizes):
    inputs = random_inputs(crowded.graph, sizes)
    source = program_source(crowded.lower(arch, sizes))
    for name in (" SumInTurn(", " ColumnSumInTurn("):
        assert (name in source) == (arch == "sm_100a")
    with device(arch, checks="raise") as gpu:
        hold(measure(crowded, crowded.graph, inputs, "sim", dims=sizes), spread=1.0)
        assert not gpu.report().findings


@coda.block
def halves_of_products(x: T["M K"], w: T["N K"], y: T["M N", coda.f32]):
    """Roundings of two neighbouring columns."""
    z = (x @ w.T).cast(coda.f32) * y
    return z.cast(coda.bf16).cast(coda.f32), z.cast(coda.f16).cast(coda.f32)


@coda.block
def halves_of_values(y: T["M N", coda.f32]):
    """Roundings of single values."""
    return y.cast(coda.bf16).cast(coda.f32), y.cast(coda.f16).cast(coda.f32)


def hostile_floats(shape):
    """Ties, subnormals, overflows, infinities, NaN and zeros of both types, among random bits."""
    edges = [0.0, 1.0 + 2**-9, 1.0 + 3 * 2**-9, 1.0 + 2**-12, 2**-24, 2**-25, 3 * 2**-25, 65504.0]
    edges += [65519.996, 65520.0, 2**-126, 2**-127, 3 * 2**-149, 3.3e38, 3.4e38, math.inf, math.nan]
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    found = bits.view(torch.float32)
    chosen = torch.tensor([*edges, *(-e for e in edges)])
    which = torch.randint(2 * len(chosen), shape, generator=generator)
    return torch.where(which < len(chosen), chosen[which % len(chosen)], found)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("block", [halves_of_products, halves_of_values], ids=lambda b: b.__name__)
def test_roundings_have_the_bits_of_torch(block, arch):
    y = hostile_floats((64, 72))
    operands = [torch.ones(n, 16, dtype=torch.bfloat16) / 4 for n in y.shape]  # products are 1
    with device(arch, checks="raise"):
        found = block(*operands[: len(block.graph.inputs) - 1], y, backend="sim")
    for one, dtype in zip(found, (torch.bfloat16, torch.float16), strict=True):
        true = y.to(dtype).float()
        assert torch.equal(one.isnan(), true.isnan())
        assert torch.equal(one.nan_to_num().view(torch.int32), true.nan_to_num().view(torch.int32))


@coda.block
def slope(x: T["M K"], w: T["N K"], z: T["M N"]):
    """As the backward of an activation with a bias."""
    d = (x @ w.T) * coda.sigmoid(z)
    return {"d": d, "y": z * coda.sigmoid(z), "db": coda.sum(d, axis=0)}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "tile_n", [64, pytest.param(128, marks=SLOW), pytest.param(256, marks=SLOW)]
)
def test_sums_over_rows_in_tiles_of_any_width(tile_n):
    """A thread has 32 or 64 columns at once: each lane is left with one sum or with two."""
    config = Config(256, tile_n, (2, 1)) if tile_n > 64 else Config(128, 64)
    hold_with_tile(slope, {"M": 300, "N": 520, "K": 64}, config, "SumInTurn")


def hold_with_tile(block, sizes, config, op):
    """A block's GEMM in a tile, with an op in its epilogue, computes what the reference does."""
    program = block.lower("sm_100a", sizes)
    (gemm, *folds) = program.kernels
    kernels = replace(gemm, config=config), *folds
    program = size_partials(replace(program, kernels=kernels))
    assert op in program_source(program)
    inputs = random_inputs(block.graph, sizes)
    with device("sm_100a", checks="raise"):
        found = run_simulated(program, inputs, sizes)
    for mine, theirs in zip(found, run_reference(program, inputs, sizes=sizes), strict=True):
        assert relative(mine, theirs.double()) < 4e-3


@coda.block
def beside(x: T["M K"], w: T["N K"], a: T["M N"], b: T["M N"], c: T["M N"], r: T["M 1", coda.f32]):
    """Much at each point, and sums over columns alone."""
    y = x @ w.T
    s = r.cast(x.dtype)
    return {"p": y * a * s + c, "q": (y - b) * s, "rows": coda.sum(y * c), "more": coda.sum(y * y)}


@pytest.mark.parametrize("tile", [(128, 64), pytest.param((128, 224), marks=SLOW)])
def test_sums_over_columns_where_two_warps_share_a_row(tile):
    """A CTA pair has 64 rows each, and so two warps for the columns of a row."""
    config = Config(*tile, (2, 1))
    hold_with_tile(beside, {"M": 200, "N": 328, "K": 64}, config, "ColumnSumInTurn")


@coda.block
def biases(x: T["M K"], w: T["N K"], b: T["N"], c: T["F N"]):
    return coda.gelu(x @ w.T + b) @ c.T


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 9, 1200])
@pytest.mark.parametrize("learned", ["b", pytest.param("xwbc", marks=pytest.mark.slow)])
def test_folds_of_any_number_of_parts(learned, rows, arch):
    """Fewer parts than warps, as many, and a ragged last round."""
    sizes = {"M": rows, "N": 72, "K": 40, "F": 24}
    inputs = random_inputs(biases.graph, sizes)
    given = torch.ones(rows, 24, dtype=inputs[0].dtype)
    grads = []
    for backend in ("reference", "sim"):
        leaves = [
            x.clone().requires_grad_(name in learned)
            for name, x in zip("xwbc", inputs, strict=True)
        ]
        with device(arch, checks="raise"):
            biases(*leaves, backend=backend, arch=arch).backward(given)
        grads.append([x.grad for x in leaves if x.requires_grad])
    assert len(grads[0]) == len(learned)
    for mine, theirs in zip(grads[1], grads[0], strict=True):
        assert relative(mine, theirs.double()) < 6e-3


@coda.block
def many(x: T["M K"], w: T["N K"], a: T["M N", coda.f32]):
    """More matrices than an epilogue has shared memory for, of any tile."""
    h = (x @ w.T).cast(coda.f32)
    return {f"y{i}": h * (i + 1.0) + a for i in range(8)}


MANY = {"M": 40, "K": 64, "N": 72}


@pytest.mark.parametrize("arch", ARCHS)
def test_an_epilogue_stores_what_shared_memory_holds(arch):
    program = many.lower(arch, MANY)
    (gemm,) = gemms(program)
    assert 4 <= len(gemm.body.epilogue.stores) <= 5
    assert len(program.kernels) == 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_many_matrices_of_one_product(arch):
    inputs = random_inputs(many.graph, MANY)
    with device(arch, checks="raise"):
        hold(measure(many, many.graph, inputs, "sim", dims=MANY))
