"""Program -> a cheaper one, some of whose GEMMs store their accumulators and compute nothing else.

An epilogue takes registers and shared memory from its mainloop: one that holds many values leaves
only small tiles. Then the GEMM that stores its accumulator, in the tile that a bare one gets, and a
row-wise kernel for all else may take less time than both in one:

    a residual beside 18432 columns of K, 2048 rows: 549 µs at 128×128; 457 at 128×192, and 16 after

Launches and bytes are certain, and times are modelled: an epilogue leaves its GEMM only if this
saves more than the model's error on the GEMM. An estimate says which GEMMs are worth another
lowering, with a kernel for the rest that reads and writes each tensor once; the price of the whole
Program decides.

In the end no Program costs more than its block with all GEMMs bare: where the kernels that a
compiler without epilogues makes (`program/baseline.py`) would take less time or have the lower
price, the block is lowered with all GEMMs bare, too, and the cheaper Program is kept. Where GEMMs
have fewer tiles than SMs, the model of an epilogue's time does not hold: it decides nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from coda.ir.dims import product
from coda.ir.graph import Contract, Node
from coda.lowering.algebra.equivalence import kinds
from coda.lowering.program.baseline import unfused_price
from coda.lowering.program.cost import memory_bytes, tensor_traffic
from coda.lowering.program.groups import is_free
from coda.lowering.program.kernel import Kernel, Kind
from coda.lowering.program.price import MOVES, NOTHING, Price, price, price_of
from coda.lowering.program.program import Program
from coda.lowering.program.target import Target
from coda.lowering.program.time import Sketch, Time, roofline, total

Bare = Mapping[Node, str]  # contraction whose GEMM stores its accumulator alone -> why
NO_BARE: Bare = MappingProxyType({})
DEARER = "its GEMM stores its accumulator alone: what fits in epilogues would cost more in all"
TILE = 128 * 64  # elements of the smallest tile in use


def separate(
    best: Program,
    lowered: Callable[[Bare], Program | None],
    kind_of: Callable[[Contract], Kind],
) -> Program:
    """A Program, or a cheaper one in which some GEMMs store their accumulators alone.

    Args:
        best: the cheapest Program with all that fits in the epilogues of GEMMs.
        kind_of: contraction -> the kind of kernel that computes it from memory.
        lowered: GEMMs' contractions -> the same lowering with these GEMMs bare; None if it is
            known not to be cheaper.
    """
    bare, tried = dict[Node, str](), set[tuple[int, ...]]()
    prices = [price_of(best, [k]) for k in best.kernels]
    while new := [c for c in candidates(best, prices) if c.key not in tried]:
        one = new[0]
        tried.add(one.key)
        program = lowered({**bare, **one.bare})
        if program is None:
            continue
        least, found = price(best), price(program)
        if found.undercuts(least) and least.seconds - found.seconds > MOVES * one.seconds:
            best, bare = program, {**bare, **one.bare}
            prices = [price_of(best, [k]) for k in best.kernels]
    gemms = [k for k in best.kernels if k.kind.tiled]
    if not any(_fuses(best, k) for k in gemms):
        return best
    own, unfused = sum(prices, NOTHING), unfused_price(best, kind_of)
    if unfused.seconds >= own.seconds and not unfused.undercuts(own):
        return best
    program = lowered(dict.fromkeys((n for k in gemms for n in _contracts(k)), DEARER))
    cheaper = program is not None and price(program).undercuts(price(best))
    return program if program is not None and cheaper else best


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


def candidates(program: Program, prices: Iterable[Price]) -> list[Candidate]:
    """The GEMMs of a Program, whose kernels have these prices, estimated to cost less bare."""
    cheaper = list(_cheaper(program, prices))
    alike = kinds(program.normal.roots) if cheaper else {}
    found: dict[tuple[int, ...], Candidate] = {}
    for contracts, fused, bare in cheaper:
        key = tuple(alike[c] for c in contracts)
        one = found.setdefault(key, Candidate(key))
        one.bare |= dict.fromkeys(contracts, _why(fused, bare))
        one.seconds += fused
    return list(found.values())


def _cheaper(
    program: Program, prices: Iterable[Price]
) -> Iterator[tuple[tuple[Contract, ...], float, float]]:
    """(contractions, seconds, seconds apart) of each GEMM that is estimated to cost less bare."""
    for kernel, own in zip(program.kernels, prices, strict=True):
        if _fuses(program, kernel):
            fused = own.seconds
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


def _fuses(program: Program, kernel: Kernel[Any]) -> bool:
    """Whether a kernel is a GEMM with an epilogue, and each SM has a tile of it.

    The model of an epilogue's time assumes that all SMs are in it at once.
    """
    rows, columns = kernel.mainloop.points(program.sizes)
    filled = rows * columns >= TILE * program.target.multiprocessors
    return kernel.kind.tiled and filled and any(map(_is_rest, kernel.nodes))


def _contracts(kernel: Kernel[Any]) -> tuple[Contract, ...]:
    return tuple(n for n in kernel.nodes if isinstance(n, Contract))


def _is_rest(node: Node) -> bool:
    return not isinstance(node, Contract) and not is_free(node)


def _why(fused: float, bare: float) -> str:
    return (
        "its GEMM stores its accumulator alone: with all that fits in its epilogue it would be "
        f"modelled at {fused * 1e6:.0f} µs, and at {bare * 1e6:.0f} µs with a kernel after it"
    )
