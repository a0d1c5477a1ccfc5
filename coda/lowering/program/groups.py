"""Graph -> the kernels of all that is no contraction, as a compiler without epilogues fuses it.

Elementwise operations and reductions over columns fuse along the rows: a kernel holds whole rows,
so a connected group of them between two contractions is one kernel that reads and writes each
tensor once. A reduction over rows (a sum over tokens, or of a whole matrix) ends its kernel: no CTA
knows the result before all others have ended. Each CTA writes a partial; a second kernel folds
these, and computes what has as many elements as the result; what reads the result beside larger
values is a third kernel. It reads its operands again, or what they are elementwise functions of:

    y = x · sigmoid(mean of all x)    read x, partials; fold, sigmoid; read x again, write y

Where there is but a number for each row, one CTA computes the reduction, and what has as many
elements as its result, in the kernel of its operands. The folds that nothing but the caller reads
are one kernel for each number of results, since a kernel has one iteration space; and so are the
parts of one group that begin after as many folds: a group has at most two kernels more for each
reduction over rows that follows another, and number of its results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from coda.ir.dims import Dim, product
from coda.ir.graph import (
    Const,
    Contract,
    Expand,
    Graph,
    Input,
    Iota,
    Node,
    Permute,
    Reduce,
    Reshape,
    Size,
    Slice,
    users,
    walk,
)
from coda.lowering.algebra.roles import is_pointwise, row_symbols

_T = TypeVar("_T")


@dataclass(frozen=True)
class FusedGroup:
    """A kernel.

    Attributes:
        nodes: what it computes; () for a kernel that only folds partials.
        reads: the tensors that it reads, each once.
        writes: the tensors that it writes, each once.
        parts: reductions over rows of which it writes partials.
        folds: those of which it folds the partials.
    """

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    writes: tuple[Node, ...]
    parts: tuple[Reduce, ...] = ()
    folds: tuple[Reduce, ...] = ()


def is_free(node: Node) -> bool:
    """Whether torch moves no bytes for a node: a leaf or a view."""
    return isinstance(node, Input | Const | Size | Iota | Expand | Reshape | Permute | Slice)


def groups(graph: Graph, sizes: Mapping[str, int]) -> tuple[FusedGroup, ...]:
    """The kernels of all operations of a graph that are no contractions.

    Args:
        graph: a block, in any form.
        sizes: the size of every symbol.
    """
    return _Groups(graph, sizes, _Grouping.of(graph)).all()


@dataclass(frozen=True)
class _Fold:
    """The fold of the partials of a reduction over rows, as a member of a kernel."""

    node: Reduce


_Member = Node | _Fold
# Of a kernel: an operation of its group, its depth, and how many results it folds, if it folds.
_Key = tuple[Node, int, Dim | None]


@dataclass
class _Grouping:
    """Operations that no contraction keeps apart, and the depth in folds at which each is known.

    Attributes:
        tokens: the symbols of rows.
        users: node -> the operations that read it.
        products: node -> the number of contractions that end before its kernel begins, at least.
        depth: node -> the same number of contractions and folds.
        united: node -> another one of its connected group; itself for one of each.
        wide: nodes whose kernel reads or computes more than a number for each row.
        parts: reductions over rows of whose kernels each CTA writes a partial.
        narrow: nodes with as many elements as a reduction over rows, known when it is.
        folding: those of them that the fold of partials computes.
    """

    tokens: frozenset[str]
    users: Mapping[Node, list[Node]]
    products: dict[Node, int] = field(default_factory=dict[Node, int])
    depth: dict[Node, int] = field(default_factory=dict[Node, int])
    united: dict[Node, Node] = field(default_factory=dict[Node, Node])
    wide: set[Node] = field(default_factory=set[Node])
    parts: set[Reduce] = field(default_factory=set[Reduce])
    narrow: set[Node] = field(default_factory=set[Node])
    folding: set[Node] = field(default_factory=set[Node])

    @staticmethod
    def of(graph: Graph) -> _Grouping:
        found = _Grouping(row_symbols(walk(graph.roots)), users(graph.roots))
        for node in found.users:
            if not isinstance(node, Input | Const | Size):
                found.visit(node)
        return found

    def first(self, node: Node) -> Node:
        """The operation that stands for the connected group of another one."""
        while self.united[node] is not node:
            node = self.united[node]
        return node

    def key(self, member: _Member) -> _Key:
        """The key that all members of one kernel share."""
        if isinstance(member, _Fold):
            node = member.node
            return self.first(node), self.depth[node] + 1, product(node.shape)
        if isinstance(member, Contract):
            return member, 0, None
        folded = product(member.shape) if member in self.folding else None
        return self.first(member), self.depth[member], folded

    def visit(self, node: Node) -> None:
        """Find when a node is known, and the connected group to which it belongs."""
        operands = [o for o in node.operands if o in self.depth]
        self.products[node] = max(map(self.products_before, operands), default=0)
        self.depth[node] = max((self.depth_before(o, node) for o in operands), default=0)
        if isinstance(node, Contract):
            return
        self.united[node] = node
        for one in operands:
            if not isinstance(one, Contract) and self.products[one] == self.products[node]:
                self.united[self.first(one)] = node
        known = [o for o in operands if o in self.united and self.depth[o] == self.depth[node]]
        if any(map(self.is_wide, (node, *node.operands))) or self.wide & set(known):
            self.wide.add(node)
        late = [o for o in operands if self.depth_before(o, node) == self.depth[node]]
        if isinstance(node, Reduce) and node.arg.shape[node.axis].symbols & self.tokens:
            self.narrow.add(node)
            self.parts |= {node} if node in self.wide else set()
        elif any(o in self.narrow and product(o.shape) == product(node.shape) for o in late):
            self.narrow.add(node)
            self.folding |= {node} if (self.parts | self.folding) & set(late) else set()

    def depth_before(self, operand: Node, node: Node) -> int:
        """The number of contractions and folds that end before a node can read an operand."""
        larger = operand in self.narrow and product(operand.shape) != product(node.shape)
        folded = isinstance(operand, Contract) or operand in self.parts
        return self.depth[operand] + folded + larger

    def products_before(self, operand: Node) -> int:
        """The number of contractions that end before a reader of an operand begins."""
        return self.products.get(operand, 0) + isinstance(operand, Contract)

    def is_late(self, operand: Node, node: Node) -> bool:
        """Whether a fold alone keeps a node from the kernel that computes its wide operand."""
        known = operand in self.united and self.is_wide(operand)
        return known and self.products[operand] == self.products[node]

    def leaves(self, node: Node) -> set[Node]:
        """The tensors of which a node is a function, element by element, in its kernel."""
        found, stack = set[Node](), [node]
        while stack:
            one = stack.pop()
            mine = one in self.united and self.products[one] == self.products[node]
            if mine and is_pointwise(one):
                stack.extend(one.operands)
            elif not isinstance(one, Const | Size):
                found.add(_storage(one))
        return found

    def is_wide(self, node: Node) -> bool:
        """Whether a node has more elements than rows."""
        return bool(product(node.shape).symbols - self.tokens) and bool(
            product(node.shape).symbols & self.tokens
        )


@dataclass
class _Groups:
    """The kernels of united operations, with what each reads and writes.

    Attributes:
        graph, sizes: as of `groups`.
        found: the operations.
        again: (node, key of a kernel) -> what the kernel reads to compute it again.
    """

    graph: Graph
    sizes: Mapping[str, int]
    found: _Grouping
    again: dict[tuple[Node, _Key], set[Node]] = field(
        default_factory=dict[tuple[Node, _Key], set[Node]]
    )

    def all(self) -> tuple[FusedGroup, ...]:
        """All kernels; the folds that no other kernel reads are one."""
        members: dict[_Key, list[_Member]] = {}
        for one in (*self.found.united, *map(_Fold, self.found.parts)):
            members.setdefault(self.found.key(one), []).append(one)
        members = {m: inside for m, inside in members.items() if not all(map(_moves_none, inside))}
        reads = {key: self.reads(key, inside) for key, inside in members.items()}
        kernels = [self.kernel(inside, reads[key]) for key, inside in members.items()]
        multiplied = {_storage(o) for n in self.found.users for o in _factors(n)}
        read = multiplied.union(*reads.values())
        last: dict[Dim, list[FusedGroup]] = {}
        for one in kernels:
            if one.folds and not read & set(one.writes):
                last.setdefault(product(one.folds[0].shape), []).append(one)
        folds = [_together(few) for few in last.values()]
        ending = {k for few in last.values() for k in few}
        return (*(k for k in kernels if k not in ending), *folds)

    def reads(self, key: _Key, inside: list[_Member]) -> set[Node]:
        """The tensors that a kernel reads.

        A matrix that a kernel computes before the end of a reduction is computed again from what it
        is a function of, element by element, where that takes fewer bytes.
        """
        known = self.known(inside)
        edges = [(o, n) for n in inside if isinstance(n, Node) for o in n.operands]
        edges = [(o, n) for o, n in edges if o not in known and not isinstance(o, Const | Size)]
        late = dict.fromkeys(o for o, n in edges if self.found.is_late(o, n))
        reads = {_storage(o) for o, _ in edges if o not in late}
        for one in late:
            leaves = self.found.leaves(one) - known
            if sum(n.nbytes(self.sizes) for n in leaves - reads) < 2 * one.nbytes(self.sizes):
                self.again[one, key] = leaves
                reads |= leaves
            else:
                reads.add(_storage(one))
        return reads

    def known(self, inside: list[_Member]) -> set[Node]:
        """The values inside a kernel: results of its operations and folds."""
        nodes = {m for m in inside if isinstance(m, Node)} - self.found.parts
        return nodes | {m.node for m in inside if isinstance(m, _Fold)}

    def kernel(self, inside: list[_Member], reads: set[Node]) -> FusedGroup:
        """The kernel of some members, which reads these tensors."""
        known, nodes = self.known(inside), [m for m in inside if isinstance(m, Node)]
        mine = set(nodes)
        edges = [(n, u) for n in known for u in self.found.users[n] if u not in mine]
        taken = {_storage(n) for n, u in edges if (n, self.found.key(u)) not in self.again}
        taken |= known & set[Node]().union(*self.again.values())
        taken |= known & {_storage(n) for n in self.graph.roots}
        filled = {n for n in self.graph.roots if isinstance(n, Expand) and n in mine}
        return FusedGroup(
            tuple(nodes),
            tuple(reads),
            tuple(n for n in taken if n not in known or n in filled or not is_free(n)),
            tuple(n for n in nodes if isinstance(n, Reduce) and n in self.found.parts),
            tuple(m.node for m in inside if isinstance(m, _Fold)),
        )


def _moves_none(member: _Member) -> bool:
    """Whether a member of a kernel moves no bytes."""
    return isinstance(member, Node) and is_free(member)


def _factors(node: Node) -> tuple[Node, ...]:
    """The operands of a contraction; () of any other node."""
    return node.operands if isinstance(node, Contract) else ()


def _together(kernels: list[FusedGroup]) -> FusedGroup:
    """Kernels of folds as one."""

    def every(of: Callable[[FusedGroup], tuple[_T, ...]]) -> tuple[_T, ...]:
        return tuple(dict.fromkeys(x for k in kernels for x in of(k)))

    found = every(lambda k: k.nodes), every(lambda k: k.reads), every(lambda k: k.writes)
    return FusedGroup(*found, every(lambda k: k.parts), every(lambda k: k.folds))


def _storage(node: Node) -> Node:
    while isinstance(node, Reshape | Permute | Slice):
        node = node.operands[0]
    return node
