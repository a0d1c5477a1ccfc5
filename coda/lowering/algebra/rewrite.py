"""Graph and laws -> graph to which no law applies: the rewrite engine.

A law is an equation between two graphs over variables: its left side is the pattern, its right side
the replacement. A variable's shape is "... K", "N K", "* N K" or "... 1": `...` matches any leading
axes, a name binds one axis, 1 matches a value that does not depend on the axis. `*` matches batch
axes, each of its size or 1, and none in a contraction with a matrix: one law holds for both. A
Permute stands for the exchange of the last two axes, or (`ROWS_PERMUTED`) for one permutation of
all others.

    Σ_k (x r) w = r Σ_k x w    x[... K] r[... 1] w[* N K]    q [b, h, M, K], s [b, h, M, 1] and
                                                             k [b, 1, N, K] match as well
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeGuard

import torch

from coda.errors import InternalError
from coda.ir.dims import ONE, Dim, Shape, product
from coda.ir.graph import Cast, Const, Contract, Input, Map, Node, Permute, Reduce, Reshape, Size
from coda.ir.node import origin
from coda.ir.scalars import SCALARS
from coda.ir.types import DType, f32
from coda.lowering.algebra.roles import is_transposed_view, transposed

ANY = DType("T", torch.float32, "float", 32, 24, 8)  # matches any dtype in a pattern
WIDE = DType("W", torch.float32, "float", 32, 24, 8)  # matches dtypes with float32's range
ROWS_PERMUTED = (1, 0, 2)  # in a pattern: any order of the axes but the last, the same everywhere


@dataclass(frozen=True)
class LawVariable:
    """The shape of a variable of a law.

    Attributes:
        leading: whether any number of leading axes may come first.
        axes: names of the axes after them; "1" for an axis on which the value does not depend.
        batch: whether batch axes may come first. Then an axis of `axes` that another variable binds
            may have size 1 or be missing: the value does not depend on it.
    """

    leading: bool
    axes: tuple[str, ...]
    batch: bool = False

    @staticmethod
    def parse(text: str) -> LawVariable:
        """Parse "... K", "* N K", "N K" or "K"."""
        axes = text.split()
        leading, batch = axes[0] == "...", axes[0] == "*"
        return LawVariable(leading, tuple(axes[leading or batch :]), batch)

    def __str__(self) -> str:
        return " ".join(("...",) * self.leading + ("*",) * self.batch + self.axes)

    @property
    def shape(self) -> Shape:
        """The shape that the variable has in the law's own two sides: one leading axis `L`.

        The own sides have no batch axes; `instantiate` makes sides of batches.
        """
        return tuple(Dim.of(int(a) if a == "1" else a) for a in ("L",) * self.leading + self.axes)


Bindings = dict[str, object]


@dataclass(frozen=True)
class Law:
    """An equation, applied from left to right.

    Attributes:
        name: the function's name.
        identity: its docstring: the equation in words and symbols.
        left, right: the two sides.
        variables: the shape of each variable.
        choice: whether the cost model decides each application.
        loosens: factor by which the rounding error may grow; 1 for most.
        unscaled: whether intermediates of the right side lack a factor or a shift that they have on
            the left. They may be far larger or smaller, so the law applies only if all dtypes have
            the range of float32.
        when: a side condition on the nodes that the variables are bound to.
    """

    name: str
    identity: str
    left: Node
    right: Node
    variables: Mapping[str, LawVariable] = field(hash=False)
    choice: bool = False
    loosens: float = 1.0
    unscaled: bool = False
    when: Callable[[Mapping[str, Node]], bool] | None = None

    def apply(self, node: Node) -> Node | None:
        """The right side, of the node's shape and dtype; None if the left side does not match."""
        for found in _unify(self, self.left, node, {}):
            nodes = {k: v for k, v in found.items() if isinstance(v, Node)}
            if self.unscaled and not all(n.dtype.reaches_far for n in (node, *nodes.values())):
                continue
            if self.when is not None and not self.when(nodes):
                continue
            with origin(node.where):
                return _as(node, instantiate(self.right, found, {}))
        return None


Sides = tuple[Node, Node]


def law(
    *,
    choice: bool = False,
    loosens: float = 1.0,
    unscaled: bool = False,
    when: Callable[[Mapping[str, Node]], bool] | None = None,
    **variables: str,
) -> Callable[[Callable[..., Sides]], Law]:
    """Decorator: a function from variables to the two sides of an equation -> a Law.

    Raises InternalError if the function has no docstring or its sides differ in shape.
    """

    def make(fn: Callable[..., Sides]) -> Law:
        parsed = {name: LawVariable.parse(text) for name, text in variables.items()}
        left, right = fn(**{n: Input(n, v.shape, f32) for n, v in parsed.items()})
        if not fn.__doc__:
            raise InternalError(f"the law {fn.__name__} does not state its identity")
        if left.shape != right.shape:
            raise InternalError(
                f"the sides of {fn.__name__} have shapes {left.shape}, {right.shape}"
            )
        doc = inspect.cleandoc(fn.__doc__)
        return Law(fn.__name__, doc, left, right, parsed, choice, loosens, unscaled, when)

    return make


