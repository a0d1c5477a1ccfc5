"""`with device(arch=...) as gpu:` -> CuTe DSL kernels launched inside run on the simulated GPU."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from coda.sim.host import kept
from coda.sim.host.hooks import install
from coda.sim.host.launch import (
    PtxStore,
    cannot_keep,
    check_target,
    default_cache,
    is_programmatic,
    load_shim,
)
from coda.sim.host.patches import Patches
from coda.sim.host.report import Launched, Report, occupancy
from coda.sim.host.tensors import CudaIsCpu, Memory, wrap
from coda.sim.machine import run
from coda.sim.types import (
    CHECK_KINDS,
    Allocations,
    Launch,
    LaunchResult,
    Level,
    Options,
    Schedule,
    SimError,
    Touched,
    Unsupported,
)

ARCHES = ("sm_90a", "sm_100a")

# One device at a time: its patches are global to the process.
_lock = threading.Lock()
_owner: int | None = None
_active: Device | None = None


class Device:
    """A simulated GPU, active between `__enter__` and `__exit__`, for the thread that entered.

    Another thread that enters a device waits for this one to end. `options` may be assigned
    between launches: kernels that are compiled serve every schedule.
    """

    def __init__(
        self, arch: str, sms: int, options: Options, *, lineinfo: bool, cache: Path | None
    ) -> None:
        if arch not in ARCHES:
            raise ValueError(f"arch is {' or '.join(ARCHES)}, not {arch!r}")
        if sms < 1:
            raise ValueError(f"a device has at least one multiprocessor, not {sms}")
        self.arch, self.sms, self.options, self.lineinfo = arch, sms, options, lineinfo
        self.cache = cache = _usable(cache, f"{arch}{'-lines' * lineinfo}", "ptx")
        self.kernels = None if cache is None else str(cache / f"{arch}{'-lines' * lineinfo}")
        self.memory = Memory()
        self.launched: list[Launched] = []
        self.unfinished: Touched = {}  # memory of launches that may run when the next one begins
        self.pending: BaseException | None = None
        self.thread: int | None = None

    def __enter__(self) -> Self:
        global _owner, _active
        me = threading.get_ident()
        if _owner == me:
            raise SimError("a simulated device is active in this thread; end it before another")
        _lock.acquire()
        try:
            self._start(me)
        except BaseException:
            _lock.release()
            raise
        _owner, _active = me, self
        return self

    def _start(self, me: int) -> None:
        self.shim = load_shim(self.cache or default_cache())
        self.store = PtxStore(self.cache / "ptx" if self.cache else None)
        self.dump = tempfile.mkdtemp(prefix="coda-sim-")
        self.thread = me
        self.mode = CudaIsCpu(self.memory)
        self.patches: Patches = install(self)
        self.shim.install(self._receive, self.arch, self.sms)
        self.mode.__enter__()

    def __exit__(self, *exception: Any) -> None:
        global _owner, _active
        if threading.get_ident() != self.thread:
            raise SimError("a simulated device ends in the thread that began it")
        try:
            self.mode.__exit__(*exception)
            self.shim.remove()
            self.patches.undo()
            shutil.rmtree(self.dump, ignore_errors=True)
        finally:
            self.thread = _owner = _active = None
            _lock.release()

    def here(self) -> bool:
        """Whether this is the device's thread."""
        return threading.get_ident() == self.thread

    def register(self, tensor: Tensor, name: str = "") -> Tensor:
        """Allow kernels to access a tensor that is no launch argument, through a raw pointer."""
        self.memory.add(tensor, name)
        return tensor

    def report(self) -> Report:
        """The results of all launches so far."""
        return Report(self.arch, list(self.launched))

    def compiled(self, cubin: bytes, ptx: str) -> None:
        """Remember the PTX of a kernel."""
        self.store.add(cubin, ptx)

    def wrap(self, tensor: Any) -> Any:
        """A torch tensor as a CUDA tensor for host code; any other value unchanged."""
        return wrap(tensor, self.memory) if isinstance(tensor, Tensor) else tensor

    def call(
        self, function: Any, names: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a compiled function; its parameter names become names of its tensors."""
        found = list(names)
        found += [f"arg{k}" for k in range(len(found), len(args))]
        positional = [wrap(a, self.memory, n) for a, n in zip(args, found, strict=False)]
        named = {n: wrap(a, self.memory, n) for n, a in kwargs.items()}
        with self.launching():
            return function(*positional, **named)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Raise a failed launch's own exception instead of host code's CUDA error."""
        self.pending = None
        try:
            yield
        except Exception as error:
            refused = self.shim.refused()
            if refused is not None:
                raise Unsupported(f"host code calls {refused}, which is not simulated") from error
            if self.pending is not None:
                raise self.pending from None
            raise
        finally:
            self.pending = None

    def _receive(self, found: Launch | SimError) -> int:
        try:
            if isinstance(found, SimError):
                raise found
            self._run(found)
        except BaseException as error:
            self.pending = error
            return 1
        return 0

    def _run(self, launch: Launch) -> None:
        ptx = self.store.find(launch.cubin, launch.kernel)
        check_target(ptx, launch)
        before = self.unfinished if is_programmatic(launch) else {}
        launch = dataclasses.replace(launch, ptx=ptx, before=before)
        record = Launched(
            launch.kernel,
            launch.grid,
            launch.block,
            launch.cluster,
            launch.smem,
            self.options.schedule,
            LaunchResult(launch.kernel),
            occupancy(launch),
        )
        self.launched.append(record)
        start = time.perf_counter()
        try:
            options = dataclasses.replace(self.options, sms=self.sms)
            record.result = execute(launch, self.memory.allocations(), options)
            self.unfinished = record.result.unfinished
        except BaseException as error:
            record.error = f"{type(error).__name__}: {error}"
            if isinstance(error, SimError) and error.finding is not None:
                record.result.findings.append(error.finding)
            raise
        finally:
            record.result.seconds = record.result.seconds or time.perf_counter() - start


def _usable(cache: Path | None, *parts: str) -> Path | None:
    """A directory for compiled kernels; None, with a warning, if it is not safe to use."""
    for path in () if cache is None else (cache, *(cache / part for part in parts)):
        why = kept.refusal(path)
        if why:
            cannot_keep(path, why)
            return None
    return cache


def active() -> Device | None:
    """The device that is active in this thread, if there is one."""
    gpu = _active
    return gpu if gpu is not None and gpu.here() else None


def execute(launch: Launch, allocations: Allocations, options: Options) -> LaunchResult:
    """Run a launch on the machine."""
    return run(launch, allocations, options)


def device(
    arch: str = "sm_90a",
    *,
    sms: int = 4,
    schedule: Schedule = "eager",
    seed: int = 0,
    checks: Level | Mapping[str, Level] = "warn",
    instructions: int = Options.instructions,
    lineinfo: bool = True,
    cache: Path | str | None = None,
) -> Device:
    """A simulated GPU for a `with` statement: CuTe DSL kernels launched inside run on the CPU.

    Args:
        arch: sm_90a or sm_100a.
        sms: multiprocessors. Persistent kernels start so many blocks; few make each run many tiles.
        schedule: when asynchronous operations complete: "eager" at issue, "late" when a warp waits
            for them, "random" at times drawn from `seed`.
        checks: off, warn or raise, for all kinds of bugs or by kind (`types.CHECK_KINDS`).
        instructions: warp instructions that one launch may execute.
        lineinfo: compile with line information, so that findings name the source line.
        cache: directory for the shim, quack's compiled kernels and their PTX; None: only the shim
            is cached, in the user's cache directory. Files whose digest does not match are
            rebuilt; a directory that other users may write to, or this user may not, is not used:
            both with a RuntimeWarning.

    Raises ValueError for an unknown arch, schedule or check, or sms < 1.
    """
    levels: dict[str, Level] = {}
    if isinstance(checks, str):
        levels.update(dict.fromkeys(CHECK_KINDS, checks))
    else:
        levels.update(checks)
    options = Options(schedule, seed, levels, instructions)
    found = None if cache is None else Path(cache)
    return Device(arch, sms, options, lineinfo=lineinfo, cache=found)
