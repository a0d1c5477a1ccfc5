"""Launches of one call -> the same launches of later calls, on other tensors of the same shapes.

A call is recorded as steps whose arguments are views of the call's arguments, of buffers that it
allocates, or of constant memory (prepacked weights). A replay allocates the buffers, makes the
views and launches. What torch computes from a call's own tensors (a table packed for a kernel, a
copy with aligned rows) is a step as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coda.runtime.bounded import Bounded
from coda.runtime.replay_code import Event, Replay, ReplayBuffer, ReplayStep, View
from coda.runtime.weight_cache import AddressWitness, Witness

LIMIT = 1024  # replays of one Program: one for each layer and each set of shapes


@dataclass(frozen=True)
class Roles:
    """How a replay identifies the arguments of a call, by position.

    Attributes:
        sources: arguments that constant memory was computed from: by identity and version.
        placed: weights whose memory is read directly: by identity and address.
        others: by shape, strides, dtype and alignment.
    """

    sources: tuple[int, ...]
    placed: tuple[int, ...]
    others: tuple[int, ...]

    def key(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The properties of the arguments that are built into a replay."""
        found: list[Any] = [id(inputs[i]) for i in self.sources + self.placed]
        for i in self.others:
            t = inputs[i]
            found += (t.shape, t.stride(), t.dtype, t.data_ptr() & 15)
        return tuple(found)

    def witnesses(self, inputs: Sequence[Tensor], gone: Callable[[Any], object]) -> Held:
        """Witnesses of the arguments that are known by identity, with their positions.

        `gone` is called when one of these arguments is freed.
        """
        held: list[Witness] = [Witness(inputs[i], gone) for i in self.sources]
        held += [AddressWitness(inputs[i], gone) for i in self.placed]
        return list(zip(held, self.sources + self.placed, strict=True))


Held = list[tuple[Witness, int]]


class _Unknown(Exception):
    """A launch took a tensor whose origin is not recorded."""


@dataclass(frozen=True)
class _Base:
    """The memory of a tensor of a call, without a reference to the tensor."""

    place: int
    address: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @staticmethod
    def of(place: int, x: Tensor) -> _Base:
        """The memory of tensor `place` of a call."""
        start = int(x.storage_offset()) * x.element_size()
        return _Base(place, x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, start)

    def view(self, x: Tensor) -> View:
        """A tensor in the same storage, as a View of this one."""
        same = (self.size, self.stride, self.dtype) == (tuple(x.shape), x.stride(), x.dtype)
        offset = int(x.storage_offset()) - self.offset // x.element_size()
        shape = tuple(x.shape), x.stride()
        return View(self.place, x.dtype, *shape, offset, same and offset == 0)


