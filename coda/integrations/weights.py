"""Weights of a region -> slices of one buffer, where its kernels read several as one matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from coda.lowering.program import Program
from coda.lowering.weights import weight_reads
from coda.runtime.share import share, shared_groups


@dataclass(frozen=True)
class WeightUse:
    """How a GEMM of a region reads its weights.

    Attributes:
        kernel: its name.
        weights: the region's arguments that it reads.
        copied: bytes of the copy that is kept of them, made again when one changes; 0 where the
            kernel reads the parameters' own memory.
        why: there is a copy, or "".
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
    """Let parameters that kernels read as one lie in one buffer; how each GEMM reads its weights.

    Args:
        programs: of the region.
        given: the tensor of each argument, None where it is computed in each call.
    """
    found: list[WeightUse] = []
    for program in programs:
        for read in weight_reads(program):
            why = read.why
            if not why and len(read.together) > 1:
                tensors = [given.get(i.name) for i in read.together]
                known = [t for t in tensors if t is not None]
                same = len(known) == len(tensors)
                why = share(known) if same else "some are computed in each call"
            copied = read.nbytes if why else 0
            found.append(WeightUse(read.kernel, read.weights, copied, why))
    return tuple(found)


def share_alike(one: nn.Module, others: Iterable[nn.Module]) -> None:
    """Let parameters of modules of one kind share buffers as those of one of them do."""
    groups = shared_groups(one.named_parameters())
    for module in others:
        for group in groups:
            share([module.get_parameter(name) for name in group])
