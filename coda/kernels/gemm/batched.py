"""quack's `gemm_epilogue` for operands of two batch axes, or shared by batches, without a copy.

The host passes an operand as [L, R, C] with one stride for the batch index; `BatchStrides` says
which strides its outer and its inner part have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from quack.epilogue.frontend import EpiMod

from coda.kernels.gemm.batches import BatchStrides
from coda.kernels.gemm.relaid import Relaid


def gemm_epilogue(
    inner: int, a: str, b: str, tiles: Mapping[str, str] | None = None, **options: Any
) -> Callable[[Any], EpiMod]:
    """As quack's, for a batch whose inner index has size `inner`.

    `a`, `b` and `tiles` name the `BatchStrides` of A, B and of those matrices of the epilogue,
    stored or loaded, that are not plain.
    """
    steps = tuple((tiles or {}).items())
    return lambda fn: Relaid(fn, Strides(inner, a, b, steps), **options)


@dataclass(frozen=True)
class Strides:
    """Matrices with a batch index of two parts; `a`, `b` and `tiles` name `BatchStrides`."""

    inner: int
    a: str
    b: str
    tiles: tuple[tuple[str, str], ...] = ()

    def tile(self, name: str, x: Any) -> Any:
        """A matrix of the epilogue with both strides of the batch index."""
        step = dict(self.tiles).get(name)
        return x if step is None else _strided(x, self.inner, BatchStrides[step])

    def operands(self, a: Any, b: Any) -> tuple[Any, Any]:
        """(A, B) with both strides of the batch index."""
        return _strided(a, self.inner, BatchStrides[self.a]), _strided(
            b, self.inner, BatchStrides[self.b]
        )


def _strided(x: Any, inner: int, step: BatchStrides) -> Any:
    """[R, C, L] with stride s of L -> [R, C, (inner, L / inner)], an alias."""
    axis = 0 if cute.is_static(x.stride[1]) else 1  # the axis that is not contiguous
    stride, every = x.stride[2], x.shape[axis] * x.stride[axis]
    strides: Any = {
        BatchStrides.PLAIN: (stride, stride * inner),
        BatchStrides.NESTED: (stride, every),
        BatchStrides.SHARED: (0, 0),
        BatchStrides.SHARED_INSIDE: (0, every),
        BatchStrides.SHARED_OUTSIDE: (every, 0),
    }[step]
    shape = (*x.shape[:2], (inner, x.shape[2] // inner))
    return cute.make_tensor(x.iterator, cute.make_layout(shape, stride=(*x.stride[:2], strides)))
