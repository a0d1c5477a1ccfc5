"""coda.nn: each module against torch's own, with gradients, saved and loaded."""

import io

import pytest
import torch
import torch.nn.functional as F

import coda
from coda.errors import CodaError
from tests.integrations.zoo import distance

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))


def agree(module, reference, *given):
    """The output and all gradients."""
    found = []
    for call in (module, reference):
        module.zero_grad()
        x = given[0].clone().requires_grad_()
        y = call(x, *given[1:])
        (y.sum() * 0.5).backward()
        found.append([y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        assert distance(a, b) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_rms_norm_linear(bias):
    m = coda.nn.RMSNormLinear(64, 96, bias=bias, eps=1e-5)
    m.norm_weight.data.uniform_(0.5, 1.5)
    agree(m, lambda x: F.linear(F.rms_norm(x, (64,), m.norm_weight, 1e-5), m.weight, m.bias), X)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_mlp(activation):
    m = coda.nn.GatedMLP(64, 128, 32, activation=activation)
    act = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}.get(activation)
    act = act or getattr(F, activation)
    agree(m, lambda x: (act(x @ m.gate_weight.T) * (x @ m.up_weight.T)) @ m.down_weight.T, X)
    with pytest.raises(CodaError, match="no such activation"):
        coda.nn.GatedMLP(64, 128, activation="swish")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(reduction):
    m = coda.nn.LinearCrossEntropy(64, 100, reduction=reduction, label_smoothing=0.1)
    target = torch.randint(0, 100, (2, 5), generator=torch.Generator().manual_seed(1))
    target[0, 2] = -100

    def reference(x, t):
        logits = (x @ m.weight.T).reshape(-1, 100)
        loss = F.cross_entropy(logits, t.reshape(-1), reduction=reduction, label_smoothing=0.1)
        return loss.reshape(t.shape) if reduction == "none" else loss

    for m.memory in ("balanced", "min"):
        agree(m, reference, X, target)


def test_modules_are_saved_and_loaded():
    m = coda.nn.GatedMLP(64, 128)
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(X), m(X))
    assert set(m.state_dict()) == {"gate_weight", "up_weight", "down_weight"}
