"""Weights of a region -> slices of one buffer, if its kernels read several as one matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from coda.ir.graph import Input
from coda.kernels.gemm.weights import weight_reads
from coda.lowering.program.program import Program
from coda.runtime.share import share, shared_groups


@dataclass(frozen=True)
class WeightUse:
    """How a GEMM of a region reads its weights.

    Attributes:
        kernel: its name.
        weights: the region's arguments that it reads.
        copied: bytes of the copy that is kept of them, rebuilt when one changes; 0 if the
            kernel reads the parameters' own memory.
        why: the reason for a copy, or "".
    """

    kernel: str
    weights: tuple[str, ...]
    copied: int
    why: str

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "weights": list(self.weights)}


def settle(
    programs: Iterable[Program], given: Mapping[str, Tensor | None]
) -> tuple[WeightUse, ...]:
    """Move parameters read as one matrix into one buffer; return how each GEMM reads weights.

    Args:
        programs: of the region.
        given: the tensor of each argument, None if it is computed in each call.
    """
    reads = [r for p in programs for r in weight_reads(p)]
    groups = dict.fromkeys(r.together for r in reads if len(r.together) > 1 and not r.why)
    apart: dict[tuple[Input, ...], str] = {}
    for group in sorted(groups, key=len, reverse=True):  # subsets then fit too
        tensors = [given.get(i.name) for i in group]
        known = [t for t in tensors if t is not None]
        computed = "at least one of them is computed in each call"
        apart[group] = share(known) if len(known) == len(tensors) else computed
    found: list[WeightUse] = []
    for read in reads:
        why = read.why or apart.get(read.together, "")
        found.append(WeightUse(read.kernel, read.weights, read.nbytes if why else 0, why))
    return tuple(found)


def share_alike(one: nn.Module, others: Iterable[nn.Module]) -> None:
    """Make parameters of equal modules share buffers in the same groups as those of `one`."""
    groups = shared_groups(one.named_parameters())
    for module in others:
        for group in groups:
            share([module.get_parameter(name) for name in group])
