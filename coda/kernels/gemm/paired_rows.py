"""quack's `gemm_epilogue` for a B whose rows are pairs of the weight's rows, read without a copy.

Row 2p + lane of B is row (p // split) · 2 · split + p % split + lane · split of the weight. This is
a layout of three modes, which TMA boxes can traverse. With split = 2:

    weight rows    0 1 2 3 | 4 5 6 7
    B rows         0 2 1 3 | 4 6 5 7    as rows (2, 2, 2) with strides (2, 1, 4)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from quack.epilogue.frontend import EpiMod

from coda.kernels.gemm.relaid import Relaid


def gemm_epilogue(split: int, groups: int, **options: Any) -> Callable[[Any], EpiMod]:
    """As quack's, for a B [groups · 2 · split, K] whose row pairs are `split` rows apart."""
    return lambda fn: Relaid(fn, Halves(split, groups), **options)


@dataclass(frozen=True)
class Halves:
    """B with its rows in pairs that are `split` rows apart, in `groups` groups of pairs."""

    split: int
    groups: int

    def operands(self, a: Any, b: Any) -> tuple[Any, Any]:
        """(A, B) in the order in which the mainloop reads them."""
        return a, by_halves(b, self.split, self.groups)

    def tile(self, name: str, x: Any) -> Any:
        """The matrix of a store, unchanged."""
        return x


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
