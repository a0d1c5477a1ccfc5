"""A Program -> the time of its block with GEMMs by cuBLAS, and the rest fused between them.

    Σ over contractions: cuBLAS (frozen, `cublas.py`)
    + Σ over connected groups of other operations: ramp + bytes / bandwidth

Contractions that share an activation take the better of one GEMM and of several. The same is said
of a kernel: cuBLAS for its contractions, and one more kernel for all else that it computes, which
reads what they wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coda.ir.dims import product
from coda.ir.graph import Contract, Graph, Node, walk
from coda.lowering.program.cost import (
    memory_bytes,
    pointwise_fused,
    rest_of,
    tensor_traffic,
)
from coda.lowering.program.cublas import RATES, cublas_seconds
from coda.lowering.program.groups import is_free
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program


def baseline_seconds(graph: Graph, program: Program) -> float | None:
    """The seconds of a block as cuBLAS's GEMMs and fused kernels; None on a GPU without figures."""
    if program.target.name not in RATES:
        return None
    rates, weights = program.target.rates, set(program.prepared.values())
    contracts = [n for n in walk(graph.roots) if isinstance(n, Contract) and n not in weights]
    rest = rest_of(pointwise_fused(graph, program.sizes), graph, program.sizes)
    return (
        _gemms(contracts, program) + rest.launches * rates.ramp + rest.hbm_bytes / rates.bandwidth
    )


def kernel_baseline(program: Program, kernel: Kernel[Any]) -> float | None:
    """The seconds of what a kernel computes; None without contractions, or figures of the GPU."""
    contracts = [n for n in kernel.nodes if isinstance(n, Contract)]
    if not contracts or program.target.name not in RATES:
        return None
    seconds, rates = _gemms(contracts, program), program.target.rates
    if all(isinstance(n, Contract) or is_free(n) for n in kernel.nodes):
        return seconds
    moved = tensor_traffic(program, kernel)
    read = sum(memory_bytes(o, program) for o in kernel.mainloop.operands)
    made = sum(c.nbytes(program.sizes) for c in contracts)
    rest = moved.read_bytes + moved.write_bytes - read + made
    return seconds + rates.ramp + rest / rates.bandwidth


def _gemms(contracts: Iterable[Contract], program: Program) -> float:
    """The seconds of contractions; those of one activation are one GEMM where that is faster."""
    groups: dict[Node, list[tuple[int, int, int, int]]] = {}
    for node in contracts:
        groups.setdefault(node.lhs, []).append(_problem(node, program))
    return sum(_together(program.target.name, problems) for problems in groups.values())


def _together(gpu: str, problems: list[tuple[int, int, int, int]]) -> float:
    """The seconds of GEMMs of one activation, as one or as several."""
    apart = sum(cublas_seconds(gpu, count * m, n, k) for count, m, n, k in problems)
    (count, m, _, k), *_ = problems
    if count > 1:
        return apart
    return min(apart, cublas_seconds(gpu, m, sum(n for _, _, n, _ in problems), k))


def _problem(node: Contract, program: Program) -> tuple[int, int, int, int]:
    """(matrices, M, N, K) of a contraction; a batch is as tall as all its matrices together."""
    sizes, lead = program.sizes, len(node.shape) - 2 if node.batched else 0
    count = product(node.shape[:lead]).size(sizes)
    rows = product(node.shape[lead:-1]).size(sizes)
    return count, rows, node.shape[-1].size(sizes), node.lhs.shape[-1].size(sizes)
