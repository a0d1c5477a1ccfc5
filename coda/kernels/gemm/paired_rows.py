"""quack's `gemm_epilogue` for a B whose rows are pairs of the weight's rows, read without a copy.

Row 2p + lane of B is row (p // split) · 2 · split + p % split + lane · split of the weight. This is
a layout of three modes, which TMA boxes can traverse. With split = 2:

    weight rows    0 1 2 3 | 4 5 6 7
    B rows         0 2 1 3 | 4 6 5 7    as rows (2, 2, 2) with strides (2, 1, 4)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import cutlass.cute as cute
from quack.epilogue.frontend import EpiMod


def gemm_epilogue(split: int, groups: int, **options: Any) -> Callable[[Any], EpiMod]:
    """As quack's, for a B [groups · 2 · split, K] whose row pairs are `split` rows apart."""
    return lambda fn: _ByHalves(fn, split, groups, **options)


class _ByHalves(EpiMod):
    """An epilogue module whose kernels read B through the layout of `by_halves`."""

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
    """A mixin of a GEMM class that applies `by_halves` to B before the tensor map is made."""

    halves: tuple[int, int]

    def rotate_batch_last(self, mA: Any, mB: Any, *rest: Any, **options: Any) -> Any:
        a, b, *others = super().rotate_batch_last(mA, mB, *rest, **options)  # type: ignore[misc]
        return a, by_halves(b, *self.halves), *others


def by_halves(b: Any, split: int, groups: int) -> Any:
    """B [N, K, L] -> [(2, split, groups), K, L], an alias; [(2, split), K, L] for one group."""
    step = b.stride[0]
    rows: Any = (2, cute.size(b, mode=[0]) // 2)
    steps: Any = (split * step, step)
    if groups > 1:
        rows = (2, split, cute.size(b, mode=[0]) // (2 * split))
        steps = (split * step, step, 2 * split * step)
    layout = cute.make_layout((rows, *b.shape[1:]), stride=(steps, *b.stride[1:]))
    return cute.make_tensor(b.iterator, layout)
