"""quack's epilogue modules for kernels that access matrices through other layouts than they have.

The tensors of a launch have the sizes of the GEMM's operands; while the kernel is traced, a change
gives them their strides, before the tensor maps are made. quack makes a class for each epilogue;
each is derived here once more, with a mixin for that and one for the stages of pipelines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

from quack.epilogue.frontend import EpiMod
from quack.epilogue.ops import TileLoad, TileStore

from coda.kernels.gemm.staged import Staged
from coda.kernels.gemm.two_columns import TwoColumns


class Change(Protocol):
    """New layouts for the matrices of a GEMM; a frozen dataclass."""

    def operands(self, a: Any, b: Any) -> tuple[Any, Any]:
        """A [M, K, L] and B [N, K, L] as the mainloop reads them."""
        ...

    def tile(self, name: str, x: Any) -> Any:
        """A matrix [M, N, L] as the epilogue writes or reads it; "D" is the GEMM's own store."""
        ...


def gemm_epilogue(**options: Any) -> Callable[[Any], EpiMod]:
    """As quack's, for operands that are read as they are."""
    return lambda fn: Relaid(fn, None, **options)


class Relaid(EpiMod):
    """An epilogue module whose kernels access their matrices as `change` lays them out.

    `change` is part of the kernel's identity; None changes nothing.
    """

    def __init__(
        self, fn: Any, change: Change | None, *, two_columns: bool = False, **options: Any
    ) -> None:
        super().__init__(fn, **options)
        self.change, self.two_columns = change, two_columns
        self.semantic_key = (*self.semantic_key, repr(change), two_columns)
        self.semantic_digest = hashlib.sha256(repr(self.semantic_key).encode()).hexdigest()
        self._ident = f"{fn.__name__}_{self.semantic_digest[:16]}"
        self._derived: dict[type, type] = {}

    def _mint(self, *key: Any) -> Any:  # type: ignore[override]
        plain = super()._mint(*key)
        if plain not in self._derived:
            members: dict[str, Any] = {"change": self.change, "__module__": __name__}
            name = f"{plain.__name__}_{hashlib.sha256(repr(self.change).encode()).hexdigest()[:16]}"
            mixins = (_Relaid,) * (self.change is not None) + (TwoColumns,) * self.two_columns
            self._derived[plain] = type(name, (*mixins, Staged, plain), members)
        return self._derived[plain]


class _Relaid:
    """A mixin of a GEMM class that changes the layouts of its matrices."""

    change: Change

    def rotate_batch_last(self, mA: Any, mB: Any, *rest: Any, **options: Any) -> Any:
        a, b, d, c, arguments = super().rotate_batch_last(mA, mB, *rest, **options)  # type: ignore[misc]
        d = None if d is None else self.change.tile("D", d)
        tiles = TileStore | TileLoad
        ops = (op.name for op in getattr(self, "_epi_ops", ()) if isinstance(op, tiles))
        found = {n: x for n in ops if (x := getattr(arguments, n, None)) is not None}
        changed = {n: self.change.tile(n, x) for n, x in found.items()}
        if changed:
            arguments = arguments._replace(**changed)
        return *self.change.operands(a, b), d, c, arguments
