"""A block and arguments -> the error of each of its kernels against float64, on every backend.

A Program runs once on a backend, and returns every value that a kernel stores beside its outputs.
Each stored value is compared with float64, evaluated from what the kernel *read*: the arguments,
and the values that earlier kernels stored, as that backend stored them. So the error of one kernel
is not charged to later ones, and the first kernel that exceeds its bound is the wrong one.

The bound is relative to the error of torch op by op, from the same values rounded to their dtypes:
`NORM` times that error over a whole value, `WORST` times that error at its worst element. One
rounding to the stored type is added, for values that torch happens to compute exactly.

Partials of a reduction are not values of the block. They are checked through the kernel that folds
them, and both kernels are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from coda.block import Block
from coda.errors import CodaError
from coda.ir.evaluate import evaluate
from coda.ir.graph import Cast, Node
from coda.ir.types import DType, bf16, f32
from coda.lowering.program.cost import describe
from coda.lowering.program.epilogue import Stat, leaves
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.memory import reads
from coda.lowering.program.program import Program
from coda.runtime.call import BACKENDS, gpu_target
from coda.sim.host.device import ARCHES as SIMULATED

NORM, WORST = 1.1, 2.0  # factors of the error of torch op by op
LEAST = 1e-6  # relative error: float32 sums in another order


@dataclass(frozen=True)
class Deviation:
    """The error of a stored value against float64.

    Attributes:
        norm: ‖y − y64‖ / ‖y64‖; for booleans and integers, the share of elements that differ.
        worst: max |y − y64| / max |y64| over the elements; infinite if one is NaN or infinite and
            the other is not.
        at: the index of the worst element.
    """

    norm: float
    worst: float
    at: tuple[int, ...]


def within(
    coda: Deviation,
    torch: Deviation,
    shape: tuple[int, ...],
    unit: float,
    slack: tuple[float, float] = (NORM, WORST),
) -> bool:
    """Whether an error is within its bound.

    Args:
        coda, torch: the error of a value, and that of torch op by op.
        shape: of the value.
        unit: the largest relative error of one rounding to its type; 0 for integers.
        slack: factors of torch's error over the whole value, and at its worst element.
    """
    few = max(math.prod(shape), 1) ** -0.5  # the norm of n elements varies by 1/√n
    norm = (slack[0] + few) * torch.norm + few * unit + LEAST
    worst = slack[1] * torch.worst + unit + LEAST
    return coda.norm <= norm and coda.worst <= worst


@dataclass(frozen=True)
class Checked:
    """One stored value of one kernel on one backend.

    Attributes:
        part: "forward" or "backward" of training, else "".
        kernel: its name in the Program.
        folds: the kernels whose partials it folds.
        value: the buffer, as `explain` names it.
        backend: the backend that computed it.
        unit: the largest relative error of one rounding to the stored type; 0 for integers.
        shape: of the value.
        coda, torch: the error of the kernel, and that of torch op by op.
    """

    part: str
    kernel: str
    folds: tuple[str, ...]
    value: str
    backend: str
    unit: float
    shape: tuple[int, ...]
    coda: Deviation
    torch: Deviation

    @property
    def good(self) -> bool:
        """Whether the value is within its bound."""
        return within(self.coda, self.torch, self.shape, self.unit)

    def name(self) -> str:
        """The kernel, and the kernels whose partials it folds."""
        whole = f"{self.part} {self.kernel}".strip()
        return f"{whole} (which folds partials of {', '.join(self.folds)})" if self.folds else whole

    def json(self) -> dict[str, Any]:
        """As plain data."""
        found = vars(self) | {"good": self.good}
        return found | {k: vars(found[k]) for k in ("coda", "torch")}


@dataclass(frozen=True)
class CheckReport:
    """The report of `coda check`.

    Attributes:
        block, arch: names.
        sizes: of every symbol.
        values: in the order of launches.
    """

    block: str
    arch: str
    sizes: dict[str, int]
    values: tuple[Checked, ...]

    @property
    def wrong(self) -> Checked | None:
        """The first value, in the order of launches, that exceeds its bound on some backend."""
        return next((v for v in self.values if not v.good), None)

    def verdict(self) -> str:
        """One sentence."""
        one = self.wrong
        if one is None:
            return f"{self.block}: every value of every kernel is within its bound"
        return (
            f"{self.block}: {one.name()} is the first kernel that is wrong, on {one.backend}: "
            f"`{one.value}`, worst at {list(one.coda.at)}"
        )

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "block": self.block,
            "arch": self.arch,
            "dims": self.sizes,
            "values": [v.json() for v in self.values],
            "wrong": None if self.wrong is None else self.wrong.json(),
        }

    def table(self) -> Table:
        """As a table."""
        sizes = " ".join(f"{k}={v}" for k, v in self.sizes.items())
        title = f"{self.block} on {self.arch}, {sizes}: errors against float64"
        table = Table(title=title, title_justify="left")
        for column in ("kernel", "value", "backend", "error", "torch's", "worst", "torch's", ""):
            table.add_column(column, overflow="fold")
        for v in self.values:
            errors = v.coda.norm, v.torch.norm, v.coda.worst, v.torch.worst
            shown = [f"{e:.1e}" for e in errors]
            kernel = f"{v.part} {v.kernel}".strip()
            table.add_row(kernel, v.value, v.backend, *shown, "ok" if v.good else "WRONG")
        return table


def backends_here(arch: str) -> list[str]:
    """The backends that can run a Program for an arch, from fast to slow."""
    import shutil

    compiler = shutil.which("cc") or shutil.which("gcc")
    gpu = gpu_target()
    simulated = arch in SIMULATED and bool(compiler)
    works = {"cuda": gpu is not None and gpu.arch == arch, "sim": simulated}
    return [name for name in ("reference", "cuda", "sim") if works.get(name, True)]


def check_kernels(
    block: Block,
    inputs: Sequence[Tensor],
    sizes: Mapping[str, int],
    *,
    element: DType = bf16,
    arch: str = "",
    backends: Sequence[str] = (),
) -> CheckReport:
    """Compare each kernel of a block's Program with float64.

    Args:
        block: the block.
        inputs: its arguments in order, on the CPU, of the types that the graph declares.
        sizes: the size of every symbol.
        element: the type of arguments that are declared without one.
        arch: to lower for; by default that of the GPU, else `CODA_ARCH`.
        backends: to run on; by default all that can run the Program.

    Raises:
        CodaError: if a kernel stops in the simulator, with the kernel's name.
    """
    program = block.lower(arch, sizes, element)
    values = check_program(program, inputs, sizes, backends or backends_here(program.arch))
    return CheckReport(program.graph.name, program.arch, dict(sizes), tuple(values))


def check_gradients(
    block: Block,
    inputs: Sequence[Tensor],
    sizes: Mapping[str, int],
    *,
    element: DType = bf16,
    arch: str = "",
    backends: Sequence[str] = (),
    wanted: Sequence[str] | None = None,
    memory: str | None = None,
    seed: int = 0,
) -> CheckReport:
    """Compare each kernel of a block's forward and backward with float64.

    Cotangents are random. The backward reads what the first backend saved.

    Args:
        block, inputs, sizes, element, arch, backends: as in `check_kernels`.
        wanted: names of the arguments to differentiate; by default all floats except constants.
        memory: "min", "balanced" or "speed", as in a call.
        seed: of the cotangents.

    Raises:
        CodaError: as in `check_kernels`.
    """
    forward, backward = block.lower_training(arch, sizes, element, wanted, memory)
    names = backends or backends_here(forward.arch)
    values = check_program(forward, inputs, sizes, names, "forward")
    outputs = run_on(names[0], forward, inputs, sizes)
    known = {i.name: x for i, x in zip(forward.graph.inputs, inputs, strict=True)}
    known |= {name: x for (name, _), x in zip(forward.outputs, outputs, strict=True)}
    generator = torch.Generator().manual_seed(seed)
    given: list[Tensor] = []
    for node in backward.graph.inputs:
        shape = [d.size(sizes) for d in node.shape]
        x = known.get(node.name)
        x = torch.randn(shape, generator=generator) if x is None else x
        given.append(x.reshape(shape).to(node.dtype.torch))
    values += check_program(backward, given, sizes, names, "backward")
    return CheckReport(forward.graph.name, forward.arch, dict(sizes), tuple(values))


def check_program(
    program: Program,
    inputs: Sequence[Tensor],
    sizes: Mapping[str, int],
    backends: Sequence[str],
    part: str = "",
) -> list[Checked]:
    """Each value that the Program's kernels store, on each backend, in the order of launches."""
    watched, nodes = observed(program)
    found: list[list[Checked]] = []
    for backend in backends:
        outputs = run_on(backend, watched, inputs, sizes)
        values = dict(zip(nodes, outputs, strict=True))
        values |= dict(zip(program.graph.inputs, inputs, strict=True))
        found.append([*_held(program, values, sizes, backend, part)])
    return [v for row in zip(*found, strict=True) for v in row]


