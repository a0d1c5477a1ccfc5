"""Losses: no kernel of torch's, no more bytes than the baseline, gradients as of float64."""

import tracemalloc

import pytest
import torch

from coda.ir.evaluate import evaluate
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.program.cost import hbm_bytes, pointwise_fused
from coda.measure import random_inputs
from coda.runtime.reference import run_reference
from tests.lowering.loss_blocks import LOSSES, SIZES, clip, given_logits, own_probability, siglip
from tests.lowering.test_backward import check, sizes_of

FEW = {"B": 3, "S": 5, "M": 15, "N": 12, "D": 16, "E": 16, "V": 37}


def names(blocks):
    return pytest.mark.parametrize("block", blocks, ids=lambda block: block.__name__)


@names(LOSSES)
def test_losses_move_no_more_bytes_than_the_baseline(block):
    """Nor does inference move more than the forward of training, which also saves."""
    sizes = sizes_of(block.graph, SIZES)
    alone, forward, backward = block.lower("sm_90a", sizes), *block.lower_training("sm_90a", sizes)
    for program in (alone, forward, backward):
        assert TORCH not in [k.kind for k in program.kernels]
        assert hbm_bytes(program) <= 1.02 * pointwise_fused(program.graph, sizes).hbm_bytes
    assert hbm_bytes(alone) <= hbm_bytes(forward)


@names([clip, siglip])
def test_lowering_holds_no_matrix(block):
    """A sum over the rows of [N, N] may try its operand as one row, of N² columns."""
    sizes = sizes_of(block.graph, SIZES)
    block.lower_training("sm_90a", sizes_of(block.graph, FEW))  # imports
    tracemalloc.start()
    block.lower_training("sm_90a", sizes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sizes["N"] ** 2  # bytes


@names(LOSSES)
def test_gradients_of_losses(block):
    sizes = sizes_of(block.graph, FEW)
    inputs = random_inputs(block.graph, sizes)
    check(block.graph, inputs, sizes, tolerance=1e-7)


@names([given_logits, own_probability])
def test_a_class_out_of_range_is_nan(block):
    """Beside logits of −inf, and of NaN in a column that is not picked."""
    sizes = sizes_of(block.graph, FEW)
    inputs = random_inputs(block.graph, sizes)
    inputs[-1][:3] = torch.tensor([-1, FEW["V"], FEW["V"] - 1])
    if block is given_logits:
        inputs[0][3, 0], inputs[0][4, 1], inputs[-1][3:5] = -torch.inf, torch.nan, 0
    program = block.lower("sm_90a", sizes)
    (found,) = run_reference(program, inputs, exact=True)
    (expected,) = evaluate(
        block.graph.roots, dict(zip(block.graph.inputs, inputs, strict=True)), sizes, torch.float64
    )
    assert expected[:2].isnan().all() if block is given_logits else expected.isnan()
    torch.testing.assert_close(found, expected, equal_nan=True)
