"""The check of Programs finds what it is there for."""

from dataclasses import replace

import pytest

from coda.errors import InternalError
from coda.ir.text import parse
from coda.kernels.rowwise.kind import ROWWISE
from coda.lowering.compiler import lower
from coda.lowering.program.epilogue import ReduceColumns
from coda.lowering.program.verify import verify_program

GATED = """
block gated(%x: [M, 64] bf16, %w: [64, 64] bf16, %v: [64, 64] bf16, %g: [64] bf16) {
  %0 = contract %x, %w bf16
  %1 = mul %0, %g
  %2 = mean %1 axis -1
  %3 = mul %1, %2
  %4 = contract %3, %v bf16
  return y = %4
}
"""


@pytest.fixture
def program():
    return lower(parse(GATED), {"M": 8})


def test_a_program_passes(program):
    verify_program(program, "place")
    assert len(program.kernels) == 2  # as many as the tests below take away


@pytest.mark.parametrize("lost", [0, 1])
def test_a_kernel_that_is_lost_is_missed(program, lost):
    kernels = program.kernels
    program = replace(program, kernels=(*kernels[:lost], *kernels[lost + 1 :]))
    with pytest.raises(InternalError, match=r"before it is written"):
        verify_program(program, "place")


def test_an_order_that_is_wrong_is_noticed(program):
    with pytest.raises(InternalError, match="before it is written"):
        verify_program(replace(program, kernels=program.kernels[::-1]), "place")


def test_a_matrix_that_is_narrower_than_what_is_loaded_is_noticed():
    program = lower(
        parse("""block over(%x: [M, 64] bf16) {
          %0 = mean %x axis -1
          %1 = mul %x, %0
          return y = %1
        }"""),
        {"M": 8},
    )
    (kernel,) = program.kernels
    assert kernel.kind is ROWWISE
    wider = replace(kernel.mainloop, width=2 * kernel.mainloop.width)
    program = replace(program, kernels=(replace(kernel, mainloop=wider),))
    with pytest.raises(InternalError, match="512 elements where it loads 8 x 128"):
        verify_program(program, "place")


def test_a_reduction_of_columns_in_a_kernel_without_tiles_is_noticed():
    graph = parse("""block doubled(%x: [M, 64] bf16) { %0 = add %x, %x return y = %0 }""")
    program = lower(graph, {"M": 8})
    (kernel,) = program.kernels
    assert kernel.kind is ROWWISE
    (store,) = kernel.body.epilogue.stores
    sink = ReduceColumns(store.buffer, "sum", store.lanes)
    epilogue = replace(kernel.body.epilogue, stores=(), sinks=(sink,))
    body = replace(kernel.body, epilogue=epilogue)
    program = replace(program, kernels=(replace(kernel, body=body),))
    with pytest.raises(InternalError, match="`rows` has no tiles"):
        verify_program(program, "place")
