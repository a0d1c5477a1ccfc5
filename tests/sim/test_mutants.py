"""Faults in good kernels are caught, each by the detector that should: the checks' own test.

Shapes wrap every pipeline: few multiprocessors, several tiles for each block, more k-tiles than
stages. A mutant is run at one schedule after another until something is reported.
"""

from dataclasses import dataclass
from functools import partial

import pytest

import coda.sim as sim
from tests.sim.mutation import MUTATIONS, Bench, Outcome, mutants
from tests.sim.third_party import attention, gemm, rows
from tests.sim.third_party.cases import Case

MULTICAST = {**gemm.TILE, "cluster_M": 2}


@dataclass(frozen=True)
class Subject:
    """A kernel, and how many sites of which mutations it gets; `kernel`: of several, its name."""

    case: Case
    sites: int = 1
    only: tuple[str, ...] = ()
    kernel: str = ""


def _case(make, sms: int) -> Case:
    return Case("", make, sms=sms)


# Its last release, which is left alone, clears the flag for a later launch.
SPLIT = _case(partial(gemm.dense, 256, 256, split_k=2, **gemm.TILE), 4)
HOPPER = {
    "GEMM": Subject(_case(partial(gemm.dense, 256, 256, 512, **gemm.TILE), 1), sites=2),
    "multicast GEMM": Subject(
        _case(partial(gemm.dense, 256, 256, 512, **MULTICAST), 2),
        only=("mbarrier", "cluster", "arrival", "transaction", "wait skipped", "box"),
    ),
    "gathered GEMM": Subject(
        _case(partial(gemm.grouped, gather=True, **gemm.TILE), 2),
        only=("cp.async", "arrival", "wait skipped", "parity"),
    ),
    "attention": Subject(
        _case(partial(attention.forward, 384, 1, 1, causal=True, mask=attention._causal), 1),
        only=("proxy", "wgmma", "wait skipped", "store of a tile"),
    ),
    "split-K GEMM": Subject(SPLIT, only=("release", "acquire")),
    "rms norm": Subject(_case(partial(rows.rms_norm, 1000), 4), kernel="RMSNorm_"),
}
BLACKWELL = {
    "GEMM": Subject(_case(partial(gemm.dense, 256, 256, 512, **gemm.TILE), 1), sites=2),
    "GEMM of pairs": Subject(
        _case(partial(gemm.dense, 512, 256, 384, **gemm.PAIR), 2),
        only=("tcgen05", "tensor", "cluster", "arrival", "transaction", "wait skipped", "parity"),
    ),
    "attention": Subject(
        _case(partial(attention.forward, 384, 1, 1, causal=True, mask=attention._causal), 1),
        only=("tcgen05", "proxy", "wait skipped", "parity", "arrival"),
    ),
    "split-K GEMM": Subject(SPLIT, only=("release", "acquire")),
    "block-scaled GEMM": Subject(
        _case(partial(gemm.block_scaled, "nvfp4", **gemm.TILE), 2),
        only=("scales", "commit", "wait skipped", "transaction"),
    ),
    "dynamic GEMM": Subject(
        _case(partial(gemm.dynamic, False, **gemm.TILE), 2),
        only=("transaction", "wait skipped", "parity", "arrival"),
    ),
    "softmax": Subject(_case(partial(rows.softmax, 1000), 4), kernel="Softmax_"),
}
SUBJECTS = {"sm_90a": HOPPER, "sm_100a": BLACKWELL}


def chosen(subject: Subject, bench: Bench):
    """The mutants of a kernel."""
    for mutation in MUTATIONS:
        wanted = not subject.only or any(part in mutation.name for part in subject.only)
        if wanted:
            yield from mutants(mutation, bench.ptx, bench.ran, subject.sites)


def outcomes(name: str, subject: Subject, arch: str, cache, names: tuple[str, ...] = ()):
    """The outcome of each mutant of a kernel, or of those of some mutations."""
    case = subject.case
    with sim.device(arch, sms=case.sms, checks="warn", lineinfo=False, cache=cache) as gpu:
        bench = Bench(case, gpu, subject.kernel, (("eager", 0),) if names else ())
        for mutant in chosen(subject, bench):
            if not names or mutant.mutation.name in names:
                found, schedule = bench.reported(mutant)
                yield Outcome(name, mutant, frozenset(found), schedule)


QUICK = (
    "proxy fence dropped",
    "block barrier dropped",
    "wgmma wait dropped",
    "arrival dropped",
    "bulk wait dropped",
)


def test_some_mutants(tmp_path):
    subject = Subject(HOPPER["GEMM"].case)
    found = list(outcomes("GEMM", subject, "sm_90a", tmp_path, QUICK))
    assert len(found) == len(QUICK)
    assert all(x.caught for x in found), [str(x) for x in found]


@pytest.mark.slow
@pytest.mark.parametrize("arch", SUBJECTS)
def test_mutants(arch, tmp_path):
    found = [
        outcome
        for name, subject in SUBJECTS[arch].items()
        for outcome in outcomes(name, subject, arch, tmp_path)
    ]
    missed = [str(x) for x in found if not x.caught]
    print(f"{len(found) - len(missed)} of {len(found)} caught on {arch}")
    assert len(found) >= 40
    assert len(missed) <= 0.05 * len(found), "\n".join(missed)
