"""Nodes of a call -> the arguments and buffers they are computed from, for use in a replay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from coda.ir.graph import Node
from coda.runtime.environment import Environment


class Sources:
    """The arguments and buffers that some nodes are computed from.

    `weights` says whether they depend on prepacked weights as well, which `run` has only if it is
    given them.
    """

    def __init__(self, run: Environment, nodes: Iterable[Node]) -> None:
        self.program, self.sizes, self.compute = run.program, run.sizes, run.compute
        self.inputs: list[Node] = []
        self.buffers: list[str] = []
        self.weights = False
        stack, seen = list(nodes), set[Node]()
        while stack:
            node = stack.pop()
            place = self.program.places.get(node)
            if node in seen:
                continue
            seen.add(node)
            if node in run.prepared:
                self.weights = True
            elif node in run.inputs:
                self.inputs.append(node)
            elif place is None:
                stack.extend(node.operands)
            elif place.buffer not in self.buffers:
                self.buffers.append(place.buffer)

    def tensors(self, run: Environment) -> list[Tensor]:
        """Their tensors in a call: arguments, then buffers."""
        return [*(run.inputs[n] for n in self.inputs), *(run.buffer(b) for b in self.buffers)]

    def run(
        self, tensors: Sequence[Tensor], prepared: Mapping[Node, Tensor] | None = None
    ) -> Environment:
        """A call in which these tensors are known, and nothing else."""
        found = object.__new__(Environment)
        found.program, found.sizes, found.compute = self.program, self.sizes, self.compute
        found.exact, found.prepared = False, dict(prepared or {})
        found.inputs = dict(zip(self.inputs, tensors, strict=False))
        found.buffers = dict(zip(self.buffers, tensors[len(self.inputs) :], strict=True))
        return found
