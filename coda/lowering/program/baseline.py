"""A Program -> the time of its block with GEMMs by cuBLAS, and the rest fused between them.

    Σ over contractions: cuBLAS (frozen, `cublas.py`)
    + Σ over connected groups of other operations: ramp + bytes / bandwidth

Contractions that share an activation take the better of one GEMM and of several. The same is said
of a kernel: cuBLAS for its contractions, and one more kernel for all else that it computes, which
reads what they wrote.

`unfused_price` is the same by coda's own models: bare GEMMs of the kinds that would compute them,
and kernels that move each tensor once. Programs are held to it, part by part, as to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from coda.ir.dims import ONE, product
from coda.ir.graph import Contract, Graph, Map, Node, Reduce, walk
from coda.ir.scalars import SCALARS
from coda.ir.types import f32
from coda.lowering.algebra.roles import summand
from coda.lowering.program.cost import (
    memory_bytes,
    pointwise_fused,
    rest_of,
    tensor_traffic,
)
from coda.lowering.program.cublas import RATES, cublas_seconds
from coda.lowering.program.groups import FusedGroup, groups, is_free
from coda.lowering.program.kernel import Kernel, Kind
from coda.lowering.program.price import NOTHING, Price
from coda.lowering.program.program import Program
from coda.lowering.program.time import MOVE, Sketch, by_rows


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


def unfused_price(program: Program, kind_of: Callable[[Contract], Kind]) -> Price:
    """The price of a Program's block as bare GEMMs, and the kernels of all else (`groups`).

    Numbers of a row or of a column are float32 there, as in coda's kernels; and of a reduction over
    rows each multiprocessor writes a partial of the rows that it has.

    Args:
        program: a Program of the block.
        kind_of: contraction -> the kind of kernel that computes it from memory.
    """
    sizes, weights = program.sizes, set(program.prepared.values())
    activations: dict[Node, list[Contract]] = {}
    for node in walk(program.graph.roots):
        if isinstance(node, Contract) and node not in weights:
            activations.setdefault(node.lhs, []).append(node)
    found = NOTHING
    for few in activations.values():
        found += _cheaper_of(few, program, kind_of)
    for group in groups(program.graph, sizes):
        moved = sum(_kept_bytes(n, program) for n in (*group.reads, *group.writes))
        moved += sum(_partial_bytes(n, program) for n in (*group.parts, *group.folds))
        time = by_rows(program.target, moved, *_instructions(group, sizes))
        found += Price(time, moved, 1)
    return found


def _instructions(group: FusedGroup, sizes: Mapping[str, int]) -> tuple[float, float]:
    """Instructions of a kernel's threads, and those for the special-function unit."""
    wide = (*group.reads, *group.writes)
    issued, special = MOVE * sum(product(n.shape).size(sizes) for n in wide), 0.0
    for node in group.nodes:
        if isinstance(node, Reduce):
            issued += product(node.arg.shape).size(sizes)
        elif isinstance(node, Map):
            points, row = product(node.shape).size(sizes), SCALARS[node.fn]
            issued, special = issued + points * row.flops, special + points * row.special
    return issued, special


def _cheaper_of(
    contracts: list[Contract], program: Program, kind_of: Callable[[Contract], Kind]
) -> Price:
    """The price of contractions of one activation: as one bare GEMM, or one each."""

    def bare(few: list[Contract]) -> Price:
        read = few[0].lhs.nbytes(program.sizes) + sum(c.rhs.nbytes(program.sizes) for c in few)
        made = sum(c.nbytes(program.sizes) for c in few)
        (count, m, _, k), *_ = problems = [_problem(c, program) for c in few]
        problem = count * m, sum(n for _, _, n, _ in problems), k
        sketch = Sketch(problem, few[0].lhs.dtype.bits, read, made)
        return Price(kind_of(few[0]).sketched(sketch, program.target), read + made, 1)

    first, *others = (bare([c]) for c in contracts)
    apart = sum(others, first)
    if not others or contracts[0].batched:
        return apart
    together = bare(contracts)
    return together if together.undercuts(apart) else apart


def _kept_bytes(node: Node, program: Program) -> int:
    """Bytes of a tensor as coda keeps it: float32, if it has a number for each row or column."""
    own = node.nbytes(program.sizes)
    narrow = product(node.shape) in node.shape or product(node.shape) == ONE
    if not (narrow and node.dtype.kind == "float"):
        return own
    return max(own, f32.nbytes(product(node.shape).size(program.sizes)))


def _partial_bytes(node: Reduce, program: Program) -> int:
    """Bytes of the partials of a reduction over rows."""
    results, rows = product(node.shape).size(program.sizes), summand(node).shape[:-1]
    parts = min(program.target.multiprocessors, product(rows).size(program.sizes))
    return f32.nbytes(results * parts)


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
