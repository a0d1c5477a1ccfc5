"""Nodes of a graph -> their roles in placement: weight, view, activation, and order.

In y = (x gᵀ) · silu(x uᵀ) the inputs g and u are weights (no token dim), and x is the
activation of both contractions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from coda.ir.attend import Attend, AttendGradient
from coda.ir.dims import ONE, Dim, product
from coda.ir.graph import (
    Cast,
    Concat,
    Const,
    Contract,
    Expand,
    Gather,
    Input,
    Iota,
    Map,
    Node,
    Permute,
    Pick,
    Put,
    Reduce,
    Reshape,
    Size,
    Slice,
    walk,
)
from coda.ir.scalars import PAIR
from coda.ir.views import under_reshapes


def is_view(node: Node) -> bool:
    """Whether a node is a view: it aliases its operand's memory."""
    return isinstance(node, Reshape | Slice | Permute)


def base(node: Node) -> Node:
    """The node under all views; a node that is no view itself."""
    while is_view(node):
        node = node.operands[0]
    return node


def keeps_order(node: Node, under: Node) -> bool:
    """Whether a view of `under` does not permute its axes."""
    while node is not under:
        if isinstance(node, Permute):
            return False
        node = node.operands[0]
    return True


def is_transposed(node: Node) -> bool:
    """Whether a node is a transposed matrix; a GEMM reads it without a copy."""
    return isinstance(node, Permute) and node.order == (1, 0)


def transposed(node: Node) -> Node:
    """The last two axes exchanged, as one permutation of what is in memory; vectors stay."""
    last = node.rank - 1
    if last < 1:
        return node
    return permuted(node, (*range(last - 1), last, last - 1))


def permuted(node: Node, order: tuple[int, ...]) -> Node:
    """A node with its axes in another order, as at most one permutation of what is in memory."""
    if isinstance(node, Permute):
        node, order = node.arg, tuple(node.order[i] for i in order)
    return node if order == tuple(range(node.rank)) else Permute(node, order)


def keeps_columns(node: Permute) -> bool:
    """Whether a permutation has the last axis last."""
    return node.order[-1] == node.rank - 1


def is_transposed_view(node: Node) -> bool:
    """Whether a node's last two axes are in the reverse of their order in memory."""
    return isinstance(node, Permute) and node.rank > 1 and node.order[-1] < node.order[-2]


def reads_strided(node: Node) -> bool:
    """Whether a node reads its operands with the strides that they have."""
    batched = isinstance(node, Contract) and node.batched
    return batched or isinstance(node, Attend | AttendGradient)


def as_stored(node: Node) -> Node:
    """The matrix in memory: a node without its transposition."""
    return node.operands[0] if is_transposed(node) else node


def is_pointwise(node: Node) -> bool:
    """Whether a node is elementwise, a view or a leaf: every kernel may recompute it."""
    views = Reshape | Slice | Permute | Expand
    return isinstance(node, Map | Cast | views | Const | Size | Iota | Input)


def over_rows(node: Contract) -> bool:
    """Whether a contraction sums over the rows of two activations, as a weight's gradient does."""
    return is_transposed(node.lhs) and is_transposed(node.rhs)


def gemms(nodes: Iterable[Node]) -> list[Contract]:
    """The contractions with a matrix on the right, each of which is a GEMM."""
    return [n for n in nodes if isinstance(n, Contract) and not n.batched]


def reduced(node: Reduce | Pick) -> Node:
    """The operand of a reduction or a pick; of a fold of pairs, the pairs."""
    paired = isinstance(node, Reduce) and node.value is not None
    return Map(PAIR, node.operands) if paired else node.arg


def summand(node: Reduce) -> Node:
    """The operand of a reduction, under the reshapes that flatten its axes."""
    return under_reshapes(node.arg)


def sequence_of(node: Reduce) -> Dim | None:
    """The rows that a sum over rows sums, if rows before them are sequences; None if all are."""
    many = any(d != ONE for d in node.shape[: node.axis])
    return node.arg.shape[node.axis] if many else None


def squared_deviation(x: Node, mean: Node) -> Node:
    """(x − mean)²."""
    return Map("square", (Map("sub", (x, mean)),))


def softmax(x: Node, axis: int = -1) -> Node:
    """The weights exp(x − logsumexp x)."""
    return Map("exp", (Map("sub", (x, Reduce("logsumexp", x, axis))),))


def as_defined(node: Reduce) -> Reduce:
    """A reduction that does not nest as sums: Σ exp(x − logsumexp x) v, or a variance's mean."""
    x, v, axis = node.arg, node.value, node.axis
    if v is not None:
        return Reduce("sum", Map("mul", (softmax(x, axis), v)), axis)
    square = squared_deviation(node.arg, Reduce("mean", node.arg, node.axis))
    return Reduce("mean", square, node.axis)


def is_window(node: Node, axis: int) -> bool:
    """Whether a node is some of the rows of others along an axis, or a function of such rows."""
    match node:
        case Slice() if node.axis == axis:
            return True
        case Map() | Cast() | Expand() | Slice() | Concat():
            along = [o for o in node.operands if o.rank >= -axis and o.shape[axis] != ONE]
            return all(is_window(o, axis) for o in along)
        case _:
            return False


