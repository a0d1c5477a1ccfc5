"""Casts that the user wrote -> explicit roundings, kept only if a wider type reads the result.

A kernel computes in float32 and rounds where it stores, so that a cast to 16 bits needs no rounding
of its own. A value that is cast down *and up again* does: h.cast(bf16).cast(f32) is h rounded to
bf16, and h minus it is the rounding error. So tracing marks each narrowing cast with a function of
its own (`cast_bf16`). When the graph is complete, a mark is kept if the value is read in a wider
type: by a cast, by arithmetic of mixed types or by a comparison, also through views and functions
that do not round. All other marks are removed, since the store rounds.

    h.cast(bf16).cast(f32)    cast(cast_bf16(cast(h, bf16)), f32)
    h.cast(bf16) @ w.T        contract(cast(h, bf16), w)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coda.ir.graph import (
    Cast,
    Concat,
    Expand,
    Gather,
    Input,
    Map,
    Node,
    Permute,
    Pick,
    Reshape,
    Slice,
    walk,
)
from coda.ir.node import origin
from coda.ir.scalars import SCALARS, cast_to
from coda.ir.types import DType, f32


def written(node: Node, dtype: DType) -> Node:
    """A node cast to `dtype` by the user; a narrowing cast is marked as a rounding."""
    found = Cast(node, dtype)
    if node.dtype.kind != "float" or dtype.kind != "float" or dtype.holds(node.dtype):
        return found
    if node.dtype.size < f32.size and not isinstance(node, Input):
        found = Cast(Map(cast_to(node.dtype), (node,)), dtype)  # rounded to its own dtype first
    return Map(cast_to(dtype), (found,))


def seen(roots: Sequence[Node]) -> tuple[Node, ...]:
    """The roots without those marked roundings that no wider type reads."""
    if not any(_is_note(n) for n in walk(roots)):
        return tuple(roots)
    plain: dict[Node, Node] = {}
    rounded: dict[Node, Node] = {}
    for node in walk(roots):
        with origin(node.where):
            if _is_note(node):
                plain[node] = plain[node.operands[0]]
            else:
                plain[node] = _on(
                    node, [(rounded if _sees(node, o) else plain)[o] for o in node.operands]
                )
            carried = _is_note(node) or _carries(node)
            rounded[node] = (
                _on(node, [rounded[o] for o in node.operands]) if carried else plain[node]
            )
    return tuple(plain[r] for r in roots)


def _is_note(node: Node) -> bool:
    return isinstance(node, Map) and SCALARS[node.fn].written


def _on(node: Node, operands: Iterable[Node]) -> Node:
    new = tuple(operands)
    same = all(a is b for a, b in zip(new, node.operands, strict=True))
    return node if same else node.with_operands(new)


def _sees(node: Node, operand: Node) -> bool:
    """Whether a node reads a float operand in a type wider than the operand's dtype."""
    if operand.dtype.kind != "float" or not isinstance(node, Map | Cast | Concat):
        return False
    return not operand.dtype.holds(node.dtype) or node.dtype.kind == "bool"


def _carries(node: Node) -> bool:
    """Whether each element is an element of an operand: a rounding commutes with the node."""
    if isinstance(node, Map):
        return SCALARS[node.fn].unrounded
    return isinstance(node, Cast | Reshape | Permute | Slice | Concat | Expand | Gather | Pick)
