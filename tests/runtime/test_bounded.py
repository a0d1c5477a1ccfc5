"""What is cached by a key is bounded, by one rule; what belongs to an object is freed with it."""

import gc
import weakref

import pytest
import torch

import coda
from coda.runtime import bounded
from coda.runtime.bounded import Bounded
from coda.runtime.call import CallOptions, calls_of
from coda.runtime.launcher import KernelRun, state_of
from coda.runtime.weight_cache import Memo


def small(monkeypatch):
    monkeypatch.setattr(Bounded, "__init__", lambda self, limit=3: setattr(self, "limit", 3))


def test_the_one_that_was_set_first_goes_first():
    table = Bounded(2)
    table["a"], table["b"], table["a"], table["c"] = 1, 2, 3, 4
    assert table == {"b": 2, "c": 4}


def test_a_block_keeps_a_bounded_number_of_calls_and_programs(monkeypatch):
    small(monkeypatch)

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


def test_a_program_keeps_a_bounded_number_of_replays_and_constants(monkeypatch):
    small(monkeypatch)
    block = coda.parse("block b(%x: [M, H*d] f32) { %0 = reshape %x [M, H, d] return out = %0 }")
    program = block.lower(dims={"M": 4, "H": 2, "d": 8})
    state = state_of(program)
    assert state.implied == ("H", "d")
    for heads in (1, 2, 4, 8, 16):
        sizes = {"M": 4, "H": heads, "d": 16 // heads}
        state.of(frozenset(), sizes)
        run = KernelRun(program, [torch.ones(4, 16)], sizes)
        size = torch.full((), heads)
        assert run.loaded(("size", heads), lambda size=size: size) is size
    assert len(state.found) == len(state.loaded) == 3


def test_values_of_the_same_weights_are_bounded(monkeypatch):
    small(monkeypatch)
    memo, w, v = Memo(), torch.ones(2), torch.ones(2)
    made = [memo.get(("repeated", i), [w], lambda: torch.zeros(2)) for i in range(8)]
    other = memo.get("other", [v], lambda: torch.zeros(2))
    assert memo.get("other", [v], lambda: None) is other
    assert sum(map(len, memo.entries.values())) == 4
    assert memo.get(("repeated", 7), [w], lambda: None) is made[7]


def compiled_model(width):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(width)
            self.up = torch.nn.Linear(width, 2 * width)
            self.down = torch.nn.Linear(2 * width, width)

        def forward(self, x):
            return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))

    return torch.compile(Layer(), backend="coda")


@pytest.mark.parametrize("fallback", ["eager", "inductor"])
def test_blocks_of_a_compiled_model_are_freed_with_it(monkeypatch, fallback):
    from coda.integrations import dynamo

    monkeypatch.setenv("CODA_FALLBACK", fallback)
    monkeypatch.setattr(dynamo, "_blocks", weakref.WeakValueDictionary())
    x = torch.randn(5, 64)
    model = compiled_model(64)
    expected = model._orig_mod(x)
    assert torch.allclose(model(x), expected, atol=1e-5)
    blocks = [weakref.ref(b) for b in dynamo._blocks.values()]
    assert blocks
    assert coda.last_report().fused
    gc.collect()
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert all(b() is not None for b in blocks)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert not [b for b in blocks if b() is not None]
