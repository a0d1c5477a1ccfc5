"""Reshapes of a node, made only where they change its shape, and seen through."""

from __future__ import annotations

from coda.ir.dims import ONE, Shape
from coda.ir.graph import Node, Reshape


def shaped(node: Node, shape: Shape) -> Node:
    """A node in a shape of as many elements."""
    return node if node.shape == shape else Reshape(node, shape)


def is_squeeze(node: Reshape) -> bool:
    """Whether a reshape adds and removes axes of size 1 alone."""
    before, after = ([d for d in n.shape if d != ONE] for n in (node.arg, node))
    return before == after


def under_reshapes(node: Node) -> Node:
    """The node under some reshapes; a node that is none itself."""
    while isinstance(node, Reshape):
        node = node.arg
    return node
