"""Graph -> Program: laws, partition, schedule. Read this file first of the lowering.

    graph ── laws ──▶ normal form ── partition ──▶ drafts ── build ──▶ Program ── schedule ──▶

The laws with a choice are decided by the cost model: the Program is built with and without each,
and the cheaper one is kept. Places of a graph that look alike are decided together.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from coda.errors import ArchError, DimError, InternalError
from coda.ir.evaluate import evaluate
from coda.ir.graph import (
    Const,
    Contract,
    Graph,
    Input,
    Map,
    Node,
    Pick,
    Reduce,
    Size,
    Slice,
    transform,
    walk,
)
from coda.ir.scalars import SCALARS
from coda.ir.verify import verify
from coda.lowering.algebra.chunk import Parted, in_parts
from coda.lowering.algebra.columns_first import columns_first
from coda.lowering.algebra.equivalence import kinds
from coda.lowering.algebra.laws import LAWS
from coda.lowering.algebra.policy import NO_TERMS, Terms
from coda.lowering.algebra.pushdown import descended
from coda.lowering.algebra.rewrite import Accept, Law, Place, Step, rewrite
from coda.lowering.algebra.roles import row_symbols
from coda.lowering.configure import schedule
from coda.lowering.placement.build import Banned, build, numbered
from coda.lowering.placement.place import Partition
from coda.lowering.program.cost import MACHINES, price
from coda.lowering.program.factor import factor
from coda.lowering.program.memory import plan_memory, soonest_freed
from coda.lowering.program.program import Program
from coda.lowering.program.verify import verify_program


def lower(
    graph: Graph,
    dims: Mapping[str, int],
    arch: str = "sm_90a",
    frozen: bool = False,
    terms: Terms = NO_TERMS,
) -> Program:
    """The cheapest Program that we find for a graph.

    Args:
        graph: a block.
        dims: the size of every symbol. Kernels serve any number of rows; the size given for those
            symbols is what costs are reckoned with.
        arch: "sm_90a" or "sm_100a".
        frozen: whether weights keep their values (inference), so that what is made of them is
            made once.
        terms: what the Program may do with memory.

    Raises:
        ArchError: for another arch.
        DimError: for a missing, superfluous or non-positive size.
    """
    if arch not in MACHINES:
        raise ArchError(
            "coda does not compile for this arch", found=arch, help=" or ".join(MACHINES)
        )
    sizes = check_dims(graph, dims)
    verify(graph, "trace")
    chosen: set[tuple[int, ...]] = set()
    candidates: list[tuple[int, ...]] = []
    alike = kinds(graph.roots)

    def accept(_: Law, __: Node, place: Place) -> bool:
        key = tuple(alike[p] if isinstance(p, Node) else p for p in place)
        if key not in candidates:
            candidates.append(key)
        return key in chosen

    best = _lower(graph, sizes, arch, frozen, terms, accept)
    tried = 0
    while tried < len(candidates):
        key = candidates[tried]
        tried += 1
        chosen.add(key)
        program = _lower(graph, sizes, arch, frozen, terms, accept)
        if price(program) < price(best):
            best = program
        else:
            chosen.discard(key)
    if any(isinstance(u.node, Reduce | Pick) for u in best.unfused):
        program = _lower(graph, sizes, arch, frozen, terms, accept, apart=True)
        best = min(program, best, key=price)
    verify_program(best)
    return best


def _lower(
    graph: Graph,
    sizes: dict[str, int],
    arch: str,
    frozen: bool,
    terms: Terms,
    accept: Accept,
    apart: bool = False,
) -> Program:
    """The Program of one choice of laws; with `apart`, what is reduced has a GEMM of its own."""
    steps: list[Step] = []
    roots = descended(rewrite(graph.roots, LAWS, accept, steps))
    normal = graph.with_roots(_numbers(columns_first(roots, graph.inputs), sizes))
    verify(normal, "laws")
    parted = in_parts(normal, sizes, terms.passing) if terms.thrifty else Parted(normal)
    verify(parted.graph, "parts")
    banned: frozenset[tuple[Node | str, Node]] = frozenset()
    while True:
        try:
            placed = Partition(parted.graph, sizes, banned, apart, terms.passing, parted.part_of)
            program = build(placed.run(), graph, arch)
            break
        except Banned as refusal:
            if refusal.places <= banned:
                raise InternalError(f"the partition does not come to an end: {refusal}") from None
            banned |= refusal.places
    program.steps, program.normal, program.cuts = steps, parted.graph, parted.cuts
    program.frozen, program.terms = frozen, terms
    if program.cuts:
        program.kernels = tuple(numbered(soonest_freed(program)))
    return plan_memory(schedule(factor(program)))


def _numbers(roots: tuple[Node, ...], sizes: Mapping[str, int]) -> tuple[Node, ...]:
    """The same values with functions of numbers and sizes, and choices by them, as they are.

    The number of rows is none of them: it may change from call to call.
    """
    tokens = row_symbols(walk(roots))

    def is_number(node: Node) -> bool:
        return isinstance(node, Const) or (isinstance(node, Size) and not node.dim.symbols & tokens)

    def known(node: Node) -> Node:
        if not isinstance(node, Map):
            return node
        test = node.args[0]
        if SCALARS[node.fn].chooses and isinstance(test, Const):
            chosen = node.args[1 if test.value else 2]
            same = (chosen.shape, chosen.dtype) == (node.shape, node.dtype)
            return chosen if same else node
        if not all(map(is_number, node.args)):
            return node
        (value,) = evaluate([node], {}, sizes)
        return Const(float(value), node.dtype)

    return transform(roots, known)


def check_dims(graph: Graph, dims: Mapping[str, int]) -> dict[str, int]:
    """The size of every symbol of a graph, checked."""
    symbols = graph.symbols
    missing = [s for s in symbols if s not in dims]
    unknown = [s for s in dims if s not in symbols]
    if missing or unknown:
        word = f"no size for dim `{missing[0]}`" if missing else f"there is no dim `{unknown[0]}`"
        raise DimError(
            f"`{graph.name}`: {word}",
            found=", ".join(f"{k}={v}" for k, v in dims.items()) or "no sizes",
            help="give " + ",".join(f"{s}=…" for s in symbols),
        )
    for name, size in dims.items():
        if not isinstance(size, int) or size < 0:
            raise DimError(f"dim `{name}` has a size of {size!r}", help="a size is an int ≥ 0")
    for node in graph.inputs:
        for dim in node.shape:
            dim.size(dims)
    tokens = row_symbols(walk(graph.roots))
    for node in walk(graph.roots):
        _check_elements(node, dims)
        if isinstance(node, Slice):
            _check_slice(node, dims)
        elif isinstance(node, Input | Contract) and node.rank > 1:
            _check_columns(node, dims, tokens)
    return dict(dims)


def _check_elements(node: Node, dims: Mapping[str, int]) -> None:
    """Raise DimError for a tensor whose elements 63 bits cannot count."""
    if prod(d.size(dims) for d in node.shape) >= 2**63:
        what = f"`{node.name}`" if isinstance(node, Input) else "a value"
        raise DimError(
            f"{what} has more elements than can be counted",
            found=" × ".join(str(d.size(dims)) for d in node.shape),
            where=node.where,
            help="fewer than 2^63 elements",
        )


def _check_columns(node: Input | Contract, dims: Mapping[str, int], tokens: frozenset[str]) -> None:
    """Raise DimError for a matrix without columns; one without rows is as good as any."""
    columns = node.shape[-1]
    if columns.size(dims) == 0 and not columns.symbols & tokens:
        what = f"`{node.name}`" if isinstance(node, Input) else "a product"
        raise DimError(
            f"{what} has no columns: `{columns}` = 0",
            found=", ".join(f"{k}={v}" for k, v in dims.items()),
            where=node.where,
            help="only the number of rows may be 0",
        )


def _check_slice(node: Slice, dims: Mapping[str, int]) -> None:
    """Raise DimError where a slice leaves its axis at these sizes."""
    axis = node.arg.shape[node.axis]
    first, count, size = node.start.size(dims), node.size.size(dims), axis.size(dims)
    if first < 0 or count < 1 or first + (count - 1) * node.step >= size:
        raise DimError(
            f"a slice leaves its axis `{axis}` = {size}",
            found=f"{count} from {first} in steps of {node.step}",
            where=node.where,
        )
