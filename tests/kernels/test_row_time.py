"""The modelled time of a row-wise kernel: bytes, sweeps beyond L2, instructions."""

import pytest

import coda
from coda.kernels.rowwise.time import rowwise_time
from coda.lowering.compiler import lower
from coda.lowering.program.cost import traffic
from coda.lowering.program.target import find_target

H200 = find_target("H200")


@coda.block
def norm(x: coda.Tensor["M D"], w: coda.Tensor["D"]):
    return coda.rms_norm(x, w, 1e-5)


@coda.block
def energy(x: coda.Tensor["M K"], w: coda.Tensor["N K"]):
    return ((x @ w.T) ** 2).sum()


def rows(block, sizes):
    """The row-wise kernels of a block, with their times and bytes."""
    program = lower(block.graph, sizes, H200)
    kernels = [k for k in program.kernels if k.kind.whole_rows]
    moved = [traffic(program, k) for k in kernels]
    return [
        (rowwise_time(program, k), m.read_bytes + m.write_bytes)
        for k, m in zip(kernels, moved, strict=True)
    ]


@pytest.mark.parametrize(("count", "quack"), [(8192, 40.1), (65536, 264.2)])
def test_a_norm_that_reads_each_row_once(count, quack):
    """As quack's, which reads a row once, on an H200."""
    ((time, _),) = rows(norm, {"M": count, "D": 4096})
    assert time.bound == "memory"
    assert time.seconds * 1e6 == pytest.approx(quack, rel=0.15)


def test_a_row_that_registers_do_not_hold_is_read_again():
    """Rows of 256 KB: what is in flight fits into half of L2 only if it is few rows."""
    ((narrow, few),) = rows(norm, {"M": 4096, "D": 4096})
    ((wide, many),) = rows(norm, {"M": 4096, "D": 131072})
    ramp = H200.rates.ramp
    assert (wide.seconds - ramp) / many >= 0.99 * (narrow.seconds - ramp) / few


def test_a_fold_is_little_more_than_a_launch():
    """Folds of a Llama layer took 2.4 to 3.3 µs."""
    found = rows(energy, {"M": 8192, "N": 4096, "K": 4096})
    fold = min(time.seconds for time, _ in found)
    assert 2.4e-6 < fold < 3.7e-6
