"""Cached files -> their bytes, verified against a SHA-256 digest before use.

Each file F that is loaded or run (an object, PTX, the shim) has its digest in F.sha256, which is
written first. A file without a digest, or with another one, is deleted with a warning and rebuilt.
A directory that other users may write to is not used at all: they could write the digest too.

An object's digest file also has the digest of the cubin inside, so that an object whose PTX is
missing is detected before it is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = re.compile(r"[0-9a-f]{64}")  # file names of objects by quack and flash-attention


class Damaged(Exception):
    """A cached file does not match its digest."""


def refusal(path: Path) -> str:
    """The reason why a directory cannot be a cache, or ""; created with mode 0700 if missing.

    It must belong to this user and be writable by this user alone.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if found.st_uid != os.geteuid():
            return (
                f"belongs to another user (uid {found.st_uid}), who may change the code that runs"
            )
        if stat.S_IMODE(found.st_mode) & 0o022:
            return f"is writable by other users: chmod go-w {path}"
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        return f"cannot be written ({e.strerror})"
    return ""


def digest_file(path: Path) -> Path:
    """Path of the digest of a file."""
    return path.with_name(path.name + ".sha256")


def write(path: Path, data: bytes) -> None:
    """Write a file and its digest, each atomically. Raises OSError."""
    _replace(digest_file(path), f"{hashlib.sha256(data).hexdigest()}\n".encode())
    _replace(path, data)


def record(path: Path, data: bytes, cubin: bytes | None = None) -> None:
    """Write the digest of a file that the caller will put in place. Raises OSError."""
    words = [hashlib.sha256(x).hexdigest() for x in (data, cubin) if x]
    _replace(digest_file(path), (" ".join(words) + "\n").encode())


def _replace(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if path.is_dir():
        discard(path)
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def words_of(path: Path) -> list[str]:
    """The words in the digest file of a file; empty if it does not exist."""
    try:
        return digest_file(path).read_text("ascii").split()
    except (OSError, UnicodeDecodeError):
        return []


def read(path: Path) -> bytes | None:
    """The bytes of a file; None if it does not exist.

    Raises Damaged if it does not match its digest, after deleting it with a warning.
    """
    try:
        if path.is_dir():
            raise Damaged("a directory is in its place")
        if not path.exists():
            return None
        data, words = path.read_bytes(), words_of(path)
        if not words:
            raise Damaged("it has no digest")
        if hashlib.sha256(data).hexdigest() != words[0]:
            raise Damaged("its digest does not match")
    except (OSError, Damaged) as e:
        spoil(path, str(e))
        raise Damaged(f"{path}: {e}") from e
    return data


def intact(path: Path) -> bool:
    """Whether a file exists and matches its digest; if not, it is deleted with a warning."""
    try:
        return read(path) is not None
    except Damaged:
        return False


def spoil(path: Path, why: str) -> None:
    """Delete a file that must not be used, with a RuntimeWarning that says why."""
    warnings.warn(
        f"the cached file {path} is not used: {why}; it is rebuilt", RuntimeWarning, stacklevel=2
    )
    discard(path)


def discard(path: Path) -> None:
    """Delete a file (or a directory in its place) and its digest."""
    for one in (path, digest_file(path)):
        try:
            if one.is_dir() and not one.is_symlink():
                shutil.rmtree(one, ignore_errors=True)
            else:
                one.unlink(missing_ok=True)
        except OSError:
            continue  # still not used: every read verifies the digest


Ours = Callable[[Path], bool]


def checked(
    load: Callable[..., Any], ours: Ours, whole: Callable[[str], bool]
) -> Callable[..., Any]:
    """`cute.runtime.load_module` that raises Damaged for kept objects that are not intact.

    Args:
        load: the original `load_module`.
        ours: whether a path is in a directory of cached objects; other objects are the user's.
        whole: whether the PTX exists for the digest of an object's cubin.
    """

    @functools.wraps(load)
    def load_module(file_path: str, *args: Any, **kwargs: Any) -> Any:
        path = Path(file_path)
        if ours(path):
            read(path)
            if not whole(words_of(path)[-1]):
                spoil(path, "the PTX of its cubin is missing")
                raise Damaged(f"{path}: the PTX of its cubin is missing")
        return load(file_path, *args, **kwargs)

    return load_module


def recorded(export: Callable[..., Any], ours: Ours) -> Callable[..., Any]:
    """`export_to_c` of a compiled function that also writes the digest of a cached object.

    Libraries export to a temporary name and rename it: the digest exists before the object.
    """

    @functools.wraps(export)
    def export_to_c(self: Any, object_file_path: str, *args: Any, **kwargs: Any) -> Any:
        found = export(self, object_file_path, *args, **kwargs)
        path = Path(object_file_path)
        name = NAME.search(path.name)
        if name and ours(path):
            cubin = getattr(getattr(self, "artifacts", None), "CUBIN", None)
            data = cubin if isinstance(cubin, bytes) else None
            record(path.with_name(f"{name[0]}.o"), path.read_bytes(), data)
        return found

    return export_to_c


def print_on_stderr(*words: Any) -> None:
    """Print quack's messages on objects that do not load: stdout is for results."""
    print(*words, file=sys.stderr)
