"""What is kept by a key is bounded, by one rule."""

import torch

import coda
from coda.runtime import bounded
from coda.runtime.bounded import Bounded
from coda.runtime.call import CallOptions, calls_of


def test_the_one_that_was_set_first_goes_first():
    table = Bounded(2)
    table["a"], table["b"], table["a"], table["c"] = 1, 2, 3, 4
    assert table == {"b": 2, "c": 4}


def test_a_block_keeps_a_bounded_number_of_calls_and_programs(monkeypatch):
    monkeypatch.setattr(Bounded, "__init__", lambda self, limit=3: setattr(self, "limit", 3))

    @coda.block
    def scaled(x: coda.Tensor["D"]):
        return 2 * x

    for size in range(1, 9):
        x = torch.ones(size, requires_grad=size % 2 == 0)
        y = scaled(x, backend="reference")
        assert torch.equal(y, 2 * torch.ones(size))
    calls = calls_of(scaled.handle)
    assert len(calls.programs) == len(calls.plans) == len(scaled._programs) == 3


def test_equal_options_are_one_call():
    block = coda.parse("block same(%x: [M, D] f32) { %0 = tanh %x return out = %0 }")
    x = torch.zeros(3, 4)
    for _ in range(3):
        block(x, backend="reference", dims={"M": 3})
        block(x, backend="reference")
    known = calls_of(block.handle).programs
    assert len(known) == 2
    options = [key[0][0] for key in known]
    assert all(isinstance(o, CallOptions) for o in options)
    assert {o.handle for o in options} == {block.handle}
    assert len(known) <= bounded.LIMIT
