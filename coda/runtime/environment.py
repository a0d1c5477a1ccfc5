"""A call of a Program -> the values of its nodes: arguments, prepacked weights, and buffers.

The base of both the reference backend and the launcher of kernels; neither depends on the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coda.ir.evaluate import evaluate
from coda.ir.graph import Node, Size
from coda.lowering.algebra.roles import is_view
from coda.lowering.program.body import Body
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program
from coda.runtime.prepare import folded_weights, together


class Environment:
    """The values of one call of a Program.

    Attributes:
        program: the Program that is run.
        exact: whether values are in float64 and never rounded.
        compute: the float dtype in which values are computed.
        sizes: of every symbol in this call.
        inputs, prepared: arguments and prepacked weights, by their nodes.
        buffers: matrices that kernels have written, by name.
        parts: partials of split reductions, as (planes, counts), by the name of their buffer.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        *,
        exact: bool,
        sizes: Mapping[str, int] | None,
    ) -> None:
        self.program, self.exact = program, exact
        wide = exact or any(t.dtype == torch.float64 for t in inputs)
        self.compute = torch.float64 if wide else torch.float32
        self.sizes: Mapping[str, int] = {**program.sizes, **sizes} if sizes else program.sizes
        self.inputs: dict[Node, Tensor] = dict(zip(program.graph.inputs, inputs, strict=True))
        self.buffers: dict[str, Tensor] = {}
        self.parts: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
        self.prepared = self.fold()

    def fold(self) -> dict[Node, Tensor]:
        """The prepacked weights: views of arguments that are adjacent in memory, else computed."""
        lying = together(self.program, self.inputs)
        rest = [n for n in self.program.prepared.values() if n not in lying]
        return lying | self.folded(rest, self.inputs | lying)

    def folded(self, nodes: Sequence[Node], known: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
        """Values of the prepacked nodes that have to be computed."""
        return folded_weights(self.program, nodes, known, self.compute, rounding=not self.exact)

    def each(self, compute: Callable[[Kernel[Any]], None]) -> tuple[Tensor, ...]:
        """Call `compute` for each kernel in order, and return the outputs."""
        for kernel, over in zip(self.program.kernels, self.program.freed, strict=True):
            compute(kernel)
            self.release(over)
        return tuple(self.output(node) for _, node in self.program.outputs)

    def keep(self, buffer: str, x: Tensor) -> None:
        """Store a value in a buffer, rounded to the buffer's dtype."""
        whole = self.exact or not x.is_floating_point()
        self.buffers[buffer] = x if whole else x.to(self.program.buffers[buffer].dtype.torch)

    def release(self, names: Iterable[str]) -> None:
        """Drop dead buffers."""
        for name in names:
            self.buffers.pop(name, None)
            self.parts.pop(name, None)

    def count(self, node: Size) -> Tensor:
        """A size as a tensor of rank 0, on the device of the call."""
        device = next(iter(self.inputs.values())).device
        return torch.full((), node.dim.size(self.sizes), dtype=self.compute, device=device)

    def value(self, node: Node) -> Tensor:
        """The tensor of a node that is stored or a view of stored nodes, in the node's shape."""
        if node in self.inputs:
            return self.inputs[node]
        if node in self.prepared:
            return self.prepared[node]
        if isinstance(node, Size):
            return self.count(node)
        place = self.program.places.get(node)
        if place is not None:
            x = self.buffer(place.buffer)
            if place.count >= 0:
                x = x[:, place.first : place.first + place.count]
            return x.reshape([d.size(self.sizes) for d in node.shape])
        known = {o: self.value(o) for o in node.operands}
        compute = self.compute if self.exact else None
        if is_view(node) and known[node.operands[0]].is_floating_point() and not self.exact:
            compute = known[node.operands[0]].dtype  # the stored dtype: a view does not round
        return evaluate([node], known, self.sizes, compute)[0]

    def buffer(self, name: str) -> Tensor:
        """A buffer; if it is stored in parts, these are concatenated."""
        parts = self.program.joined.get(name)
        if parts is None or name in self.buffers:
            return self.buffers[name]
        return torch.cat([*map(self.buffer, parts)], 0 if name in self.program.stacked else 1)

    def operand(self, body: Body, name: str) -> Tensor:
        """The tensor that an operand loads, repeated over row axes on which it does not depend."""
        return self.repeated(body, name)

    def repeated(self, body: Body, name: str) -> Tensor:
        """The tensor that an operand loads, computed without a cache."""
        x = self.value(body.nodes[name])
        spread = body.spread.get(name)
        if spread is None:
            return x
        lead = [d.size(self.sizes) for d in spread.lead]
        columns = x.shape[x.ndim - spread.columns :]
        return x.expand(*lead, *columns).reshape(math.prod(lead), math.prod(columns))

    def output(self, node: Node) -> Tensor:
        x = self.value(node)
        return x if self.exact else x.to(node.dtype.torch)
