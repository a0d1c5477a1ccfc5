"""Every example: launches, bytes, numbers, and its kernels compiled for both archs."""

import math
import runpy
from pathlib import Path

import pytest
import torch

from coda.ir.evaluate import evaluate
from coda.kernels.gemm.kind import GEMM
from coda.kernels.gemm.stages import stages
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.algebra.accumulate import accumulating, siblings
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower
from coda.lowering.explain_training import TrainingExplanation
from coda.lowering.program.cost import hbm_bytes, kernel_time
from coda.measure import measure, random_inputs, relative

ROOT = Path(__file__).parents[2] / "examples"
ARCHS = ("sm_90a", "sm_100a")
VOCABULARY = {"M": 101, "D": 128, "V": 500}
LLAMA = {"M": 101, "D": 128, "F": 192, "H": 4, "G": 2, "d": 32}

# file, block, sizes of its model, small sizes, launches by arch, GEMMs, MB, MB with frozen weights.
# The last two are the docstrings' programs, by hand.
TABLE = {
    "llama_mlp": ("mlp", "DIMS", {"M": 101, "D": 128, "F": 192}, (3, 3), 2, 1158, 1091),
    "llama_layer": ("layer", "DIMS", LLAMA, (5, 4), 4, 1618, 1483),
    "qwen3_layer": ("layer", "DIMS", LLAMA, (5, 4), 4, 1500, 1366),
    "gpt2_layer": ("layer", "DIMS", {"M": 101, "D": 128, "F": 192}, (4, 4), 4, 538, 538),
    "starcoder2": ("starcoder2_layer", "STARCODER2_DIMS", LLAMA, (5, 4), 4, 1667, 1667),
    "neox_parallel": ("layer", "DIMS", {"M": 101, "D": 128, "F": 192}, (4, 4), 3, 2720, 2720),
    "gemma2_layer": ("layer", "DIMS", LLAMA, (6, 6), 4, 1779, 1662),
    "unnamed_norm": ("mlp", "DIMS", {"M": 101, "D": 128, "F": 192}, (3, 3), 2, 1158, 1091),
    "loss": ("loss", "DIMS", VOCABULARY, (2, 2), 1, 1151, 1151),
    "logits_and_loss": (
        "logits_and_loss",
        "DIMS",
        {"M": 101, "D": 128, "V": 500},
        (3, 3),
        1,
        3253,
        3253,
    ),
}
FILES = {"starcoder2": "gpt2_layer", "loss": "lm_head_loss", "logits_and_loss": "lm_head_loss"}


@pytest.fixture(params=TABLE)
def example(request):
    name, dims, *rest = TABLE[request.param]
    module = runpy.run_path(str(ROOT / f"{FILES.get(request.param, request.param)}.py"))
    return module[name], module[dims], *rest


@pytest.mark.parametrize("arch", ARCHS)
def test_launches_and_bytes(example, arch, request):
    block, dims, _, launches, gemms, megabytes, frozen = example
    for constant, limit in ((False, megabytes), (True, frozen)):
        program = block.lower(arch, dims, frozen=constant)
        assert len(program.kernels) <= dict(zip(ARCHS, launches, strict=True))[arch]
        assert sum(k.kind is GEMM for k in program.kernels) <= gemms
        assert not any(k.kind is TORCH for k in program.kernels)
        assert hbm_bytes(program) <= limit * 1e6
        if not constant:
            hold_stages(request.node.callspec.params["example"], "inference", program)


STAGES = runpy.run_path(str(ROOT.parent / "benchmarks/stages.py"))


def hold_stages(name, part, program):
    """Every GEMM has three stages of A and B, and the page of the stages has its row.

    There it neither spills nor has wgmma instructions that wait for each other.
    """
    page = STAGES["table"](program.arch)
    for kernel, cells in STAGES["rows"](name, part, program):
        if kernel.kind is GEMM:
            assert stages(program, kernel, kernel.config).ab >= 3, kernel.name
        *found, _, stack, complaints = page[name, f"{part} {kernel.name}"]
        assert (found, stack, complaints) == (cells, "0", "none")


