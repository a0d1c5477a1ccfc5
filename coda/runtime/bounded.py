"""The one eviction rule of coda: a dict of at most `limit` values drops the oldest first.

What belongs to an object is stored on it, or in a weak table, and is freed with it. What is stored
by a key that users vary without bound (shapes, options) is in a `Bounded`.
"""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")
LIMIT = 4096  # values: calls of a block by their shapes, its Programs


class Bounded(dict[K, V]):
    """A dict of at most `limit` values: inserting one more drops the value inserted first."""

    def __init__(self, limit: int = LIMIT) -> None:
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        if len(self) > self.limit:
            del self[next(iter(self))]