class Recording:
    """The events of one call: launches, allocations, and the use of constant memory.

    Holds no reference to the buffers that the call allocates, so recording does not extend their
    lifetime.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = list(inputs)
        self.events: list[Event] = []
        self.bases: dict[int, list[_Base]] = {}
        self.derived: list[Tensor] = []
        self.constants: set[int] = set()
        self.sources: set[int] = set()
        self.placed: set[int] = set()
        self.count = 0
        self.complete = True
        for place, x in enumerate(inputs):
            self.bases.setdefault(_memory(x), []).append(_Base.of(place, x))
        self.own = set(self.bases)

    def made(self, buffer: Tensor, start: float | None = None) -> None:
        """Record a buffer that the call allocates, and its initial value, if it has one."""
        place = len(self.inputs) + self.count
        self.count += 1
        shape = tuple(buffer.shape), buffer.stride()
        self.events.append((place, ReplayBuffer(*shape, buffer.dtype, buffer.device, start)))
        self.bases.setdefault(_memory(buffer), []).append(_Base.of(place, buffer))

    def keep_only(self, buffers: Iterable[Tensor]) -> None:
        """Record that all buffers of the call except these are dead."""
        kept = {_memory(b) for b in buffers} | self.own
        for memory in self.bases.keys() - kept:
            self.events += [(base.place, None) for base in self.bases.pop(memory)]
        self.derived.clear()

    def computed(
        self, value: Tensor, make: Callable[..., Tensor], made_of: Sequence[Tensor]
    ) -> None:
        """Record a tensor that torch computes in each call, by `make(*made_of)`."""
        place = len(self.inputs) + self.count
        self.count += 1
        self.launched(ReplayStep(make, tuple(made_of), place))
        self.derived.append(value)  # alive for now, so that no other tensor gets its address
        if _memory(value) not in self.bases:
            self.bases[_memory(value)] = [_Base.of(place, value)]

    def knows(self, tensor: Tensor) -> bool:
        """Whether a replay can find the storage of a tensor."""
        return _memory(tensor) in self.constants or _memory(tensor) in self.bases

    def constant(self, value: Any, made_of: Sequence[Tensor]) -> None:
        """Record memory that stays valid until one of the arguments `made_of` changes."""
        tensors = value.values() if isinstance(value, dict) else [value]
        self.constants |= {_memory(t) for t in tensors} - self.own
        self.sources |= {i for i, t in enumerate(self.inputs) if any(t is m for m in made_of)}

    def in_place(self, tensors: Sequence[Tensor]) -> None:
        """Record arguments whose memory a launch reads directly, several perhaps as one matrix."""
        self.placed |= {i for i, t in enumerate(self.inputs) if any(t is one for one in tensors)}

    def roles(self) -> Roles:
        """How a replay identifies each argument."""
        placed = self.placed - self.sources
        others = set(range(len(self.inputs))) - self.sources - placed
        return Roles(tuple(sorted(self.sources)), tuple(sorted(placed)), tuple(sorted(others)))

    def launched(self, step: ReplayStep) -> None:
        """Record a launch, without the tensors of this call."""
        try:
            arguments = tuple(map(self.view, step.arguments))
            self.events.append(ReplayStep(step.function, arguments, step.place))
        except _Unknown:
            self.complete = False

    def view(self, x: Any) -> Any:
        """An argument of a launch as a view of a tensor of any such call. Raises _Unknown."""
        if isinstance(x, dict):
            return {k: self.view(v) for k, v in x.items()}
        if type(x) is tuple:
            return tuple(map(self.view, x))
        if not isinstance(x, Tensor) or _memory(x) in self.constants:
            return x
        if _memory(x) not in self.bases:
            raise _Unknown
        # Arguments may share memory: the one that begins last before the view is its base.
        here = self.bases[_memory(x)]
        before = [b for b in here if b.address <= x.data_ptr()]
        return max(before or here, key=lambda b: b.address).view(x)

    def replay(
        self,
        outputs: Sequence[Tensor],
        updated: Sequence[bool] = (),
    ) -> Replay | None:
        """The launches as a Replay; None if one of them took a tensor of unknown origin.

        `updated` says for each output whether it is an argument that the call updates in place. A
        call that returns another argument has no replay either.
        """
        try:
            returned = [self.view(o) for o in outputs]
        except _Unknown:
            return None
        if not self.complete or not all(isinstance(v, View) for v in returned):
            return None
        # An argument that is returned unchanged is copied, which no replay does.
        made = [v.base >= len(self.inputs) for v in returned]
        if not all(m or u for m, u in zip(made, updated or [False] * len(made), strict=True)):
            return None
        return Replay(self.events, returned, len(self.inputs))


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Replays:
    """Replays of one Program, by the weights' identities and the other arguments' shapes.

    Weights may be copied in some calls and read directly in others: `roles` has each such case. A
    replay is freed with the weights that it was recorded for.
    """

    def __init__(self) -> None:
        self.roles: list[Roles] = []
        self.found: Bounded[tuple[int, tuple[Any, ...]], tuple[Held, Replay]] = Bounded(LIMIT)

    def find(self, inputs: Sequence[Tensor]) -> Replay | None:
        """The replay for these arguments; None if they are new, or have changed."""
        for number, roles in enumerate(self.roles):
            held = self.found.get((number, roles.key(inputs)))
            if held is not None and all([w.holds(inputs[i]) for w, i in held[0]]):
                return held[1]
        return None

    def keep(
        self, recording: Recording, outputs: Sequence[Tensor], updated: Sequence[bool] = ()
    ) -> None:
        """Keep the replay of a call, if its launches can be replayed."""
        replay = recording.replay(outputs, updated)
        if replay is None:
            return
        inputs, roles = recording.inputs, recording.roles()
        if roles not in self.roles:
            self.roles.append(roles)
        for key, (held, _) in list(self.found.items()):
            if any(witness.is_over() for witness, _ in held):
                self.found.pop(key, None)
        new = self.roles.index(roles), roles.key(inputs)
        held = roles.witnesses(inputs, lambda _: self.found.pop(new, None))
        self.found[new] = held, replay
