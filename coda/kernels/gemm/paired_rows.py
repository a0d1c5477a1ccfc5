"""quack's `gemm_epilogue` for a weight whose rows are wanted in pairs, read as it lies.

Row 2p + lane of the kernel's B is row (p // split) · 2 · split + p % split + lane · split of the
weight: a layout of three modes, which TMA's boxes follow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import cutlass.cute as cute
from quack.epilogue.frontend import EpiMod


def gemm_epilogue(split: int, groups: int, **options: Any) -> Callable[[Any], EpiMod]:
    """As quack's, for a B of `groups` groups of rows, each with its partners `split` rows apart."""
    return lambda fn: _ByHalves(fn, split, groups, **options)


class _ByHalves(EpiMod):
    """An epilogue whose kernels see B under another layout."""

    def __init__(self, fn: Any, split: int, groups: int, **options: Any) -> None:
        super().__init__(fn, **options)
        self.split, self.groups = split, groups
        self.semantic_key = (*self.semantic_key, "halves", split, groups)
        self.semantic_digest = hashlib.sha256(repr(self.semantic_key).encode()).hexdigest()
        self._derived: dict[type, type] = {}

    def _mint(self, *key: Any) -> Any:  # type: ignore[override]
        plain = super()._mint(*key)
        if plain not in self._derived:
            members = {"halves": (self.split, self.groups), "__module__": __name__}
            name = f"{plain.__name__}_{self.split}x{self.groups}"
            self._derived[plain] = type(name, (_Halves, plain), members)
        return self._derived[plain]


class _Halves:
    """A GEMM that views B so before it makes the tensor map."""

    halves: tuple[int, int]

    def rotate_batch_last(self, mA: Any, mB: Any, *rest: Any, **options: Any) -> Any:
        a, b, *others = super().rotate_batch_last(mA, mB, *rest, **options)  # type: ignore[misc]
        return a, by_halves(b, *self.halves), *others


def by_halves(b: Any, split: int, groups: int) -> Any:
    """B [N, K, L] with its rows as (2, split, groups); as (2, split) where there is one group."""
    step = b.stride[0]
    rows: Any = (2, cute.size(b, mode=[0]) // 2)
    steps: Any = (split * step, step)
    if groups > 1:
        rows = (2, split, cute.size(b, mode=[0]) // (2 * split))
        steps = (split * step, step, 2 * split * step)
    layout = cute.make_layout((rows, *b.shape[1:]), stride=(steps, *b.stride[1:]))
    return cute.make_tensor(b.iterator, layout)
