"""Reductions over rows of numbers in memory: each result reads a contiguous line of them."""

import pytest

import coda
from coda.ir.dims import product
from coda.ir.graph import Input, Reduce
from coda.ir.types import f32
from coda.lowering.placement.columns import Space
from coda.lowering.placement.values import Refused


def placed(shape, axis):
    """A sum over an axis of H numbers, whose count only a call knows, in a row-wise kernel."""
    numbers = Input("numbers", coda.Tensor[shape].shape, f32)
    node = Reduce("sum", numbers, axis)
    sizes = {"B": 2, "S": 72}
    space = Space(1, product(node.shape), sizes, whole_rows=True)
    space.leaf = lambda n: "numbers" if n is numbers else None
    space.compute(node)
    return space.lines


def test_the_last_axis_is_a_line():
    assert len(placed("B S H", -1)) == 1
    assert len(placed("B S H 1", -2)) == 1


def test_numbers_of_a_result_that_are_apart_are_no_line():
    """[B, H, S] summed over H: the numbers of one result are S apart."""
    for shape, axis in (("B H S", -2), ("B H S 1", -3), ("H S", -2)):
        with pytest.raises(Refused, match="over rows of what is not in memory"):
            placed(shape, axis)
