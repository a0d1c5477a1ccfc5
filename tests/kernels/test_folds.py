"""GEMMs that fold the partials of their rows before their epilogue, on both archs."""

import runpy
from pathlib import Path

import pytest
import torch

import coda
from coda.ir.types import f32
from coda.kernels.gemm.kind import GEMM
from coda.lowering.program.text import program_source
from coda.measure import measure, measure_gradients, random_inputs
from coda.runtime.simulate import device
from tests.kernels.test_kernels import ARCHS, hold

T = coda.Tensor
EXAMPLES = Path(__file__).parents[2] / "examples"


@coda.block
def rms(x: T["M K"], w: T["D K"], g: T["D"], v: T["N D"]):
    return coda.rms_norm(x @ w.T, g, eps=1e-5) @ v.T


@coda.block
def gated(x: T["M K"], w: T["D K"], g: T["D"], v: T["N D"], u: T["N D"]):
    """A GEMM of column pairs, which stores the statistic for its backward."""
    h = coda.rms_norm(x @ w.T, g, eps=1e-5)
    return coda.swiglu(h @ v.T, h @ u.T)


@coda.block
def layer_norm(x: T["M K"], w: T["D K"], g: T["D"], b: T["D"], v: T["N D"]):
    """Partials are (mean, Σ(x − mean)²), and two values of a row are read."""
    return coda.gelu(coda.layer_norm(x @ w.T, g, b, eps=1e-5) @ v.T)


def folds(program):
    """The fold of each GEMM that has one: its line in the source."""
    return [s for s in program_source(program).splitlines() if " RowFold(" in s]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("block", "columns", "rows"),
    [
        (rms, 320, 150),
        (rms, 37 * 64, 64),
        (gated, 320, 150),
        (gated, 256, 300),
        (layer_norm, 320, 150),
        (layer_norm, 256, 129),
        (layer_norm, 640, 1),
    ],
)
def test_a_fold_before_the_epilogue(block, columns, rows, arch):
    """Numbers of partials that are prime, multiples of four and not; ragged rows."""
    sizes = {"M": rows, "D": columns, "K": 64, "N": 72}
    program = block.lower(arch, sizes)
    assert len(program.kernels) == 2
    assert len(folds(program)) == 1
    inputs = random_inputs(block.graph, sizes)
    with device(arch, checks="raise") as gpu:
        hold(measure(block, block.graph, inputs, "sim", dims=sizes), spread=1.05)
        assert not gpu.report().findings


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("block", [rms, layer_norm])
def test_a_fold_whose_value_the_backward_reads(block, arch):
    sizes = {"M": 150, "D": 320, "K": 64, "N": 72}
    forward, _ = block.lower_training(arch, sizes)
    assert ("RowStore" in program_source(forward)) == all(k.kind is GEMM for k in forward.kernels)
    inputs = random_inputs(block.graph, sizes)
    with device(arch, checks="raise") as gpu:
        hold(measure_gradients(block, block.graph, inputs, "sim", dims=sizes), spread=1.05)
        assert not gpu.report().findings


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rows", [1, 2048])
def test_a_llama_layer_has_no_kernel_that_only_folds_rows(rows, arch):
    """Of the backward's ten launches the last folds the gradients of gains, over all rows."""
    module = runpy.run_path(str(EXAMPLES / "llama_layer.py"))
    block, sizes = module["layer"], {**module["DIMS"], "M": rows}
    floats = [i.name for i in block.graph.inputs if i.dtype.kind == "float"]
    wanted = [n for n in floats if n not in ("cos", "sin")]
    forward, backward = block.lower_training(arch, sizes, wanted=wanted)
    assert len(block.lower(arch, sizes).kernels) == len(forward.kernels) == 4
    assert len(backward.kernels) <= 10


def test_a_value_that_two_kernels_read_is_folded_once():
    @coda.block
    def both(x: T["M K"], w: T["D K"], v: T["N D"]):
        h = x @ w.T
        r = coda.rsqrt(coda.mean(coda.square(h), axis=-1, keepdims=True) + 1e-5)
        return (h @ v.T) * r, coda.tanh(h) * r

    sizes = {"M": 128, "D": 256, "K": 64, "N": 64}
    assert not folds(both.lower("sm_90a", sizes))


def test_the_fold_takes_no_more_shared_memory_than_the_vector():
    """So a GEMM keeps its config, for which the numbers of its own partials are sized."""
    sizes = {"M": 2048, "D": 4096, "K": 4096, "N": 4096}
    program = rms.lower("sm_90a", sizes)
    gemm = program.kernels[-1]
    assert gemm.config in gemm.kind.configs(program, gemm)
    assert [o.dtype for o in gemm.body.epilogue.operands] == [f32]


def test_the_reference_folds_too():
    sizes = {"M": 33, "D": 320, "K": 64, "N": 72}
    inputs = random_inputs(layer_norm.graph, sizes)
    assert folds(layer_norm.lower("sm_90a", sizes))
    hold(measure(layer_norm, layer_norm.graph, inputs, "reference", dims=sizes), spread=1.02)
    assert torch.isfinite(layer_norm(*inputs, backend="reference", dims=sizes)).all()
