"""Nodes of a torch.fx graph of ATen operators -> a Graph of primitives.

The graph is functional (no operator writes to its arguments), before autograd and before the
decomposition of composite operators: `linear`, `layer_norm` and `scaled_dot_product_attention` are
single nodes, and there is no backward, so that coda derives its own. `torch._functorch` returns it
for `pre_dispatch=True`; `torch.export` calls it the training IR. Names and classes of layers are
not used.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node as FxNode

from coda.errors import CodaError, Reason, UnsupportedError, Where
from coda.frontend.casts import seen
from coda.frontend.tensor import Tensor
from coda.frontend.torch_import.decompose import decomposes, expanded
from coda.frontend.torch_import.heads import heads_apart
from coda.frontend.torch_import.left import why_left
from coda.frontend.torch_import.operators import RULES, VIEWS
from coda.frontend.torch_import.permutations import outward
from coda.frontend.torch_import.row_axes import canonical, with_row_symbols
from coda.frontend.torch_import.rules import Result
from coda.ir.dims import Dim
from coda.ir.graph import Contract, Gather, Graph, Input, Node, Put, Reshape, Scan, walk
from coda.ir.node import origin
from coda.ir.types import from_torch

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Imported:
    """A set of fx nodes as a Graph.

    Attributes:
        graph: always named `region`, so that equal layers give the same graph.
        inputs: the fx node of each of its arguments, in order.
        outputs: returned fx node -> (index of the graph's output, permutation of its axes that
            gives the fx node's axes).
    """

    graph: Graph
    inputs: tuple[FxNode, ...]
    outputs: dict[FxNode, tuple[int, tuple[int, ...]]]


def value_of(node: FxNode) -> Any:
    """The fake value (mostly a tensor) that torch recorded for a node."""
    return node.meta.get("val")


def dim_of(size: Any) -> Dim:
    """A torch size as a Dim. Raises UnsupportedError if it is not a polynomial of symbols."""
    if isinstance(size, torch.SymInt):
        return _polynomial(size.node.expr)
    return Dim.of(int(size))


def _polynomial(expr: Any) -> Dim:
    if isinstance(expr, sympy.Integer):
        return Dim.of(int(expr))
    if isinstance(expr, sympy.Symbol):
        return Dim.of(str(expr))
    if isinstance(expr, sympy.Add):
        return sum((_polynomial(a) for a in expr.args), Dim.of(0))
    if isinstance(expr, sympy.Mul):
        total = Dim.of(1)
        for a in expr.args:
            total = total * _polynomial(a)
        return total
    if isinstance(expr, sympy.Pow) and isinstance(expr.exp, sympy.Integer) and expr.exp > 0:
        total = Dim.of(1)
        for _ in range(int(expr.exp)):
            total = total * _polynomial(expr.base)
        return total
    raise UnsupportedError("a size that is no polynomial", found=str(expr))


def result_of(value: Any) -> Result:
    """Shape and dtype of a fake tensor. Raises UnsupportedError for dtypes coda does not have."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor):
        raise UnsupportedError("a value that is no tensor", found=type(value).__name__)
    dtype = from_torch(value.dtype)
    if (
        dtype is None
        or value.layout != torch.strided
        or (dtype.size == 1 and dtype.kind == "float")
    ):
        raise UnsupportedError(f"tensors of {value.dtype}, {value.layout}")
    if dtype.torch == torch.float64:
        raise UnsupportedError("float64 is torch's")
    return Result(tuple(dim_of(s) for s in value.shape), dtype)


SAYABLE = "operators that the language has (docs/language.md)"
LEFT = "nothing: it is one of the operators that stay torch's (docs/models.md)"
RULE = "a rule for the operator (CONTRIBUTING.md), if a kernel can compute it"


def place_of(node: FxNode) -> Where | None:
    """The user's line that an fx node was traced from."""
    found = _FRAME.findall(node.meta.get("stack_trace") or "")
    return Where(found[-1][0], int(found[-1][1])) if found else None


def apply_rule(node: FxNode, values: Callable[[FxNode], Any]) -> Any:
    """Translate one fx node to primitives.

    Args:
        node: a call of an ATen operator, or of `getitem` on a list of results.
        values: operand -> its translation, a `Tensor` or a list of them.

    Raises:
        CodaError: if no rule supports it.
    """
    args: Any = torch.fx.map_arg(node.args, values)
    options: Any = torch.fx.map_arg(node.kwargs, values)
    if node.target is operator.getitem:
        return args[0][args[1]]
    if node.target not in RULES:
        if why := why_left(node.target):
            raise UnsupportedError(why, help=LEFT)
        if not decomposes(node.target):
            raise UnsupportedError(f"coda has no rule for {node.target}", help=RULE)
    result = result_of(value_of(node))
    if node.target in RULES:
        found = RULES[node.target](result, *args, **options)
    else:
        found = expanded(node, apply_rule, values)
    for tensor in found if isinstance(found, list) else [found]:
        tensors = tensor if isinstance(found, list) else None
        if tensors is None and (tensor.shape, tensor.dtype) != (result.shape, result.dtype):
            raise UnsupportedError(
                f"{node.target} gives another shape or type",
                found=f"{tensor} for {result.shape}, {result.dtype}",
            )
    return found


def why_not(node: FxNode) -> str:
    """Why coda leaves a node to torch (a `Reason` if something would help); "" if a rule supports
    it.
    """
    return meaning(node)[1]


def meaning(node: FxNode) -> tuple[list[Node], str]:
    """(its nodes of coda, operands first; the reason that coda leaves it to torch, or "")."""
    if node.op != "call_function":
        return [], f"a {node.op}"
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, FxNode)
        listed = isinstance(value_of(source), tuple | list)
        mine = listed and not why_not(source)
        part = Reason("a part of a value that is torch's", "what the value takes")
        return [], "" if mine else part
    try:
        with origin(place_of(node)):
            found = apply_rule(node, lambda n: _argument(n, n.name))
    except CodaError as e:
        return [], Reason(e.message, e.help or SAYABLE)
    except (TypeError, AttributeError, IndexError):
        return [], Reason(f"coda has no rule for these arguments of {node.target}", RULE)
    return [*walk([t.node for t in (found if isinstance(found, list) else [found])])], ""


