"""Values made of tensors that seldom change: made again only when one of those tensors has.

A tensor is known by its identity and torch's count of its changes in place. Entries die with the
tensors that they were made of.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


_steps = 0  # of all optimizers


@cache
def _count_steps() -> None:
    """Have every step of every optimizer counted from now on."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def count(*_: object) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)


_written: dict[int, int] = {}  # how often tensors, by their ids, changed without torch's counting


def note_write(tensor: Tensor) -> None:
    """Count a change of a tensor that torch does not count, such as one through `.data`."""
    key = id(tensor)
    if key not in _written:
        weakref.finalize(tensor, _written.pop, key, None).atexit = False
    _written[key] = _written.get(key, 0) + 1


class Witness:
    """A tensor as it was: the object, where its memory is, its strides, and its version.

    Torch does not count the changes of a tensor made in inference mode, so no witness holds for it.
    Nor does it count those of whoever writes parameters past it, as sharded training does, so none
    holds for a parameter over the step of an optimizer.
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
        """Whether the tensor is gone, or its memory is, as that of a parameter is between uses."""
        tensor = self.reference()
        if tensor is None or self.step not in (None, _steps):
            return True
        return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


class Place(Witness):
    """A tensor where it was, whatever its values are now."""

    __slots__ = ()

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, in the same memory."""
        return (
            self.reference() is tensor
            and tensor.data_ptr() == self.address
            and tensor.stride() == self.stride
        )


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


@dataclass
class Entry:
    """A value, and the tensors that it was made of."""

    witnesses: list[Witness]
    value: Any

    def fresh(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the value was made of these tensors as they are now."""
        return all(w.holds(t) for w, t in zip(self.witnesses, tensors, strict=True))


class Memo:
    """Values by a name and the tensors that they are made of."""

    def __init__(self) -> None:
        self.entries: dict[tuple[Any, ...], Entry] = {}

    def get(self, name: Hashable, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """The value of `make()`, made now or before."""
        key = (name, *map(id, tensors))
        entry = self.entries.get(key)
        if entry is None or not entry.fresh(tensors):
            self.sweep()
            value = make()
            witnesses = [Witness(t, lambda _: self.entries.pop(key, None)) for t in tensors]
            entry = self.entries[key] = Entry(witnesses, value)
        return entry.value

    def sweep(self) -> None:
        """Forget what was made of tensors that have no memory any more."""
        over = [k for k, e in self.entries.items() if any(w.is_over() for w in e.witnesses)]
        for key in over:
            self.entries.pop(key, None)
