"""`coda check`: each kernel held against float64, and the first that is wrong named."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

from coda.check import backends_here, check_gradients, check_kernels, deviation
from coda.cli import main
from coda.measure import random_inputs
from coda.runtime.reference import ReferenceRun

ROOT = Path(__file__).parents[1] / "examples"
MLP = {"M": 48, "D": 64, "F": 96}
LAYER = {"M": 48, "D": 64, "F": 96, "H": 4, "G": 2, "d": 16}


def example(name, block):
    return runpy.run_path(str(ROOT / f"{name}.py"))[block]


def checked(block, sizes, **options):
    return check_kernels(block, random_inputs(block.graph, sizes), sizes, **options)


def spoil(monkeypatch, kernel, change):
    """Let a kernel of backend reference store something else, and those after it read that."""
    original = ReferenceRun.kernel

    def computed(run, one):
        original(run, one)
        if one.name == kernel:
            for name in one.writes():
                change(run, name)

    monkeypatch.setattr(ReferenceRun, "kernel", computed)


def scaled(run, name):
    if name in run.buffers:
        run.buffers[name] = run.buffers[name] * 1.05


def one_element(run, name):
    run.buffers[name] = run.buffers[name].clone()
    run.buffers[name][17, 5] += run.buffers[name].abs().max()


def partials(run, name):
    if name in run.parts:
        planes, counts = run.parts[name]
        run.parts[name] = tuple(p * 1.1 for p in planes), counts


def test_right_kernels_are_within_their_bounds():
    report = checked(example("llama_mlp", "mlp"), MLP, backends=["reference"])
    assert report.wrong is None
    assert {v.kernel for v in report.values} == {"rows0", "gemm1", "gemm2"}
    assert all(v.coda.norm > 0 for v in report.values)


@pytest.mark.parametrize(
    ("kernel", "change"),
    [("rows0", scaled), ("gemm1", scaled), ("gemm1", one_element), ("gemm2", one_element)],
)
def test_the_wrong_kernel_is_named_and_those_after_it_are_not(monkeypatch, kernel, change):
    spoil(monkeypatch, kernel, change)
    report = checked(example("llama_mlp", "mlp"), MLP, backends=["reference"])
    assert {v.kernel for v in report.values if not v.good} == {kernel}
    assert report.wrong.kernel == kernel
    if change is one_element:
        assert report.wrong.coda.at == (17, 5)


def test_partials_are_seen_through_the_kernel_that_folds_them(monkeypatch):
    spoil(monkeypatch, "gemm0", partials)
    report = checked(example("llama_layer", "layer"), LAYER, backends=["reference"])
    assert {v.kernel for v in report.values if not v.good} == {"gemm2"}
    assert "gemm2 (which folds partials of gemm0)" in report.verdict()


def test_a_wrong_kernel_of_a_backward_is_named(monkeypatch):
    block = example("llama_mlp", "mlp")
    inputs = random_inputs(block.graph, MLP)
    assert check_gradients(block, inputs, MLP, backends=["reference"]).wrong is None
    spoil(monkeypatch, "gemm3", scaled)
    wrong = check_gradients(block, inputs, MLP, backends=["reference"]).wrong
    assert (wrong.part, wrong.kernel) == ("backward", "gemm3")


def rounded_once(value):
    """Rounding n elements to nearest gives a norm of at most 0.43 units; it varies by 1/√n."""
    return value.coda.norm < 0.43 * value.unit * (1 + 3 * math.prod(value.shape) ** -0.5)


def test_only_roundings_that_a_kernel_does_are_counted():
    report = checked(example("gemma2_layer", "layer"), LAYER, backends=["reference"])
    assert {v.kernel for v in report.values if not rounded_once(v)} == set()
    block = example("gpt2_layer", "layer")
    sizes = {s: LAYER[s] for s in block.graph.symbols}
    report = check_gradients(
        block, random_inputs(block.graph, sizes), sizes, backends=["reference"]
    )
    sums = [v for v in report.values if v.part == "backward" and v.kernel == "rows12"]
    assert {v.folds for v in sums} == {("gemm2",), ("gemm6", "gemm3"), ("gemm9",), ("gemm11",)}
    assert all(map(rounded_once, sums))


def test_values_that_are_not_finite():
    y = torch.tensor([1.0, torch.nan, torch.inf, -2.0], dtype=torch.float64)
    assert deviation(y.clone(), y).worst == 0
    assert deviation(torch.tensor([1.0, 0.0, torch.inf, -2.0]), y).at == (1,)
    assert deviation(torch.tensor([1.0, 0.0, torch.inf, -2.0]), y).worst == torch.inf
    assert deviation(torch.tensor([1.0, torch.nan, -torch.inf, -2.0]), y).worst == torch.inf
    assert deviation(torch.tensor([1.0, torch.nan, torch.inf, -2.5]), y).worst == 0.25
    flags = torch.tensor([True, False, True, True])
    assert deviation(flags, torch.tensor([True, True, True, True])).norm == 0.25


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["check", f"{ROOT}/llama_mlp.py:mlp", "--dims", "M=48,D=64,F=96", *arguments])
    found = capsys.readouterr()
    return stopped.value.code or 0, found.out, found.err


def test_the_command(capsys, monkeypatch):
    code, out, _ = run(capsys, "--backend", "reference")
    assert code == 0
    assert "every value of every kernel is within its bound" in out
    spoil(monkeypatch, "gemm1", scaled)
    code, out, _ = run(capsys, "--backend", "reference")
    assert code == 1
    assert "mlp: gemm1 is the first kernel that is wrong, on reference" in out
    code, out, _ = run(capsys, "--backend", "reference", "--backward", "--json")
    assert code == 1
    assert json.loads(out)["wrong"]["kernel"] == "gemm1"


def test_wrong_calls(capsys):
    for options in (("--backend", "none"), ("--memory", "min"), ("--seed", "-1")):
        code, out, err = run(capsys, *options)
        assert code == 2
        assert not out
        assert "Error" in err


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_kernels_in_the_simulator_are_within_their_bounds(arch):
    block = example("llama_mlp", "mlp")
    report = checked(block, MLP, arch=arch)
    assert {v.backend for v in report.values} == set(backends_here(arch))
    assert report.wrong is None


@pytest.mark.slow
def test_a_kernel_that_the_simulator_stops_is_named(monkeypatch):
    from coda.errors import CodaError
    from coda.sim.host.device import Device
    from coda.sim.types import SimError

    original = Device._run

    def stopped(self, launch):
        original(self, launch)
        if len(self.launched) == 2:
            raise SimError("a test")

    monkeypatch.setattr(Device, "_run", stopped)
    with pytest.raises(CodaError, match=r"the simulated GPU stopped in gemm1: .*a test"):
        checked(example("llama_mlp", "mlp"), MLP, backends=["sim"])


@pytest.mark.gpu
def test_kernels_on_the_gpu_are_within_their_bounds():
    report = checked(example("llama_mlp", "mlp"), MLP, backends=["cuda"])
    assert report.wrong is None
