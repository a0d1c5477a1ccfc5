"""Contractions of one activation -> those that share a GEMM, with their weights stacked along rows.

In y = (x gᵀ) · silu(x uᵀ), k = x vᵀ the contractions with g and u are combined elementwise and pair
their columns in a GEMM of their own, and that with v is alone in its GEMM.

A reduction over full rows is a sink of a GEMM that has no other columns. In a shared GEMM its
operand is stored, and a row-wise kernel reads it again. Which of both a contraction gets is decided
by the price of these kernels, as a choice of laws is (`program/price.py`):

    a = x wᵀ, s = Σ (x vᵀ)²    shared: store x vᵀ, read it    x vᵀ alone: read x, a launch more
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from coda.ir.dims import product
from coda.ir.graph import Contract, Map, Node, Pick, Reduce
from coda.ir.monoids import MONOIDS
from coda.ir.types import DType
from coda.lowering.algebra.roles import base, is_pointwise, pointwise_leaves
from coda.lowering.program.price import Price
from coda.lowering.program.time import Sketch

Groups = dict[Node, tuple[Contract, ...]]  # contraction -> the contractions that share its GEMM


@dataclass
class Uses:
    """What is computed of contractions that may share a GEMM.

    Attributes:
        by_input: (activation, number of the chunk) -> its contractions with weights.
        weights: nodes that are weights.
        turn: node -> the number of the last GEMM before it, in the order in which GEMMs open.
        opened: (activation, number of the chunk), or a contraction without siblings -> its turn.
        reach: node -> the contractions of which it is an elementwise function.
        here: node -> those of them whose GEMM can compute it.
        joined: pairs of contractions that an elementwise operation combines.
        mixed: contractions that are combined with another matrix.
        sinks: contraction -> reductions and picks over its full rows, which would be sinks of a
            GEMM that has no other columns.
        behind: node -> the contractions of whose `sinks` it is an elementwise function.
        stored: contraction -> its functions of which another kernel needs elements in any case.
        reread: those whose full rows a row-wise kernel needs in any case.
    """

    by_input: Mapping[tuple[Node, int], list[Contract]]
    weights: Set[Node]
    turn: dict[Node, int] = field(default_factory=dict[Node, int])
    opened: dict[Node | tuple[Node, int], int] = field(
        default_factory=dict[Node | tuple[Node, int], int]
    )
    reach: dict[Node, Set[Contract]] = field(default_factory=dict[Node, Set[Contract]])
    here: dict[Node, Set[Contract]] = field(default_factory=dict[Node, Set[Contract]])
    joined: set[tuple[Node, Node]] = field(default_factory=set[tuple[Node, Node]])
    mixed: set[Node] = field(default_factory=set[Node])
    sinks: dict[Node, list[Reduce | Pick]] = field(default_factory=dict[Node, list[Reduce | Pick]])
    behind: dict[Node, Set[Contract]] = field(default_factory=dict[Node, Set[Contract]])
    stored: dict[Node, dict[Node, None]] = field(default_factory=dict[Node, dict[Node, None]])
    reread: set[Node] = field(default_factory=set[Node])

    @staticmethod
    def of(
        contracts: Iterable[Contract],
        nodes: Iterable[Node],
        roots: Iterable[Node],
        weights: Set[Node],
        part_of: Mapping[Node, int],
    ) -> Uses:
        """The uses of contractions in a graph.

        Args:
            contracts: the contractions.
            nodes: all nodes of the graph, operands first.
            roots: the outputs of the graph.
            weights: nodes that are weights; contractions with anything else stay alone.
            part_of: contraction -> number of its chunk; different chunks do not share a GEMM.
        """
        by_input: dict[tuple[Node, int], list[Contract]] = {}
        for one in contracts:
            if one.rhs in weights:
                by_input.setdefault((one.lhs, part_of.get(one, -1)), []).append(one)
        found = Uses(by_input, weights)
        key_of = {c: key for key, group in by_input.items() if len(group) > 1 for c in group}
        for node in nodes:
            found.visit(node, key_of)
        for root in roots:
            found.store(found.here.get(root, ()), root)
        return found

    def store(self, contracts: Iterable[Contract], node: Node) -> None:
        """Record that another kernel needs elements of a function of contractions."""
        for one in contracts:
            self.stored.setdefault(one, {})[base(node)] = None

    def visit(self, node: Node, key_of: Mapping[Contract, tuple[Node, int]]) -> None:
        """Record the uses that a node makes of contractions, by the keys of those with siblings."""
        self.turn[node] = max((self.turn[o] for o in node.operands), default=0)
        if is_pointwise(node):
            for found in (self.reach, self.here, self.behind):
                found[node] = self.union(found, node)
            if isinstance(node, Map) and self.reach[node]:
                self.combine(node)
            return
        self.take_whole(node)
        if isinstance(node, Contract):
            key = key_of.get(node, node)
            self.turn[node] = self.opened.setdefault(key, len(self.opened) + 1)
            self.reach[node] = self.here[node] = {node} if node in key_of else set()

    def union(self, of: Mapping[Node, Set[Contract]], node: Node) -> Set[Contract]:
        """The contractions of all operands."""
        return set[Contract]().union(*(of.get(o, ()) for o in node.operands))

    def combine(self, node: Map) -> None:
        """Record what an elementwise operation combines with contractions."""
        mine = self.reach[node]
        self.joined |= {(a, b) for a in mine for b in mine}
        others = [o for o in node.args if not self.reach.get(o) and o not in self.weights]
        beside = {i for o in others for i in pointwise_leaves(o)} - self.weights
        if any(product(i.shape) == product(node.shape) for i in beside):
            self.mixed |= mine
        self.reread |= self.here[node] & self.behind[node]
        beside_it = max((self.turn[o] for o in node.args if not self.here.get(o)), default=0)
        late = {c for c in self.here[node] if self.turn[c] <= max(beside_it, self.turn[node] - 1)}
        self.here[node] -= late
        for operand in node.args:
            self.store(late & self.here.get(operand, set()), operand)

    def take_whole(self, node: Node) -> None:
        """Record a node that is not elementwise: a sink of a contraction's GEMM, or another use."""
        for operand in node.operands:
            reached = self.here.get(operand, set())
            whole = {c for c in reached if c.shape[-1] == operand.shape[-1]}
            if isinstance(node, Pick) or (isinstance(node, Reduce) and MONOIDS[node.fn].tiled):
                for one in whole:
                    self.sinks.setdefault(one, []).append(node)
                self.behind[node] = whole
            elif isinstance(node, Reduce):
                self.reread |= whole
            else:
                self.store(reached, operand)


