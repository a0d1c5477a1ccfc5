"""A third-party kernel, its inputs and what torch says -> runs on the simulator, compared."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import coda.sim as sim

BOTH = ("sm_90a", "sm_100a")
SCHEDULES = (("eager", 0), ("late", 0), ("random", 1))
# Kinds of findings that stay, by the beginning of a case's name; docs/sim-checks.md argues each.
ARGUED = {
    ("attention backward", "sm_100a"): {"exited"},
    ("CUTLASS attention", "sm_90a"): {"exited"},
}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Problem:
    """One problem: `launch` runs kernels and returns what they wrote, `expected` says what.

    An output may be off by `tolerance` of its own magnitude plus the tensor's root mean square:
    bfloat16 rounds by 2^-9 at most, twice where a kernel rounds an intermediate value.
    """

    launch: Callable[[], dict[str, Tensor]]
    expected: dict[str, Tensor]
    tolerance: float = 2**-7
    tolerances: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A problem; `make` is called inside a device. `quick`: arches on which each run has it."""

    name: str
    make: Callable[[], Problem]
    arches: tuple[str, ...] = BOTH
    quick: tuple[str, ...] = ()
    sms: int = 4


def argued(name: str, arch: str) -> set[str]:
    """The kinds of findings of a case that the docs argue."""
    fits = (kinds for (head, a), kinds in ARGUED.items() if name.startswith(head) and a == arch)
    return set().union(*fits)


@dataclass
class Run:
    """One run of a case."""

    case: str
    arch: str
    schedule: str
    seconds: float
    warp_instructions: int
    launches: int
    error: float
    findings: list[Any]

    @property
    def rate(self) -> float:
        """Warp instructions per second."""
        return self.warp_instructions / self.seconds if self.seconds else 0.0


def run(
    case: Case,
    arch: str,
    schedules: Sequence[tuple[str, int]] = SCHEDULES,
    checks: Any = "off",
    cache: Any = None,
) -> list[Run]:
    """Compile a case once, run it at every schedule, compare with torch.

    Without line information: it takes a third of the compiler's time.
    """
    found = []
    with sim.device(arch, sms=case.sms, checks=checks, lineinfo=False, cache=cache) as gpu:
        torch.manual_seed(0)
        problem = case.make()
        for schedule, seed in schedules:
            gpu.options = sim.Options(schedule, seed, gpu.options.checks)
            before = len(gpu.report().launches)
            try:
                error = compare(problem, problem.launch())
            except Exception as failure:
                failure.add_note(f"{case.name} on {arch}, schedule {schedule}")
                raise
            launches = gpu.report().launches[before:]
            assert launches, "nothing was launched"
            seconds = sum(x.result.seconds for x in launches)
            count = sum(x.result.warp_instructions for x in launches)
            findings = [f for x in launches for f in x.result.findings]
            found.append(
                Run(case.name, arch, schedule, seconds, count, len(launches), error, findings)
            )
    return found


def compare(problem: Problem, outputs: dict[str, Tensor]) -> float:
    """Check every output; the largest relative error in the Frobenius norm."""
    assert outputs.keys() == problem.expected.keys()
    worst = 0.0
    for name, expected in problem.expected.items():
        got, wanted = outputs[name].detach().double(), expected.detach().double()
        assert got.shape == wanted.shape, f"{name}: {got.shape} is not {wanted.shape}"
        if not outputs[name].is_floating_point():
            assert torch.equal(got, wanted), f"{name}: {int((got != wanted).sum())} differ"
            continue
        assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} of {got.numel()} are NaN"
        wanted_rms = wanted.square().mean().sqrt()
        allowed = problem.tolerances.get(name, problem.tolerance) * (wanted.abs() + wanted_rms)
        error = (got - wanted).abs()
        wrong = int((error > allowed).sum())
        relative = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
        at = tuple(int(i) for i in torch.unravel_index((error - allowed).argmax(), error.shape))
        assert not wrong, (
            f"{name}: {wrong} of {got.numel()} elements are off, {relative:.2e} in all; worst at "
            f"{at}: {got[at]:.6g}, torch has {wanted[at]:.6g}"
        )
        worst = max(worst, relative)
    assert math.isfinite(worst)
    return worst


def randn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    """Normal values."""
    return (torch.randn(*shape) * scale).to(dtype)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Memory in which every element that no kernel writes is NaN."""
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(dtype)
    return torch.full(shape, math.nan, dtype=dtype)
