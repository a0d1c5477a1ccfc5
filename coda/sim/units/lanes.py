"""Masks and scalars -> arrays [warps, 32]: small functions on the hot path."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, int]
count_true = np.count_nonzero
lowest = np.minimum.reduce


def spread(x: Any, shape: Shape) -> Array:
    """Broadcast a value to an array [warps, 32]."""
    if isinstance(x, np.ndarray) and x.shape == shape:
        return x
    return np.broadcast_to(x, shape)


@lru_cache(1024)
def all_lanes(shape: Shape) -> Array:
    """The mask with all lanes, bool [warps, 32]; read-only, as it is cached."""
    mask = np.ones(shape, bool)
    mask.flags.writeable = False
    return mask


def both(m: Any, condition: Any, shape: Shape) -> Any:
    """Lanes of the mask `m` where the condition holds; None for all lanes."""
    condition = spread(condition, shape)
    if m is None:
        return None if count_true(condition) == condition.size else condition
    return m & condition
