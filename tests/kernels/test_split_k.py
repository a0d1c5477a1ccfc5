"""GEMMs whose K is split among CTAs: results, flags between calls, bytes and memory."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

import coda
from coda.kernels.gemm import bind
from coda.kernels.gemm.configs import choice, legal
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.split_k import parts_of, scratch
from coda.lowering.explain import Explanation
from coda.lowering.program.cost import PASSED, traffic
from coda.lowering.program.memory import temporary_bytes
from coda.lowering.program.price import price
from coda.lowering.program.target import Config
from coda.lowering.program.text import program_source
from coda.measure import random_inputs, relative
from coda.runtime.launcher import run_kernels, state_of
from coda.runtime.reference import run_reference
from coda.runtime.simulate import device
from tests.kernels.forced import forced, with_configs
from tests.kernels.test_batches import attention
from tests.kernels.test_configs import worst
from tests.kernels.test_folds import rms

ARCHS = ("sm_90a", "sm_100a")
EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = Config(128, 64)
T = coda.Tensor


@coda.block
def added(x: T["M K"], w: T["N K"], r: T["M N"]):
    return r + x @ w.T


@coda.block
def over_rows(x: T["M N"], y: T["M K"]):
    """K of the GEMM is the number of rows."""
    return coda.einsum("m n, m k -> n k", x, y)


def split(program, parts):
    """The Program with K split in all GEMMs that can."""
    found = forced(program, replace(SMALL, split_k=parts))
    assert any(k.config.split_k == parts for k in gemms(found))
    return found


def decode(arch, rows=16):
    """A Llama-3-8B layer at few rows."""
    module = runpy.run_path(str(EXAMPLES / "llama_layer.py"))
    return module["layer"].lower(arch, {**module["DIMS"], "M": rows})


@pytest.mark.parametrize("gpu", ["H200", "B200"])
def test_a_layer_of_few_rows_splits_k_where_tiles_are_few(gpu):
    """4096 columns are 64 tiles; of 28672 there are enough, and of 8192 rows."""
    program = decode(gpu)
    down = [k for k in gemms(program) if k.mainloop.problem(program.sizes)[2] == 14336]
    assert [k.config.split_k > 1 for k in down] == [True]
    for kernel in gemms(program):
        one = [o.seconds for o in choice(program, kernel).offers if o.config.split_k == 1]
        if kernel.config.split_k > 1:
            assert choice(program, kernel).offers[0].seconds < 0.9 * min(one)
    assert all(k.config.split_k == 1 for k in gemms(decode(gpu, rows=8192)))


def test_what_is_passed_is_counted_but_not_in_the_price():
    program = added.lower("sm_90a", {"M": 16, "K": 512, "N": 4096})
    (one,) = gemms(with_configs(program, {"gemm0": SMALL}))
    four = with_configs(program, {"gemm0": replace(SMALL, split_k=4)})
    (kernel,) = gemms(four)
    sums, flags = 64 * 128 * 64 * 4, 64 * 4
    assert scratch(four, kernel).held == temporary_bytes(four) == sums + flags
    shown = f"memory for what is not returned: {(sums + flags) / 1e6:.1f} MB"
    assert shown in str(Explanation(four))
    now, before = traffic(four, kernel), traffic(program, one)
    assert now.reads == (*before.reads, (PASSED, sums))
    assert now.writes == (*before.writes, (PASSED, 3 * sums))
    assert price(four).moved == price(with_configs(program, {"gemm0": SMALL})).moved


def test_k_is_split_only_if_the_gemm_stores_a_matrix():
    @coda.block
    def sums(x: T["M K"], w: T["N K"]):
        return coda.logsumexp(x @ w.T)

    config = replace(SMALL, split_k=4)
    for block, k, reason in (
        (sums, 4096, "stores no matrix"),
        (added, 192, "fewer k-steps than the 4 CTAs"),
        (added, 200, ""),
    ):
        program = block.lower("sm_90a", {"M": 16, "K": k, "N": 64})
        assert reason in legal(program, next(gemms(program)), config)
        assert bool(reason) == bool(legal(program, next(gemms(program)), config))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_calls_have_flags_that_are_0_and_move_the_bytes_that_are_counted(arch, monkeypatch):
    """The second call replays the first: it clears flags of its own, as its kernel does again."""
    sizes, flags = {"M": 150, "K": 512, "N": 136}, []
    program = split(added.lower(arch, sizes), 4)
    make = bind.GemmBinding.shared
    monkeypatch.setattr(
        bind.GemmBinding, "shared", lambda self: flags.append(make(self)) or flags[-1]
    )
    with device(arch, checks="raise") as gpu:
        _, w, _ = random_inputs(added.graph, sizes)
        for seed in range(2):
            x, _, r = random_inputs(added.graph, sizes, seed)
            (y,) = run_kernels(program, [x, w, r], sizes)
            exact, rounded = (run_reference(program, [x, w, r], exact=e)[0] for e in (True, False))
            assert relative(y, exact) <= 1.05 * relative(rounded, exact) + 1e-7
        report = gpu.report()
    assert not report.findings
    assert len(flags) == 1
    assert flags[0]["flags"].count_nonzero() == 0
    ((replays,),) = (s.found.values() for s in [*state_of(program).found.values()])
    assert replays[1].text.count("()\n") == 3  # the result, flags and sums are allocated
    moved, predicted = report.launches, traffic(program, next(gemms(program)))
    assert len(moved) == 2
    for launch in moved:
        tensors = launch.result.per_allocation
        stored = sum(t.stored for t in tensors.values())
        read = sum(t.unique_loaded for t in tensors.values())
        assert stored == pytest.approx(predicted.write_bytes, rel=0.01)
        assert read == pytest.approx(predicted.read_bytes, rel=0.01)
        (sums,) = (t for name, t in tensors.items() if name.startswith("split_k_workspace"))
        assert sums.loaded == dict(predicted.reads)[PASSED]
        assert sums.stored == dict(predicted.writes)[PASSED]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("block", "sizes", "parts"),
    [
        (rms, {"M": 150, "D": 320, "K": 128, "N": 72}, 2),  # partials of rows, and their fold
        (attention, {"B": 2, "S": 67}, 2),  # a batch
        (added, {"M": 1, "K": 200, "N": 64}, 4),  # a part of a k-step
    ],
)
def test_split_gemms_are_right(block, sizes, parts, arch):
    program = split(block.lower(arch, sizes), parts)
    assert worst(program, random_inputs(program.graph, sizes)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["llama_layer", "gpt2_layer"])
def test_a_layer_and_its_backward_are_right_at_few_rows(name, arch):
    block = runpy.run_path(str(EXAMPLES / f"{name}.py"))["layer"]
    sizes = {"M": 16, "D": 128, "F": 192, "H": 2, "G": 1, "d": 64}
    floats = [i.name for i in block.graph.inputs if i.dtype.kind == "float"]
    wanted = [n for n in floats if n not in block.graph.constants]
    sizes = {s: sizes[s] for s in block.graph.symbols}
    for program in block.lower_training(arch, sizes, wanted=wanted):
        given = split(program, 2)
        assert worst(given, random_inputs(given.graph, given.sizes)) <= 1


@pytest.mark.slow
def test_a_call_of_few_rows_does_not_split_them():
    """A Program serves any number of rows, which are the K of a weight's gradient."""
    program = split(over_rows.lower("sm_90a", {"M": 512, "N": 128, "K": 72}), 4)
    (kernel,) = gemms(program)
    assert [parts_of(kernel, {**program.sizes, "M": m}, kernel.config) for m in (193, 192)] == [
        4,
        1,
    ]
    few = replace(program, sizes={**program.sizes, "M": 40})
    assert worst(few, random_inputs(few.graph, few.sizes)) <= 1


def test_a_fold_is_left_in_a_gemm_whose_k_is_split():
    program = split(rms.lower("sm_90a", {"M": 150, "D": 320, "K": 128, "N": 72}), 2)
    assert " RowFold(" in program_source(program)
    assert all(k.config.split_k == 2 for k in gemms(program))
