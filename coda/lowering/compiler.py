"""Graph -> Program: laws, placement, configs, memory. Read this file first of the lowering.

    graph ── laws … chunks ──▶ normal form ── place ──▶ Program ── factor … memory ──▶ Program

`run_stages` lists the stages in order; `lowering/stages.py` has the precondition of each. The cost
model decides each application of a law with a choice: the graph is lowered with and without it, and
the cheaper Program is kept. Applications in equal layers are decided together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod

from coda import kernels
from coda.errors import CodaError, DimError
from coda.ir.graph import Contract, Expand, Graph, Input, Node, Slice, walk
from coda.lowering.algebra.attends import attends
from coda.lowering.algebra.chunk import Parted, chunk
from coda.lowering.algebra.columns_first import columns_first
from coda.lowering.algebra.constants import fold_constants
from coda.lowering.algebra.equivalence import kinds
from coda.lowering.algebra.laws import LAWS
from coda.lowering.algebra.policy import DEFAULT_POLICY, MemoryPolicy
from coda.lowering.algebra.pushdown import push_down
from coda.lowering.algebra.rewrite import Accept, Law, LawApplication, Place, rewrite
from coda.lowering.algebra.roles import row_symbols
from coda.lowering.algebra.stops import without_stops
from coda.lowering.apart import NO_BARE, Bare, separate
from coda.lowering.configure import configure
from coda.lowering.fold_in import fold_in
from coda.lowering.placement.build import build, numbered
from coda.lowering.placement.place import Partition
from coda.lowering.program.bound import least_price
from coda.lowering.program.factor import factor
from coda.lowering.program.kernel import Kind, kind_of
from coda.lowering.program.memory import plan_memory, soonest_freed
from coda.lowering.program.price import Price, price
from coda.lowering.program.program import Program
from coda.lowering.program.target import DEFAULT, Target, find_target
from coda.lowering.stages import PROGRAM, STAGES, Stages, Trial, Value


@dataclass(frozen=True)
class Request:
    """The checked arguments of `lower`."""

    graph: Graph
    sizes: dict[str, int]
    target: Target
    frozen: bool
    policy: MemoryPolicy

    @cached_property
    def known(self) -> dict[str, int]:
        """The sizes of symbols that are compiled in: of all but tokens."""
        tokens = row_symbols(walk(self.graph.roots))
        return {s: n for s, n in self.sizes.items() if s not in tokens}


def lower(
    graph: Graph,
    dims: Mapping[str, int],
    target: Target | str = DEFAULT,
    *,
    frozen: bool = False,
    policy: MemoryPolicy = DEFAULT_POLICY,
    stages: Stages | None = None,
) -> Program:
    """Lower a graph to the cheapest Program found, by the cost model.

    Args:
        graph: a block.
        dims: the size of every symbol. Kernels serve any number of rows: the sizes of token symbols
            are only used to estimate costs.
        target: a GPU, or an arch or a GPU's name for `find_target`.
        frozen: whether weights keep their values (inference), so that prepacking happens once.
        policy: the memory policy.
        stages: checks, shows and records the stages.

    Raises:
        ArchError: for an unknown target.
        DimError: for a missing, unknown or negative size, or one at which a tensor has no columns.
        InternalError: if the result of a stage is not well formed.
    """
    graph = graph.with_roots(without_stops(graph.roots))
    asked = request(graph, dims, target, frozen=frozen, policy=policy)
    with stages or Stages() as record:
        record.begin(graph)

        def lowered(accept: Accept, below: Price | None, bare: Bare) -> Program | None:
            return run_stages(asked, accept, record.trial(), below=below, bare=bare)

        return record.keep(decide(graph, lowered, lambda n: kind_of(kernels.KINDS, n, asked.known)))


def request(
    graph: Graph,
    dims: Mapping[str, int],
    target: Target | str,
    *,
    frozen: bool,
    policy: MemoryPolicy,
) -> Request:
    """Check target and sizes. Raises ArchError and DimError."""
    target = target if isinstance(target, Target) else find_target(target)
    return Request(graph, check_dims(graph, dims), target, frozen, policy)


def run_stages(
    asked: Request,
    accept: Accept,
    stage: Trial,
    *,
    below: Price | None = None,
    bare: Bare = NO_BARE,
) -> Program | None:
    """One lowering, for one choice of laws; None if no Program of its normal form costs less.

    Args:
        asked: the graph, sizes, target and memory policy.
        accept: decides each application of a law with a choice.
        stage: runs, checks and records each stage.
        below: the price that a Program has to undercut; None for any.
        bare: contraction whose GEMM stores its accumulator alone -> why.
    """
    graph = stage("laws", partial(_apply_laws, accept, stage), asked.graph)
    graph = stage("pushdown", push_down, graph)
    graph = stage("columns", columns_first, graph)
    graph = stage("constants", fold_constants, graph, asked.sizes)
    graph = stage("attends", attends, graph, asked.sizes, is_taken)
    parted = stage("chunks", _chunk, graph, asked)
    if below is not None and not _may_undercut(asked, parted.graph, below):
        return None
    program = stage("place", partial(_place, asked, stage.steps, bare), parted)
    program = stage("factor", factor, program)
    program = stage("order", _order, program)
    program = stage("configure", configure, program)
    program = stage("folds", fold_in, program)
    return stage("memory", plan_memory, program)


def run_stage(name: str, asked: Request) -> Value:
    """Run a single stage on a graph, with checks before and after.

    For a stage that takes a Program, the stages from "chunks" on run before it. Laws with a choice
    are applied wherever they match.

    Raises:
        CodaError: if the graph does not meet the stage's precondition.
    """
    only = PROGRAM[: PROGRAM.index(name) + 1] if name in PROGRAM else (name,)
    missing = STAGES[only[0]].missing(asked.graph)
    if missing:
        raise CodaError(
            f"`{name}` takes what the stages before it leave: {missing}",
            found=asked.graph.name,
            help=f"the stages before it: {', '.join(STAGES)}",
        )
    trial = Trial(2, frozenset(only))
    found = run_stages(asked, lambda law, node, place: True, trial)
    assert found is not None
    return found


def decide(
    graph: Graph,
    lowered: Callable[[Accept, Price | None, Bare], Program | None],
    kind_of: Callable[[Contract], Kind],
) -> Program:
    """The cheapest Program over all choices, which are decided greedily in order of occurrence.

    Laws come first, then GEMMs that would better store their accumulators alone.

    Args:
        graph: the block.
        lowered: (accept, below, bare) -> Program or None, as `run_stages`.
        kind_of: contraction -> the kind of kernel that computes it from memory.
    """
    chosen: set[tuple[int, ...]] = set()
    candidates: list[tuple[int, ...]] = []
    alike = kinds(graph.roots)

    def accept(_: Law, __: Node, place: Place) -> bool:
        key = tuple(alike[p] if isinstance(p, Node) else p for p in place)
        if key not in candidates:
            candidates.append(key)
        return key in chosen

    best = lowered(accept, None, NO_BARE)
    assert best is not None
    least, tried = price(best), 0
    while tried < len(candidates):
        key = candidates[tried]
        tried += 1
        chosen.add(key)
        program = lowered(accept, least, NO_BARE)
        if program is not None and (found := price(program)).undercuts(least):
            best, least = program, found
        else:
            chosen.discard(key)
    return separate(best, partial(lowered, accept, None), kind_of)


def _may_undercut(asked: Request, graph: Graph, below: Price) -> bool:
    """Whether the price of a Program of a graph in normal form may undercut another."""
    least = least_price(
        graph, asked.sizes, asked.target, frozen=asked.frozen, per_call=asked.policy.per_call
    )
    fewer = (least.moved, least.launches) < (below.moved, below.launches)
    return fewer or least.seconds < below.seconds


def _apply_laws(accept: Accept, trial: Trial, graph: Graph) -> Graph:
    return graph.with_roots(rewrite(graph.roots, LAWS, accept, trial.law))


def is_taken(node: Node, sizes: Mapping[str, int]) -> bool:
    """Whether a kind with kernels of its own takes a node; the last kind takes every one."""
    return any(kind.takes(node, sizes) for kind in kernels.KINDS[:-1])


def _chunk(graph: Graph, asked: Request) -> Parted:
    """Chunk the largest intermediate, if the memory policy asks for it."""
    policy = asked.policy
    return chunk(graph, asked.sizes, policy.per_call) if policy.chunked else Parted(graph)


def _place(asked: Request, steps: list[LawApplication], bare: Bare, parted: Parted) -> Program:
    """Place the nodes of a graph in normal form, and build the Program.

    Where small reductions have kernels of their numbers alone, it is the cheaper of two Programs,
    with such kernels and without.
    """
    program, has_small = _placed(asked, steps, bare, parted, small=True)
    if not has_small:
        return program
    other, _ = _placed(asked, steps, bare, parted, small=False)
    return other if price(configure(other)).undercuts(price(configure(program))) else program


def _placed(
    asked: Request, steps: list[LawApplication], bare: Bare, parted: Parted, *, small: bool
) -> tuple[Program, bool]:
    """A Program, with kernels of a few numbers of each row or without; whether it can have some."""
    policy = asked.policy
    placed = Partition(
        parted.graph,
        asked.sizes,
        kernels.KINDS,
        asked.target,
        policy.per_call,
        parted.part_of,
        bare,
        small=small,
    )
    program = build(
        placed.run(),
        asked.graph,
        target=asked.target,
        frozen=asked.frozen,
        policy=policy,
        steps=steps,
        cuts=parted.cuts,
    )
    return program, any(map(placed.reduces_few, walk(parted.graph.roots)))


def _order(program: Program) -> Program:
    """Reorder the kernels of a chunked Program so that memory is freed early."""
    if not program.cuts:
        return program
    return replace(program, kernels=tuple(numbered(soonest_freed(program))))


def check_dims(graph: Graph, dims: Mapping[str, object]) -> dict[str, int]:
    """Return the sizes of all symbols of a graph. Raises DimError if they do not fit the graph."""
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
    sizes: dict[str, int] = {}
    for name, size in dims.items():
        if not isinstance(size, int) or size < 0:
            raise DimError(f"dim `{name}` has a size of {size!r}", help="a size is an int ≥ 0")
        sizes[name] = size
    for node in graph.inputs:
        for dim in node.shape:
            dim.size(sizes)
    tokens = row_symbols(walk(graph.roots))
    for node in walk(graph.roots):
        _check_elements(node, sizes)
        if isinstance(node, Slice):
            _check_slice(node, sizes)
        elif node.rank > 1 and (
            isinstance(node, Input | Contract) or (isinstance(node, Expand) and node in graph.roots)
        ):
            _check_columns(node, sizes, tokens)
    return sizes


def _check_elements(node: Node, dims: Mapping[str, int]) -> None:
    """Raise DimError for a tensor of 2^63 elements or more."""
    if prod(d.size(dims) for d in node.shape) >= 2**63:
        what = f"`{node.name}`" if isinstance(node, Input) else "a value"
        raise DimError(
            f"{what} has more elements than can be counted",
            found=" × ".join(str(d.size(dims)) for d in node.shape),
            where=node.where,
            help="fewer than 2^63 elements",
        )


def _check_columns(
    node: Input | Contract | Expand, dims: Mapping[str, int], tokens: frozenset[str]
) -> None:
    """Raise DimError for a matrix without columns. A matrix may have no rows."""
    columns = node.shape[-1]
    if columns.size(dims) == 0 and not columns.symbols & tokens:
        what = "a product" if isinstance(node, Contract) else "a value that is repeated"
        what = f"`{node.name}`" if isinstance(node, Input) else what
        raise DimError(
            f"{what} has no columns: `{columns}` = 0",
            found=", ".join(f"{k}={v}" for k, v in dims.items()),
            where=node.where,
            help="only the number of rows may be 0",
        )


def _check_slice(node: Slice, dims: Mapping[str, int]) -> None:
    """Raise DimError for a slice that is out of bounds at these sizes."""
    axis = node.arg.shape[node.axis]
    first, count, size = node.start.size(dims), node.size.size(dims), axis.size(dims)
    if first < 0 or count < 1 or first + (count - 1) * node.step >= size:
        raise DimError(
            f"a slice leaves its axis `{axis}` = {size}",
            found=f"{count} from {first} in steps of {node.step}",
            where=node.where,
        )
