"""Losses: no kernel of torch's, no more bytes than the baseline, gradients as of float64."""

import tracemalloc

import pytest
import torch

from coda.ir.evaluate import evaluate
from coda.kernels.rowwise.plan import plan
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.program.cost import hbm_bytes, pointwise_fused
from coda.measure import random_inputs
from coda.runtime.reference import run_reference
from tests.lowering.loss_blocks import (
    LOSSES,
    SIZES,
    clip,
    entropy,
    entropy_of_logits,
    expected,
    given_logits,
    own_probability,
    ppo,
    reverse_kl,
    siglip,
    warm_distillation,
)
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


def logits_of(program, sizes):
    """The matrices with a vocabulary of columns that kernels write, and those that they load."""
    epilogues = [k.body.epilogue for k in program.kernels]
    wide = {n for n, b in program.buffers.items() if b.shape[-1].size(sizes) == sizes["V"]}
    written = [s.buffer for e in epilogues for s in e.stores if s.buffer in wide]
    return written, [o.name for e in epilogues for o in e.operands if o.name in wide]


@names([entropy, expected, ppo, reverse_kl, warm_distillation])
def test_expectations_over_the_vocabulary_are_folded_where_logits_are_computed(block):
    """Two models have one matrix of logits in memory, in 16 bits, which one kernel reads."""
    sizes = sizes_of(block.graph, SIZES)
    alone, forward, _ = block.lower("sm_90a", sizes), *block.lower_training("sm_90a", sizes)
    models = sum(str(i.shape[-1]) == "D" and str(i.shape[0]) == "V" for i in block.graph.inputs)
    written, loaded = logits_of(alone, sizes)
    assert len(written) == len(loaded) == models - 1
    assert all(alone.buffers[n].dtype.size == 2 for n in written)
    saved, loaded = logits_of(forward, sizes)
    assert (len(saved), len(loaded)) == (models, models - 1)


def test_an_entropy_of_logits_in_memory_reads_them_once():
    """So does its backward, which computes no statistic."""
    sizes = sizes_of(entropy_of_logits.graph, SIZES)
    alone, (forward, backward) = (
        entropy_of_logits.lower("sm_90a", sizes),
        entropy_of_logits.lower_training("sm_90a", sizes),
    )
    for program in (alone, forward, backward):
        (kernel,) = program.kernels
        assert plan(program, kernel).sweeps == 1
    assert not backward.kernels[0].body.epilogue.statistics


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
