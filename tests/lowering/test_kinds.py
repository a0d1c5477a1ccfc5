"""A kind of kernel is a value: one that is added to the list is all that lowering has to know."""

import pytest
import torch

import coda
from coda import kernels
from coda.kernels.gemm.kind import GEMM
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.compiler import lower
from coda.lowering.explain import Explanation
from coda.lowering.program.cost import hbm_bytes, kernel_time
from coda.lowering.program.text import program_source
from coda.runtime.reference import run_reference
from tests.lowering.toy_kind import RUNNING

T = coda.Tensor
DIMS = {"M": 6, "D": 32, "F": 48}


@coda.block
def summed(x: T["M D"], w: T["F D"]):
    return coda.cumsum(coda.silu(x @ w.T), axis=-1)


@pytest.fixture
def toy(monkeypatch):
    plain = lower(summed.graph, DIMS)
    monkeypatch.setattr(kernels, "KINDS", (RUNNING, *kernels.KINDS))
    return plain, lower(summed.graph, DIMS)


def test_a_kind_that_is_added_is_placed(toy):
    plain, program = toy
    assert [k.kind for k in plain.kernels] == [GEMM, TORCH]
    assert [k.kind for k in program.kernels] == [GEMM, RUNNING]
    assert [k.name for k in program.kernels] == ["gemm0", "running1"]
    assert "running1 = running sums of t" in str(program)
    assert "running1: running, since the toy computes it" in program_source(program)


def test_a_kind_that_is_added_is_costed_and_explained(toy):
    plain, program = toy
    elements = DIMS["M"] * DIMS["F"]
    assert hbm_bytes(program) == hbm_bytes(plain)
    time, rates = kernel_time(program, program.kernels[1]), program.target.rates
    assert time.seconds == pytest.approx(rates.ramp + 2 * 2 * elements / rates.bandwidth)
    assert time.bound == "memory"
    kernel = Explanation(program).json()["kernels"][1]
    assert (kernel["kind"], kernel["flops"]) == ("running", elements)
    assert kernel["read_bytes"] == kernel["write_bytes"] == 2 * elements
    assert "running sums of" in str(Explanation(program))


def test_a_kind_that_is_added_is_run(toy):
    _, program = toy
    x, w = torch.randn(6, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    (found,) = run_reference(program, [x, w], exact=True)
    exact = torch.cumsum(torch.nn.functional.silu(x.double() @ w.double().T), -1)
    torch.testing.assert_close(found, exact)
