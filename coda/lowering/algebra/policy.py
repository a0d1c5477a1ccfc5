"""Memory policy: in-place updates, donated arguments and chunking that a caller allows."""

from __future__ import annotations

from dataclasses import dataclass

Updates = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class MemoryPolicy:
    """The memory policy of a Program.

    Attributes:
        updates: (output, argument) names: outputs that update an argument in place.
        donated: names of donated arguments: dead after the call, so their storage may be reused.
        per_call: names of arguments that are new in every call, and so are no weights.
        chunked: whether large intermediates are computed in chunks.
    """

    updates: Updates = ()
    donated: frozenset[str] = frozenset()
    per_call: frozenset[str] = frozenset()
    chunked: bool = False

    @property
    def updated(self) -> frozenset[str]:
        """The names of the outputs that update an argument in place."""
        return frozenset(name for name, _ in self.updates)


DEFAULT_POLICY = MemoryPolicy()
