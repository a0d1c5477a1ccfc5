"""coda.nn: each module against torch's own, with gradients, saved and loaded."""

import gc
import inspect
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


def test_equal_modules_share_a_block_and_free_it():
    known = set(coda.nn._blocks)
    one, other = (coda.nn.RMSNormLinear(64, 96, eps=0.125) for _ in range(2))
    (key,) = set(coda.nn._blocks) - known
    block = weakref.ref(coda.nn._blocks[key])
    assert one._held[key] is other._held[key] is block()
    agree(
        one,
        lambda x: F.linear(F.rms_norm(x, (64,), one.norm_weight, 0.125), one.weight, one.bias),
        X,
    )
    one.eps = 0.5
    agree(
        one, lambda x: F.linear(F.rms_norm(x, (64,), one.norm_weight, 0.5), one.weight, one.bias), X
    )
    del one, other
    gc.collect()
    assert block() is None
    assert set(coda.nn._blocks) == known


SIZES = {"in_features": 32, "out_features": 16, "hidden_features": 24, "num_classes": 20}


def modules():
    """All classes of coda.nn that are modules, each with sizes for its parameters."""
    for name, cls in vars(coda.nn).items():
        if isinstance(cls, type) and issubclass(cls, nn.Module) and not name.startswith("_"):
            takes = inspect.signature(cls).parameters
            yield name, cls, {k: v for k, v in SIZES.items() if k in takes}


@pytest.mark.parametrize(("name", "cls", "sizes"), list(modules()))
def test_a_module_that_begins_on_the_meta_device_gets_its_first_values(
    name, cls, sizes, monkeypatch
):
    monkeypatch.setattr(coda.nn, "_blocks", {})  # the first module of these options
    with torch.device("meta"):
        late = nn.Sequential(cls(**sizes))
    torch.manual_seed(7)
    expected = cls(**sizes)
    late.to_empty(device="cpu")
    with torch.no_grad():
        for p in late.parameters():
            p.fill_(torch.nan)
    kept = list(late.parameters())
    versions = [p._version for p in kept]
    torch.manual_seed(7)
    late[0].reset_parameters()
    assert all(a is b for a, b in zip(kept, late.parameters(), strict=True))
    assert all(p._version > v for p, v in zip(kept, versions, strict=True))
    for a, b in zip(kept, expected.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad


def test_first_values_are_those_of_torch():
    for bias in (True, False):
        torch.manual_seed(1)
        ours = coda.nn.RMSNormLinear(32, 16, bias=bias)
        torch.manual_seed(1)
        theirs = nn.Linear(32, 16, bias=bias)
        assert torch.equal(ours.weight, theirs.weight)
        assert ours.norm_weight.equal(nn.RMSNorm(32).weight)
        assert (ours.bias is None) if not bias else torch.equal(ours.bias, theirs.bias)
    torch.manual_seed(1)
    mlp = coda.nn.GatedMLP(32, 48, 8, dtype=torch.bfloat16)
    torch.manual_seed(1)
    for weight in (mlp.gate_weight, mlp.up_weight, mlp.down_weight):
        assert torch.equal(weight, nn.Linear(*weight.shape[::-1], False, dtype=weight.dtype).weight)
    assert (
        mlp.gate_weight.untyped_storage().data_ptr() == mlp.up_weight.untyped_storage().data_ptr()
    )
