"""Unmodified kernels of quack, flash-attention and CUTLASS agree with torch on the simulator."""

import pytest

import coda.sim as sim
from tests.sim.third_party import attention, epilogues, examples, gemm, rows
from tests.sim.third_party.cases import SCHEDULES, Case, argued, run

CASES = (*gemm.CASES, *epilogues.CASES, *rows.CASES, *attention.CASES)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Kernels of all tests of a session."""
    return tmp_path_factory.mktemp("sim")


def parameters(quick: bool):
    """(case, arch) of the cases that are quick, or of the rest."""
    return [
        pytest.param(case, arch, id=f"{case.name}-{arch}")
        for case in CASES
        for arch in case.arches
        if (arch in case.quick) == quick
    ]


def check(case: Case, arch: str, cache, checks="warn") -> None:
    for found in run(case, arch, SCHEDULES, checks, cache):
        assert found.warp_instructions > 0
        left = [f for f in found.findings if f.kind not in argued(case.name, arch)]
        assert not left, f"{found.schedule}: {left[0]}"


@pytest.mark.parametrize(("case", "arch"), parameters(quick=True))
def test_quick(case, arch, cache):
    check(case, arch, cache)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "arch"), parameters(quick=False))
def test_all(case, arch, cache):
    check(case, arch, cache)


def test_every_epilogue_of_the_library_has_a_case():
    from quack.epilogue import library
    from quack.epilogue.frontend import EpiMod

    named = {name.split("(")[0] for name in epilogues.TABLE}
    found = {n for n, v in vars(library).items() if isinstance(v, EpiMod)}
    quantising = {"swiglu_quant_mod"}  # among the GEMMs: it writes scale factors as well
    assert found - named == quantising


@pytest.mark.slow
@pytest.mark.skipif(examples.checkout() is None, reason="CODA_CUTLASS_DIR names no checkout")
@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
@pytest.mark.parametrize("example", examples.EXAMPLES, ids=lambda e: f"{e.name}-{e.arch}")
def test_examples_of_cutlass(example, schedule, seed):
    with sim.device(example.arch, schedule=schedule, seed=seed) as gpu:
        examples.run(example)
    assert gpu.report().launches
    stay = argued(f"CUTLASS {example.name}", example.arch)
    left = [f for f in gpu.report().findings if f.kind not in stay]
    assert not left, left[0]
