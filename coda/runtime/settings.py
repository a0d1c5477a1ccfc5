"""The environment variables that coda reads, in one table."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from coda.errors import CodaError
from coda.lowering.program.target import ARCHS, DEFAULT
from coda.lowering.stages import Stages, stage_names


@dataclass(frozen=True)
class EnvironmentVariable:
    """An environment variable: its name, what it means, the values it takes, its default."""

    name: str
    meaning: str
    values: tuple[str, ...] = ()
    default: str = ""

    def get(self) -> str:
        """The current value. Raises CodaError if it is not one of `values`."""
        value = _given.get().get(self.name) or os.environ.get(self.name) or self.default
        if self.values and value not in self.values:
            raise CodaError(
                f"{self.name} is one of {', '.join(v for v in self.values if v)}",
                found=repr(value),
            )
        return value

    @contextmanager
    def as_given(self, value: str) -> Iterator[None]:
        """Override the variable for calls inside, on this thread; "" changes nothing.

        The environment itself is not changed. Processes that are started get overrides from
        `given`.
        """
        token = _given.set({**_given.get(), self.name: value} if value else _given.get())
        try:
            yield
        finally:
            _given.reset(token)


_given: ContextVar[Mapping[str, str]] = ContextVar("given", default=MappingProxyType({}))


def given() -> dict[str, str]:
    """The overrides that are active, by the names of variables."""
    return dict(_given.get())


BACKEND = EnvironmentVariable(
    "CODA_BACKEND",
    "where blocks run; by default on a Hopper or Blackwell GPU if there is one, else in torch",
    ("", "reference", "cuda", "sim"),
)
ARCH = EnvironmentVariable("CODA_ARCH", "the arch to lower for without a GPU", ARCHS, DEFAULT.arch)
CACHE_DIR = EnvironmentVariable(
    "CODA_CACHE_DIR", "where compiled kernels are kept between processes"
)
CACHE = EnvironmentVariable(
    "CODA_CACHE", "0: keep compiled kernels in this process only", ("0", "1"), "1"
)
FALLBACK = EnvironmentVariable(
    "CODA_FALLBACK",
    'what runs a model around its blocks under backend="coda"; by default inductor on a GPU',
    ("", "eager", "inductor"),
)

DISABLE = EnvironmentVariable(
    "CODA_DISABLE",
    "1: torch runs everything: blocks op by op, and models as if coda were not there",
    ("0", "1"),
    "0",
)
CHECK = EnvironmentVariable(
    "CODA_CHECK",
    "checks of a lowering: 0 none, 1 the block and the Program, 2 each stage and each law",
    ("0", "1", "2"),
    "1",
)
SHOW = EnvironmentVariable("CODA_SHOW", "stages of lowering to print on stderr, as in `laws,place`")

PROGRESS = EnvironmentVariable(
    "CODA_PROGRESS",
    "progress of what takes more than two seconds, on stderr; by default on a terminal alone",
    ("", "0", "1"),
)

VARIABLES = (BACKEND, ARCH, CACHE_DIR, CACHE, FALLBACK, DISABLE, CHECK, SHOW, PROGRESS)


def stages() -> Stages:
    """How a lowering is checked and shown, as the variables say. Raises CodaError."""
    from coda.runtime.progress import progress

    tell = partial(print, file=sys.stderr)
    return Stages(int(CHECK.get()), stage_names(SHOW.get(), SHOW.name), tell, progress)
