"""Check a graph after a pass: types follow from operands, nodes are interned, names unique."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from coda.errors import CodaError, InternalError
from coda.ir.dims import Shape, show_shape
from coda.ir.graph import Graph, Input, Node, walk
from coda.ir.node import is_interned
from coda.ir.text import show_operation
from coda.ir.types import DType


def verify(graph: Graph, after: str) -> None:
    """Raise InternalError, which names the pass `after`, if the graph is not well formed."""
    known = set(graph.inputs)
    for node in walk(graph.roots):
        if isinstance(node, Input) and node not in known:
            _fail(after, node, f"the input `{node.name}` is not an argument of the block")
    verify_nodes(walk(graph.roots), after)
    for what, names in (
        ("arguments", [i.name for i in graph.inputs]),
        ("outputs", [name for name, _ in graph.outputs]),
    ):
        if len(set(names)) != len(names):
            raise InternalError(f"after `{after}`: two {what} of `{graph.name}` share a name")


def verify_nodes(nodes: Iterable[Node], after: str) -> None:
    """Raise InternalError for a node that is not interned, or whose type is not as inferred."""
    for node in nodes:
        if not is_interned(node):
            _fail(after, node, "another node means the same")
        if _infer(node, after) != (node.shape, node.dtype):
            _fail(after, node, "its shape and element type do not follow from its operands")


def _infer(node: Node, after: str) -> tuple[Shape, DType]:
    try:
        return node.infer()
    except CodaError as e:
        _fail(after, node, f"{e.message}: {e.found}")


def _fail(after: str, node: Node, why: str) -> NoReturn:
    names = {o: f"%{i}: {show_shape(o.shape)} {o.dtype}" for i, o in enumerate(node.operands)}
    raise InternalError(
        f"after `{after}`: {why}",
        found=show_operation(node, names) + f" : {show_shape(node.shape)} {node.dtype}",
        help="this is a fault of coda, not of the block: please report it",
        where=node.where,
    ) from None
