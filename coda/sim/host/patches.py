"""Attributes, environment variables and caches -> temporary values, with an undo."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import ChainMap
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from typing import Any

_MISSING = object()


class Patches:
    """Changes that `undo` reverts, the last one first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module, class or object."""
        old = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)

        def restore() -> None:
            if old is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, old)

        self._undo.append(restore)

    def contents(self, cache: dict[Any, Any], inside: dict[Any, Any]) -> None:
        """Swap a dictionary's contents for `inside`; undo writes new entries back to `inside`."""
        outside = dict(cache)
        cache.clear()
        cache.update(inside)

        def restore() -> None:
            inside.clear()
            inside.update(cache)
            cache.clear()
            cache.update(outside)

        self._undo.append(restore)

    def on_undo(self, action: Callable[[], object]) -> None:
        """Register an action for `undo`."""

        def restore() -> None:
            action()

        self._undo.append(restore)

    def undo(self) -> None:
        """Revert all changes, the last one first."""
        while self._undo:
            self._undo.pop()()


class OsWith:
    """The module `os` with other environment variables, for a library that reads them there.

    The environment of the process stays as it is. `here` says whether a caller sees `values`.
    """

    def __init__(self, values: Mapping[str, str], here: Callable[[], bool]) -> None:
        self._values, self._here = values, here

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @property
    def environ(self) -> Mapping[str, str]:
        """The variables."""
        return ChainMap(dict(self._values), os.environ) if self._here() else os.environ

    def getenv(self, name: str, default: str | None = None) -> str | None:
        """One variable."""
        return self.environ.get(name, default)


class _Then(Loader):
    """A loader that calls `then` after it executed a module."""

    def __init__(self, loader: Loader, then: Callable[[], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then()


class OnImport(MetaPathFinder):
    """Calls an action for each module: at once if it is imported, else after its import."""

    def __init__(self, actions: Mapping[str, Callable[[], None]]) -> None:
        self.waiting = dict(actions)
        for name in [n for n in self.waiting if n in sys.modules]:
            self.waiting.pop(name)()
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Stop watching imports."""
        sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in self.waiting:
            return None
        action = self.waiting.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, action)
        return spec
