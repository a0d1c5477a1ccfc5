"""A call that trains -> its Plan: forward and backward Programs, and the values passed between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from coda.errors import CallError
from coda.ir.graph import Graph, Input, walk
from coda.ir.types import DType
from coda.lowering.algebra.accumulate import Names, accumulating, siblings
from coda.lowering.algebra.training import Training
from coda.lowering.program.program import Program
from coda.runtime.call import (
    CallOptions,
    Sizes,
    bind,
    block_of,
    calls_of,
    choose_backend,
    choose_target,
    shapes_of,
)


@dataclass(frozen=True)
class SavedLayout:
    """The positions of values that pass from a call to its backward.

    Attributes:
        kept: the values that the backward reads, without cotangents: positions in the arguments
            followed by the forward's outputs.
        read: for each argument of the backward, a position in `kept`, or -1 - i for cotangent i.
        inputs: the nodes of the backward's arguments.
        gradients: for each argument of the block, the position of its gradient in the backward's
            outputs, or -1.
    """

    kept: tuple[int, ...]
    read: tuple[int, ...]
    inputs: tuple[Input, ...]
    gradients: tuple[int, ...]

    @staticmethod
    def of(training: Training) -> SavedLayout:
        """The layout of a training."""
        inputs, outputs = training.forward.inputs, training.forward.outputs
        places = {i.name: p for p, i in enumerate(inputs)}
        computed = {name: len(inputs) + p for p, (name, _) in enumerate(outputs)}
        places |= {name: computed[name] for name in training.saved}
        cotangents = {name: -1 - p for p, name in enumerate(training.cotangents) if name}
        kept = [i.name for i in training.backward.inputs if i.name not in cotangents]
        position = {name: p for p, name in enumerate(kept)} | cotangents
        gradients = {name: p for p, name in enumerate(training.requires_grad)}
        return SavedLayout(
            tuple(places[name] for name in kept),
            tuple(position[i.name] for i in training.backward.inputs),
            training.backward.inputs,
            tuple(gradients.get(i.name, -1) for i in inputs),
        )

    def saved(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that the backward reads, without cotangents."""
        every = (*inputs, *outputs)
        return [every[p] for p in self.kept]

    def tracked(self, saved: Sequence[Tensor]) -> list[Tensor]:
        """The saved tensors, where computed ones require gradients, as torch's own would.

        Otherwise a second derivative with respect to their sources would silently be 0.
        """
        computed = [p >= len(self.gradients) for p in self.kept]
        return [
            t.detach().requires_grad_() if c and t.is_floating_point() else t
            for c, t in zip(computed, saved, strict=False)
        ]

    def arguments(
        self, sizes: Sizes, kept: Sequence[Tensor], given: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The backward's arguments, with zeros for missing cotangents."""
        out: list[Tensor] = []
        for node, position in zip(self.inputs, self.read, strict=True):
            found = kept[position] if position >= 0 else given[-1 - position]
            if found is None:
                like = next(t for t in (*kept, *given) if t is not None)
                shape = [d.size(sizes) for d in node.shape]
                found = like.new_zeros(shape, dtype=node.dtype.torch)
            out.append(found if position >= 0 else found.contiguous())
        return out

    def typed(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """The backward's arguments, cast to the types that it declares."""
        pairs = zip(arguments, self.inputs, strict=True)
        return [t if t.dtype == i.dtype.torch else t.to(i.dtype.torch) for t, i in pairs]

    def donated(self, program: Program) -> dict[int, str]:
        """Saved values that a backward may write over: positions in `kept`, and names."""
        pairs = zip(self.inputs, self.read, strict=True)
        over = program.policy.donated & set(program.overwrites.values())
        return {p: i.name for i, p in pairs if p >= 0 and i.name in over}

    def by_argument(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One gradient for each argument of the block, or None."""
        return [gradients[p] if p >= 0 else None for p in self.gradients]


@dataclass(frozen=True)
class Plan:
    """How a call with arguments of some shapes trains.

    Attributes:
        training: the two graphs.
        forward, backward: their Programs; `backward` is None if no gradient is to be computed.
        sizes: of every symbol of the block.
        backend: its name.
        reached: for each output of the block, whether it depends on a differentiated argument.
        handle: of the block.
        layout: the positions of values that pass from one Program to the other.
    """

    training: Training
    forward: Program
    backward: Program | None
    sizes: Sizes
    backend: str
    reached: tuple[bool, ...]
    handle: str
    layout: SavedLayout

    def accumulating(
        self, targets: Mapping[str, DType], beside: Sequence[Names]
    ) -> tuple[Program, tuple[Names, ...]]:
        """The backward that adds gradients to tensors in place.

        Args:
            targets: the element type of each such tensor, by the argument whose gradient it holds.
            beside: siblings whose gradients are added to the rows of one matrix.

        Returns:
            The Program, and for each tensor that it takes after the backward's arguments, the names
            of the arguments whose gradients the tensor holds.
        """
        found = accumulating(self.training, targets, beside)
        policy = self.training.policy(found.updates)
        target, block = self.forward.target, block_of(self.handle)
        return block.program_for(
            found.graph, target, frozen=False, sizes=self.sizes, policy=policy
        ), found.held

    @cached_property
    def siblings(self) -> tuple[Names, ...]:
        """Arguments whose gradients are row slices of one matrix, in order."""
        return siblings(self.training)


def plan_of(inputs: Sequence[Tensor], options: CallOptions) -> Plan:
    """The Plan for these arguments, made once for each set of shapes and types."""
    key, plans = (options.key(), shapes_of(inputs)), calls_of(options.handle).plans
    if key not in plans:
        plans[key] = make_plan(*bind(options.handle, inputs, options.dims), options)
    return plans[key]


def make_plan(graph: Graph, sizes: Sizes, options: CallOptions) -> Plan:
    """The Plan for a block of these sizes."""
    block, target = block_of(options.handle), choose_target(options.arch)
    names = names_requiring_grad(graph, options.requires_grad)
    training = block.training_for(graph, names, options.memory, sizes)
    forward = block.program_for(training.forward, target, frozen=False, sizes=sizes)
    backward = None
    if training.requires_grad:
        backward = block.program_for(
            training.backward, target, frozen=False, sizes=sizes, policy=training.policy()
        )
    asked = {i for i in graph.inputs if i.name in training.requires_grad}
    reached = tuple(bool(asked & set(walk([r]))) for _, r in graph.outputs)
    backend, layout = choose_backend(options.backend), SavedLayout.of(training)
    return Plan(training, forward, backward, sizes, backend, reached, options.handle, layout)


def names_requiring_grad(graph: Graph, requires_grad: Sequence[bool]) -> tuple[str, ...]:
    """The names of the differentiated float arguments. Raises CallError for a constant."""
    pairs = zip(graph.inputs, requires_grad, strict=True)
    names = tuple(i.name for i, asked in pairs if asked and i.dtype.kind == "float")
    for name in names:
        if name in graph.constants:
            raise CallError(
                f"`{name}` is declared constant, and requires a gradient",
                found=f"{name}.requires_grad",
                help=f"pass {name}.detach(), or declare `{name}` as coda.Tensor",
            )
    return names
