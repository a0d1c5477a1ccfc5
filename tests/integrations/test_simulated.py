"""A decoder layer of a model by its real kernels, in the simulator, forward and backward."""

import pytest
import torch

import coda
from tests.integrations.zoo import build, distance


def layer_of(name):
    """The second layer of a model in bf16, and arguments for it."""
    model = build(name).to(torch.bfloat16)
    seen = {}

    def keep(module, args, kwargs):
        seen["inputs"] = args, kwargs

    layer = model.model.layers[1]
    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.arange(1, 33).reshape(2, 16), use_cache=False)
    hook.remove()
    args, kwargs = seen["inputs"]
    return layer, args, kwargs


def gradients(layer, call, args, kwargs):
    """The output and the gradients of the input and of all parameters."""
    layer.zero_grad()
    x = args[0].detach().clone().requires_grad_()
    y = call(x, *args[1:], **kwargs)
    y.backward(torch.ones_like(y) / 8)
    return [y.detach(), x.grad, *(p.grad.detach().clone() for p in layer.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("name", ["Llama", "Gemma-2"])
def test_a_layers_kernels(name, arch, monkeypatch):
    layer, args, kwargs = layer_of(name)
    expected = gradients(layer, layer, args, kwargs)
    monkeypatch.setenv("CODA_BACKEND", "sim")  # which stops at the first finding
    monkeypatch.setenv("CODA_ARCH", arch)
    found = gradients(layer, torch.compile(layer, backend="coda"), args, kwargs)
    assert coda.last_report().fused > 20
    assert coda.last_report().copied == 0
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 2e-2