def joins_windows(node: Node) -> bool:
    """Whether a node concatenates some rows of others, and perhaps single ones, along the rows."""
    if not isinstance(node, Concat):
        return False
    rows = [is_window(arg, node.axis) for arg in node.args]
    return any(rows) and all(
        w or arg.shape[node.axis] == ONE for w, arg in zip(rows, node.args, strict=True)
    )


def windows(joins: Iterable[Concat], above: Mapping[Node, Sequence[Node]]) -> set[Node]:
    """The rows that nothing but some concatenations along the rows reads.

    Args:
        joins: the concatenations, of windows.
        above: node -> the nodes that read it.
    """
    found: set[Node] = set()
    every = set(joins)
    stack = [(o, node.axis) for node in every for o in node.operands]
    while stack:
        one, axis = stack.pop()
        if is_window(one, axis) and one not in found:
            found.add(one)
            stack += [] if isinstance(one, Slice) else [(o, axis) for o in one.operands]
    while bad := {n for n in found if not every | found >= set(above.get(n, ()))}:
        found -= bad
    return found


def flat(node: Concat) -> list[Node]:
    """The operands of a concatenation, with nested ones of the same axis flattened."""
    found: list[Node] = []
    for arg in node.args:
        nested = isinstance(arg, Concat) and arg.axis == node.axis
        found += flat(arg) if isinstance(arg, Concat) and nested else [arg]
    return found


def stacked(node: Node) -> tuple[Input, ...]:
    """The arguments that a matrix stacks along rows, in order; () for any other node."""
    if isinstance(node, Input):
        return (node,)
    if isinstance(node, Concat) and node.rank == 2 and node.axis == -2:
        parts = [stacked(a) for a in node.args if a.dtype == node.dtype]
        return tuple(i for p in parts for i in p) if len(parts) == len(node.args) else ()
    return ()


def stacks(node: Concat) -> bool:
    """Whether a concatenation stacks contiguous parts: all axes before its own have size 1."""
    before = node.shape[: node.rank + node.axis]
    return all(d == ONE for d in before)


def pointwise_leaves(node: Node, weights: Collection[Node] = ()) -> set[Node]:
    """The arguments and nodes of `weights` that a node is a function of, element by element."""
    found: set[Node] = set()
    stack, seen = [node], set[Node]()
    while stack:
        one = stack.pop()
        if one in seen:
            continue
        seen.add(one)
        if isinstance(one, Input) or one in weights:
            found.add(one)
        elif is_pointwise(one) or isinstance(one, Concat):
            stack.extend(one.operands)
    return found


def leaves_of(node: Node, weights: Collection[Node] = ()) -> set[Node]:
    """The arguments, and nodes of `weights`, that an operation reads directly or by views."""
    known = {o for o in node.operands if o in weights}
    return known | {n for n in map(base, node.operands) if isinstance(n, Input)}


def in_order(roots: Iterable[Node]) -> list[Node]:
    """All nodes, operands before users, and all others before weights' gradients.

    Of those gradients, contractions come before sums over rows that none of them needs.
    """
    nodes = list(walk(roots))
    late: set[Node] = set()
    for node in nodes:
        sums = isinstance(node, Contract) and over_rows(node)
        after = [o for o in node.operands if isinstance(o, Reduce) and o.axis != -1]
        if sums or after or any(o in late for o in node.operands):
            late.add(node)
    wide: set[Node] = set()
    for node in nodes:
        sums = isinstance(node, Contract) and over_rows(node)
        if node in late and (sums or any(o in wide for o in node.operands)):
            wide.add(node)
    early = [n for n in nodes if n not in late]
    narrow = [n for n in nodes if n in late and n not in wide]
    needed = set(walk(o for n in wide for o in n.operands))
    before = [n for n in narrow if n in needed]
    after = [n for n in narrow if n not in needed]
    return [*early, *before, *(n for n in nodes if n in wide), *after]


def fewer_rows_first(nodes: list[Node]) -> list[Node]:
    """The same order, but for contractions with a row for each sequence, which come first.

    The GEMM of all tokens can then load what follows from them. Rows B are fewer than rows B · S.
    """
    products = [c for c in gemms(nodes) if not over_rows(c)]
    rows = {c: product(c.shape[:-1]) for c in products}
    few = [c for c in products if any(rows[c].symbols < r.symbols for r in rows.values())]
    early: set[Node] = set()
    for node in few:
        below = set(walk([node]))
        if not below & (rows.keys() - set(few)):
            early |= below
    return [n for n in nodes if n in early] + [n for n in nodes if n not in early]


