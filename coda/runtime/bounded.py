"""The one rule by which coda forgets: a table of at most so many values, the oldest goes first.

What is kept for an object is kept by it, or in a weak table, and ends with it; what is kept by a
key that users vary without end (shapes, options) is in a `Bounded`.
"""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")
LIMIT = 4096  # values: calls of a block by their shapes, its Programs


class Bounded(dict[K, V]):
    """A dict of at most `limit` values: a new one drops the one that was set first."""

    def __init__(self, limit: int = LIMIT) -> None:
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        if len(self) > self.limit:
            del self[next(iter(self))]
