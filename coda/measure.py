"""A block and its arguments -> relative errors against float64, of coda and of torch op by op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from coda.block import Block
from coda.errors import CallError
from coda.ir.evaluate import evaluate
from coda.ir.graph import Contract, Graph, Input, Node, walk
from coda.lowering.algebra.training import differentiated
from coda.lowering.compiler import check_dims
from coda.runtime.bind import bind_sizes
from coda.runtime.call import choose_backend


def random_inputs(graph: Graph, dims: Mapping[str, int], seed: int = 0) -> list[Tensor]:
    """Random arguments on the CPU, in the declared shapes and dtypes.

    Activations are normal, weights are scaled by 1/sqrt(K), vectors are near 1, and integers are in
    [0, smallest size). Raises DimError for missing or wrong sizes.
    """
    sizes = check_dims(graph, dims)
    generator = torch.Generator().manual_seed(seed)
    weights = {n.rhs for n in walk(graph.roots) if isinstance(n, Contract)}
    found: list[Tensor] = []
    for node in graph.inputs:
        shape = [d.size(sizes) for d in node.shape]
        if node.dtype.kind != "float":
            high = 2 if node.dtype.kind == "bool" else max(2, min(sizes.values(), default=2))
            whole = torch.randint(0, high, shape, generator=generator)
            found.append(whole.to(node.dtype.torch))
            continue
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if node in weights:
            x = x / max(shape[-1], 1) ** 0.5
        elif node.rank == 1:
            x = 1 + 0.1 * x
        found.append(x.to(node.dtype.torch))
    return found


def load_inputs(graph: Graph, path: Path) -> list[Tensor]:
    """Load arguments by name from a .safetensors or .npz file, in the declared dtypes.

    Raises:
        CallError: if the file is missing or of another format, lacks an argument, or has one whose
            conversion would lose information (complex numbers, or floats for integers).
    """
    try:
        if not path.is_file():
            raise CallError("there is no such file", found=str(path))
        if path.suffix not in (".safetensors", ".npz"):
            raise CallError("arguments come from .safetensors or .npz", found=path.name)
        tensors = _read_arrays(path)
    except CallError:
        raise
    except Exception as e:  # numpy, zipfile, pickle and safetensors raise different classes
        raise CallError(
            f"{path.name} cannot be read",
            found=f"{type(e).__name__}: {e}",
            help="arrays of numbers, saved by numpy.savez or safetensors.torch.save_file",
        ) from e
    missing = [i.name for i in graph.inputs if i.name not in tensors]
    if missing:
        raise CallError(f"`{missing[0]}` is not in {path.name}", found=", ".join(tensors))
    return [_as_declared(i, tensors[i.name]) for i in graph.inputs]


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found = np.load(path, allow_pickle=False)
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise TypeError("one array without a name")
    with found as arrays:
        return {k: torch.from_numpy(np.ascontiguousarray(arrays[k])) for k in arrays.files}


def _as_declared(node: Input, tensor: Tensor) -> Tensor:
    """Cast a tensor to an argument's dtype. Raises CallError if that loses information."""
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    if tensor.is_complex() or (node.dtype.kind != "float" and not whole):
        raise CallError(
            f"`{node.name}` is declared {node.dtype}",
            found=str(tensor.dtype).removeprefix("torch."),
            help="save real numbers, and whole ones for an index",
        )
    return tensor.to(node.dtype.torch)


@dataclass(frozen=True)
class Error:
    """‖y − y64‖ / ‖y64‖ of one output, for coda and for torch op by op in the storage dtypes."""

    output: str
    shape: tuple[int, ...]
    coda: float
    torch: float


@dataclass(frozen=True)
class ErrorReport:
    """Errors of all outputs of a block, as `coda run` prints them."""

    block: str
    sizes: dict[str, int]
    backend: str
    errors: tuple[Error, ...]

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "block": self.block,
            "dims": self.sizes,
            "backend": self.backend,
            "outputs": [vars(e) for e in self.errors],
        }

    def table(self) -> Table:
        """As a table."""
        sizes = " ".join(f"{k}={v}" for k, v in self.sizes.items())
        table = Table(title=f"{self.block} on {self.backend}, {sizes}", title_justify="left")
        for column in ("output", "shape", "error against float64", "torch's, op by op"):
            table.add_column(column)
        for e in self.errors:
            table.add_row(e.output, str(e.shape), f"{e.coda:.2e}", f"{e.torch:.2e}")
        return table


