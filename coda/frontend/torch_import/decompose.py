"""Operators that torch decomposes into others -> the primitives of these.

    addcdiv(x, a, b, value=2)    ->    d = div(a, b);  m = mul(d, 2);  add(x, m)

A decomposition is traced on the fake tensors that torch recorded for the operands, once for each
fx node, and each of its nodes is translated as a node of the graph is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from coda.errors import UnsupportedError

aten = torch.ops.aten
Values = Callable[[FxNode], Any]
KEY = "coda_decomposition"  # in an fx node's meta: its decomposition, freed with the node
# Those whose decompositions give torch's values and derivatives, also at their edges.
DECOMPOSED: frozenset[Any] = frozenset(
    (
        aten.addcdiv.default, aten.addmv.default, aten.mv.default, aten.deg2rad.default,
        aten.rad2deg.default, aten.lerp.Tensor, aten.special_ndtr.default,
        aten.hardshrink.default, aten.softshrink.default, aten.threshold.default,
        aten.mse_loss.default, aten.logaddexp2.default,
        aten.isposinf.default, aten.isneginf.default, aten.ldexp.Tensor, aten.dot.default,
        aten.vdot.default, aten.addr.default, aten.dist.default, aten.rot90.default,
        aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default,
        aten.narrow_copy.default, aten.take.default,
        aten.binary_cross_entropy_with_logits.default,
    )
)  # fmt: skip


def decomposes(target: Any) -> bool:
    """Whether a call of an operator is translated by its decomposition.

    What torch calls composite is nothing but its decomposition, by which torch itself computes and
    differentiates it.
    """
    if target in DECOMPOSED:
        return True
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)


def expanded(node: FxNode, translate: Callable[[FxNode, Values], Any], values: Values) -> Any:
    """Translate the decomposition of a call of an operator that `decomposes`.

    Args:
        node: the call.
        translate: the importer's `apply_rule`, for a node of the decomposition.
        values: operand of the call -> its translation.

    Raises:
        UnsupportedError: if torch cannot trace it, or it has a constant tensor.
    """
    operands = iter(_tensors(node))
    known: dict[FxNode, Any] = {}
    for one in _traced(node).graph.nodes:
        match one.op:
            case "placeholder":
                known[one] = values(next(operands))
            case "output":
                return torch.fx.map_arg(one.args[0], known.__getitem__)
            case "call_function" if isinstance(one.meta.get("val"), torch.Tensor | tuple | list):
                known[one] = translate(one, known.__getitem__)
            case "call_function":
                known[one] = one.meta.get("val")  # a size
            case _:
                raise UnsupportedError(f"a constant in the decomposition of {node.target}")
    raise AssertionError(node)


def _tensors(node: FxNode) -> Iterator[FxNode]:
    return (n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor))


def _traced(node: FxNode) -> GraphModule:
    if KEY not in node.meta:
        node.meta[KEY] = _trace(node)
    return node.meta[KEY]


def _trace(node: FxNode) -> GraphModule:
    # Both import torch's compiler, which takes seconds.
    from torch._decomp import decomposition_table
    from torch.fx.experimental.proxy_tensor import make_fx

    target: Any = node.target
    listed = target in DECOMPOSED
    fn = decomposition_table[target] if listed else target
    operands = list(_tensors(node))

    def call(*tensors: Any) -> Any:
        known = dict(zip(operands, tensors, strict=True))

        def value(operand: FxNode) -> Any:
            return known[operand] if operand in known else operand.meta.get("val")

        args, options = torch.fx.map_arg((node.args, dict(node.kwargs)), value)
        return fn(*args, **options)

    try:
        with torch.no_grad():
            traced = make_fx(call, tracing_mode="symbolic", pre_dispatch=listed)
            found = traced(*(n.meta["val"] for n in operands))
    except (RuntimeError, TypeError, ValueError) as e:  # torch's own tracer
        raise UnsupportedError(f"torch does not trace the decomposition of {target}") from e
    found.graph.eliminate_dead_code()
    if any(n.target is target for n in found.graph.nodes):
        raise UnsupportedError(f"the decomposition of {target} calls it again")
    return found
