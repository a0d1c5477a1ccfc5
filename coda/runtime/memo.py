"""Values made of tensors that seldom change: made again only when one of those tensors has.

A tensor is known by its identity and torch's count of its changes in place. Entries die with the
tensors that they were made of.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Witness:
    """A tensor as it was: the object, where its memory is, and its version.

    Torch does not count the changes of a tensor made in inference mode, so no witness holds for it.
    """

    __slots__ = ("address", "reference", "version")

    def __init__(self, tensor: Tensor, gone: Callable[[Any], object] | None = None) -> None:
        self.reference = weakref.ref(tensor, gone)
        self.address, self.version = tensor.data_ptr(), version_of(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, unchanged."""
        return (
            self.reference() is tensor
            and self.version is not None
            and tensor._version == self.version
            and tensor.data_ptr() == self.address
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
            value = make()
            witnesses = [Witness(t, lambda _: self.entries.pop(key, None)) for t in tensors]
            entry = self.entries[key] = Entry(witnesses, value)
        return entry.value