def measure(
    block: Block,
    graph: Graph,
    inputs: Sequence[Tensor],
    backend: str = "",
    arch: str = "",
    dims: Mapping[str, int] | None = None,
) -> ErrorReport:
    """Run a block and compare its outputs with float64.

    Args:
        block, inputs: the block and its arguments, in order.
        graph: the block's graph for these arguments.
        backend, arch, dims: as in a call; "" for the default.
    """
    with torch.no_grad():
        found = block(*inputs, backend=backend or None, arch=arch or None, dims=dims)
        sizes = bind_sizes(graph, inputs, dims)
        values: dict[Node, Tensor] = dict(zip(graph.inputs, inputs, strict=True))
        exact = evaluate(graph.roots, values, sizes)
        plain = evaluate(graph.roots, values, sizes, None)
    if isinstance(found, dict):
        found = tuple(found.values())
    outputs = found if isinstance(found, tuple) else (found,)
    errors = [
        Error(name, tuple(a.shape), relative(a, e), relative(b, e))
        for (name, _), a, e, b in zip(graph.outputs, outputs, exact, plain, strict=True)
    ]
    return ErrorReport(graph.name, sizes, choose_backend(backend), tuple(errors))


def measure_gradients(
    block: Block,
    graph: Graph,
    inputs: Sequence[Tensor],
    backend: str = "",
    arch: str = "",
    dims: Mapping[str, int] | None = None,
    *,
    seed: int = 0,
    wanted: Sequence[str] | None = None,
    memory: str | None = None,
) -> ErrorReport:
    """Run a block and its backward on random cotangents, and compare the gradients with float64.

    Args:
        block, graph, inputs, backend, arch, dims: as in `measure`.
        seed: seed of the cotangents.
        wanted: names of the arguments to differentiate; by default all floats except constants.
        memory: as in a call.

    Raises:
        CallError: if `wanted` names an argument that is not a float.
    """
    sizes = bind_sizes(graph, inputs, dims)
    names = differentiated(graph, wanted)

    def leaves(dtype: torch.dtype | None) -> list[Tensor]:
        made = [x.detach().clone() for x in inputs]
        cast = [x.to(dtype or x.dtype) if x.is_floating_point() else x for x in made]
        pairs = zip(cast, graph.inputs, strict=True)
        return [x.requires_grad_() if i.name in names else x for x, i in pairs]

    def plain(compute: torch.dtype | None) -> tuple[list[Tensor], list[Tensor]]:
        mine = leaves(compute)
        values: dict[Node, Tensor] = dict(zip(graph.inputs, mine, strict=True))
        return mine, evaluate(graph.roots, values, sizes, compute)

    def gradients(mine: list[Tensor], outputs: Sequence[Tensor]) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        given = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
        pairs = [(o, d) for o, d in zip(outputs, given, strict=True) if o.requires_grad]
        asked = [x for x in mine if x.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs], asked, [d for _, d in pairs], allow_unused=True
        )
        return list(found)

    mine = leaves(None)
    options: dict[str, Any] = {"backend": backend or None, "arch": arch or None, "dims": dims}
    found = block(*mine, **options, memory=memory)
    if isinstance(found, dict):
        found = tuple(found.values())
    coda_s = gradients(mine, found if isinstance(found, tuple) else (found,))
    exact, torch_s = gradients(*plain(torch.float64)), gradients(*plain(None))
    errors = [
        Error(f"d{name}", tuple(e.shape), relative(a, e), relative(b, e))
        for name, a, e, b in zip(names, coda_s, exact, torch_s, strict=True)
        if a is not None and e is not None and b is not None
    ]
    return ErrorReport(graph.name, sizes, choose_backend(backend), tuple(errors))


def relative(x: Tensor, exact: Tensor) -> float:
    """‖x − exact‖ / ‖exact‖ (Frobenius norm) in float64; 0 for an empty tensor."""
    if not exact.numel():
        return 0.0
    difference = (x.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp_min(1e-300))
