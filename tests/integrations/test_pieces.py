"""Graphs in which something stays as it is: autocast, operators with graphs, torch.func."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import coda
from coda.integrations import segments as pieces
from tests.integrations.zoo import distance

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(2))
BF16 = ("cpu", torch.bfloat16)


class Part(nn.Module):
    """RMSNorm and a gated MLP."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Part(), Part(), Part()


class Inside(Model):
    """Three types, one after the other."""

    def forward(self, x):
        y = self.first(x)
        with torch.autocast(*BF16):
            z = self.second(y)
            product = self.third.gate(z)
        return y, z, product, self.third(z)


class Island(Model):
    """Full precision inside of autocast."""

    def forward(self, x):
        with torch.autocast(*BF16):
            y = self.first(x)
            with torch.autocast("cpu", enabled=False):
                z = self.second(y.to(self.second.gate.weight.dtype))
                product = self.second.gate(z)
            return y, product, self.third(z)


class Unrecorded(Model):
    """A part that autograd does not see, beside autocast."""

    def forward(self, x):
        with torch.no_grad(), torch.autocast(*BF16):
            y = self.first(x)
        return y, self.second(y), self.third(x)


def run(model, call, x):
    """Outputs, and the gradients by name."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    outputs = call(x)
    sum(y.float().square().mean() for y in outputs).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return outputs, {"x": x.grad, **{n: g.clone() for n, g in found.items()}}


@pytest.mark.parametrize("kind", [Inside, Island, Unrecorded])
def test_autocast_that_begins_in_the_graph(kind):
    """Types are torch's at every place, and errors against full precision no larger."""
    model = kind()
    outputs, gradients = run(model, model, X)
    found, others = run(model, torch.compile(model, backend="coda", fullgraph=True), X)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: torch.autograd.graph.save_on_cpu())
        exact, slopes = run(model.double(), model, X.double())
    assert [y.dtype for y in found] == [y.dtype for y in outputs]
    for a, b, c in zip(found, outputs, exact, strict=True):
        assert distance(a, c) <= 1.3 * distance(b, c) + 1e-6
    assert others.keys() == gradients.keys()
    for name in gradients:
        assert others[name].dtype == gradients[name].dtype
        assert distance(others[name], slopes[name]) <= 1.5 * distance(gradients[name], slopes[name])
    report = coda.last_report()
    assert report.fused >= 20
    assert any("autocast begins or ends here" in why for _, why in report.left)


class Twice(torch.autograd.Function):
    """A derivative that is not that of what is computed."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * dy * x.cos()


class Own(Model):
    def forward(self, x):
        return (self.second(Twice.apply(self.first(x))) + Twice.apply(x),)


class Mapped(Model):
    def forward(self, x):
        y = self.first(x)
        scaled = torch.func.vmap(lambda row: row * row.sum())(y)
        return (self.second(scaled),)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Own, "the operator `autograd_function_apply` holds graphs"), (Mapped, "torch.func")],
)
def test_what_lies_around_is_taken(kind, why):
    model = kind()
    outputs, gradients = run(model, model, X)
    found, others = run(model, torch.compile(model, backend="coda", fullgraph=True), X)
    assert distance(found[0], outputs[0]) < 1e-5
    assert others.keys() == gradients.keys()
    assert all(distance(others[n], gradients[n]) < 1e-5 for n in gradients)
    report = coda.last_report()
    assert sum(len(g.regions) for g in report.graphs) == 2
    assert any(why in reason for _, reason in report.left)


def test_sizes_stay_free():
    model = Own()
    compiled = torch.compile(model, backend="coda", dynamic=True)
    for x in (X, torch.randn(3, 5, 64)):
        (a,), mine = run(model, compiled, x)
        (b,), others = run(model, model, x)
        assert distance(a, b) < 1e-5
        assert all(distance(mine[n], others[n]) < 1e-5 for n in others)
    assert len(coda.last_report().graphs) == 4, "one graph, its pieces reported one by one"


@pytest.mark.slow
def test_by_inductor_between(monkeypatch):
    monkeypatch.setenv("CODA_FALLBACK", "inductor")
    model = Own()
    (a,), mine = run(model, torch.compile(model, backend="coda"), X)
    (b,), others = run(model, model, X)
    assert distance(a, b) < 1e-5
    assert all(distance(mine[n], others[n]) < 1e-5 for n in others)


class Checkpointed(Model):
    """Parts that are computed again in the backward, one of them with chance in it."""

    def forward(self, x):
        y = checkpoint(self.first, x, use_reentrant=False)
        return y, checkpoint(lambda t: F.dropout(self.second(t), 0.5), y, use_reentrant=True)


def test_what_is_checkpointed_has_blocks_and_is_computed_again(monkeypatch):
    torch._dynamo.reset()
    model, runs = Checkpointed(), []

    def counted(body, *args, **options):
        return checkpoint(lambda *a: runs.append(body) or body(*a), *args, **options)

    monkeypatch.setattr(pieces, "checkpoint", counted)
    call = torch.compile(model, backend="coda")
    torch.manual_seed(0)
    expected, wanted = run(model, model, X)
    torch.manual_seed(0)
    found, gradients = run(model, call, X)
    assert len(runs) == 4
    blocks = [r for g in coda.last_report().graphs for r in g.regions]
    assert len(blocks) == 2
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5
    for name, gradient in wanted.items():
        assert distance(gradients[name], gradient) < 1e-5, name
