"""A call's arguments -> the size of every symbol, checked against the block's declarations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coda.errors import CallError
from coda.ir.dims import show_shape
from coda.ir.graph import Graph, Input


def check_tensors(graph: Graph, inputs: Sequence[Tensor], undeclared: Sequence[bool] = ()) -> None:
    """Raise CallError if the arguments are not the tensors that the block declares.

    Checks their number, layout, rank, dtype and device. `undeclared` says for each argument whether
    it is declared without an element type: all such arguments have the dtype of the first of them.
    """
    declared = graph.inputs
    names = ", ".join(i.name for i in declared)
    if len(inputs) != len(declared):
        raise CallError(
            f"`{graph.name}` takes {len(declared)} tensors", found=str(len(inputs)), help=names
        )
    for node, tensor in zip(declared, inputs, strict=True):
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CallError(
                f"`{node.name}` has no elements in memory, side by side",
                found="a meta tensor" if tensor.is_meta else str(tensor.layout),
                help="x.to_dense(); fake tensors tell shapes (torch's FakeTensorMode)",
            )
        if tensor.ndim != node.rank:
            _refuse_rank(node, tensor)
        if tensor.dtype != node.dtype.torch:
            _refuse_type(node, tensor, [n for n, u in zip(declared, undeclared, strict=False) if u])
    devices = {t.device for t in inputs}
    if len(devices) > 1:
        raise CallError("all tensors on one device", found=", ".join(map(str, devices)))


def arrange(
    graph: Graph, tensors: Sequence[Tensor], named: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The arguments in order, where some are given by name. Raises CallError."""
    names = [i.name for i in graph.inputs]
    rest = names[len(tensors) :]
    wrong = [n for n in named if n not in rest] + [n for n in rest if n not in named]
    if wrong or len(tensors) > len(names):
        word = "is given twice" if wrong and wrong[0] in names[: len(tensors)] else "is no argument"
        word = "is missing" if wrong and wrong[0] in rest else word
        raise CallError(
            f"`{wrong[0]}` {word}" if wrong else f"`{graph.name}` takes {len(names)} tensors",
            found=", ".join([f"{len(tensors)} in order", *named]),
            help=", ".join(names),
        )
    return (*tensors, *(named[n] for n in rest))


def given_sizes(graph: Graph, dims: Mapping[str, int]) -> list[int]:
    """Sizes in the order of the graph's symbols, -1 where none is given. Raises CallError."""
    for name, size in dims.items():
        if name not in graph.symbols:
            raise CallError(
                f"`{graph.name}` has no dim `{name}`",
                found=f"dims={{{name!r}: {size}}}",
                help=", ".join(graph.symbols),
            )
        if not isinstance(size, int) or size < 0:
            raise CallError(f"dim `{name}` has a size of {size!r}", help="a size is an int ≥ 0")
    return [dims.get(s, -1) for s in graph.symbols]


def _refuse_rank(node: Input, tensor: Tensor) -> None:
    more = tensor.ndim - node.rank
    joined = f"{node.name}.flatten(0, {more}), or " if more > 0 and node.rank > 1 else ""
    raise CallError(
        f"`{node.name}` is declared {show_shape(node.shape)}",
        found=f"a tensor of shape {tuple(tensor.shape)}",
        help=f"{joined}declare the axes that it has",
    )


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
        given: sizes that the shapes do not determine (number and width of heads, for instance).

    Raises:
        CallError: if a shape does not fit, or a size is not determined.
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
        if len(missing) == 1 and dim.symbols & sizes.keys():
            raise CallError(
                f"axis {axis} of `{node.name}` is `{dim}`, and no `{missing[0]}` gives its size",
                found=f"size {size}, with {_listed(sizes)}",
                help=f"other sizes of {' and '.join(sorted(dim.symbols & sizes.keys()))}",
            )
        if missing:
            raise CallError(
                f"the size of `{missing[0]}` cannot be determined from the arguments",
                found=f"axis {axis} of `{node.name}` is `{dim}` = {size}",
                help=f"pass dims={{'{missing[0]}': …}}",
            )
        if size != dim.size(sizes):
            _refuse_size(node, axis, inputs[graph.inputs.index(node)].shape, sizes)
    return sizes


UNKNOWN = 4096  # assumed for a size that torch knows only at run time


def size_hint(size: int | torch.SymInt) -> int:
    """A number for a size that torch keeps symbolic: its value in the call that torch compiles.

    A size that is known only at run time, such as the number of rows that a mask selects, gives
    `UNKNOWN`. The number decides between Programs; no Program depends on it.
    """
    if not isinstance(size, torch.SymInt):
        return size
    from torch.fx.experimental.symbolic_shapes import optimization_hint  # imports sympy

    return optimization_hint(size, fallback=UNKNOWN)


def _refuse_size(node: Input, axis: int, found: torch.Size, sizes: Mapping[str, int]) -> None:
    expected = node.shape[axis].size(sizes)
    transposed = len(found) == 2 and found[1 - axis] == expected
    raise CallError(
        f"axis {axis} of `{node.name}` is `{node.shape[axis]}` = {expected}",
        found=f"size {found[axis]}, with {_listed(sizes)}",
        help=f"{node.name}.T has that size there" if transposed else "",
    )


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{k}={v}" for k, v in sizes.items())