def _unify(law: Law, pattern: Node, node: Node, b: Bindings) -> Iterator[Bindings]:
    """All bindings of variables and axes under which the pattern equals `node`."""
    if isinstance(pattern, Input):
        if pattern.name in b:
            if b[pattern.name] is node:
                yield b
            return
        axes = _fit(law.variables[pattern.name], node, b)
        if axes is not None:
            yield {**axes, pattern.name: node}
        return
    if isinstance(pattern, Permute) and pattern.order != ROWS_PERMUTED:
        if is_transposed_view(node):
            yield from _unify(law, pattern.arg, transposed(node), b)
        return
    if isinstance(pattern, Permute):
        like = b.get("permuted", node)
        if _permutes_rows(node) and isinstance(like, Permute) and like.order == node.order:
            yield from _unify(law, pattern.arg, node.arg, {**b, "permuted": node})
        return
    if type(pattern) is not type(node) or not _same_attributes(pattern, node):
        return
    if isinstance(node, Cast):
        b = {**b, "element type": node.to}
    orders: list[tuple[Node, ...]] = [node.operands]
    if isinstance(pattern, Map) and SCALARS[pattern.fn].commutes:
        orders.append(node.operands[::-1])
    for operands in orders:
        yield from _unify_all(law, pattern.operands, operands, b)


def _permutes_rows(node: Node) -> TypeGuard[Permute]:
    """Whether a node has the axes of its operand in another order, the last one in its place."""
    last = node.rank - 1
    return isinstance(node, Permute) and node.order[last] == last


def _unify_all(
    law: Law, patterns: Sequence[Node], nodes: Sequence[Node], b: Bindings
) -> Iterator[Bindings]:
    if not patterns:
        yield b
        return
    for found in _unify(law, patterns[0], nodes[0], b):
        yield from _unify_all(law, patterns[1:], nodes[1:], found)


def _same_attributes(pattern: Node, node: Node) -> bool:
    """Whether all attributes but the operands agree; ANY and WIDE match dtypes."""
    for name in pattern.identity:
        p, n = getattr(pattern, name), getattr(node, name)
        if isinstance(p, Node) or (isinstance(p, tuple) and p and isinstance(p[0], Node)):
            continue
        if p is not ANY and p != n and not (p is WIDE and n.reaches_far):
            return False
    return True


def _fit(variable: LawVariable, node: Node, b: Bindings) -> Bindings | None:
    """The bindings extended by this node's axes; None if its shape does not fit the variable."""
    axes = variable.axes
    shape = node.shape
    if variable.leading and axes == ("1",) and not shape:
        return b
    if variable.batch:
        shape = (ONE,) * (len(axes) - len(shape)) + shape
    if len(shape) < len(axes):
        return None
    lead, tail = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
    if not (variable.leading or variable.batch) and any(d != ONE for d in lead):
        return None
    new = dict(b)
    for axis, dim in zip(axes, tail, strict=True):
        if axis == "1":
            if dim != ONE:
                return None
        elif dim == ONE:
            if not variable.batch or "axis " + axis not in new:
                return None
        elif new.setdefault("axis " + axis, dim) != dim:
            return None
    return new


def instantiate(side: Node, b: Bindings, memo: dict[Node, Node]) -> Node:
    """A side of a law with its variables replaced by the nodes that they are bound to."""
    if side in memo:
        return memo[side]
    if isinstance(side, Input):
        new = b[side.name]
        assert isinstance(new, Node)
        if side.rank == 1 and new.rank > 1:
            new = Reshape(new, new.shape[-1:])
    elif isinstance(side, Permute):
        arg, like = instantiate(side.arg, b, memo), b.get("permuted", side)
        assert isinstance(like, Permute)
        new = Permute(arg, like.order) if side.order == ROWS_PERMUTED else transposed(arg)
    elif isinstance(side, Reshape):
        axes = {name.removeprefix("axis "): d for name, d in b.items() if isinstance(d, Dim)}
        new = Reshape(instantiate(side.arg, b, memo), tuple(d.substitute(axes) for d in side.to))
    else:
        operands = [instantiate(o, b, memo) for o in side.operands]
        new = side.with_operands(operands)
        if isinstance(side, Contract) and side.result is ANY:
            kinds = {o.dtype for o in operands}
            new = Contract(operands[0], operands[1], kinds.pop() if len(kinds) == 1 else f32)
        elif isinstance(side, Cast):
            to = b["element type"]
            assert isinstance(to, DType)
            new = _cast(operands[0], to)
    memo[side] = new
    return new


def _cast(node: Node, to: DType) -> Node:
    """A value in another dtype; a constant is not rounded in between, as in torch."""
    match node:
        case Const(value=value) if to.kind == "float":
            return Const(value, to)
        case Size(dim=dim) if to.kind == "float":
            return Size(dim, to)
        case _:
            return Cast(node, to)


