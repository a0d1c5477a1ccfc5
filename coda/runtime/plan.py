"""How a call trains: Programs of its forward and backward, and what goes from one to the other."""

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
class Layout:
    """Where values go from a call to its backward, by position.

    Attributes:
        kept: what the backward reads but cotangents, among the arguments and after them the
            forward's outputs.
        read: each argument of the backward: a position in `kept`, or a cotangent and -1 - its own.
        inputs: the backward's arguments themselves.
        gradients: for each argument of the block, which of the backward's outputs, or -1.
    """

    kept: tuple[int, ...]
    read: tuple[int, ...]
    inputs: tuple[Input, ...]
    gradients: tuple[int, ...]

    @staticmethod
    def of(training: Training) -> Layout:
        """The layout of a training."""
        inputs, outputs = training.forward.inputs, training.forward.outputs
        places = {i.name: p for p, i in enumerate(inputs)}
        computed = {name: len(inputs) + p for p, (name, _) in enumerate(outputs)}
        places |= {name: computed[name] for name in training.saved}
        cotangents = {name: -1 - p for p, name in enumerate(training.cotangents) if name}
        kept = [i.name for i in training.backward.inputs if i.name not in cotangents]
        position = {name: p for p, name in enumerate(kept)} | cotangents
        gradients = {name: p for p, name in enumerate(training.wanted)}
        return Layout(
            tuple(places[name] for name in kept),
            tuple(position[i.name] for i in training.backward.inputs),
            training.backward.inputs,
            tuple(gradients.get(i.name, -1) for i in inputs),
        )

    def saved(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that the backward reads, without the cotangents."""
        every = (*inputs, *outputs)
        return [every[p] for p in self.kept]

    def tracked(self, saved: Sequence[Tensor]) -> list[Tensor]:
        """What was saved, with computed values as torch's own would be: they require gradients.

        Or the second derivative by what they were computed of would be 0 without a word.
        """
        computed = [p >= len(self.gradients) for p in self.kept]
        return [
            t.detach().requires_grad_() if c and t.is_floating_point() else t
            for c, t in zip(computed, saved, strict=False)
        ]

    def arguments(
        self, sizes: Sizes, kept: Sequence[Tensor], given: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The backward's arguments, with zeros for cotangents that nobody gave."""
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
        """The backward's arguments in the types that it declares."""
        pairs = zip(arguments, self.inputs, strict=True)
        return [t if t.dtype == i.dtype.torch else t.to(i.dtype.torch) for t, i in pairs]

    def spare(self, program: Program) -> dict[int, str]:
        """Saved values that a backward may write over: places in `kept`, and their names."""
        pairs = zip(self.inputs, self.read, strict=True)
        over = program.terms.spare & set(program.overwrites.values())
        return {p: i.name for i, p in pairs if p >= 0 and i.name in over}

    def by_argument(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One gradient for each argument of the block, or None."""
        return [gradients[p] if p >= 0 else None for p in self.gradients]


@dataclass(frozen=True)
class Plan:
    """How a call with arguments of some shapes trains.

    Attributes:
        training: the two graphs.
        forward, backward: their Programs; no backward where no wanted argument is reached.
        sizes: of every symbol of the block.
        backend: by its name.
        reached: for each output of the block, whether a wanted argument reaches it.
        handle: of the block.
        layout: where values go from one graph to the other.
    """

    training: Training
    forward: Program
    backward: Program | None
    sizes: Sizes
    backend: str
    reached: tuple[bool, ...]
    handle: str
    layout: Layout

    def accumulating(
        self, targets: Mapping[str, DType], beside: Sequence[Names]
    ) -> tuple[Program, tuple[Names, ...]]:
        """The backward that adds gradients of these arguments to tensors of these types.

        `beside` are siblings that are added to the rows of one matrix. Also tells for each tensor
        that the program is given after the backward's arguments whose gradients it holds.
        """
        found = accumulating(self.training, targets, beside)
        terms = self.training.terms(found.updates)
        target, block = self.forward.target, block_of(self.handle)
        return block.program_for(found.graph, target, False, self.sizes, terms), found.held

    @cached_property
    def siblings(self) -> tuple[Names, ...]:
        """Arguments whose gradients are all rows of one matrix, in their order."""
        return siblings(self.training)


def plan_of(inputs: Sequence[Tensor], options: CallOptions) -> Plan:
    """The plan for these arguments, made once for each set of shapes and types."""
    key, plans = (options.key(), shapes_of(inputs)), calls_of(options.handle).plans
    if key not in plans:
        plans[key] = make_plan(*bind(options.handle, inputs, options.dims), options)
    return plans[key]


def make_plan(graph: Graph, sizes: Sizes, options: CallOptions) -> Plan:
    """The plan for a block of these sizes."""
    block, target = block_of(options.handle), choose_target(options.arch)
    names = wanted_names(graph, options.wanted)
    training = block.training_for(graph, names, options.memory, sizes)
    forward = block.program_for(training.forward, target, False, sizes)
    backward = None
    if training.wanted:
        backward = block.program_for(training.backward, target, False, sizes, training.terms())
    asked = {i for i in graph.inputs if i.name in training.wanted}
    reached = tuple(bool(asked & set(walk([r]))) for _, r in graph.outputs)
    backend, layout = choose_backend(options.backend), Layout.of(training)
    return Plan(training, forward, backward, sizes, backend, reached, options.handle, layout)


def wanted_names(graph: Graph, wanted: Sequence[bool]) -> tuple[str, ...]:
    """The names of the floats among the wanted arguments. Raises CallError for a constant."""
    pairs = zip(graph.inputs, wanted, strict=True)
    names = tuple(i.name for i, asked in pairs if asked and i.dtype.kind == "float")
    for name in names:
        if name in graph.constants:
            raise CallError(
                f"`{name}` is declared constant, and requires a gradient",
                found=f"{name}.requires_grad",
                help=f"pass {name}.detach(), or declare `{name}` as coda.Tensor",
            )
    return names
