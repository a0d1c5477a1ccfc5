"""Writes in a forward that autograd does not see: parameters, buffers and values of the model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coda
from coda.integrations.report import forget_report
from coda.runtime.weight_cache import Memo, note_write


class Base(nn.Module):
    """A gated MLP around something that writes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 32, bias=False)
        self.gate, self.up = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down = nn.Linear(48, 32)
        self.register_buffer("average", torch.zeros(32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def rest(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))

    def forward(self, x):
        self.write(x)
        return self.rest(self.first(x))

    def write(self, x):
        """Nothing."""


class Data(Base):
    def write(self, x):
        self.first.weight.data.clamp_(-0.05, 0.05)


class Detached(Base):
    def write(self, x):
        self.first.weight.detach()[3:9].mul_(0.5)


class Unrecorded(Base):
    def write(self, x):
        with torch.no_grad():
            self.first.weight.copy_(F.normalize(self.first.weight, dim=-1))


class Packed(Base):
    """Of weights that one GEMM reads together."""

    def write(self, x):
        self.gate.weight.data.mul_(0.9)
        self.up.weight.data[:, 2].zero_()


class Used(Base):
    """A weight that is read before and after."""

    def forward(self, x):
        y = self.rest(self.first(x)).detach()
        self.down.weight.data.clamp_(-0.02, 0.02)
        return self.rest(self.first(x) + y)


class Value(Base):
    def forward(self, x):
        h = self.first(x)
        h.data.mul_(2)
        return self.rest(h)


class ValueUnrecorded(Base):
    def forward(self, x):
        h = self.first(x)
        with torch.no_grad():
            h.clamp_(-1, 1)
        return self.rest(h)


class Average(Base):
    """Running statistics, by values that have a gradient."""

    def write(self, x):
        mean = self.first(x).mean(0)
        self.average.data.mul_(0.9).add_(mean, alpha=0.1)
        self.steps += 1


class AverageUnrecorded(Base):
    def forward(self, x):
        h = self.first(x)
        with torch.no_grad():
            self.average.lerp_(h.mean(0), 0.1)
            self.steps.add_(1)
        return self.rest(h - self.average)


class Visible(Base):
    """A write that autograd does see."""

    def forward(self, x):
        h = self.first(x)
        h.mul_(2)
        h[:, :4] += x[:, :4]
        return self.rest(h)


KINDS = [Data, Packed, Value, Average, Visible]
SELDOM = [Detached, Unrecorded, Used, ValueUnrecorded, AverageUnrecorded]


def steps(model, call, training=True):
    """Outputs, gradients and all tensors of the model after each of two steps."""
    found = []
    for seed in range(2):
        x = torch.randn(24, 32, generator=torch.Generator().manual_seed(seed))
        model.zero_grad(set_to_none=False)
        with torch.set_grad_enabled(training):
            y = call(x)
        found.append(y.detach().clone())
        if training:
            y.square().mean().backward()
            found += [p.grad.clone() for p in model.parameters()]
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
        found += [t.clone() for t in model.state_dict().values()]
        assert not any(b.requires_grad for b in model.buffers())
    return found


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SELDOM)]
)
def test_values_gradients_and_what_is_written_are_those_of_torch(kind):
    torch._dynamo.reset()
    forget_report()
    twin, model = kind(), kind()
    expected = steps(twin, twin)
    found = steps(model, torch.compile(model, backend="coda", fullgraph=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert coda.last_report().fused >= 5


@pytest.mark.parametrize("kind", [Data, pytest.param(Unrecorded, marks=pytest.mark.slow)])
def test_without_gradients_and_by_module_compile(kind):
    torch._dynamo.reset()
    twin, model = kind(), kind()
    expected = steps(twin, twin, training=False) + steps(twin, twin)
    model.compile(backend="coda")
    found = steps(model, model, training=False) + steps(model, model)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_is_made_of_a_weight_is_made_again():
    memo, w = Memo(), nn.Parameter(torch.ones(3))
    assert memo.get("a", [w], lambda: 1) == 1
    w.data.mul_(2)
    note_write(w)
    assert memo.get("a", [w], lambda: 2) == 2
    assert memo.get("a", [w], lambda: 3) == 2


def test_compiled_writes_are_noted_where_torch_does_not_count():
    torch._dynamo.reset()
    model, memo = Data(), Memo()
    call = torch.compile(model, backend="coda")
    x, w = torch.randn(24, 32), model.first.weight
    before = w._version
    for count in range(2):
        assert memo.get("a", [w], lambda count=count: count) == count
        call(x)
    assert w._version == before
