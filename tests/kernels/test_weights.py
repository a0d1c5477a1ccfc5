"""Weights that kernels read where they lie, held bit by bit against ordered copies."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import coda
from coda.kernels.gemm import bind, imports
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.weights import halves, weight_reads
from coda.lowering.compiler import lower
from coda.lowering.program.target import Config
from coda.lowering.program.text import program_source
from coda.measure import random_inputs
from coda.runtime.launcher import KernelRun
from coda.runtime.prepare import one_below_another
from coda.runtime.simulate import device, run_simulated
from tests.kernels.forced import forced

ARCHS = ("sm_90a", "sm_100a")
T = coda.Tensor


def projections():
    """q and k turned by half-split RoPE, and v."""

    @coda.block
    def qkv(
        x: T["M D"],
        w_q: T["(H d) D"],
        w_k: T["(G d) D"],
        w_v: T["(G d) D"],
        cos: T["M d/2"],
        sin: T["M d/2"],
    ):
        q = coda.rope((x @ w_q.T).reshape("M (H d) -> M H d"), cos, sin)
        k = coda.rope((x @ w_k.T).reshape("M (G d) -> M G d"), cos, sin)
        return q, k, x @ w_v.T

    return qkv


def gated():
    @coda.block
    def gated(x: T["M D"], w_gate: T["F D"], w_up: T["F D"]):
        return (coda.swiglu(x @ w_gate.T, x @ w_up.T),)

    return gated


def gated_in_heads():
    @coda.block
    def gated(x: T["M D"], w: T["(H d) D"]):
        a, b = coda.split((x @ w.T).reshape("M (H d) -> M H d"), 2)
        return (a * coda.sigmoid(b),)

    return gated


def heads(H, G, d):
    return projections, {"M": 200, "D": 128, "H": H, "G": G, "d": d}


def features(F):
    return gated, {"M": 200, "D": 128, "F": F}


# The number is that of a tile: clusters, two CTAs that share a tile, and one.
TILES = {
    "sm_90a": (Config(128, 256, (2, 1)), Config(256, 128, (2, 1)), Config(128, 64)),
    "sm_100a": (Config(256, 256, (2, 1)), Config(256, 128, (2, 1)), Config(128, 64)),
}
CASES = [
    (*features(176), 2),
    pytest.param(*heads(3, 1, 64), 0, marks=pytest.mark.slow),
    pytest.param(*heads(5, 2, 64), 0, marks=pytest.mark.slow),
    pytest.param(*features(424), 1, marks=pytest.mark.slow),
    *(
        pytest.param(*case, tile, marks=pytest.mark.slow)
        for case in (heads(3, 2, 128), heads(3, 1, 32), features(176))
        for tile in (0, 1, 2)
        if (case, tile) != (features(176), 2)
    ),
]


def run(program, inputs):
    with device(program.arch, checks="raise") as gpu:
        found = run_simulated(program, inputs, program.sizes)
        assert not gpu.report().findings
    return found


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("make", "sizes", "tile"), CASES)
def test_rows_in_pairs_by_layout_are_those_of_a_copy(make, sizes, tile, arch, monkeypatch):
    config = TILES[arch][tile]
    program, copying = (forced(lower(make().graph, sizes, arch), config) for _ in range(2))
    inputs = random_inputs(program.graph, sizes)
    (gemm,) = gemms(program)
    assert halves(program, gemm) == sizes.get("d", 2 * sizes.get("F", 0)) // 2
    found = run(program, inputs)
    assert "split=" in program_source(program)
    for module in (imports, bind):
        monkeypatch.setattr(module, "halves", lambda *_: 0)
    copied = run(copying, inputs)
    assert "split=" not in program_source(copying)
    for one, other in zip(found, copied, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow)])
def test_weights_in_one_buffer_are_not_copied_and_changes_are_seen(arch, monkeypatch):
    kept = []
    once = KernelRun.once

    def note(self, name, roots, make):
        kept.append(name)
        return once(self, name, roots, make)

    monkeypatch.setattr(KernelRun, "once", note)
    program = gated().lower(arch, features(176)[1])
    x, gate, up = random_inputs(program.graph, program.sizes)
    gate, up = nn.Parameter(gate), nn.Parameter(up)
    with torch.no_grad():
        (apart,) = run(program, (x, gate, up))
        assert ("matrix", "gemm0") in kept
        coda.share_weights(gate, up)
        kept.clear()
        (together,) = run(program, (x, gate, up))
        assert torch.equal(apart, together)
        up.mul_(2)
        (changed,) = run(program, (x, gate, up))
    assert all(name[0] != "matrix" for name in kept)
    torch.testing.assert_close(changed, 2 * together)
    assert one_below_another([gate, up]).data_ptr() == gate.data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_partners_that_tiles_do_not_divide_are_copied(arch):
    sizes = {"M": 200, "D": 128, "H": 3, "d": 192}
    block = gated_in_heads()
    program = forced(lower(block.graph, sizes, arch), TILES[arch][1])
    (read,) = weight_reads(program)
    assert read.why == "the rows of a pair are 96 apart, which tiles of 64 pairs do not divide"
    inputs = random_inputs(block.graph, sizes)
    found = run(program, inputs)
    expected = block(*inputs, backend="reference", dims=sizes)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_loaded_kernels_are_those_of_their_config():
    """A kernel with other tiles is another kernel, whatever its name; equal tiles are equal."""
    assert Config(128, 128) == Config(128, 128) != Config(128, 64)
    program = gated().lower("sm_90a", {"M": 64, "D": 64, "F": 64})
    gemm = next(gemms(program))
    other = replace(gemm, config=Config(128, 64))
    one = KernelRun(program, random_inputs(program.graph, program.sizes), program.sizes)
    assert bind.GemmBinding(one, gemm).gemm.config == gemm.config
    assert bind.GemmBinding(one, other).gemm.config == Config(128, 64)
    assert bind.GemmBinding(one, gemm).gemm is bind.GemmBinding(one, gemm).gemm