@pytest.mark.slow
def test_the_page_of_the_stages(request):
    if request.config.getoption("--update-golden"):
        STAGES["PAGE"].write_text(STAGES["page"]())
    for arch in ARCHS:
        parts = [(n, *p) for n in STAGES["EXAMPLES"] for p in STAGES["programs"](n, arch)]
        found = [tuple(cells[:2]) for p in parts for _, cells in STAGES["rows"](*p)]
        assert found == [*STAGES["table"](arch)]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["inference", "forward", "backward"])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", STAGES["EXAMPLES"])
def test_compiled_kernels_have_the_resources_of_the_page(name, arch, part):
    page, program = STAGES["table"](arch), dict(STAGES["programs"](name, arch))[part]
    kernels, planned = zip(*STAGES["rows"](name, part, program), strict=True)
    found = STAGES["resources"](arch, [(program, kernel) for kernel in kernels])
    for cells, more in zip(planned, found, strict=True):
        assert more[1:] == ["0", "none"]
        assert cells + more == page[tuple(cells[:2])]


def test_no_further_from_float64_than_torch(example):
    block, _, dims, *_ = example
    inputs = random_inputs(block.graph, dims)
    for error in measure(block, block.graph, inputs, "reference", dims=dims).errors:
        assert error.coda <= error.torch * 1.02, error.output


def wanted_of(block):
    floats = [i.name for i in block.graph.inputs if i.dtype.kind == "float"]
    return [n for n in floats if n not in ("cos", "sin")]


def gradients(block, inputs, run):
    """Gradients of a random combination of the outputs, of all floats but tables."""
    names = [i.name for i in block.graph.inputs]
    wanted = wanted_of(block)
    leaves = [x.clone().requires_grad_(n in wanted) for n, x in zip(names, inputs, strict=True)]
    outputs = run(leaves)
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, given)
    return {n: x.grad for n, x in zip(names, leaves, strict=True) if n in wanted}


def test_gradients_are_no_further_from_float64_than_torch(example):
    """The derived backward in bf16 beside torch's, op by op."""
    block, _, dims, *_ = example
    inputs = random_inputs(block.graph, dims)

    def ours(leaves):
        found = block(*leaves, backend="reference", arch="sm_90a", dims=dims)
        return list(found.values()) if isinstance(found, dict) else [found]

    def theirs(compute):
        def run(leaves):
            values = dict(zip(block.graph.inputs, leaves, strict=True))
            return evaluate(block.graph.roots, values, dims, compute)

        return run

    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = gradients(block, wide, theirs(torch.float64))
    plain = gradients(block, inputs, theirs(None))
    for name, mine in gradients(block, inputs, ours).items():
        assert mine.dtype == plain[name].dtype
        assert relative(mine, exact[name]) <= 1.15 * relative(plain[name], exact[name]), name


