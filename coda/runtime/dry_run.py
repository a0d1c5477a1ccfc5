"""A kernel of a Program -> its compiled object, by a run on uninitialised tensors without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from coda.ir.graph import Node, Permute
from coda.kernels.gemm import quack_target
from coda.lowering.program.body import Body
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program
from coda.lowering.program.target import Target
from coda.runtime.cache import object_directory
from coda.runtime.launcher import KernelRun
from coda.sim.host.hardware import driver_answers, forget_answers
from coda.sim.host.patches import Patches


def dry_run(program: Program, kernel: Kernel[Any]) -> None:
    """Compile one kernel as a call of the Program would, into quack's store.

    The Program's Target answers in place of a driver: the number of clusters, which is an argument
    of each launch and built into no kernel.
    """
    quack_target.use_cache(object_directory(), enabled=True)
    free = {s: min(n, 128) for s, n in program.sizes.items() if s not in program.fixed}
    sizes = {**program.sizes, **free}
    inputs = [
        torch.empty([d.size(sizes) for d in i.shape], dtype=i.dtype.torch)
        for i in program.graph.inputs
    ]
    run = DryRun(program, inputs, sizes)
    run.raw = _Partials(program, sizes)
    with without_driver(program.target):
        run.kernel(kernel)


@contextmanager
def without_driver(target: Target) -> Iterator[None]:
    """Answer in place of a driver inside, and clear the answers afterwards."""
    patches = Patches()
    for owner, name, answer in driver_answers(target.multiprocessors, target.l2):
        patches.set(owner, name, answer)
    try:
        yield
    finally:
        patches.undo()
        forget_answers()


class DryRun(KernelRun):
    """A call that allocates and compiles, and launches nothing."""

    def fold(self) -> dict[Node, Tensor]:
        return {}

    def value(self, node: Node) -> Tensor:
        if isinstance(node, Permute) and node not in self.program.places:
            return self.value(node.arg).permute(node.order)
        place = self.program.places.get(node)
        dtype = node.dtype.torch
        if place is not None:
            dtype = self.program.buffers[place.buffer].dtype.torch
        return torch.empty([d.size(self.sizes) for d in node.shape], dtype=dtype)

    def packed(self, name: str, body: Body) -> dict[str, Tensor]:
        return {p.name: torch.empty(len(p.source)) for p in body.packed}

    def kernel(self, kernel: Kernel[Any]) -> None:
        if kernel.kind.code is not None:
            kernel.kind.code.compile(self, kernel)


class _Partials(dict[str, Tensor]):
    """Partials of any GEMM, uninitialised, allocated on access."""

    def __init__(self, program: Program, sizes: dict[str, int]) -> None:
        super().__init__()
        self.program, self.sizes = program, sizes

    def __missing__(self, name: str) -> Tensor:
        planes, rows, parts = (d.size(self.sizes) for d in self.program.buffers[name].shape)
        return torch.empty((rows, parts * planes))
