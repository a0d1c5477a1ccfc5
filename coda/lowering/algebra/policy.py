"""What a caller lets a Program do with memory."""

from __future__ import annotations

from dataclasses import dataclass

Updates = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Terms:
    """What a caller lets a Program do with memory.

    Attributes:
        updates: outputs that are written over an argument: a name, and the argument's.
        spare: arguments that a call may give up: nobody reads them after the Program.
        passing: arguments that are new in every call, as no weight is.
        thrifty: whether what the Program makes for itself is made in parts where it is large.
    """

    updates: Updates = ()
    spare: frozenset[str] = frozenset()
    passing: frozenset[str] = frozenset()
    thrifty: bool = False

    @property
    def updated(self) -> frozenset[str]:
        """The outputs that are written over an argument."""
        return frozenset(name for name, _ in self.updates)


NO_TERMS = Terms()