# Launches of the forward that saves and of the backward, by arch; GEMMs and MB of the backward.
BACKWARD = {
    "llama_mlp": ((3, 3), (5, 5), 4, 3467),
    "llama_layer": ((5, 4), (10, 10), 8, 4681),
    "qwen3_layer": ((5, 4), (11, 11), 8, 4252),
    "gpt2_layer": ((4, 4), (12, 12), 8, 1577),
    "starcoder2": ((5, 4), (13, 13), 8, 4492),
    "neox_parallel": ((4, 4), (13, 13), 8, 7702),
    "gemma2_layer": ((6, 6), (13, 12), 8, 5381),
    "unnamed_norm": ((3, 3), (5, 5), 4, 3467),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", BACKWARD)
def test_launches_and_bytes_of_the_backward(name, arch):
    """CODA's hand-written program for the Llama layer moves 4798 MB."""
    forwards, kernels, gemms, megabytes = BACKWARD[name]
    block, dims, *_ = TABLE[name]
    module = runpy.run_path(str(ROOT / f"{FILES.get(name, name)}.py"))
    block = module[block]
    forward, program = block.lower_training(arch, module[dims], wanted=wanted_of(block))
    k = ARCHS.index(arch)
    assert len(forward.kernels) <= forwards[k]
    assert len(program.kernels) <= kernels[k]
    assert sum(k.kind is GEMM for k in program.kernels) <= gemms
    assert hbm_bytes(program) <= megabytes * 1e6
    assert not any(k.kind is TORCH for k in (*forward.kernels, *program.kernels))
    hold_stages(name, "forward", forward)
    hold_stages(name, "backward", program)


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow)])
def test_memory_is_traded_for_traffic_in_one_direction(example, arch):
    """From "min" to "speed" more is saved and less time is taken; "min" has more GEMMs.

    A mainloop may hide all that "speed" moves less: its time then is equal, but for other partials.
    """
    block, dims, *_ = example
    saved, moved, seconds = [], [], []
    for memory in ("min", "balanced", "speed"):
        programs = block.lower_training(arch, dims, wanted=wanted_of(block), memory=memory)
        saved.append(TrainingExplanation(block.graph, *programs).saved_bytes["coda"])
        moved.append(sum(map(hbm_bytes, programs)))
        seconds.append(sum(kernel_time(p, k).seconds for p in programs for k in p.kernels))
    assert saved == sorted(saved)
    assert moved[1] >= moved[2]
    assert seconds[0] > seconds[1] > 0.999 * seconds[2]


def test_a_product_that_the_forward_stores_is_kept_for_speed():
    """The backward of Llama's layer then writes no product of gate and up: 235 MB less."""
    module = runpy.run_path(str(ROOT / "llama_layer.py"))
    block, dims, found = module["layer"], module["DIMS"], []
    for memory in ("balanced", "speed"):
        programs = block.lower_training("sm_90a", dims, wanted=wanted_of(block), memory=memory)
        found.append([hbm_bytes(p) for p in programs])
    product = 2 * dims["M"] * dims["F"]
    assert found[0][0] == found[1][0]
    assert 0 <= found[1][1] - (found[0][1] - product) < 4e6  # partials of a narrower tile
    assert found[1][1] <= 4446e6


def test_adding_to_gradients_takes_no_more_launches():
    """Nor bytes but those of the old gradients, where siblings' are rows of one matrix."""
    module = runpy.run_path(str(ROOT / "llama_layer.py"))
    block, dims = module["layer"], module["DIMS"]
    training = derive(block.graph, dims, wanted_of(block))
    matrices = [i for i in block.graph.inputs if i.rank == 2 and i.name[:2] == "w_"]
    targets = {i.name: i.dtype for i in matrices}
    found = accumulating(training, targets, siblings(training))
    plain, program = lower(training.backward, dims), lower(found.graph, dims)
    assert len(program.kernels) == len(plain.kernels) == BACKWARD["llama_layer"][1][0]
    old = sum(math.prod(d.size(dims) for d in i.shape) * i.dtype.size for i in matrices)
    assert hbm_bytes(program) == hbm_bytes(plain) + old


@pytest.mark.slow
def test_the_backward_of_an_mlp_in_the_simulator():
    block = runpy.run_path(str(ROOT / "llama_mlp.py"))["mlp"]
    simulated(block, {"M": 37, "D": 64, "F": 96}, "sm_90a")


def simulated(block, dims, arch):
    inputs = random_inputs(block.graph, dims)
    found = []
    for backend in ("reference", "sim"):

        def run(leaves, backend=backend):
            out = block(*leaves, backend=backend, arch=arch, dims=dims)
            return list(out.values()) if isinstance(out, dict) else [out]

        found.append(gradients(block, inputs, run))
    for name, mine in found[0].items():
        assert relative(found[1][name], mine.double()) < 5e-3, name


def test_the_structure_that_the_laws_must_find(example):
    """Statistics of norms are sinks of the GEMM before, applied in the epilogue after."""
    block, dims, *_ = example
    program = block.lower("sm_90a", dims)
    assert not program.unfused
    folded = {n for k in program.kernels for n in k.body.folded}
    sunk = {
        n for k in program.kernels if k.kind is GEMM for n in k.sunk if type(n).__name__ == "Reduce"
    }
    assert sunk == folded