def group_siblings(contracts: Iterable[Contract], uses: Uses) -> Groups:
    """For each contraction, the contractions of the same activation that share its GEMM.

    Contractions that an elementwise operation combines (gate and up) pair their columns in a GEMM
    of their own. A contraction that is combined with another matrix stays alone, since that matrix
    is not as wide as a shared GEMM. All others of an activation share one GEMM, with their weights
    stacked along rows.
    """
    out: Groups = {c: (c,) for c in contracts}
    for group in uses.by_input.values():
        rest = list(group)
        while rest:
            coupled = _closure(rest[0], rest, uses.joined)
            if len(coupled) == 1 and rest[0] not in uses.mixed:
                alone = [c for c in rest if len(_closure(c, rest, uses.joined)) == 1]
                coupled = [c for c in alone if c not in uses.mixed]
            rest = [c for c in rest if c not in coupled]
            out |= dict.fromkeys(coupled, tuple(coupled))
    return out


def _closure(
    first: Contract, among: list[Contract], joined: set[tuple[Node, Node]]
) -> list[Contract]:
    """The contractions that elementwise operations combine with the first, transitively."""
    found = [first]
    for one in found:
        found += [c for c in among if c not in found and (one, c) in joined]
    return [c for c in among if c in found]


def apart_by_types(
    groups: Groups, uses: Uses, sizes: Mapping[str, int], seconds: Callable[[int, int], float]
) -> Groups:
    """Give contractions of which matrices of other types are stored a GEMM each, if it is cheaper.

    A shared GEMM stores each of its matrices as wide as all contractions: of z in bf16 and dt in
    float32, both. A mainloop may hide the time of these bytes, but the memory that they take stays
    with the caller: bytes and launches decide. The other arguments are those of `own_gemms`.

    Args:
        seconds: (bytes moved, launches) -> estimated time.
    """
    out = dict(groups)
    for group in dict.fromkeys(groups.values()):
        if len(group) == 1 or (group[0], group[1]) in uses.joined:
            continue
        types = {c: frozenset(_stored((c,), uses).items()) for c in group}
        first = next((t for t in types.values() if t), frozenset[tuple[DType, int]]())
        types = {c: t or first for c, t in types.items()}
        parts = [tuple(c for c in group if types[c] == t) for t in dict.fromkeys(types.values())]
        whole, apart = kernels(group, uses, sizes), [kernels(p, uses, sizes) for p in parts]
        moved, launches = sum(k.moved for k in apart), sum(k.launches for k in apart)
        if seconds(moved, launches) < seconds(whole.moved, whole.launches):
            out |= {c: part for part in parts for c in part}
    return out


