"""Casts that the user wrote -> the roundings among them that a wider type sees.

A kernel computes in float32 and rounds where it stores, so that a cast to 16 bits alone costs
nothing. A value that is cast down *and up again* is another matter: h.cast(bf16).cast(f32) is what
bf16 has room for of h, and h less it is what is left. So each cast down is noted as a function of
its own (`cast_bf16`), and when the graph is complete the note stays where a type sees the value
that holds more than the cast's: behind a cast, in arithmetic of several types, in a comparison;
through views and functions that do not round. Elsewhere the note goes, for a store rounds anyway.

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
    origin,
    walk,
)
from coda.ir.scalars import SCALARS, cast_to
from coda.ir.types import DType, f32


def written(node: Node, dtype: DType) -> Node:
    """A node in another element type, by a cast that the user wrote."""
    found = Cast(node, dtype)
    if node.dtype.kind != "float" or dtype.kind != "float" or dtype.holds(node.dtype):
        return found
    if node.dtype.size < f32.size and not isinstance(node, Input):
        found = Cast(Map(cast_to(node.dtype), (node,)), dtype)  # it is a value of its own type
    return Map(cast_to(dtype), (found,))


def seen(roots: Sequence[Node]) -> tuple[Node, ...]:
    """Roots with the roundings that a wider type sees, and no others."""
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
    """Whether a node reads a value in a type that holds more than the value's own."""
    if operand.dtype.kind != "float" or not isinstance(node, Map | Cast | Concat):
        return False
    return not operand.dtype.holds(node.dtype) or node.dtype.kind == "bool"


def _carries(node: Node) -> bool:
    """Whether a node's elements are elements of its operands: roundings come before or after."""
    if isinstance(node, Map):
        return SCALARS[node.fn].unrounded
    return isinstance(node, Cast | Reshape | Permute | Slice | Concat | Expand | Gather | Pick)