def _as(old: Node, new: Node) -> Node:
    """`new` with the shape and dtype of the node that it replaces."""
    if new.shape != old.shape:
        if product(new.shape) != product(old.shape):
            raise InternalError(f"a law turned {old.shape} into {new.shape}")
        new = Reshape(new, old.shape)
    return new if new.dtype == old.dtype else Cast(new, old.dtype)


@dataclass(frozen=True)
class LawApplication:
    """One application of a law."""

    law: Law
    before: Node
    after: Node


Place = tuple[Node | int, ...]  # a node of the original graph, and a path from it
Accept = Callable[[Law, Node, Place], bool]


def rewrite(
    roots: Sequence[Node],
    laws: Sequence[Law],
    accept: Accept,
    tell: Callable[[LawApplication], object] = lambda _: None,
) -> tuple[Node, ...]:
    """Apply `laws` everywhere, in order, until none applies.

    Terminates because a measure falls with each application (`measure.py`).

    Args:
        roots: the outputs of a graph.
        laws: tried in order at each node, operands first.
        accept: called before a law with `choice` is applied; its third argument is the place of the
            node's first operand, which does not depend on earlier rewrites.
        tell: called with each application.
    """
    return _Rewrite(_by_kind(tuple(laws)), accept, tell).run(roots)


Kind = tuple[type[Node], str]


def _kind(node: Node) -> Kind:
    return type(node), node.fn if isinstance(node, Map | Reduce) else ""


@lru_cache(maxsize=16)
def _by_kind(laws: tuple[Law, ...]) -> Mapping[Kind, list[Law]]:
    """Kind of node -> the laws whose left side is of that kind, in order."""
    found: dict[Kind, list[Law]] = {}
    for one in laws:
        found.setdefault(_kind(one.left), []).append(one)
    return found


@dataclass
class _Rewrite:
    """One run of the engine.

    Attributes:
        laws: by the kind of node of their left side.
        accept, tell: as in `rewrite`.
        done: visited node -> its rewritten form.
        places: the places of nodes that are not in the original graph.
    """

    laws: Mapping[Kind, list[Law]]
    accept: Accept
    tell: Callable[[LawApplication], object]
    done: dict[Node, Node] = field(default_factory=dict[Node, Node])
    places: dict[Node, Place] = field(default_factory=dict[Node, Place])

    def run(self, roots: Sequence[Node]) -> tuple[Node, ...]:
        """The rewritten roots, by an explicit stack of nodes to visit."""
        stack: list[tuple[Node, Node | None]] = []
        for root in roots:
            stack.append((root, None))
            while stack:
                node, out = stack.pop()
                if out is not None:  # `out` replaced the node, and is rewritten by now
                    self.done[node] = self.done[out]
                elif node not in self.done:
                    waiting = [o for o in node.operands if o not in self.done]
                    if waiting:
                        stack.append((node, None))
                        stack += [(o, None) for o in reversed(waiting)]
                    else:
                        self.leave(node, stack)
        return tuple(self.done[r] for r in roots)

    def leave(self, node: Node, stack: list[tuple[Node, Node | None]]) -> None:
        """Rebuild a node on its rewritten operands, and apply the first law that matches."""
        out = node
        operands = tuple(self.done[o] for o in node.operands)
        if any(a is not b for a, b in zip(operands, node.operands, strict=True)):
            with origin(node.where):
                out = node.with_operands(operands)
            if out in self.done:
                self.done[node] = self.done[out]
                return
            self.places.setdefault(out, self.place(node))
        new = self.step(out)
        if new is None:
            self.done[node] = self.done[out] = out
            return
        self.locate(new, self.place(out))
        stack += [(node, new), (out, new), (new, None)]

    def step(self, node: Node) -> Node | None:
        """The replacement by the first law that applies; None if none does."""
        for one in self.laws.get(_kind(node), ()):
            new = one.apply(node)
            if new is None or new is node:
                continue
            if one.choice and not self.accept(one, node, self.place(node.operands[0])):
                continue
            self.tell(LawApplication(one, node, new))
            return new
        return None

    def place(self, node: Node) -> Place:
        """The place of a node: the node itself, if it is in the original graph."""
        return self.places.get(node, (node,))

    def locate(self, new: Node, place: Place) -> None:
        """Give places to the nodes that a law has created, numbered in order of visit."""
        stack, number = [new], 0
        while stack:
            node = stack.pop()
            if node not in self.done and node not in self.places:
                self.places[node] = (*place, number)
                number += 1
                stack.extend(reversed(node.operands))


def substituted(roots: Iterable[Node], stands: Mapping[Node, Node]) -> tuple[Node, ...]:
    """The roots with nodes replaced; the operands of a replaced node are not visited."""
    roots, new = tuple(roots), dict(stands)
    stack = [(r, False) for r in roots]
    while stack:
        node, ready = stack.pop()
        if node in new:
            continue
        if ready:
            operands = tuple(new[o] for o in node.operands)
            same = all(a is b for a, b in zip(operands, node.operands, strict=True))
            with origin(node.where):
                new[node] = node if same else node.with_operands(operands)
        else:
            stack.append((node, True))
            stack.extend((o, False) for o in node.operands)
    return tuple(new[r] for r in roots)