def own_gemms(
    groups: Groups, uses: Uses, sizes: Mapping[str, int], price: Callable[[Kernels], Price]
) -> tuple[Groups, dict[Node, str]]:
    """Give contractions whose full rows are reduced a GEMM of their own where that is cheaper.

    Args:
        groups: as `group_siblings` returns them.
        uses: the uses of the contractions.
        sizes: the size of every symbol.
        price: the price of a GEMM, and of the kernels that reduce its rows.

    Returns:
        The groups, and for each reduction that is no sink, since its contraction shares a GEMM, why
        that is cheaper.
    """
    out, why = dict(groups), dict[Node, str]()
    for group in dict.fromkeys(groups.values()):
        reduced = [c for c in group if c in uses.sinks]
        if len(group) == 1 or not reduced or (group[0], group[1]) in uses.joined:
            continue

        def split(taken: Sequence[Contract], group: tuple[Contract, ...] = group) -> Price:
            rest = tuple(c for c in group if c not in taken)
            parts = [*((c,) for c in taken), *([rest] if rest else [])]
            first, *others = (price(kernels(p, uses, sizes)) for p in parts)
            return sum(others, first)

        order = sorted(reduced, key=lambda c: -c.nbytes(sizes))
        taken, best = order[:0], split([])
        for n in range(1, len(order) + 1):
            other = split(order[:n])
            if other.undercuts(best):
                taken, best = order[:n], other
        rest = tuple(c for c in group if c not in taken)
        out |= {c: (c,) for c in taken} | dict.fromkeys(rest, rest)
        for one in reduced if len(rest) > 1 else ():
            if one in rest:
                why |= dict.fromkeys(uses.sinks[one], _shares(split([*taken, one]), best))
    return out, why


def _shares(alone: Price, shared: Price) -> str:
    """Why a reduction is no sink: what a GEMM of its contraction alone would cost in addition."""
    return (
        "its operand shares a GEMM with other columns, and alone in one would change the modelled "
        f"time by {(alone.seconds - shared.seconds) * 1e6:+.3g} µs, launches by "
        f"{alone.launches - shared.launches:+d} and bytes by "
        f"{(alone.moved - shared.moved) / 1e6:+.3g} MB"
    )


@dataclass(frozen=True)
class Kernels:
    """A GEMM, and row-wise kernels that reduce its rows.

    Attributes:
        contracts: of the GEMM.
        gemm: the GEMM, as far as it is known. Partials are left out.
        launches: the number of all kernels.
        read: bytes that the row-wise ones read.
    """

    contracts: tuple[Contract, ...]
    gemm: Sketch
    launches: int
    read: int

    @property
    def moved(self) -> int:
        """Bytes that the kernels read and write."""
        return self.gemm.read + self.gemm.written + self.read


def kernels(group: Sequence[Contract], uses: Uses, sizes: Mapping[str, int]) -> Kernels:
    """One GEMM, and the reductions of its rows. A matrix that it stores has all of its columns.

    A pick that is no sink is an operation of torch, and what reads it is one more kernel.
    """
    shared = len(group) > 1
    reduced = [c for c in group if c in uses.sinks]
    read = [c for c in group if c in uses.reread or (shared and c in reduced)]
    widths = {c.shape[-1] for c in reduced if any(isinstance(s, Reduce) for s in uses.sinks[c])}
    picks = [s for c in reduced for s in uses.sinks[c] if shared and isinstance(s, Pick)]
    elements = sum(c.nbytes(sizes) // c.dtype.size for c in group)
    written = elements * sum(t.size * n for t, n in _stored(group, uses, read).items())
    lhs = group[0].lhs
    problem = (
        product(group[0].shape[:-1]).size(sizes),
        sum(c.shape[-1].size(sizes) for c in group),
        lhs.shape[-1].size(sizes),
    )
    operands = lhs.nbytes(sizes) + sum(c.rhs.nbytes(sizes) for c in group)
    gemm = Sketch(problem, lhs.dtype.bits, operands, written)
    again = sum(c.nbytes(sizes) for c in read)
    return Kernels(tuple(group), gemm, 1 + len(widths) + 2 * len(picks), again)


def _stored(
    group: Sequence[Contract], uses: Uses, read: Collection[Contract] = ()
) -> Counter[DType]:
    """The number of matrices of each type that a GEMM stores, with the contractions of `read`.

    Columns of different contractions share a matrix if their types are the same.
    """
    most = Counter[DType]()
    for one in group:
        nodes = {**uses.stored.get(one, {}), **({one: None} if one in read else {})}
        most |= Counter(n.dtype for n in nodes)
    return most