def observed(program: Program) -> tuple[Program, tuple[Node, ...]]:
    """The same kernels, with all stored values and all prepacked weights as outputs.

    No buffer is freed or reused, so that each value is available at the end. A kernel may read a
    bf16 value that is kept in float32 (a row's statistic, a prepacked vector). Floats are therefore
    returned in float32, so that a rounding that no kernel does is not counted.

    Returns:
        The Program, and the node of each of its outputs.
    """
    stored = [*program.places, *program.prepared.values()]
    narrow = [n for n in stored if n.dtype.kind == "float" and n.dtype.size < f32.size]
    wide: dict[Node, Node] = {n: Cast(n, f32) for n in narrow}
    outputs = [*program.outputs, *((f"value{i}", wide.get(n, n)) for i, n in enumerate(stored))]
    places = {**program.places, **{wide.get(n, n): p for n, p in program.places.items()}}
    freed = tuple(() for _ in program.kernels)
    changed = replace(program, outputs=tuple(outputs), places=places, freed=freed, overwrites={})
    return changed, (*(n for _, n in program.outputs), *stored)


def run_on(
    backend: str, program: Program, inputs: Sequence[Tensor], sizes: Mapping[str, int]
) -> list[Tensor]:
    """The outputs of a Program on a backend, on the CPU.

    Raises:
        CodaError: if the simulator stops, with the kernel's name.
    """
    nothing: frozenset[str] = frozenset()
    if backend == "cuda":
        moved = [x.cuda() for x in inputs]
        return [x.cpu() for x in BACKENDS[backend](program, moved, sizes, nothing)]
    if backend != "sim":
        return list(BACKENDS[backend](program, inputs, sizes, nothing))
    from coda.runtime.simulate import device
    from coda.sim import SimError

    gpu = None
    try:
        with device(program.arch, checks="raise") as gpu:
            return list(BACKENDS[backend](program, inputs, sizes, nothing))
    except SimError as e:
        count = len(gpu.report().launches) if gpu is not None else 0
        launched = [k for k in program.kernels if k.kind.code is not None][: max(count, 1)]
        raise CodaError(
            f"the simulated GPU stopped in {launched[-1].name}: {e}",
            found=f"launch {count} of {program.graph.name}",
        ) from e