def products_of_batches(nodes: Iterable[Node]) -> list[Contract]:
    """The products of two batches of matrices."""
    return [n for n in nodes if isinstance(n, Contract) and n.batched]


def moves_rows(nodes: Iterable[Node]) -> bool:
    """Whether some nodes read or add rows at indices, or sum along an axis.

    A block may have such operations; no kernel computes them.
    """
    return any(isinstance(n, Gather | Put | Scan) for n in nodes)


def _argument(node: FxNode, name: str) -> Any:
    value = value_of(node)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | None):
        return value
    found = result_of(value)
    return Tensor(Input(name, found.shape, found.dtype))


def with_fewer_axes(node: FxNode) -> FxNode:
    """The base of a view that only adds axes of size 1, else the node itself.

    Each layer of a model adds such axes to the same RoPE table. With the table itself as the
    argument of all their blocks, its packed form is made once, for the first layer.
    """
    while node.op == "call_function" and node.target in VIEWS:
        source = node.args[0]
        if not isinstance(source, FxNode) or not isinstance(value_of(source), torch.Tensor):
            break
        before, after = value_of(source).shape, value_of(node).shape
        if len(after) <= len(before) or _wide(before) != _wide(after):
            break
        node = source
    return node


def _wide(shape: Iterable[Any]) -> list[Any]:
    return [d for d in shape if not (isinstance(d, int) and d == 1)]


def import_nodes(
    nodes: Sequence[FxNode], returned: Iterable[FxNode], is_weight: Callable[[FxNode], bool]
) -> Imported:
    """Translate nodes of an fx graph to one Graph of primitives.

    Args:
        nodes: calls with an empty `why_not`, in graph order.
        returned: those that are read outside.
        is_weight: whether an outside operand is a parameter; it affects only argument names.

    Raises:
        CodaError: if shapes or dtypes of the translated nodes do not match.
    """
    inside = set(nodes)
    values: dict[FxNode, Any] = {}
    inputs: list[FxNode] = []

    def value(node: FxNode) -> Any:
        source = with_fewer_axes(node)
        if node not in values and source is not node:
            shape = result_of(value_of(node)).shape
            values[node] = Tensor(Reshape(value(source).node, shape))
        elif node not in values:
            number = sum(is_weight(i) == is_weight(node) for i in inputs)
            found = _argument(node, f"{'w' if is_weight(node) else 'x'}{number}")
            if not isinstance(found, Tensor):
                return found
            values[node] = found
            inputs.append(node)
        return values[node]

    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in inside:
                value(operand)
        with origin(place_of(node)):
            values[node] = apply_rule(node, value)
    arguments = tuple(values[n].node for n in inputs)
    wanted = {n: values[n].node for n in returned}
    wanted = dict(zip(wanted, seen(list(wanted.values())), strict=True))
    return _finish(arguments, tuple(inputs), wanted)


def _finish(
    arguments: tuple[Input, ...], inputs: tuple[FxNode, ...], wanted: Mapping[FxNode, Node]
) -> Imported:
    """Move permutations to the outputs, name rows, and return equal outputs once."""
    found = outward(wanted.values())
    apart = heads_apart([n for n, _ in found])
    ordered = dict(zip(wanted, zip(apart, [o for _, o in found], strict=True), strict=True))
    distinct = list(dict.fromkeys(n for n, _ in ordered.values()))
    names = ["out"] if len(distinct) == 1 else [f"out{i}" for i in range(len(distinct))]
    graph = Graph("region", arguments, tuple(zip(names, distinct, strict=True)))
    places = {n: (distinct.index(node), order) for n, (node, order) in ordered.items()}
    return Imported(canonical(with_row_symbols(graph)), inputs, places)
