"""Backend sim: a Program and tensors -> outputs, by executing the kernels' PTX on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from coda import sim
from coda.errors import ArchError
from coda.kernels.gemm import quack_target
from coda.lowering.program.program import Program
from coda.runtime import settings
from coda.runtime.cache import simulator_directory
from coda.runtime.launcher import KernelRun
from coda.sim.host.device import ARCHES as SIMULATED


def device(arch: str, **options: object) -> sim.Device:
    """A simulated GPU that keeps its compiled kernels in coda's cache.

    Raises:
        ArchError: for an arch that is not simulated.
    """
    if arch not in SIMULATED:
        raise ArchError(
            "there is no simulated GPU of this arch", found=arch, help=" or ".join(SIMULATED)
        )
    cache = simulator_directory() if settings.CACHE.get() == "1" else None
    return sim.device(arch, cache=cache, **options)  # type: ignore[arg-type]


def run_simulated(
    program: Program,
    inputs: Sequence[Tensor],
    sizes: Mapping[str, int],
    given: frozenset[str] = frozenset(),
) -> tuple[Tensor, ...]:
    """The outputs of a Program, whose kernels may write over the donated arguments, `given`.

    Inside `with coda.sim.device(...)` the kernels run on that device. Elsewhere they run on a
    temporary device, which stops at the first bug that a check finds.

    Raises:
        ArchError: if the active device is of another arch than the Program.
        coda.sim.SimError: for an error of a kernel.
    """
    gpu = sim.active()
    if gpu is None:
        with device(program.arch, checks="raise"):
            return _run(program, inputs, sizes, given)
    if gpu.arch != program.arch:
        raise ArchError(
            f"a program for {program.arch} does not run on a simulated {gpu.arch}",
            found=f'coda.sim.device(arch="{gpu.arch}")',
            help=f'call the block with arch="{gpu.arch}"',
        )
    return _run(program, inputs, sizes, given)


def _run(
    program: Program,
    inputs: Sequence[Tensor],
    sizes: Mapping[str, int],
    given: frozenset[str],
) -> tuple[Tensor, ...]:
    quack_target.cover_our_sources()
    return KernelRun(program, inputs, sizes, given).run()
