"""PTX of a CuTe DSL launch -> results and findings: a simulated Hopper or Blackwell GPU."""

from coda.sim.host.device import Device, active, device
from coda.sim.host.report import Launched, Report
from coda.sim.types import (
    CHECK_KINDS,
    CheckFailed,
    Deadlock,
    Fault,
    Finding,
    Livelock,
    Options,
    SimError,
    Unsupported,
)

__all__ = [
    "CHECK_KINDS",
    "CheckFailed",
    "Deadlock",
    "Device",
    "Fault",
    "Finding",
    "Launched",
    "Livelock",
    "Options",
    "Report",
    "SimError",
    "Unsupported",
    "active",
    "device",
]
