"""Node -> a node that later kernels can load: stored by its producer, joined, hosted or moved.

A producer that refuses to store a node (`admit`) loses it: the node is placed again, elsewhere. A
concatenation is one buffer of which the producer of each part writes a slice. A node of arguments
alone is placed here, in a kernel that loads the arguments anyway or in a row-wise one of its own.

    gemm0 computes mean [M, 4] of heads, cannot store it, and a later kernel loads it
        ->  mean moves to a row-wise kernel after gemm0
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from coda.ir.dims import product
from coda.ir.graph import (
    Concat,
    Const,
    Contract,
    Input,
    Node,
    Size,
    walk,
)
from coda.lowering.algebra.roles import (
    flat,
    keeps_order,
    stacks,
)
from coda.lowering.placement.admit import Admission
from coda.lowering.placement.draft import Draft
from coda.lowering.program.program import Unfused


class Materialisation(Admission, ABC):
    """What makes nodes loadable. Which kernel computes a node is for the placement to say."""

    @abstractmethod
    def in_rows(self, node: Node, index: int) -> None:
        """Place a node in a row-wise kernel after the GEMM `index`, or in a kernel of its own."""

    @abstractmethod
    def absorb(self, node: Node, draft: Draft) -> str:
        """Place a node in a kernel; the reason if the kernel refuses, otherwise ""."""

    def materialise(self, node: Node, *, host: bool = False) -> None:
        """Make a node loadable; place it if it has no producer.

        With `host`, a node of arguments alone may be placed in an existing kernel.
        """
        under = self.storage(node)
        if under in self.weights or isinstance(under, Input):
            return
        if under in self.home:
            self.keep(under)
            return
        self.loadable.add(under)
        if host and self.hosted(under):
            return
        if isinstance(under, Concat) and not self.joins(under) and not self.in_pass(under):
            self.join_either(under)
        if under not in self.home:
            below = [self.home[n].order[0] for n in walk([under]) if n in self.home]
            self.in_rows(under, max(below, default=0))

    def join_either(self, node: Concat) -> bool:
        """Let the producers of a concatenation's parts write them, as columns or as rows."""
        return self.join(node) or (stacks(node) and self.join(node, stacked=True))

    def join(self, node: Concat, *, stacked: bool = False) -> bool:
        """Materialise a concatenation: each part's producer kernel writes its slice of one buffer.

        Parts are columns or, with `stacked`, rows. False if some part cannot be written so.
        """
        if not stacked and node.axis != -1:
            return False
        parts = [self.storage(a) for a in flat(node)]
        whole = [
            product(p.shape) == product(a.shape) and keeps_order(a, p)
            for p, a in zip(parts, flat(node), strict=True)
        ]
        taken = any(p in self.piece_of or p in self.joined for p in parts)
        known = any(isinstance(p, Input | Const) or p in self.weights for p in parts)
        if not all(whole) or taken or known or len(set(parts)) < len(parts):
            return False
        for part in parts:
            self.materialise(part)
        if any(p not in self.home or self.storage(p) is not p for p in parts):
            return False  # a part became a view of another value
        rows = [a.shape[node.axis] if stacked else product(node.shape[:-1]) for a in flat(node)]
        spaces = [self.home[p].space for p in parts]
        fits = all(s.rows == r for s, r in zip(spaces, rows, strict=True))
        if stacked and not fits:  # contiguous parts, each written as one column
            fits = all(s.rows == product(p.shape) for s, p in zip(spaces, parts, strict=True))
        if not fits or not all(map(self.fills, parts)):
            return False
        self.joined[node] = tuple(parts)
        self.stacked |= {node} if stacked else set()
        self.piece_of |= dict.fromkeys(parts, node)
        self.home[node] = max((self.home[p] for p in parts), key=lambda d: d.order)
        self.loadable.add(node)
        return True

    def fills(self, node: Node) -> bool:
        """Whether a node has all columns of its producer GEMM, or one per column pair."""
        space = self.home[node].space
        if not self.home[node].kind.tiled:
            return self.home[node].kind.whole_rows
        value = space.compute(node)
        return value.count == space.width or (
            value.slots.shape[1] == 2 and 2 * value.count == space.width
        )

    def keep(self, node: Node) -> None:
        """Let later kernels load a node; if its producer refuses, it gets a kernel of its own."""
        if node in self.loadable:
            return
        self.loadable.add(node)
        why = self.commit(node)
        if why:
            self.move(node, why)

    def provide(self, node: Node) -> list[Node]:
        """Let later kernels load a node's operands or, if one is refused, its operands in turn.

        Rows of operands that are read at a distance are rows of what is in memory.

        Returns:
            The operands that a producer refused to store.
        """
        stack, seen, refused = list(node.operands), set[Node](), list[Node]()
        while stack:
            under = self.storage(stack.pop())
            if under in seen or under in self.loadable:
                continue
            seen.add(under)
            if under in self.deferred:
                stack.extend(under.operands)
                continue
            if under not in self.home:
                continue
            if self.commit(under):
                refused.append(under)
                stack.extend(under.operands)
            else:
                self.loadable.add(under)
        return refused

    def keep_operands(self, node: Node) -> list[Node]:
        """Let later kernels load all operands of a node; those that were not loadable before."""
        under = dict.fromkeys(self.storage(o) for o in node.operands if o in self.home)
        missing = [n for n in under if n not in self.loadable]
        for one in missing:
            self.keep(one)
        return missing

    def take_back(self, kept: Iterable[Node], draft: Draft) -> None:
        """Do not let later kernels load what was kept for a node that is now in the same kernel.

        They recompute it from what this kernel loads, unless one loads it already.
        """
        for node in kept:
            later = (d for d in self.drafts if d.order > draft.order)
            if self.home.get(node) is draft and not any(node in d.space.values for d in later):
                self.loadable.discard(node)
                draft.kept.discard(node)
                draft.layout = None

    def move(self, node: Node, why: str) -> None:
        """Place a node again that its producer can compute but not store, for the reason `why`.

        A product takes the place of a value that its GEMM stores, which is placed again instead;
        only where there is none, the product is computed again by a GEMM of its own.
        """
        home = self.home[node]
        if isinstance(node, Contract):
            node = self.make_room(node, home) or node
        del self.home[node]
        home.homed.remove(node)
        if home.kind.tiled:
            self.unfused.append(Unfused(node, why))
        if isinstance(node, Contract):
            self.open_gemm((node,))
        else:
            self.in_rows(node, home.order[0])

    def make_room(self, product: Contract, home: Draft) -> Node | None:
        """Store a product in the place of the last value that no other kernel loads yet.

        Returns:
            That value, which its kernel no longer stores; None if there is none.
        """
        for node in reversed(home.homed):
            if node not in home.kept or isinstance(node, Contract) or node in self.piece_of:
                continue
            if self.is_used_outside(node, home):
                continue
            home.kept.remove(node)
            if not self.commit(product):
                return node
            home.kept.add(node)
        return None

    def is_used_outside(self, node: Node, home: Draft) -> bool:
        """Whether a kernel other than `home` computes something of a node, or of a view of it."""
        stack = list(self.users[node])
        while stack:
            user = stack.pop()
            if user not in self.home:
                stack.extend(self.users[user])
            elif self.home[user] is not home:
                return True
        return False

    def in_pass(self, node: Node) -> bool:
        """Place a node of arguments alone in one new row-wise kernel; False if it refuses."""
        if any(n in self.home for n in walk([node]) if n not in self.weights):
            return False
        for rows, columns in self.shapes(node)[:1]:
            draft = self.open(self.rowwise, 0, self.space(columns.size(self.sizes), rows))
            if not self.absorb(node, draft):
                return True
            self.drop(draft)
        return False

    def hosted(self, node: Node) -> bool:
        """Place a node of arguments alone in a kernel that loads them anyway; False if refused.

        The first to be asked is the kernel that computes all of its operands, if there is one.
        """
        homes = {self.home.get(o) for o in node.operands if not isinstance(o, Const | Size)}
        own = [d for d in homes if d is not None and d.kind.fuses and len(homes) == 1]
        hosts = sorted(self.hosts(node), key=lambda d: not d.kind.tiled)
        return any(not self.absorb(node, draft) for draft in dict.fromkeys(own + hosts))
