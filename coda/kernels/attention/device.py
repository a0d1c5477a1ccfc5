"""Functions that generated functions of scores call, and the form in which they are called."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from coda.kernels.device_math import maximum, minimum, ne


def element(x: Any, *index: Any) -> Any:
    """x[index] as float32 or a whole number; an index outside x is moved to its first or last."""
    at = [0 if isinstance(i, float) else _inside(i, n) for i, n in zip(index, x.shape, strict=True)]
    found = x[tuple(at)]
    if x.element_type.is_float or x.element_type is cutlass.Uint8:
        return found.to(Float32)
    return found


def _inside(i: Any, count: Any) -> Any:
    """An index, within [0, count)."""
    return maximum(minimum(i, count - 1), Int32(0))


def whole32(a: Any) -> Any:
    """A number as an Int32, rounded towards 0."""
    return Int32(int(a)) if isinstance(a, float) else a.to(Int32)


def whole64(a: Any) -> Any:
    """A number as an Int64, rounded towards 0."""
    return Int64(int(a)) if isinstance(a, float) else a.to(Int64)


def real(a: Any) -> Any:
    """A whole number as a float32."""
    return a.to(Float32)


def condition(a: Any) -> Any:
    """1.0 where a number is not 0, else 0.0."""
    return ne(a, 0.0)


def by_lanes(text: str, shared: int = 1) -> Callable[..., Any]:
    """The function `score` of a module as a `score_mod` of flash-attention, which has lanes.

    Its hash is that of the text: flash-attention's own hash ignores the functions that are called.

    Args:
        text: the module.
        shared: how many heads of queries the caller takes for rows of one, though they are none:
            row i of head h is given as row i // shared of head h · shared + i % shared.
    """
    digest = sha256(text.encode()).hexdigest()
    file = f"<scores {digest[:16]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    names: dict[str, Any] = {}
    exec(compile(text, file, "exec"), names)
    score = names["score"]

    def program(
        *given: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any,
        aux_tensors: Any, aux_scalars: Any = (),
    ) -> Any:  # fmt: skip
        *values, b, h = given
        count = cute.size(kv_idx.shape)
        found = cute.make_rmem_tensor(count, Float32)
        for k in range(count):
            head, row = h[k], q_idx[k]
            if shared > 1:
                head, row = head // shared, row * shared + head % shared
            found[k] = score(*(x[k] for x in values), b[k], head, row, kv_idx[k], aux_scalars)
        return found.load()

    vars(program)["__cute_hash__"] = digest
    return program
