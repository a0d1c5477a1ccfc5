"""Functions that emitted row-wise kernels call: vector loads and stores, reductions over a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from quack.epilogue.math import F2

from coda.kernels.device_folds import moments_merge, pivot, weighted, weighted_merge
from coda.kernels.device_math import maximum, minimum

__all__ = ["moments_merge", "weighted_merge"]  # emitted modules import them from here

LANES = 32
NEG_INF = -math.inf
MOST = 3.4028234663852886e38  # the largest finite float32


def vectors(x: Any, size: int, count: int) -> list[Any]:
    """Registers for `count` vectors of `size` elements of `x`, uninitialised."""
    layout = cute.make_layout(size)
    return [cute.make_rmem_tensor(layout, x.element_type) for _ in range(count)]


def fill(held: Any, x: Any, row: Any, index: Any) -> None:
    """Load vector `index` of row `row`, as many contiguous elements as `held` has."""
    cute.autovec_copy(cute.local_tile(x[row, None], (cute.size(held),), (index,)), held)


def wide(held: Any) -> Any:
    """A vector in registers as float32; two bf16 of a word by a shift and a mask."""
    size = cute.size(held)
    found = vector(size)
    if held.element_type is not cutlass.BFloat16 or size % 2:
        found.store(held.load().to(Float32))
        return found
    words, bits = cute.recast_tensor(held, Int32), cute.recast_tensor(found, Int32)
    for i in range(size // 2):
        bits[2 * i], bits[2 * i + 1] = words[i] << 16, words[i] & Int32(-65536)
    return found


def wide_if(inside: Any, held: Any) -> Any:
    """A vector in registers as float32, or zeros if it is not there."""
    found = wide(held)
    for i in range(cute.size(found)):
        found[i] = cutlass.select_(inside, found[i], Float32(0.0))
    return found


def load(x: Any, row: Any, index: Any, count: int) -> Any:
    """Load vector `index` of row `row`: `count` contiguous elements, as float32 in registers."""
    (held,) = vectors(x, count, 1)
    fill(held, x, row, index)
    return wide(held)


def numbers(index: Any, count: int) -> Any:
    """The numbers of the columns of vector `index`, in float32: index · count + 0, 1, …"""
    made = vector(count)
    for i in range(count):
        made[i] = Float32(index * count + i)
    return made


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


def zero_vectors(size: int, count: int) -> list[Any]:
    """Registers with `count` vectors of `size` float32 zeros."""
    return [zeros(size) for _ in range(count)]


def add_to(to: Any, j: int, value: Any) -> None:
    """Add a value to element `j` of registers."""
    to[j] = to[j] + value


def two(x: Any, at: int, step: int) -> F2:
    """Elements `at` and `at + step` of registers."""
    return F2(x[at], x[at + step])


def both(value: Any) -> F2:
    """A value for two elements."""
    return F2(value, value)


def put(to: Any, at: int, step: int, value: Any) -> None:
    """Assign two values, or one for both, to elements `at` and `at + step` of registers."""
    to[at], to[at + step] = value if isinstance(value, tuple) else (value, value)


def add_two(to: Any, at: int, step: int, value: Any) -> None:
    """Add two values to elements `at` and `at + step` of registers."""
    put(to, at, step, two(to, at, step) + value)


def into(state: Any, values: F2, merge: Callable[[Any, Any], Any]) -> Any:
    """A state, merged with those of two values."""
    return merge(merge(state, values[0]), values[1])


def room(count: int) -> Any:
    """Allocate `count` float32 values in shared memory."""
    allocator = cutlass.utils.SmemAllocator()
    return allocator.allocate_tensor(Float32, cute.make_layout(count), 16)


def rooms(planes: int, count: int) -> list[Any]:
    """Allocate `count` states of so many planes in shared memory."""
    return [room(count) for _ in range(planes)]


def keep(rooms: Sequence[Any], at: Any, state: Any) -> None:
    """Write a state to slot `at` of shared memory."""
    for plane, x in zip(rooms, state if isinstance(state, tuple) else (state,), strict=True):
        plane[at] = x


def kept(rooms: Sequence[Any], at: Any) -> Any:
    """Read the state in slot `at` of shared memory."""
    found = tuple(plane[at] for plane in rooms)
    return found if len(found) > 1 else found[0]


def over_lanes(state: Any, merge: Callable[[Any, Any], Any], lanes: int = LANES) -> Any:
    """The merged states of each aligned group of `lanes` lanes of a warp, in all of them."""
    offset = lanes // 2
    while offset:
        if isinstance(state, tuple):
            other = tuple(cute.arch.shuffle_sync_bfly(p, offset=offset) for p in state)
        else:
            other = cute.arch.shuffle_sync_bfly(state, offset=offset)
        state = merge(state, other)
        offset //= 2
    return state


def sum_merge(a: Any, b: Any) -> Any:
    """a + b."""
    return a + b


def prod_merge(a: Any, b: Any) -> Any:
    """a · b."""
    return a * b


def max_merge(a: Any, b: Any) -> Any:
    """The larger value; NaN if either is NaN."""
    return maximum(a, b)


def min_merge(a: Any, b: Any) -> Any:
    """The smaller value; NaN if either is NaN."""
    return minimum(a, b)


def lse_merge(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    """Merge (top, Σ exp(x − top)) of two parts.

    `top` is the maximum as a finite float32: at least −MOST, at most MOST, and without regard to
    NaN. So no difference is infinite minus infinite: x = ∞ makes the sum ∞, NaN makes it NaN, and
    no value, or only −∞, makes it 0.
    """
    top = cute.arch.fmax(a[0], b[0])
    return top, a[1] * _exp(a[0] - top) + b[1] * _exp(b[0] - top)


def _exp(x: Any) -> Any:
    return cute.math.exp(x, fastmath=True)


def _values(values: Any) -> Sequence[Any]:
    return values if isinstance(values, tuple) else [values[i] for i in range(cute.size(values))]


def lse_step(state: tuple[Any, Any], values: Any) -> tuple[Any, Any]:
    """Add values, a tuple or registers, to a state of `lse_merge`; its sum is rescaled once."""
    top, total = state
    several = _values(values)
    for x in several:
        top = cute.arch.fmax(top, x)
    top = cute.arch.fmin(top, Float32(MOST))
    total = total * _exp(state[0] - top)
    for x in several:
        total = total + _exp(x - top)
    return top, total


def lse_finish(state: tuple[Any, Any]) -> Any:
    """log Σ exp of a state (top, Σ exp(x − top))."""
    return state[0] + cute.math.log(state[1], fastmath=True)


def weighted_step(state: tuple[Any, Any, Any], scores: Any, values: Any) -> tuple[Any, Any, Any]:
    """Add pairs of a score and a value, tuples or registers, to a state of `weighted_merge`."""
    return weighted_merge(state, weighted(_values(scores), _values(values)))


def weighted_finish(state: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """log Σ exp s and the mean of a state; NaN where the weights are not numbers, as in torch."""
    some = (state[1] > Float32(0.0)) & (state[1] < Float32(math.inf))
    return lse_finish(state[:2]), cutlass.select_(some, state[2], Float32(math.nan))


def moments_step(state: tuple[Any, Any, Any], values: Any) -> tuple[Any, Any, Any]:
    """Add values, a tuple or registers, to a state (count, mean, Σ(x − mean)²).

    Their own mean is computed first, about one of them, and then the squares about that mean.
    """
    several = _values(values)
    near = pivot(several[0], len(several))
    total = Float32(0.0)
    for x in several:
        total = total + (x - near)
    mean = near + total * Float32(1.0 / len(several))
    squares = Float32(0.0)
    for x in several:
        squares = squares + (x - mean) * (x - mean)
    return moments_merge(state, (Float32(len(several)), mean, squares))


def zero() -> Any:
    """0 as a float32."""
    return Float32(0.0)


def one() -> Any:
    """1 as a float32."""
    return Float32(1.0)


def lowest() -> Any:
    """−inf as a float32."""
    return Float32(NEG_INF)


def least_finite() -> Any:
    """The least finite float32."""
    return Float32(-MOST)


def highest() -> Any:
    """+inf as a float32."""
    return Float32(math.inf)
