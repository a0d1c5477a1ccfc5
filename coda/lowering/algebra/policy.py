"""Memory policy: in-place updates, donated arguments and chunking that a caller allows."""

from __future__ import annotations

from dataclasses import dataclass

Updates = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Terms:
    """The memory policy of a Program.

    Attributes:
        updates: (output, argument) names: outputs that update an argument in place.
        spare: names of donated arguments: dead after the call, so their storage may be reused.
        passing: names of arguments that are new in every call, and so are no weights.
        thrifty: whether large intermediates are computed in chunks.
    """

    updates: Updates = ()
    spare: frozenset[str] = frozenset()
    passing: frozenset[str] = frozenset()
    thrifty: bool = False

    @property
    def updated(self) -> frozenset[str]:
        """The names of the outputs that update an argument in place."""
        return frozenset(name for name, _ in self.updates)


NO_TERMS = Terms()