def _held(
    program: Program,
    values: Mapping[Node, Tensor],
    sizes: Mapping[str, int],
    backend: str,
    part: str,
) -> Iterator[Checked]:
    """The values of one run, each compared with float64."""
    makers: dict[str, Kernel[Any]] = {}
    given = {n: values[n] for n in (*program.graph.inputs, *program.prepared.values())}
    for kernel in program.kernels:
        makers |= dict.fromkeys(kernel.writes(), kernel)
        for buffer in kernel.writes():
            folds = _folded(program, kernel, buffer, makers)
            read = {n for k in (kernel, *folds) for n in reads(program, k)}
            known = given | {n: values[n] for n, p in program.places.items() if p.buffer in read}
            mine = [n for n, p in program.places.items() if p.buffer == buffer and n not in known]
            rounded = {n: x.to(n.dtype.torch) for n, x in known.items()}  # as torch stores them
            plain, exact = evaluate(mine, rounded, sizes, None), evaluate(mine, rounded, sizes)
            errors = list(map(deviation, plain, exact))
            if not all(torch.equal(x, rounded[n].to(x.dtype)) for n, x in known.items()):
                exact = evaluate(mine, known, sizes)
            for node, wide, error in zip(mine, exact, errors, strict=True):
                yield Checked(
                    part,
                    kernel.name,
                    tuple(k.name for k in folds),
                    f"{buffer}: {_described(node)}",
                    backend,
                    torch.finfo(node.dtype.torch).eps / 2 if node.dtype.kind == "float" else 0.0,
                    tuple(wide.shape),
                    deviation(values[node], wide),
                    error,
                )


