"""Side conditions of laws: nodes that a law's variables are bound to -> whether it applies."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from coda.ir.dims import ONE
from coda.ir.graph import (
    Cast,
    Const,
    Contract,
    Input,
    Map,
    Node,
    Permute,
    Reduce,
    Reshape,
    Slice,
    walk,
)
from coda.ir.types import f32, has_reciprocal
from coda.ir.views import under_reshapes
from coda.lowering.algebra.roles import is_transposed_view

_depths: WeakKeyDictionary[Node, int] = WeakKeyDictionary()


def depth(node: Node) -> int:
    """The largest number of contractions on a path from the inputs to a node, itself included."""
    stack = [node]
    while stack:
        one = stack[-1]
        waiting = [o for o in one.operands if o not in _depths]
        if waiting:
            stack += waiting
        else:
            below = max((_depths[o] for o in one.operands), default=0)
            _depths[stack.pop()] = below + isinstance(one, Contract)
    return _depths[node]


def factor_comes_late(nodes: Mapping[str, Node]) -> bool:
    """Whether `r` becomes available only after the kernel that produces `x`."""
    return comes_late(nodes["r"], nodes["x"])


def comes_late(r: Node, x: Node) -> bool:
    """Whether a factor becomes available only after the kernel that produces what it multiplies.

    A factor that is an argument is available to every kernel; it moves past the sum only if no
    kernel produces `x`. One of which `x` is a function is known before `x`.
    """
    if depth(r) != depth(x):
        return depth(r) > depth(x)
    if any(n is r for n in walk([x])):
        return False
    return in_memory(x) or any(isinstance(n, Reduce) for n in walk([r]))


def both_are_computed(nodes: Mapping[str, Node]) -> bool:
    """Whether kernels of the Program write `x` and `y`, and so can write both into one buffer."""
    x, y = nodes["x"], nodes["y"]
    views = Reshape | Slice | Permute
    apart = x is not y and not any(isinstance(n, Input | views) for n in (x, y))
    return apart and has_rows(nodes) and not is_over_rows(nodes["x"], nodes["v"])


def is_over_rows(x: Node, w: Node) -> bool:
    """Whether a contraction of `x` with `w` sums over rows: both operands are transposed."""
    return isinstance(x, Permute) and isinstance(w, Permute)


def has_rows(nodes: Mapping[str, Node]) -> bool:
    """Whether `x` has more than one row."""
    return any(d != ONE for d in nodes["x"].shape[:-1])


def in_memory(node: Node) -> bool:
    """Whether a value is an argument or a view of one."""
    while isinstance(node, Reshape | Slice | Permute):
        node = node.arg
    return isinstance(node, Input)


def cancels_in_float32(nodes: Mapping[str, Node]) -> bool:
    """Whether subtracting a large mean after the sum, in float32, loses no bits that `x` has.

    A mean far larger than the deviation costs a float32 sum as many bits as it costs `x` itself. A
    16-bit `x` does not have these bits to begin with; a float32 `x` would lose them.
    """
    return nodes["x"].dtype != f32


def has_rounded(nodes: Mapping[str, Node]) -> bool:
    """Whether `x` went through a 16-bit type, whose rounding error is far above float32's.

    A float32 logsumexp of values near 10⁴ has an error of 10⁻³, and so has a difference from it;
    the maximum is exact.
    """
    stack, seen = [nodes["x"]], set[Node]()
    while stack:
        node = stack.pop()
        if node.dtype.kind == "float" and node.dtype.size < f32.size:
            return True
        if isinstance(node, Map | Cast | Reshape) and node not in seen:
            seen.add(node)
            stack.extend(node.operands)
    return False


def reciprocal_is_normal(nodes: Mapping[str, Node]) -> bool:
    """Whether `r`, if it is a constant, has a reciprocal that is normal in float32."""
    r = nodes["r"]
    return not isinstance(r, Const) or has_reciprocal(r.value)


def column_factor_comes_late(nodes: Mapping[str, Node]) -> bool:
    """Whether `w` is of a batch, and `c` available only after the kernel that produces it.

    A factor of a matrix stays with it: both are weights, or it is prepared once.
    """
    return nodes["w"].rank > 2 and comes_late(nodes["c"], nodes["w"])


def shift_cancels(nodes: Mapping[str, Node]) -> bool:
    """Whether a shift may be subtracted after the sum; for a batch, if `x` is in memory as it is.

    A matrix's sums are prepared once, those of a batch are computed anew: they cost less than `x`
    written without its shift, and more than a shift in the kernel that produces `x`.
    """
    plain = nodes["w"].rank <= 2
    return cancels_in_float32(nodes) and (plain or in_memory(nodes["x"]))


def gain_is_free(nodes: Mapping[str, Node]) -> bool:
    """Whether `g` is a vector that multiplies a matrix, or comes late for `x` of a batch."""
    x, g = nodes["x"], nodes["g"]
    if x.rank > 2:
        return comes_late(g, x)
    return g.shape[-1:] not in ((), (ONE,))


def rows_are_contiguous(nodes: Mapping[str, Node]) -> bool:
    """Whether the rows of all batches of `x` can be joined without a copy."""
    return not isinstance(under_reshapes(nodes["x"]), Permute)


def lies_straight(nodes: Mapping[str, Node]) -> bool:
    """Whether `w` is not transposed; `row_sum_exchanged_transposed` is the law for transposes."""
    return not is_transposed_view(nodes["w"])


def other_is_computed(nodes: Mapping[str, Node]) -> bool:
    """Whether `u` of a batch is computed, when `r` is known, and `x` is in memory as it is."""
    u, x = nodes["u"], nodes["x"]
    known = depth(nodes["r"]) <= depth(u)
    return u.rank > 2 and known and in_memory(x) and not in_memory(u)


def weights_are_known_late(nodes: Mapping[str, Node]) -> bool:
    """Whether no kernel knows the statistic of `x` before the kernel that has the values `v`."""
    return depth(nodes["v"]) <= depth(nodes["x"])


def are_two(nodes: Mapping[str, Node]) -> bool:
    """Whether `x` and `y` are two values: a square is spelled as one."""
    return nodes["x"] is not nodes["y"]
