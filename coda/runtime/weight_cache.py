"""Values computed from tensors that seldom change -> cached until one of those tensors changes.

A tensor is identified by its object and by its version, torch's count of changes in place. An entry
is dropped with the tensors that it was computed from.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

from coda.runtime.bounded import Bounded

T = TypeVar("T")


_steps = 0  # taken so far, of all optimizers


@cache
def _count_steps() -> None:
    """Count every step of every optimizer from now on."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def count(*_: object) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)


_written: dict[int, int] = {}  # changes that torch does not count, by id of the tensor


def note_write(tensor: Tensor) -> None:
    """Count a change of a tensor that torch does not count, such as one through `.data`."""
    key = id(tensor)
    if key not in _written:
        weakref.finalize(tensor, _written.pop, key, None).atexit = False
    _written[key] = _written.get(key, 0) + 1


class Witness:
    """The state of a tensor: the object, its address, strides and version.

    Torch does not count the changes of a tensor made in inference mode, so no witness of it holds.
    Torch also misses changes by code that writes to parameters directly, as sharded training does,
    so no witness of a parameter holds after a step of an optimizer.
    """

    __slots__ = ("address", "reference", "step", "stride", "version", "written")

    def __init__(self, tensor: Tensor, gone: Callable[[Any], object] | None = None) -> None:
        self.reference = weakref.ref(tensor, gone)
        self.address, self.version = tensor.data_ptr(), version_of(tensor)
        self.written, self.stride = _written.get(id(tensor)), tensor.stride()
        self.step = None
        if tensor.requires_grad:
            _count_steps()
            self.step = _steps

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, unchanged."""
        return (
            self.reference() is tensor
            and self.version is not None
            and tensor._version == self.version
            and _written.get(id(tensor)) == self.written
            and tensor.data_ptr() == self.address
            and tensor.stride() == self.stride
            and self.step in (None, _steps)
        )

    def is_over(self) -> bool:
        """Whether the tensor or its storage is freed, or an optimizer has taken a step.

        Sharded training frees the storage of a parameter between uses.
        """
        tensor = self.reference()
        if tensor is None or self.step not in (None, _steps):
            return True
        return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


class AddressWitness(Witness):
    """A tensor at its address, for any values."""

    __slots__ = ()

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, in the same memory."""
        return (
            self.reference() is tensor
            and tensor.data_ptr() == self.address
            and tensor.stride() == self.stride
        )


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None if torch does not count."""
    return None if tensor.is_inference() else tensor._version


@dataclass
class Entry:
    """A value, and witnesses of the tensors that it was computed from."""

    witnesses: list[Witness]
    value: Any

    def fresh(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the value was computed from these tensors in their current state."""
        return all(w.holds(t) for w, t in zip(self.witnesses, tensors, strict=True))


LIMIT = 256  # values of the same tensors: their names may have sizes of a call


class Memo:
    """Values by the tensors that they are computed from, and a name.

    They are freed with the tensors; of the values of the same tensors, the oldest are dropped.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[int, ...], Bounded[Hashable, Entry]] = {}

    def get(self, name: Hashable, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """The value of `make()`, cached while the tensors do not change."""
        key = tuple(map(id, tensors))
        known = self.entries.get(key)
        entry = None if known is None else known.get(name)
        if entry is None or not entry.fresh(tensors):
            self.sweep()
            value = make()
            witnesses = [Witness(t, lambda _: self.entries.pop(key, None)) for t in tensors]
            entry = Entry(witnesses, value)
            self.entries.setdefault(key, Bounded(LIMIT))[name] = entry
        return entry.value

    def sweep(self) -> None:
        """Drop the entries of tensors whose memory is freed."""
        for key, known in list(self.entries.items()):
            for name, entry in list(known.items()):
                if any(w.is_over() for w in entry.witnesses):
                    known.pop(name, None)
            if not known:
                self.entries.pop(key, None)
