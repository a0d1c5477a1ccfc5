"""The observers of a launch: its checks and its counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from coda.sim.checks import checks, counters
from coda.sim.checks.observe import Observer, Several

if TYPE_CHECKING:
    from coda.sim.machine import Machine

Maker = Callable[["Machine"], "list[Observer]"]
MAKERS: list[Maker] = [checks.make, counters.make]


def attach(machine: Machine) -> Observer | None:
    """The observer of the resident CTAs of a launch, or None if there is none."""
    made = [observer for make in MAKERS for observer in make(machine)]
    if len(made) > 1:
        return Several(machine, made)
    return made[0] if made else None
