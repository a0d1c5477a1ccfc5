"""What `explain` tells of a training: kernels of both ways, and what is kept between them."""

import runpy
from pathlib import Path

import pytest
import torch

import coda
from coda.errors import CallError
from coda.ir.text import parse
from coda.lowering.explain_training import TrainingExplanation
from coda.lowering.program.cost import hbm_bytes

ROOT = Path(__file__).parents[2] / "examples"
T = coda.Tensor


def explained(block, dims, wanted=None):
    forward, backward = block.lower_training("sm_90a", dims, wanted=wanted)
    return TrainingExplanation(block.graph, forward, backward)


@coda.block
def swish(x: T["M D"], w: T["F D"]):
    return coda.silu(x @ w.T)


def test_what_is_kept_of_an_activation():
    """z = x wᵀ and y = z · sigmoid z: torch keeps x, z and sigmoid z; coda the first two."""
    found = explained(swish, {"M": 10, "D": 32, "F": 64})
    assert found.tokens == 10
    assert found.saved_bytes == {
        "coda": 2 * 10 * (32 + 64),
        "eager": 2 * 10 * (32 + 64 + 64),
        "checkpointed": 2 * 10 * 32,
    }
    assert [s.argument for s in found.saved] == [True, False]


def test_a_frozen_weight_needs_no_activation():
    found = explained(swish, {"M": 10, "D": 32, "F": 64}, wanted=["x"])
    assert found.saved_bytes["coda"] == 2 * 10 * 64
    assert found.saved_bytes["eager"] == 2 * 10 * (64 + 64)


def test_a_layer_keeps_fewer_bytes_than_torch():
    module = runpy.run_path(str(ROOT / "llama_layer.py"))
    block = module["layer"]
    wanted = [i.name for i in block.graph.inputs if i.name not in ("cos", "sin")]
    found = explained(block, module["DIMS"], wanted)
    per_token = found.json()["saved_bytes_per_token"]
    # attention, x1, x2 and 2·F + (H + 2·G)·d pre-activations in bf16; two statistics; the tables.
    by_hand = 2 * (3 * 4096 + 2 * 14336 + 6144) + 2 * 4 + 2 * 4 * 64
    assert per_token["coda"] == by_hand
    assert per_token["checkpointed"] == 2 * 2 * 4096 + 2 * 4 * 64
    assert per_token["eager"] > 2 * per_token["coda"]


def test_the_report():
    found = explained(swish, {"M": 10, "D": 32, "F": 64})
    text = str(found)
    for word in ("kernels of the forward", "kernels of the backward", "bytes per token", "gemm0"):
        assert word in text
    plain = found.json()
    assert plain["forward"]["hbm_bytes"] == hbm_bytes(found.forward.program)
    assert plain["backward"]["launches"] == len(found.backward.program.kernels)
    assert plain["saved_bytes"] == found.saved_bytes


def test_llamas_tables_are_constant():
    """What is explained is what a call runs: 10 kernels, none by torch, no table's gradient."""
    module = runpy.run_path(str(ROOT / "llama_layer.py"))
    found = module["layer"].explain_training("sm_90a", **module["DIMS"])
    kinds = [k["kind"] for k in found.json()["backward"]["kernels"]]
    assert len(kinds) == 10
    assert "torch" not in kinds
    assert found.json()["constants"] == ["cos", "sin"]
    assert "cos" not in found.json()["differentiated"]
    assert "; constant: cos, sin" in str(found)
    assert parse(str(module["layer"].graph)) == module["layer"].graph


@coda.block
def turned(x: T["M D"], angle: coda.Constant["M D", coda.f32], w: T["F D"]):
    return (x * angle.cast(x.dtype)) @ w.T


def test_the_report_says_what_is_differentiated():
    found = turned.explain_training("sm_90a", wanted=["x"], M=8, D=16, F=32)
    assert "gradients of x; constant: angle; none of w" in str(found)
    with pytest.raises(CallError, match="`angle` is declared constant"):
        turned.lower_training("sm_90a", {"M": 8, "D": 16, "F": 32}, wanted=["x", "angle"])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_constant_that_requires_a_gradient_is_refused(compiled):
    shapes = (8, 16), (8, 16), (32, 16)
    x, angle, w = (torch.randn(s, requires_grad=True) for s in shapes)
    call = torch.compile(turned, backend="eager", fullgraph=True) if compiled else turned
    call(x, angle.detach(), w).sum().backward()
    assert x.grad is not None
    with pytest.raises(Exception, match="`angle` is declared constant, and requires a gradient"):
        call(x, angle, w)
    with torch.no_grad():
        assert call(x, angle, w).shape == (8, 32)
