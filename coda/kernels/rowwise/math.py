"""Functions that emitted row-wise kernels call: vector loads and stores, warp reductions."""

from __future__ import annotations

import math
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from coda.kernels.device_math import maximum, minimum, moments_merge

LANES = 32
NEG_INF = -math.inf


def load(x: Any, row: Any, index: Any, count: int) -> Any:
    """Load vector `index` of row `row`: `count` contiguous elements, as float32 in registers."""
    part = cute.local_tile(x[row, None], (count,), (index,))
    held = cute.make_rmem_tensor(part.layout, part.element_type)
    cute.autovec_copy(part, held)
    wide = cute.make_rmem_tensor(part.layout, Float32)
    wide.store(held.load().to(Float32))
    return wide


def by_row(x: Any) -> Any:
    """[..., columns], whose other axes are those of the rows from inner to outer, as a matrix."""
    return cute.group_modes(x, 0, cute.rank(x) - 1)


def store(x: Any, row: Any, index: Any, values: Any) -> None:
    """Store a float32 vector as vector `index` of row `row`, rounded to the dtype of `x`."""
    part = cute.local_tile(x[row, None], (cute.size(values),), (index,))
    held = cute.make_rmem_tensor(part.layout, part.element_type)
    held.store(values.load().to(part.element_type))
    cute.autovec_copy(held, part)


def vector(count: int) -> Any:
    """Registers for `count` float32 values, uninitialised."""
    return cute.make_rmem_tensor(cute.make_layout(count), Float32)


def zeros(count: int) -> Any:
    """Registers with `count` float32 zeros."""
    made = vector(count)
    made.fill(0.0)
    return made


def room(count: int) -> Any:
    """Allocate `count` float32 values in shared memory."""
    allocator = cutlass.utils.SmemAllocator()
    return allocator.allocate_tensor(Float32, cute.make_layout(count), 16)


def _over_lanes(planes: tuple[Any, ...], merge: Any, lanes: int = LANES) -> tuple[Any, ...]:
    offset = lanes // 2
    while offset:
        others = tuple(cute.arch.shuffle_sync_bfly(p, offset=offset) for p in planes)
        planes = merge(planes, others)
        offset //= 2
    return planes


def warp_sum(x: Any) -> Any:
    """The sum over the lanes of a warp."""
    return _over_lanes((x,), lambda a, b: (a[0] + b[0],))[0]


def lanes_sum(x: Any, lanes: int) -> Any:
    """The sum over each aligned group of `lanes` lanes of a warp."""
    return _over_lanes((x,), lambda a, b: (a[0] + b[0],), lanes)[0]


def warp_max(x: Any) -> Any:
    """The maximum over the lanes of a warp; NaN if any is NaN."""
    return _over_lanes((x,), lambda a, b: (maximum(a[0], b[0]),))[0]


def warp_min(x: Any) -> Any:
    """The minimum over the lanes of a warp; NaN if any is NaN."""
    return _over_lanes((x,), lambda a, b: (minimum(a[0], b[0]),))[0]


def lse_merge(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    """Merge (max, Σ exp(x − max)) of two parts."""
    top = maximum(a[0], b[0])
    base = cutlass.select_(top == Float32(NEG_INF), Float32(0.0), top)
    return top, a[1] * _exp(a[0] - base) + b[1] * _exp(b[0] - base)


def _exp(x: Any) -> Any:
    return cute.math.exp(x, fastmath=True)


def lse_step(state: tuple[Any, Any], x: Any) -> tuple[Any, Any]:
    """Add a value to a state (max, Σ exp(x − max))."""
    return lse_merge(state, (x, Float32(1.0)))


def warp_lse(state: tuple[Any, Any]) -> Any:
    """log Σ exp over the lanes of a warp, from their states (max, Σ exp(x − max))."""
    top, total = _over_lanes(state, lse_merge)
    return cutlass.select_(top == Float32(math.inf), top, top + cute.math.log(total, fastmath=True))


def warp_moments(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """(count, mean, Σ(x − mean)²) over the lanes of a warp."""
    return _over_lanes(state, moments_merge)


def zero() -> Any:
    """0 as a float32."""
    return Float32(0.0)


def lowest() -> Any:
    """−inf as a float32."""
    return Float32(NEG_INF)


def highest() -> Any:
    """+inf as a float32."""
    return Float32(math.inf)
