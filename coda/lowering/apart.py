"""Program -> a cheaper one, some of whose GEMMs store their accumulators and compute nothing else.

An epilogue takes registers and shared memory from its mainloop: one that holds many values leaves
only small tiles. Then the GEMM that stores its accumulator, in the tile that a bare one gets, and a
row-wise kernel for all else may take less time than both in one:

    a residual beside 18432 columns of K, 2048 rows: 549 µs at 128×128; 457 at 128×192, and 16 after

Launches and bytes are certain, and times are modelled: an epilogue leaves its GEMM only if this
saves more than the model's error on the GEMM. An estimate says which GEMMs are worth another
lowering, with a kernel for the rest that reads and writes each tensor once; the price of the whole
Program decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from coda.ir.dims import product
from coda.ir.graph import Contract, Node
from coda.lowering.algebra.equivalence import kinds
from coda.lowering.program.cost import kernel_time, memory_bytes, tensor_traffic
from coda.lowering.program.groups import is_free
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.price import MOVES, price
from coda.lowering.program.program import Program
from coda.lowering.program.target import Target
from coda.lowering.program.time import Sketch, Time, roofline, total

Bare = Mapping[Node, str]  # contraction whose GEMM stores its accumulator alone -> why
NO_BARE: Bare = MappingProxyType({})
TILE = 128 * 64  # elements of the smallest tile in use


def separate(best: Program, lowered: Callable[[Bare], Program | None]) -> Program:
    """A Program, or a cheaper one in which some GEMMs store their accumulators alone.

    Args:
        best: the cheapest Program with all that fits in the epilogues of GEMMs.
        lowered: GEMMs' contractions -> the same lowering with these GEMMs bare; None if it is
            known not to be cheaper.
    """
    least, bare, tried = price(best), dict[Node, str](), set[tuple[int, ...]]()
    while new := [c for c in candidates(best) if c.key not in tried]:
        one = new[0]
        tried.add(one.key)
        program = lowered({**bare, **one.bare})
        if program is None:
            continue
        found = price(program)
        if found.undercuts(least) and least.seconds - found.seconds > MOVES * one.seconds:
            best, least, bare = program, found, {**bare, **one.bare}
    return best


@dataclass
class Candidate:
    """GEMMs, equal ones of many layers, that may be cheaper bare.

    Attributes:
        key: the classes of their contractions.
        bare: contraction -> why its GEMM is bare.
        seconds: the modelled time of these GEMMs with their epilogues.
    """

    key: tuple[int, ...]
    bare: dict[Node, str] = field(default_factory=dict[Node, str])
    seconds: float = 0.0


def candidates(program: Program) -> list[Candidate]:
    """The GEMMs that are estimated to cost less bare."""
    cheaper = list(_cheaper(program))
    alike = kinds(program.normal.roots) if cheaper else {}
    found: dict[tuple[int, ...], Candidate] = {}
    for contracts, fused, bare in cheaper:
        key = tuple(alike[c] for c in contracts)
        one = found.setdefault(key, Candidate(key))
        one.bare |= dict.fromkeys(contracts, _why(fused, bare))
        one.seconds += fused
    return list(found.values())


def _cheaper(program: Program) -> Iterator[tuple[tuple[Contract, ...], float, float]]:
    """(contractions, seconds, seconds apart) of each GEMM that is estimated to cost less bare."""
    for kernel in program.kernels:
        if kernel.kind.tiled and any(map(_is_rest, kernel.nodes)) and _fills(program, kernel):
            fused = kernel_time(program, kernel).seconds
            for time in (roofline, kernel.kind.sketched):  # a bound is quick, and most often enough
                bare = apart(program, kernel, time).seconds
                if bare >= (1 - MOVES) * fused:
                    break
            else:
                yield _contracts(kernel), fused, bare


def apart(program: Program, kernel: Kernel[Any], time: Callable[[Sketch, Target], Time]) -> Time:
    """The price of a GEMM that stores its accumulator, and of a kernel for its epilogue.

    Args:
        program: the Program of the kernel.
        kernel: a GEMM, of a matrix or of a batch, whose matrices count as one.
        time: the modelled time of the bare GEMM, or a bound of it.
    """
    sizes, rates = program.sizes, program.target.rates
    moved, contracts = tensor_traffic(program, kernel), _contracts(kernel)
    read = sum(memory_bytes(o, program) for o in kernel.mainloop.operands)
    made = sum(c.nbytes(sizes) for c in contracts)
    rest = moved.read_bytes + moved.write_bytes - read + made
    lhs, rows = contracts[0].lhs, product(contracts[0].shape[:-1])
    columns = sum(c.shape[-1].size(sizes) for c in contracts)
    problem = rows.size(sizes), columns, lhs.shape[-1].size(sizes)
    bare = time(Sketch(problem, lhs.dtype.bits, read, made), program.target)
    after = Time(rates.ramp, memory=rest / rates.bandwidth)
    return total((bare, after))


def _fills(program: Program, kernel: Kernel[Any]) -> bool:
    """Whether each SM has a tile of the GEMM, as the model of an epilogue's time assumes."""
    rows, columns = kernel.mainloop.points(program.sizes)
    return rows * columns >= TILE * program.target.multiprocessors


def _contracts(kernel: Kernel[Any]) -> tuple[Contract, ...]:
    return tuple(n for n in kernel.nodes if isinstance(n, Contract))


def _is_rest(node: Node) -> bool:
    return not isinstance(node, Contract) and not is_free(node)


def _why(fused: float, bare: float) -> str:
    return (
        "its GEMM stores its accumulator alone: with all that fits in its epilogue it would be "
        f"modelled at {fused * 1e6:.0f} µs, and at {bare * 1e6:.0f} µs with a kernel after it"
    )
