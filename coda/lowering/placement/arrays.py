"""Integer arrays over the n elements of a row, [n] or [n, columns]: compared, indexed, classified.

Lowering has one such array for each fact about a value, tens of thousands of rows long and a few
columns wide. numpy reduces over a short last axis row by row, and sorts to find distinct values, so
both are avoided here. Rows that are all equal are common, and tested first:

    rows_are_equal([[3 0], [3 0], [3 0]])    True
    distinct([2 0 2 -1])                     [-1 0 2]
    classes([[7 1], [3 0], [7 1]])           first [1 0], which [1 0 1]
"""

from __future__ import annotations

import numpy as np

from coda.lowering.program.body import Ints


def constant(count: int, value: int) -> Ints:
    """[count] int64, read-only: one number in memory, repeated by a stride of 0."""
    return np.ndarray((count,), np.int64, np.int64(value), 0, (0,))


def rows_are_equal(a: Ints) -> bool:
    """Whether all rows of an array are equal."""
    return a.size == 0 or a.strides[0] == 0 or bool((a == a[:1]).all())


def any_set(a: Ints) -> bool:
    """Whether an array has an element that is not -1, which stands for none."""
    return a.size > 0 and int((a[:1] if a.strides[0] == 0 else a).max()) >= 0


def all_set(a: Ints) -> bool:
    """Whether no element of an array is -1."""
    return a.size == 0 or int((a[:1] if a.strides[0] == 0 else a).min()) >= 0


def taken(a: Ints, index: Ints) -> Ints:
    """The rows of an array at an index [m]."""
    if a.ndim == 1 and (len(a) == 1 or (len(a) and a.strides[0] == 0)):
        return constant(len(index), int(a[0]))
    return a.take(index, 0)


def distinct(a: Ints) -> list[int]:
    """The distinct elements of an array [n], in ascending order; none is below -1."""
    if rows_are_equal(a):
        return [int(v) for v in a[:1]]
    return [int(v) - 1 for v in np.flatnonzero(np.bincount(a + 1))]


def classes(a: Ints) -> tuple[Ints, Ints]:
    """The classes of equal rows of an array [n, columns], in lexicographic order of the rows.

    Returns:
        The first row of each class, and the class of each row.
    """
    if rows_are_equal(a):
        return np.zeros(min(1, len(a)), np.int64), np.zeros(len(a), np.int64)
    code = np.zeros(len(a), np.int64)
    for column in a.T:
        low, high = int(column.min()), int(column.max())
        if low < high:
            code = _ranked(code * (high - low + 1) + (column - low))
    count = int(code.max()) + 1
    first = np.empty(count, np.int64)
    first[code[::-1]] = np.arange(len(a) - 1, -1, -1)  # the last that is written is the first row
    return first, code


def _ranked(code: Ints) -> Ints:
    """[n] int64: the number of distinct smaller elements, for each element of a code [n] >= 0."""
    seen = np.zeros(int(code.max()) + 1, np.int64)
    seen[code] = 1
    return (seen.cumsum() - 1).take(code)
