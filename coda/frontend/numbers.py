"""Numbers and dims among the operands of a function -> nodes of the others' element type.

x * 0.5     with x of bf16:  const 0.5 bf16
x / D       with a dim D:    size D bf16
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coda.errors import DtypeError
from coda.frontend.refused import foreign
from coda.ir.dims import Dim
from coda.ir.graph import Const, Map, Node, Size, walk
from coda.ir.scalars import SCALARS
from coda.ir.types import DType


def lift(value: Any, like: DType) -> Node:
    """The node of an operand: a node, a number or a dim; numbers get the element type `like`.

    Raises DtypeError for a fraction among whole numbers, TraceError for any other value.
    """
    if isinstance(value, Node):
        return _retyped(value, like) if is_number(value) else value
    if isinstance(value, Dim):
        return Size(Dim.of(value), like)
    if isinstance(value, bool | int | float | np.floating | np.integer):
        if like.kind == "int" and not float(value).is_integer():
            raise DtypeError(
                "a number with a fraction meets whole numbers",
                found=f"{value} and {like}",
                help="x.cast(coda.f32)",
            )
        return Const(float(value), like)
    raise foreign(value)


def is_number(node: Node) -> bool:
    """Whether a 0-d value is computed of numbers and dims only: it adopts the others' dtype."""
    return not node.rank and all(isinstance(n, Const | Size | Map) for n in walk([node]))


def _retyped(node: Node, like: DType) -> Node:
    """Rebuild an expression of numbers in another float type; ints are unchanged."""
    if like.kind != "float" or node.dtype.kind != "float":
        return node
    match node:
        case Const(value=value):
            return Const(value, like)
        case Size(dim=dim):
            return Size(dim, like)
    return node.with_operands(_retyped(o, like) for o in node.operands)


def rounded(node: Node) -> Node:
    """Round a number to its dtype, since torch compares in the dtype of the tensor."""
    if isinstance(node, Const):
        return Const(node.dtype.nearest(node.value), node.dtype)
    name = f"rounded_{node.dtype.name}"
    return Map(name, (node,)) if name in SCALARS else node
