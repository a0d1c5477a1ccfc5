"""A Program beside GEMMs by cuBLAS with the rest fused, and what `explain` says of it."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

import coda
from coda.lowering.compiler import lower
from coda.lowering.explain import Explanation
from coda.lowering.program.baseline import baseline_seconds, kernel_baseline
from coda.lowering.program.cublas import cublas_seconds
from coda.lowering.program.target import find_target

H200 = find_target("H200")
EXAMPLES = Path(__file__).parents[2] / "examples"


@coda.block
def twice(x: coda.Tensor["M D"], w: coda.Tensor["F D"], v: coda.Tensor["D F"]):
    return coda.silu(x @ w.T) @ v.T


SIZES = {"M": 8192, "D": 4096, "F": 1024}


def test_the_baseline_is_cublas_and_what_is_between():
    """Two measured GEMMs, and one kernel that reads and writes their 8192×1024 between them."""
    program = lower(twice.graph, SIZES, H200)
    between = H200.rates.ramp + 2 * 2 * 8192 * 1024 / H200.rates.bandwidth
    wide = cublas_seconds("H200", 8192, 1024, 4096) + cublas_seconds("H200", 8192, 4096, 1024)
    assert baseline_seconds(program.graph, program) == pytest.approx(wide + between)
    first, second = program.kernels
    assert kernel_baseline(program, second) == cublas_seconds("H200", 8192, 4096, 1024)
    assert kernel_baseline(program, first) == pytest.approx(
        cublas_seconds("H200", 8192, 1024, 4096) + between
    )


def test_the_baseline_of_llama_is_inductors_time():
    """Inductor's kernels of the training forward took 5186 µs, two of them copies of 63 µs."""
    module = runpy.run_path(str(EXAMPLES / "llama_layer.py"))
    found = module["layer"].explain("H200", **module["DIMS"])
    assert found.baseline * 1e6 == pytest.approx(5186 - 63, rel=0.02)


def test_llama_is_modelled_faster_than_the_baseline():
    module = runpy.run_path(str(EXAMPLES / "llama_layer.py"))
    small = {"M": 8192, "D": 2048, "F": 8192, "H": 32, "G": 8, "d": 64}
    for sizes, most in ((module["DIMS"], 0.95), (small, 0.95)):
        wanted = [i.name for i in module["layer"].graph.inputs if i.name not in ("cos", "sin")]
        programs = module["layer"].lower_training("H200", sizes, wanted=wanted)
        for program in programs:
            found = Explanation(program)
            assert found.seconds < most * found.baseline


def test_explain_says_which_kernel_is_slower_and_why():
    """Two stages stall the mainloop: one tile, with deep pipelines of its epilogue."""

    @coda.block
    def added(x: coda.Tensor["M K"], w: coda.Tensor["N K"], r: coda.Tensor["M N"]):
        return x @ w.T + r

    program = lower(added.graph, {"M": 8192, "N": 4096, "K": 4096}, H200)
    deep = replace(program.kernels[0].config, loads=8, stores=8)
    stalled = replace(program, kernels=(replace(program.kernels[0], config=deep),))
    assert Explanation(program).json()["slower"] == []
    (slower,) = Explanation(stalled).json()["slower"]
    assert slower["kernel"] == "gemm0"
    assert slower["us"] > 100
    assert "feed" in slower["why"]
    assert "gemm0 is" in str(Explanation(stalled))


def test_parts_add_up_to_the_modelled_time():
    program = lower(twice.graph, SIZES, H200)
    found = Explanation(program).json()
    for kernel in found["kernels"]:
        assert sum(kernel["parts_us"].values()) == pytest.approx(kernel["modelled_us"])
    assert found["modelled_us"] == pytest.approx(sum(k["modelled_us"] for k in found["kernels"]))


def test_a_gpu_without_figures_has_no_baseline():
    program = lower(twice.graph, SIZES, replace(H200, name="another"))
    assert baseline_seconds(program.graph, program) is None
    assert Explanation(program).json()["cublas_us"] is None
