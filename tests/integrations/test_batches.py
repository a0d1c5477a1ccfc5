"""Products of two batches of matrices inside a model's regions: values, gradients, and the cut."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coda.integrations.report import forget_report, last_report


class LinearAttention(nn.Module):
    def __init__(self, d=64, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, x):
        b, t, d = x.shape
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in parts)
        state = F.elu(k).add(1).transpose(-1, -2) @ v
        y = (F.elu(q).add(1) @ state) * 0.1
        return x + self.out(y.transpose(1, 2).reshape(b, t, d))


class Disentangled(nn.Module):
    """Attention with scores of contents, and of contents and relative positions (DeBERTa)."""

    def __init__(self, d=64, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(d)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))

    def by_heads(self, x):
        b, t, _ = x.shape
        return x.view(b, t, self.heads, -1).permute(0, 2, 1, 3).reshape(b * self.heads, t, -1)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (self.by_heads(m(x)) for m in (self.q, self.k, self.v))
        r = self.by_heads(self.k(x[:1]).expand(b, t, d))
        scores = torch.bmm(q, k.transpose(-1, -2)) / 7 + torch.bmm(q, r.transpose(-1, -2))
        y = torch.bmm(F.softmax(scores, -1), v).view(b, self.heads, t, -1).permute(0, 2, 1, 3)
        return self.norm(self.out(y.reshape(b, t, d)) + x)


@pytest.fixture
def report():
    torch._dynamo.reset()
    forget_report()
    yield last_report
    forget_report()
    torch._dynamo.reset()


def gradients(model, x, compiled):
    x = x.detach().requires_grad_()
    y = compiled(x)
    wanted = [x, *model.parameters()]
    return [y, *torch.autograd.grad(y.square().mean(), wanted)]


@pytest.mark.parametrize("kind", [LinearAttention, Disentangled])
def test_layers_are_no_further_from_float64_than_torch(kind, report):
    torch.manual_seed(0)
    model, x = kind().bfloat16(), torch.randn(2, 48, 64).bfloat16()
    mine = gradients(model, x, torch.compile(model, backend="coda"))
    theirs = gradients(model, x, model)
    exact = gradients(model.double(), x.double(), model)
    for a, b, c in zip(mine, theirs, exact, strict=True):
        errors = [float((y.double() - c).norm() / c.norm()) for y in (a, b)]
        assert errors[0] <= 1.3 * errors[1] + 0.002


def test_a_layer_of_linear_attention_is_one_region(report):
    model, x = LinearAttention().bfloat16(), torch.randn(2, 48, 64).bfloat16()
    with torch.no_grad():
        torch.compile(model, backend="coda")(x)
    (graph,) = report().graphs
    (region,) = graph.regions
    assert not graph.left
    assert [k.name for k in region.forward.program.kernels if not k.kind.tiled] == ["rows0"]
    assert "n0" not in region.forward.program.fixed  # any number of batches
