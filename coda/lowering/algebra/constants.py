"""Graph and sizes -> graph with functions of constants and choices by constants folded.

    mul (size D), 0.5        = 0.5 · D, a number once D has a size
    cast (const 14.29) bf16  = 14.29, which kernels multiply by in float32
    where (const 1), a, b    = a

The number of rows is not folded: it may change from call to call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from coda.ir.attend import Attend, AttendGradient
from coda.ir.evaluate import evaluate
from coda.ir.graph import Cast, Const, Graph, Map, Node, Size, transform, walk
from coda.ir.scalars import SCALARS
from coda.ir.types import f32
from coda.lowering.algebra.roles import row_symbols


def fold_constants(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """Replace every scalar function of constants and column sizes by its value at `sizes`."""
    return graph.with_roots(transform(graph.roots, folding(graph, sizes)))


def folding(graph: Graph, sizes: Mapping[str, int]) -> Callable[[Node], Node]:
    """A function of nodes of a graph, which folds one whose operands are folded."""
    tokens = row_symbols(walk(graph.roots))

    def is_number(node: Node) -> bool:
        return isinstance(node, Const) or (isinstance(node, Size) and not node.dim.symbols & tokens)

    def known(node: Node) -> Node:
        if isinstance(node, Cast) and isinstance(node.arg, Const):
            both = node.arg.dtype.kind == node.to.kind == "float"
            return Const(node.arg.value, node.to) if both else node
        if isinstance(node, Attend | AttendGradient):
            return node.with_scores(lambda root: transform([root], known)[0])
        if not isinstance(node, Map):
            return node
        test = node.args[0]
        if SCALARS[node.fn].chooses and isinstance(test, Const):
            chosen = node.args[1 if test.value else 2]
            same = (chosen.shape, chosen.dtype) == (node.shape, node.dtype)
            return chosen if same else node
        if not all(map(is_number, node.args)):
            return node
        narrow = node.dtype.kind == "float" and node.dtype.size < f32.size
        (value,) = evaluate([node], {}, sizes, torch.float64 if narrow else None)
        return Const(float(value), node.dtype)

    return known
