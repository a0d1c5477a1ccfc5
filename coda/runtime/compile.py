"""A Program -> compiled kernels, in worker processes, for any arch and without a GPU.

A worker is a fresh process with the arch in its environment, since quack and the DSL read it once.
It gets the block as text, lowers it again, and compiles one kernel on uninitialised tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from coda.ir.text import parse, show
from coda.kernels.gemm import quack_target
from coda.lowering.algebra.policy import MemoryPolicy
from coda.lowering.algebra.roles import is_transposed_view
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program
from coda.lowering.program.target import Target
from coda.lowering.program.text import show_config
from coda.runtime.cache import kernel_directory, prune
from coda.runtime.progress import progress
from coda.runtime.sass import Usage, usage
from coda.runtime.settings import given
from coda.runtime.workers import run_all
from coda.sim.host import kept

WORTH_IT = 6  # kernels: starting a process takes as long as compiling four or five


@dataclass(frozen=True)
class Job:
    """One kernel to compile, as a worker process gets it."""

    text: str
    dims: tuple[tuple[str, int], ...]
    target: Target
    frozen: bool
    policy: MemoryPolicy
    kernel: str


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: its files, and its resources (None without cuobjdump)."""

    kernel: str
    source: Path
    ptx: Path
    cubin: Path
    usage: Usage | None

    def json(self) -> dict[str, Any]:
        """As plain data."""
        paths = {"source": str(self.source), "ptx": str(self.ptx), "cubin": str(self.cubin)}
        return {"kernel": self.kernel, **paths, **(vars(self.usage) if self.usage else {})}


def compile_program(program: Program, jobs: int = 0) -> Iterator[Compiled]:
    """Compile all kernels of a Program in parallel, one a core; yields each when it is done."""
    work = [job for _, job in _jobs(program)]
    yield from run_all(compile_job, work, _workers_environment(program.target), jobs)
    prune()


def compile_ahead(programs: Sequence[Program]) -> list[Compiled]:
    """Compile in parallel the kernels of some Programs of one arch that the cache does not have.

    Each kernel is compiled once. Fewer than `WORTH_IT` are left to their first call, since starting
    processes would take longer. On a terminal, shows progress.
    """
    fresh: dict[Path, Job] = {}
    for program in programs:
        for kernel, job in _jobs(program):
            base = base_of(program, kernel)
            if not kept.intact(beside(base, ".cubin")):
                fresh.setdefault(base, job)
    if len(fresh) < WORTH_IT:
        return []
    environment = _workers_environment(programs[0].target)
    done = show_progress(run_all(compile_job, [*fresh.values()], environment), len(fresh))
    prune()
    return done


def _jobs(program: Program) -> Iterator[tuple[Kernel[Any], Job]]:
    """The kernels of a Program that are compiled, each with its job."""
    text, dims = show(program.graph), tuple(program.sizes.items())
    for kernel in program.kernels:
        if kernel.kind.code is not None:
            options = program.target, program.frozen, program.policy
            yield kernel, Job(text, dims, *options, kernel.name)


def compiling_environment(target: Target) -> dict[str, str]:
    """The variables of a process that compiles for a GPU, which need not be there."""
    return {
        **given(),
        "CUTE_DSL_ARCH": target.arch,
        "QUACK_ARCH": "{}{}".format(*target.capability),
        "CUTE_DSL_KEEP": "ptx,cubin",
        "CUTE_DSL_DUMP_DIR": str(_made(kernel_directory() / "dump")),
    }


def _workers_environment(target: Target) -> dict[str, str]:
    """The variables of a worker. It sees no GPU, so that no library initialises one."""
    return {**compiling_environment(target), "CUDA_VISIBLE_DEVICES": ""}


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def compile_job(job: Job) -> Compiled:
    """Compile one kernel in this process."""
    from coda.lowering.compiler import lower

    program = lower(
        parse(job.text), dict(job.dims), job.target, frozen=job.frozen, policy=job.policy
    )
    kernel = next(k for k in program.kernels if k.name == job.kernel)
    return compile_kernel(program, kernel)


def compile_kernel(program: Program, kernel: Kernel[Any]) -> Compiled:
    """Compile one kernel in this process, which began with `compiling_environment`."""
    from coda.runtime.dry_run import dry_run

    base = base_of(program, kernel)
    with captured(base):
        dry_run(program, kernel)
    source, ptx, cubin = base.with_suffix(".py"), beside(base, ".ptx"), beside(base, ".cubin")
    return Compiled(kernel.name, source, ptx, cubin, usage(cubin))


def beside(base: Path, ending: str) -> Path:
    """The file of a kernel with this suffix."""
    return base.with_name(base.name + ending)


def base_of(program: Program, kernel: Kernel[Any]) -> Path:
    """The path of a kernel's compiled files, without a suffix.

    It names the kernel's emitted text, its arch and config; the types and layouts of its tensors,
    which the text leaves open; and the sources that compile it, since an older coda's files
    describe another kernel. Each of these is a part of the key of compiled objects too.
    """
    assert kernel.kind.code is not None
    name = kernel.kind.code.emit(program, kernel)[-1].name
    config = show_config(kernel.config).replace("×", "x") if kernel.config else ""
    layouts = [(n.dtype, is_transposed_view(n)) for n in kernel.mainloop.operands]
    loaded = [n.dtype for n in kernel.body.nodes.values() if n.rank]
    written = [program.buffers[name].dtype for name in kernel.writes()]
    rest = repr((quack_target.sources_digest(), layouts, loaded, written)).encode()
    digest = hashlib.sha256(rest).hexdigest()[:12]
    return kernel_directory() / "-".join([f"{name}.{program.arch}", *config.split(), digest])


class captured:
    """Write the PTX and the cubin of what is compiled inside to `base`.ptx and `base`.cubin.

    A cached object is compiled again if these files are missing.
    """

    def __init__(self, base: Path) -> None:
        self.base = base

    def __enter__(self) -> None:
        from cutlass.base_dsl.jit_executor import JitFunctionArtifacts

        self.owner: Any = JitFunctionArtifacts
        self.original = original = JitFunctionArtifacts.__post_init__
        base = self.base

        def after(artifacts: Any) -> None:
            original(artifacts)
            if artifacts.PTX:
                kept.write(beside(base, ".ptx"), str(artifacts.PTX).encode())
            if artifacts.CUBIN:
                kept.write(beside(base, ".cubin"), bytes(artifacts.CUBIN))

        self.owner.__post_init__ = after
        quack_target.needed[:] = beside(base, ".ptx"), beside(base, ".cubin")

    def __exit__(self, *exception: object) -> None:
        self.owner.__post_init__ = self.original
        quack_target.needed.clear()


def show_progress(found: Iterable[Compiled], total: int) -> list[Compiled]:
    """Collect compiled kernels, and show progress."""
    done: list[Compiled] = []
    with progress("compiling kernels", total) as step:
        step("in parallel")
        for one in found:
            done.append(one)
            step(f"{one.kernel} is done")
    return done


def usage_table(arch: str, done: Iterable[Compiled]) -> Table:
    """The resources of each kernel, as a table."""
    table = Table(title=f"compiled for {arch}", title_justify="left")
    for column in ("kernel", "registers", "spilled bytes", "static shared", "instructions"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for one in done:
        if one.usage is None:
            table.add_row(one.kernel, "pip install 'coda-dsl[sass]' tells", "", "", "")
            continue
        u = one.usage
        table.add_row(
            one.kernel, *map(str, (u.registers, u.stack + u.local, u.shared, u.instructions))
        )
    return table
