"""Cotangents of the slices of a node -> summands of the node's cotangent.

Slices that do not overlap, as those of `coda.split`, or that take turns along an axis, as x[::2]
and x[1::2], are concatenated, without a sum, and zeros fill what no slice reads:

    a, _, c = split(x, 3)    dx = concat(da, 0, dc)

Any other is padded with zeros by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from coda.ir.dims import ONE, Dim, Shape
from coda.ir.graph import Concat, Const, Expand, Node, Reshape, Slice
from coda.ir.types import DType


def joined(node: Node, parts: Sequence[tuple[Slice, Node]]) -> list[Node]:
    """Cotangents of slices -> summands of the whole's, concatenated where slices are apart."""
    left = list(parts)
    out: list[Node] = []
    for axis in sorted({s.axis for s, _ in parts}):
        mine = [(s, d) for s, d in left if s.axis == axis]
        if len(chosen := _apart(node.shape[axis], mine)) > 1:
            left = [p for p in left if p not in chosen]
            out.append(_filled(node, axis, chosen))
        if chosen := _strides(node.shape[axis], mine):
            left = [p for p in left if p not in chosen]
            out.append(_interleaved([d for _, d in chosen], axis))
    return out + [_padded(node, s, d) for s, d in left]


def _apart(size: Dim, parts: list[tuple[Slice, Node]]) -> list[tuple[Slice, Node]]:
    """Slices of step 1 that do not overlap at any sizes, in order along an axis."""
    left = [p for p in parts if p[0].step == 1 and p[0].size != size]
    at, chosen = Dim.of(0), list[tuple[Slice, Node]]()
    while left := [p for p in left if (p[0].start - at).is_natural]:
        first = [p for p in left if all((o.start - p[0].start).is_natural for o, _ in left)]
        if not first:
            break
        chosen.append(first[0])
        left.remove(first[0])
        at = first[0][0].start + first[0][0].size
    return chosen


def _filled(node: Node, axis: int, parts: Sequence[tuple[Slice, Node]]) -> Node:
    """Cotangents of slices that are apart, concatenated with zeros before, between and after."""
    at, pieces = Dim.of(0), list[Node]()
    for part, d in parts:
        pieces += _gap(node, axis, part.start - at, d.dtype)
        pieces.append(d)
        at = part.start + part.size
    pieces += _gap(node, axis, node.shape[axis] - at, parts[0][1].dtype)
    return Concat(tuple(pieces), axis) if len(pieces) > 1 else pieces[0]


def _gap(node: Node, axis: int, size: Dim, dtype: DType) -> list[Node]:
    """Zeros of a node's shape but for one axis; none for a size of 0."""
    shape = list(node.shape)
    shape[axis] = size
    return [_zeros(tuple(shape), dtype)] if size.constant != 0 else []


def _strides(size: Dim, parts: list[tuple[Slice, Node]]) -> list[tuple[Slice, Node]]:
    """Interleaved slices x[i::step] that cover the axis, in order; [] if there are none."""
    for step in {s.step for s, _ in parts if s.step > 1}:
        turns = {s.start.constant: (s, d) for s, d in parts if s.step == step}
        whole = all(s.size * step == size for s, _ in turns.values())
        if whole and set(turns) == set(range(step)):
            return [turns[i] for i in range(step)]
    return []


def _interleaved(parts: Sequence[Node], axis: int) -> Node:
    """Interleave parts along an axis: a0 b0 a1 b1 ..."""
    shape = parts[0].shape
    at = len(shape) + axis + 1
    stacked = [Reshape(p, (*shape[:at], ONE, *shape[at:])) for p in parts]
    size = shape[axis] * len(parts)
    return Reshape(Concat(tuple(stacked), axis), (*shape[: at - 1], size, *shape[at:]))


def _padded(node: Node, part: Slice, d: Node) -> Node:
    """The cotangent of one slice, padded with zeros to the shape of `node`."""
    if part.step > 1:
        zero, span = _zeros(d.shape, d.dtype), (part.size - 1) * part.step + 1
        d = _interleaved([d] + [zero] * (part.step - 1), part.axis)
        d = Slice(d, part.axis, Dim.of(0), span, 1)
        part = Slice(part.arg, part.axis, part.start, span, 1)
    return _filled(node, part.axis, [(part, d)])


def _zeros(shape: Shape, dtype: DType) -> Node:
    return Expand(Const(0.0, dtype), shape)
