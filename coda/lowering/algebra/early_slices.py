"""Graph -> graph in which slices of columns that are combined are taken before what precedes them.

    y = x wᵀ · r + b;  silu(y[:, ::2]) · y[:, 1::2]
      ->  z = x wᵀ;  silu(z[:, ::2] · r + b[::2]) · (z[:, 1::2] · r + b[1::2])

In the derivative, sums over columns and rows then are those of each slice, as for gate and up of
two weights, and only the cotangent of the contraction is put together of both. A slice of an axis
that a reshape has made of columns is first spelled as a slice of the columns.
"""

from __future__ import annotations

from collections.abc import Mapping

from coda.ir.dims import ONE, product
from coda.ir.graph import Cast, Contract, Graph, Map, Node, Reshape, Slice, transform, users, walk
from coda.ir.node import origin
from coda.lowering.algebra.roles import is_pointwise


def slice_columns_first(graph: Graph) -> Graph:
    """Take slices of columns that an elementwise operation combines as early as possible."""
    graph = graph.with_roots(transform(graph.roots, _of_columns))
    above = users(graph.roots)
    pushed = _combined(graph)
    returned = set(graph.roots)

    def change(node: Node) -> Node:
        if isinstance(node, Slice) and node.arg in pushed and _is_sliced(node.arg, above, returned):
            return _sliced(node.arg, node)
        return node

    return graph.with_roots(transform(graph.roots, change))


def _of_columns(node: Node) -> Node:
    """[..., F · n] as [..., F, n], of which column i is taken -> every n-th column from i on.

    Of [..., n, F] it is columns i · F up to (i + 1) · F.
    """
    cut = node.arg if isinstance(node, Reshape) else None
    if not isinstance(cut, Slice) or cut.size != ONE or not isinstance(cut.arg, Reshape):
        return node
    whole, under, axis = cut.arg, cut.arg.arg, cut.axis
    if not -axis <= 2 <= whole.rank:
        return node
    kept, (groups, width) = whole.shape[:-2], whole.shape[-2:]
    count, other = (groups, width) if axis == -2 else (width, groups)
    fits = under.shape == (*kept, groups * width) and node.shape == (*kept, other)
    if not fits or count.constant is None:
        return node
    with origin(node.where):
        if axis == -1:
            return Slice(under, -1, cut.start, other, count.constant)
        return Slice(under, -1, cut.start * other, other, 1)


def _combined(graph: Graph) -> set[Node]:
    """Functions of one contraction of which an elementwise operation combines slices of columns."""
    reach: dict[Node, frozenset[Slice]] = {}
    found: set[Node] = set()
    for node in walk(graph.roots):
        if isinstance(node, Slice) and node.axis == -1 and _source(node.arg) is not None:
            reach[node] = frozenset({node})
        elif is_pointwise(node):
            reach[node] = frozenset[Slice]().union(*(reach.get(o, ()) for o in node.operands))
            sliced = [s.arg for s in reach[node]] if isinstance(node, Map) else []
            found |= {arg for arg in sliced if sliced.count(arg) > 1}
    return found


def _source(node: Node) -> Contract | None:
    """The contraction of which alone a node is an elementwise function; None if there is none.

    Other operands are numbers, vectors along the columns, and factors of rows.
    """
    while isinstance(node, Map | Cast):
        wide = [o for o in node.operands if o.shape == node.shape]
        rest = [o for o in node.operands if o.shape != node.shape]
        narrow = all(not o.rank or o.shape[-1] == ONE or product(o.shape[:-1]) == ONE for o in rest)
        if len(wide) != 1 or not narrow:
            return None
        node = wide[0]
    return node if isinstance(node, Contract) else None


def _is_sliced(node: Node, above: Mapping[Node, list[Node]], returned: set[Node]) -> bool:
    """Whether nothing but slices of columns, each once, reads a function of a contraction."""
    cuts = [c for c in above[node] if isinstance(c, Slice) and c.axis == -1]
    alike = all(c.step == cuts[0].step for c in cuts)
    return node not in returned and len(cuts) == len(above[node]) and alike


def _sliced(node: Node, cut: Slice) -> Node:
    """f(x, r)[:, columns] -> f(x[:, columns], r)."""
    if not isinstance(node, Map | Cast):
        return Slice(node, cut.axis, cut.start, cut.size, cut.step)
    with origin(node.where):
        wide = [o.rank > 0 and o.shape[-1] == node.shape[-1] != ONE for o in node.operands]
        pairs = zip(node.operands, wide, strict=True)
        return node.with_operands([_sliced(o, cut) if w else o for o, w in pairs])
