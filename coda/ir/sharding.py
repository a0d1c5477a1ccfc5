"""A graph and one sharded dim -> how each output and each gradient is placed over ranks.

Every rank computes the block on its own shard. A value that depends on the dim is sharded ("split"
here). Any other value is replicated ("full"), or a partial sum ("partial"): a sum over the dim, of
which each rank has one summand. A linear function of a partial sum is a partial sum; every other
function of one, and every reduction over the dim except a sum, needs communication and is refused.

    y = x @ w.T, x [M, K], w [N, K]     over M: x, y sharded, w replicated, dw a partial sum
                                        over K: x, w sharded, y a partial sum, dx, dw sharded
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from coda.ir.dims import Dim, Shape, product
from coda.ir.graph import (
    Cast,
    Concat,
    Contract,
    Expand,
    Gather,
    Graph,
    Input,
    Iota,
    Map,
    Node,
    Permute,
    Pick,
    Put,
    Reduce,
    Reshape,
    Scan,
    Size,
    Slice,
    users,
    walk,
)
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SCALARS

FULL, SPLIT, PARTIAL = "full", "split", "partial"


class Inseparable(Exception):
    """A node cannot be computed without communication between ranks; the message says why."""

    def __init__(self, node: Node, why: str) -> None:
        super().__init__(why)
        self.node = node


@dataclass(frozen=True)
class ShardedBlock:
    """A block with one sharded dim. A state is "split" (sharded), "full" (replicated) or "partial".

    Attributes:
        symbol: the sharded dim.
        outputs: the state of each output.
        gradients: the state of each argument's gradient, by name; "" if it is the sum of a
            replicated and a partial one.
    """

    symbol: str
    outputs: tuple[str, ...]
    gradients: Mapping[str, str]


def share(graph: Graph, symbol: str) -> ShardedBlock:
    """Propagate the sharding of a dim through a block and its backward pass. Raises Inseparable."""
    states: dict[Node, str] = {}
    for node in walk((*graph.inputs, *graph.roots)):
        states[node] = _state(node, symbol, [states[o] for o in node.operands])
    readers = users(graph.roots)
    gradients: dict[Node, set[str]] = {}
    for node in reversed(list(walk(graph.roots))):
        found: set[str] = {FULL} if node in graph.roots else set()
        for user in readers[node]:
            found |= gradients[user] if states[user] == FULL else {PARTIAL}
        gradients[node] = {SPLIT} if states[node] == SPLIT else found
    named: dict[str, str] = {}
    for node in graph.inputs:
        kinds = gradients.get(node, {FULL})
        named[node.name] = next(iter(kinds)) if len(kinds) == 1 else ""
    return ShardedBlock(symbol, tuple(states[r] for r in graph.roots), named)


def axis_of(shape: Shape, symbol: str) -> int | None:
    """The first axis whose size depends on the dim; None for none."""
    return next((i for i, d in enumerate(shape) if symbol in d.symbols), None)


def _state(node: Node, symbol: str, operands: list[str]) -> str:
    """The state of a node, given the states of its operands."""
    if isinstance(node, Input):
        return SPLIT if axis_of(node.shape, symbol) is not None else FULL
    if isinstance(node, Size | Iota):
        dim = node.dim if isinstance(node, Size) else node.count
        if symbol in dim.symbols:
            raise Inseparable(node, f"it needs all of `{symbol}`")
        return FULL
    if isinstance(node, Contract | Reduce):
        return _sum(node, symbol, operands)
    if isinstance(node, Map):
        return _map(node, operands)
    _check_place(node, symbol)
    return next((s for s in (PARTIAL, SPLIT) if s in operands), FULL)


def _sum(node: Contract | Reduce, symbol: str, operands: list[str]) -> str:
    if isinstance(node, Contract):
        axes = [d for d in (*node.shape, node.lhs.shape[-1]) if symbol in d.symbols]
        if len(axes) > 1:  # every shard of one axis is needed with every shard of the other
            raise Inseparable(node, f"it needs all of `{symbol}`")
    summed: Dim = node.lhs.shape[-1] if isinstance(node, Contract) else node.arg.shape[node.axis]
    adds = isinstance(node, Contract) or MONOIDS[node.fn].is_plain_sum
    if symbol in summed.symbols:
        if not adds:
            raise Inseparable(node, f"it needs all of `{symbol}`")
        if PARTIAL not in operands:
            return PARTIAL
    elif PARTIAL not in operands:
        return SPLIT if SPLIT in operands else FULL
    elif adds and operands.count(PARTIAL) == 1 and SPLIT not in operands:
        return PARTIAL
    raise Inseparable(node, f"each rank has only its part of a sum over `{symbol}`")


def _map(node: Map, operands: list[str]) -> str:
    if PARTIAL not in operands:
        return SPLIT if SPLIT in operands else FULL
    linear = SCALARS[node.fn].is_linear_in([s == PARTIAL for s in operands])
    if not linear or SPLIT in operands:
        raise Inseparable(node, "each rank has only its part of the sum that it reads")
    return PARTIAL


def _check_place(node: Node, symbol: str) -> None:
    """Raise Inseparable if a view or a gather reads elements of several shards."""
    match node:
        case Cast() | Permute() | Expand():
            mixed = False
        case Reshape(arg=arg):
            mixed = _before(arg.shape, symbol) != _before(node.shape, symbol)
        case Slice(arg=arg, axis=axis):
            mixed = symbol in arg.shape[axis].symbols | node.start.symbols | node.size.symbols
        case Scan(arg=arg, axis=axis):
            mixed = symbol in arg.shape[axis].symbols
        case Concat(axis=axis):
            mixed = symbol in node.shape[axis].symbols
        case Gather(table=table, indices=indices):
            mixed = any(symbol in d.symbols for d in table.shape[: len(indices)])
        case Pick(arg=arg):
            mixed = symbol in arg.shape[-1].symbols
        case Put():
            mixed = any(symbol in d.symbols for o in node.operands for d in o.shape)
        case _:
            mixed = False
    if mixed:
        raise Inseparable(node, f"it needs all of `{symbol}`")


def _before(shape: Shape, symbol: str) -> Dim | None:
    """The number of elements of the axes left of the sharded one; None if none is sharded."""
    axis = axis_of(shape, symbol)
    return None if axis is None else product(shape[:axis])


def candidates(graph: Graph, dims: Iterable[Dim]) -> list[str]:
    """The symbols on which all of `dims` depend: those that can be sharded on these axes."""
    common = [d.symbols for d in dims]
    return [s for s in graph.symbols if common and all(s in symbols for symbols in common)]