def _folded(
    program: Program, kernel: Kernel[Any], buffer: str, makers: Mapping[str, Kernel[Any]]
) -> list[Kernel[Any]]:
    """The kernels whose partials reach a buffer, directly or through other kernels."""
    found: dict[Kernel[Any], None] = {}
    stack = [(kernel, buffer)]
    while stack:
        for name in _partials(*stack.pop()):
            if makers[name] not in found:
                found[makers[name]] = None
                stack.append((makers[name], name))
    return list(found)


def _partials(kernel: Kernel[Any], buffer: str) -> set[str]:
    """The partials that a kernel folds to compute one of its buffers."""
    epilogue = kernel.body.epilogue
    statistics = {s.name: s for s in epilogue.statistics}
    exprs = [e for s in (*epilogue.stores, *epilogue.sinks) if s.buffer == buffer for e in s.lanes]
    read: set[str] = set()
    found: set[str] = set()
    while exprs:
        names = {x.name for x in leaves(exprs) if isinstance(x, Stat)} - read
        read |= names
        found |= {operand for n in names if (operand := statistics[n].operand)}
        exprs = [e for n in names if (e := statistics[n].expr) is not None]
    return found & set(kernel.partials())


def _described(node: Node) -> str:
    """An operation, and the user's line that it comes from."""
    where = f" ({Path(node.where.file).name}:{node.where.line})" if node.where else ""
    return f"{describe(node)}{where}"


def deviation(found: Tensor, exact: Tensor) -> Deviation:
    """The error of a tensor against float64.

    Args:
        found, exact: tensors of one shape; NaNs and infinities in the same places are equal.
    """
    x, y = found.double().reshape(-1), exact.double().reshape(-1)
    if not y.numel():
        return Deviation(0.0, 0.0, ())
    same = (x == y) | (x.isnan() & y.isnan())
    if not exact.is_floating_point():
        other = (~same).double()
        return Deviation(float(other.mean()), 0.0, _index(int(other.argmax()), exact))
    finite = x.isfinite() & y.isfinite()
    apart = torch.where(same, 0.0, torch.where(finite, (x - y).abs(), math.inf))
    scale = torch.where(y.isfinite(), y, 0.0)
    place = int(apart.argmax())
    norm = float(apart.norm() / scale.norm().clamp_min(1e-300))
    worst = float(apart.max() / scale.abs().max().clamp_min(1e-300))
    return Deviation(norm, worst, _index(place, exact))


def _index(place: int, like: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(place), like.shape))
