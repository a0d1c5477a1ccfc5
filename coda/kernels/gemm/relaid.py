"""quack's epilogue modules for kernels that read A and B through other layouts than they have.

The tensors of a launch have the sizes of the GEMM's operands; while the kernel is traced, a change
gives them their strides, before the tensor maps are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from quack.epilogue.frontend import EpiMod

Change = Callable[[Any, Any], tuple[Any, Any]]  # (A, B) -> (A, B)


class Relaid(EpiMod):
    """An epilogue module whose kernels read A [M, K, L] and B [N, K, L] as `change` lays them out.

    `change` is a frozen dataclass, and is part of the kernel's identity.
    """

    def __init__(self, fn: Any, change: Change, **options: Any) -> None:
        super().__init__(fn, **options)
        self.change = change
        self.semantic_key = (*self.semantic_key, repr(change))
        self.semantic_digest = hashlib.sha256(repr(self.semantic_key).encode()).hexdigest()
        self._derived: dict[type, type] = {}

    def _mint(self, *key: Any) -> Any:  # type: ignore[override]
        plain = super()._mint(*key)
        if plain not in self._derived:
            members = {"change": staticmethod(self.change), "__module__": __name__}
            name = f"{plain.__name__}_{hashlib.sha256(repr(self.change).encode()).hexdigest()[:16]}"
            self._derived[plain] = type(name, (_Relaid, plain), members)
        return self._derived[plain]


class _Relaid:
    """A mixin of a GEMM class that changes the layouts of A and B."""

    change: Change

    def rotate_batch_last(self, mA: Any, mB: Any, *rest: Any, **options: Any) -> Any:
        a, b, *others = super().rotate_batch_last(mA, mB, *rest, **options)  # type: ignore[misc]
        return *self.change(a, b), *others
