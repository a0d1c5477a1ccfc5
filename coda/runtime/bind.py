"""Arguments of a call -> the size of every symbol, checked against what the block declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from coda.errors import CallError
from coda.ir.dims import show_shape
from coda.ir.graph import Graph, Input


def check_tensors(graph: Graph, inputs: Sequence[Tensor], undeclared: Sequence[bool] = ()) -> None:
    """Raise CallError where the arguments are not the tensors that the block declares.

    `undeclared` tells which of them are declared without an element type: they have that of the
    first of them.
    """
    declared = graph.inputs
    names = ", ".join(i.name for i in declared)
    if len(inputs) != len(declared):
        raise CallError(
            f"`{graph.name}` takes {len(declared)} tensors", found=str(len(inputs)), help=names
        )
    for node, tensor in zip(declared, inputs, strict=True):
        if tensor.ndim != node.rank:
            raise CallError(
                f"`{node.name}` is {show_shape(node.shape)}", found=str(tuple(tensor.shape))
            )
        if tensor.dtype != node.dtype.torch:
            _refuse_type(node, tensor, [n for n, u in zip(declared, undeclared, strict=False) if u])
    devices = {t.device for t in inputs}
    if len(devices) > 1:
        raise CallError("all tensors lie on one device", found=", ".join(map(str, devices)))


def _refuse_type(node: Input, tensor: Tensor, undeclared: Sequence[Input]) -> None:
    if node in undeclared:
        raise CallError(
            f"`{node.name}` is {node.dtype} as `{undeclared[0].name}` is",
            found=str(tensor.dtype),
            help=f"{node.name}.to({node.dtype.torch}), or call under torch.autocast",
        )
    raise CallError(
        f"`{node.name}` is declared {node.dtype}",
        found=str(tensor.dtype),
        help=f"{node.name}.to({node.dtype.torch}), or declare it otherwise",
    )


def bind_sizes(
    graph: Graph, inputs: Sequence[Tensor], given: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The size of every symbol, from the shapes of the arguments.

    Args:
        graph: the block.
        inputs: its arguments in order.
        given: sizes that the shapes alone do not tell (heads and their width, say).

    Raises:
        CallError: where a shape does not fit, or a size cannot be told.
    """
    facts = [
        (node, axis, dim, size)
        for node, tensor in zip(graph.inputs, inputs, strict=True)
        for axis, (dim, size) in enumerate(zip(node.shape, tensor.shape, strict=True))
    ]
    sizes: dict[str, int] = dict(given or {})
    progress = True
    while progress:
        progress = False
        for _, _, dim, size in facts:
            solved = dim.solve(size, sizes)
            if solved is not None:
                sizes[solved[0]] = solved[1]
                progress = True
    for node, axis, dim, size in facts:
        missing = sorted(dim.symbols - sizes.keys())
        if missing:
            raise CallError(
                f"the size of `{missing[0]}` cannot be told from the arguments",
                found=f"axis {axis} of `{node.name}` is `{dim}` = {size}",
                help=f"pass dims={{'{missing[0]}': …}}",
            )
        _check(node, axis, size, dim.size(sizes), sizes)
    return sizes


def _check(node: Input, axis: int, found: int, expected: int, sizes: Mapping[str, int]) -> None:
    if found != expected:
        raise CallError(
            f"axis {axis} of `{node.name}` is `{node.shape[axis]}` = {expected}",
            found=f"size {found}",
            help=", ".join(f"{k}={v}" for k, v in sizes.items()),
        )
