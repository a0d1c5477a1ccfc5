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
def test_training_moves_no_more_bytes_than_the_baseline(block):
    sizes = sizes_of(block.graph, SIZES)
    for program in block.lower_training("sm_90a", sizes):
        assert TORCH not in [k.kind for k in program.kernels]
        assert hbm_bytes(program) <= 1.05 * pointwise_fused(program.graph, sizes).hbm_bytes


@names(LOSSES)
def test_gradients_of_losses(block):
    sizes = sizes_of(block.graph, FEW)
    inputs = random_inputs(block.graph, sizes)
    check(block.graph, inputs, sizes, tolerance=1e-7)