def row_shapes(node: Node, mine: Dim, *, groups: bool = False) -> list[tuple[Dim, Dim]]:
    """The (rows, columns) under which a node can be seen as a matrix, those of `mine` rows first.

    A reduction has as columns the axis that it reduces; with `groups`, also several groups of it.

    Args:
        node: any node; of a reduction, the shape of its operand counts.
        mine: the number of rows of the block.
        groups: whether a row may hold several groups, each reduced alone (heads).
    """
    shape = node.operands[0].shape if isinstance(node, Reduce) else node.shape
    found: list[tuple[Dim, Dim]] = []
    for i in range(len(shape) + 1):
        rows, columns = product(shape[:i]), product(shape[i:])
        whole = not isinstance(node, Reduce) or i == len(shape) + node.axis
        grouped = groups and isinstance(node, Reduce) and node.axis == -1 and 0 < i < len(shape)
        if (whole or grouped) and rows == mine:
            found.insert(0, (rows, columns))
        elif whole and (i == len(shape) - 1 or not shape):
            found.append((rows, columns))
    return found


def row_symbols(nodes: Iterable[Node]) -> frozenset[str]:
    """The token symbols: those of rows of contractions that are never among columns.

    Batch axes count as rows, and so do the leading axes of a batched contraction's left operand. In
    a block without contractions: symbols of the leading axes of its matrices, and of indices, that
    are never among columns.
    """
    nodes = list(nodes)
    contracts = [n for n in nodes if isinstance(n, Contract)]
    if not contracts:
        return _leading_symbols(nodes)
    rows: set[str] = set()
    columns: set[str] = set()
    for node in contracts:
        if over_rows(node):
            columns |= node.shape[-1].symbols
        else:
            rows |= symbols_of(node.shape[:-1])
            columns |= symbols_of(node.rhs.shape[-2:])
    if all(map(over_rows, contracts)):
        rows = symbols_of(n.lhs.shape[-1] for n in contracts)
    return frozenset(rows - columns)


def token_symbols(nodes: Iterable[Node]) -> frozenset[str]:
    """The symbols of numbers of tokens: `row_symbols`, or where there are none, those of rows.

    In a product of all pairs, [N, D] @ [D, N], N counts rows and columns.
    """
    nodes = list(nodes)
    pairs = [n for n in gemms(nodes) if not over_rows(n)]
    return row_symbols(nodes) or frozenset(symbols_of(d for n in pairs for d in n.shape[:-1]))


def _leading_symbols(nodes: list[Node]) -> frozenset[str]:
    """The token symbols of a block without contractions."""
    tables = {base(n.table) for n in nodes if isinstance(n, Gather)}
    matrices = [n for n in nodes if isinstance(n, Input) and n.rank > 1 and n not in tables]
    indices = [i for n in nodes if isinstance(n, Gather | Put) for i in n.indices]
    indices += [n.index for n in nodes if isinstance(n, Pick)]
    lead = [m.shape[:-1] for m in matrices] + [i.shape for i in indices]
    rows = symbols_of(d for shape in lead for d in shape)
    narrow = {ONE, *map(product, lead)}  # element counts of values with one element per row
    wide = [n for n in nodes if n.rank > 1 and product(n.shape) not in narrow]
    return frozenset(rows - symbols_of(n.shape[-1] for n in wide))


def symbols_of(dims: Iterable[Dim]) -> set[str]:
    """All symbols of some sizes."""
    return {s for d in dims for s in d.symbols}


def row_axes(contracts: Iterable[Contract], inputs: Iterable[Input]) -> Dim:
    """The number of rows of a block: of its first GEMM's activation, or else of a matrix input."""
    contracts = list(contracts)
    matrices = [c.lhs for c in contracts if not over_rows(c)]
    matrices += [c.lhs.operands[0] for c in contracts if over_rows(c)]
    matrices += [i for i in inputs if i.rank > 1]
    return product(matrices[0].shape[:-1]) if matrices else ONE


def weight_nodes(nodes: list[Node], per_call: Collection[str] = ()) -> set[Node]:
    """The weights of a graph: inputs without a token dim, and functions of them alone.

    Args:
        nodes: all nodes of the graph, operands first.
        per_call: names of arguments that are new in every call, and so are no weights.
    """
    tokens = row_symbols(nodes)
    if tokens:
        free = {n for n in nodes if isinstance(n, Input) and not tokens & symbols_of(n.shape)}
    else:
        right = [n.rhs for n in gemms(nodes)]
        left = {
            i for n in nodes if isinstance(n, Contract) for o in _activations(n) for i in walk([o])
        }
        pairs = token_symbols(nodes)
        free = {n for n in walk(right) if isinstance(n, Input) and n not in left}
        free = {n for n in free if not pairs & symbols_of(n.shape[:-1])}
    free = {n for n in free if n.name not in per_call}
    found: set[Node] = set(free)
    for node in nodes:
        if isinstance(node, Iota) and not tokens & node.count.symbols:
            found.add(node)
        counts = any(isinstance(o, Size) and tokens & o.dim.symbols for o in node.operands)
        known = [o in found for o in node.operands if not isinstance(o, Const | Size)]
        grown = counts or (isinstance(node, Expand) and tokens & symbols_of(node.shape))
        if known and all(known) and not grown:
            found.add(node)
    return found


def _activations(node: Contract) -> tuple[Node, ...]:
    """The operands of a contraction that may be activations: both of a batched one."""
    return node.operands if node.batched else (node.lhs,)
