"""Cotangents of the slices of a node -> summands of the node's cotangent.

Slices that tile an axis, as those of `coda.split`, or that take turns along it, as x[::2] and
x[1::2], are concatenated, without a sum. Any other is padded with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

from coda.ir.dims import ONE, Dim, Shape
from coda.ir.graph import Concat, Const, Expand, Node, Reshape, Slice
from coda.ir.types import DType


def joined(node: Node, parts: Sequence[tuple[Slice, Node]]) -> list[Node]:
    """Cotangents of slices -> summands of the whole's, concatenated where slices tile an axis."""
    left = list(parts)
    out: list[Node] = []
    for axis in sorted({s.axis for s, _ in parts}):
        mine = [(s, d) for s, d in left if s.axis == axis]
        for chosen in (_tiles(node.shape[axis], mine), _strides(node.shape[axis], mine)):
            if chosen:
                left = [p for p in left if p not in chosen]
                ds = [d for _, d in chosen]
                step = chosen[0][0].step
                whole = Concat(tuple(ds), axis) if step == 1 else _interleaved(ds, axis)
                out.append(whole)
    return out + [_padded(node, s, d) for s, d in left]


def _tiles(size: Dim, parts: list[tuple[Slice, Node]]) -> list[tuple[Slice, Node]]:
    """Adjacent slices of step 1 that cover the axis, in order; [] if there are none."""
    at = Dim.of(0)
    chosen: list[tuple[Slice, Node]] = []
    while at != size:
        here = [p for p in parts if p[0].step == 1 and p[0].start == at and p[0].size != size]
        if not here:
            return []
        chosen.append(here[0])
        at = at + here[0][0].size
    return chosen


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
    axis, span = part.axis, part.size
    if part.step > 1:
        zero = _zeros(d.shape, d.dtype)
        d = _interleaved([d] + [zero] * (part.step - 1), axis)
        span = (part.size - 1) * part.step + 1
        d = Slice(d, axis, Dim.of(0), span, 1)
    shape = list(node.shape)
    pieces: list[Node] = [d]
    for size, front in ((part.start, True), (node.shape[axis] - part.start - span, False)):
        if size.constant == 0:
            continue
        shape[axis] = size
        zero = _zeros(tuple(shape), d.dtype)
        pieces = [zero, *pieces] if front else [*pieces, zero]
    return Concat(tuple(pieces), axis) if len(pieces) > 1 else d


def _zeros(shape: Shape, dtype: DType) -> Node:
    return Expand(Const(0.0, dtype), shape)
