"""Arrays over a row's elements: the same answers as numpy's sorts and row-wise reductions."""

import numpy as np
import pytest

from coda.lowering.placement import arrays
from coda.lowering.placement.values import Refused, _union

RANDOM = np.random.default_rng(0)
TABLES = [
    RANDOM.integers(low, high, (n, k))
    for low, high in ((-1, 1), (-1, 3), (0, 40), (5, 6))
    for n, k in ((1, 1), (2, 2), (7, 1), (50, 2), (50, 3))
]


@pytest.mark.parametrize("table", TABLES)
def test_classes_are_those_of_unique_rows(table):
    first, which = arrays.classes(table)
    rows, at, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    assert np.array_equal(table[first], rows)
    assert np.array_equal(first, at)
    assert np.array_equal(which, inverse.reshape(-1))


@pytest.mark.parametrize("table", TABLES)
def test_questions_about_elements(table):
    column = table[:, 0]
    assert arrays.distinct(column) == np.unique(column).tolist()
    assert arrays.rows_are_equal(table) == (len(np.unique(table, axis=0)) == 1)
    assert arrays.any_set(table) == (table >= 0).any()
    assert arrays.all_set(table) == (table >= 0).all()
    index = RANDOM.integers(0, len(table), 9)
    assert np.array_equal(arrays.taken(table, index), table[index])


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_constant_is_like_a_full_array(count):
    for value in (-1, 3):
        same, full = arrays.constant(count, value), np.full(count, value)
        assert np.array_equal(same, full)
        assert same.dtype == full.dtype
        assert arrays.rows_are_equal(same)
        assert arrays.distinct(same) == [value] * min(1, count)
        assert arrays.any_set(same) == (full >= 0).any()
        assert arrays.all_set(same) == (full >= 0).all()
        if count:
            assert np.array_equal(arrays.taken(same, np.array([0, 0])), [value, value])


@pytest.mark.parametrize("seed", range(30))
def test_a_union_has_the_slots_of_all_operands(seed):
    random = np.random.default_rng(seed)
    pool = random.integers(0, 6, (4, 2))  # what an element may read: two columns, perhaps one
    operands = []
    for k in random.integers(1, 3, random.integers(1, 4)):
        drawn = [random.permuted(np.unique(row))[:k] for row in pool]
        padded = [np.pad(np.sort(d), (0, k - len(d)), constant_values=-1) for d in drawn]
        operands.append(np.array(padded))
    if seed % 3 == 0:  # a third column, in the first element
        operands.append(np.array([[9], [-1], [-1], [-1]]))
    read = [{int(c) for o in operands for c in o[i] if c >= 0} for i in range(4)]
    if max(map(len, read)) > 2:
        with pytest.raises(Refused, match=f"reads {max(map(len, read))} columns"):
            _union(operands, 2)
        return
    union, lanes = _union(operands, 2)
    assert [{int(c) for c in row if c >= 0} for row in union] == read
    assert union.shape[1] == max(map(len, read))
    for operand, lane in zip(operands, lanes, strict=True):
        assert np.array_equal(lane >= 0, operand >= 0)
        found = np.take_along_axis(union, np.maximum(lane, 0), 1)
        assert np.array_equal(np.where(lane >= 0, found, -1), operand)
