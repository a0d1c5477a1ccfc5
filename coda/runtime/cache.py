"""The directories of compiled kernels that persist between processes, and their size limit."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs

from coda.runtime import settings
from coda.sim.host.kept import discard, refusal

PARTS = ("kernels", "objects", "sim")
LIMIT = 2 << 30  # bytes; the objects used longest ago are deleted first


def cache_directory() -> Path:
    """`CODA_CACHE_DIR`, else the user's cache directory; private to the user (0700).

    A directory that others can write to, that another user owns, or that cannot be written is
    refused, since files loaded from it are executed. A temporary directory replaces it, with a
    warning.
    """
    return _usable(_chosen())


def _chosen() -> Path:
    chosen = settings.CACHE_DIR.get()
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("coda"))


def why_refused() -> str:
    """Why the chosen directory cannot keep kernels, with its path; "" if it can."""
    path = _chosen()
    why = next(filter(None, (refusal(p) for p in (path, *(path / n for n in PARTS)))), "")
    return why and f"{path} {why}"


@cache
def _usable(path: Path) -> Path:
    """The directory; if it is refused, a temporary one, with one warning."""
    why = why_refused()
    if why:
        warnings.warn(
            f"coda's cache {why}. Kernels are compiled again in each process; set "
            "CODA_CACHE_DIR to a directory of your own",
            RuntimeWarning,
            stacklevel=3,
        )
        return Path(_scratch().name)
    return path


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A temporary directory, deleted when the process exits."""
    return tempfile.TemporaryDirectory(prefix="coda-")


def kernel_directory() -> Path:
    """Emitted modules, as files that a debugger can open, and their PTX and cubins."""
    return cache_directory() / "kernels"


def object_directory() -> Path:
    """Compiled objects (quack's store)."""
    return cache_directory() / "objects"


def simulator_directory() -> Path:
    """The simulator's compiled kernels, and the PTX of each."""
    return cache_directory() / "sim"


def prune(limit: int = LIMIT) -> int:
    """Delete the objects used longest ago until at most `limit` bytes remain; returns how many."""
    found = objects()
    total, deleted = sum(o.size for o in found), 0
    for one in found:
        if total <= limit:
            break
        discard(one.path)
        total, deleted = total - one.size, deleted + 1
    return deleted


@dataclass(frozen=True, order=True)
class Object:
    """A compiled kernel in the cache.

    Attributes:
        used: when it was last used, in seconds since 1970.
        size: in bytes.
        path: of the file.
    """

    used: float
    size: int
    path: Path


def objects() -> list[Object]:
    """The compiled kernels of the cache, the one used longest ago first."""
    found: list[Object] = []
    for path in cache_directory().rglob("*.o"):
        try:
            known = path.stat()
        except OSError:
            continue  # another process deleted it
        found.append(Object(known.st_atime, known.st_size, path))
    return sorted(found)


def clear() -> None:
    """Delete everything that coda keeps between processes."""
    for name in PARTS:
        shutil.rmtree(cache_directory() / name, ignore_errors=True)
        (cache_directory() / name).mkdir(mode=0o700, exist_ok=True)
