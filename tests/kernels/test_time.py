"""The modelled time of a GEMM: its parts, and what moves it."""

from dataclasses import replace

import pytest

import coda
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.time import gemm_time
from coda.lowering.compiler import lower
from coda.lowering.program.target import Config, find_target
from coda.lowering.program.time import overlapped

H200 = find_target("H200")
LARGE = Config(128, 256, (2, 1))


@coda.block
def plain(x: coda.Tensor["M K"], w: coda.Tensor["N K"]):
    return x @ w.T


@coda.block
def added(x: coda.Tensor["M K"], w: coda.Tensor["N K"], r: coda.Tensor["M N"]):
    return x @ w.T + r


def time(block, m, n, k, config, target=H200):
    program = lower(block.graph, {"M": m, "N": n, "K": k}, target)
    return gemm_time(program, next(gemms(program)), config)


def test_overlapped_parts_wait_for_each_other_a_little():
    assert overlapped(10, 0) == 10
    assert 10 < overlapped(10, 5) < 10.1
    assert 11 < overlapped(10, 10) < 12
    assert overlapped(0, 0) == 0


@pytest.mark.parametrize(
    ("config", "measured"),
    [
        (LARGE, 344.0),
        (Config(128, 192, (2, 1), pingpong=True), 358.7),
        (Config(128, 128, (2, 1), pingpong=True), 389.2),
        (Config(128, 64), 682.1),
    ],
)
def test_tiles_of_a_large_gemm_on_an_h200(config, measured):
    """Measured: quack's GEMM of 8192×4096×4096 in these tiles, µs."""
    found = time(plain, 8192, 4096, 4096, config)
    assert found.seconds * 1e6 == pytest.approx(measured, rel=0.12)


def test_ragged_waves_cost_as_full_ones():
    """132 SMs compute 132 tiles of 128×256 in one wave, and 134 in two."""
    one = time(plain, 128 * 66, 512, 8192, LARGE)
    two = time(plain, 128 * 68, 512, 8192, LARGE)
    assert two.mainloop == pytest.approx(2 * one.mainloop)


def test_two_stages_stall_a_mainloop():
    """Eight stages of loaded and stored subtiles leave two of A and B."""
    deep = time(added, 8192, 4096, 4096, LARGE)
    shallow = time(added, 8192, 4096, 4096, replace(LARGE, loads=8, stores=8))
    assert shallow.seconds > 1.4 * deep.seconds
    assert shallow.mainloop == deep.mainloop


def test_a_mainloop_hides_the_epilogue_in_pingpong():
    tile = Config(128, 128, (2, 1))
    shown = time(added, 8192, 4096, 4096, tile)
    hidden = time(added, 8192, 4096, 4096, replace(tile, pingpong=True))
    assert hidden.epilogue < shown.epilogue / 8


def test_few_rows_wait_for_memory():
    """One row: each weight is read once, and no CTA finds it in L2."""
    found = time(plain, 1, 4096, 14336, Config(128, 64))
    assert found.bound == "operand feed"
    assert found.feed > found.mainloop / 2
    assert found.seconds > 2 * 117e6 / H200.rates.bandwidth
