"""Losses: no kernel of torch's, no more bytes than the baseline, gradients as of float64."""

import pytest

from coda.kernels.torch_op.kind import TORCH
from coda.lowering.program.cost import hbm_bytes, pointwise_fused
from coda.measure import random_inputs
from tests.lowering.loss_blocks import LOSSES, SIZES
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


@names(LOSSES)
def test_gradients_of_losses(block):
    sizes = sizes_of(block.graph, FEW)
    inputs = random_inputs(block.graph, sizes)
    check(block.graph, inputs, sizes, tolerance=1e-7)
