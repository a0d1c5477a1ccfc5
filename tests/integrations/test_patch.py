"""coda.patch: layers in place, checked, undone; weights stay the model's own."""

import copy
import pickle

import pytest
import torch
from torch import nn

import coda
from coda.errors import CallError, UnsupportedError
from tests.integrations.zoo import arguments, build, distance, overall, step


@pytest.fixture
def llama():
    return build("Llama").eval()


def test_patch_replaces_layers_and_unpatch_gives_them_back(llama):
    before = {n: p for n, p in llama.named_parameters()}
    given = arguments("Llama")
    expected = llama(**given).logits
    report = coda.patch(llama)
    assert [one.name for one in report.layers] == ["model.layers.0", "model.layers.1"]
    assert report.replaced == 2
    assert report.layers[0].fused > 30
    assert "model.layers.1" in str(report)
    with torch.no_grad():
        assert distance(llama(**given).logits, expected) < 1e-5
    after = dict(llama.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[n] is before[n] for n in before)
    assert type(llama.model.layers[0]).forward is type(build("Llama").model.layers[0]).forward
    coda.unpatch(llama)
    assert all(m._compiled_call_impl is None for m in llama.modules())


def test_a_change_in_place_is_seen_by_the_next_call(llama):
    given = arguments("Llama")
    coda.patch(llama)
    with torch.no_grad():
        first = llama(**given).logits
        for layer in llama.model.layers:
            layer.self_attn.q_proj.weight.mul_(3)
            layer.mlp.gate_proj.weight.add_(0.5)
        second = llama(**given).logits
        coda.unpatch(llama)
        assert distance(second, llama(**given).logits) < 1e-5
    assert distance(first, second) > 1e-2


def test_a_copy_is_whole_and_unpatched(llama):
    given = arguments("Llama")
    coda.patch(llama)
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert all(m._compiled_call_impl is None for m in twin.modules())
        with torch.no_grad():
            assert distance(twin(**given).logits, llama(**given).logits) < 1e-5


def test_layers_are_chosen_and_skipped_by_name(llama):
    report = coda.patch(llama, only=["model.layers.*"], skip=["*.0"])
    assert [one.name for one in report.layers] == ["model.layers.1"]
    report.undo()
    assert llama.model.layers[1]._compiled_call_impl is None


def test_a_layer_that_somebody_else_replaced_is_left_alone(llama):
    llama.model.layers[0].forward = llama.model.layers[0].forward
    report = coda.patch(llama)
    assert [one.replaced for one in report.layers] == [False, True]
    assert report.layers[0].why == "its call is already replaced by other code"
    with pytest.raises(UnsupportedError, match="no layer was replaced"):
        coda.patch(llama)


def test_a_model_without_layers_or_without_an_example_is_refused():
    with pytest.raises(UnsupportedError, match="no repeated layers"):
        coda.patch(nn.Linear(4, 4))
    with pytest.raises(CallError, match="takes a torch"):
        coda.patch("llama")

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            pair = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in "ab"]
            self.layers = nn.ModuleList(pair)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Stack(), torch.randn(8, 64)
    with pytest.raises(CallError, match="on an example"):
        coda.patch(model)
    expected = model(x)
    assert coda.patch(model, [x]).replaced == 2
    assert distance(model(x).detach(), expected.detach()) < 1e-5


def test_training_through_patched_layers(llama):
    given = arguments("Llama")
    twin = copy.deepcopy(llama)
    coda.patch(llama)
    for one in (llama, twin):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        for _ in range(3):
            loss, _, gradients = step(one, one, given)
            optimizer.step()
        one.kept = loss, gradients
    assert llama.kept[0] == pytest.approx(twin.kept[0], rel=1e-4)
    assert overall(llama.kept[1], twin.kept[1]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_twenty_steps_follow_the_unpatched_model(lora):
    import peft

    def prepared():
        model = build("Qwen2")
        if lora:
            config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
            torch.manual_seed(3)
            model = peft.get_peft_model(model, config)
        return model

    given = arguments("Qwen2")
    losses = []
    for patched in (False, True):
        model = prepared()
        if patched:
            assert coda.patch(model, {"input_ids": given["input_ids"]}).replaced == 2
        wanted = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(wanted, lr=2e-3)
        found = []
        for _ in range(20):
            loss, _, _ = step(model, model, given)
            optimizer.step()
            found.append(loss)
        losses.append(found)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Gemma-2", "GPT-NeoX"])
def test_greedy_tokens_with_a_cache_are_the_same(name):
    model = build(name).eval()
    ids = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    coda.patch(model)
    assert torch.equal(model.generate(ids, **options), expected)


class Narrow(nn.Module):
    """A layer with an operator that has no float64."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        offsets = torch.full((1,), len(x), dtype=torch.int32)
        return x + torch._grouped_mm(hidden, self.down.weight.T[None].contiguous(), offs=offsets)


def test_a_layer_that_float64_does_not_run_is_held_against_float32():
    model = nn.Sequential()
    model.layers = nn.ModuleList([Narrow(), Narrow()])
    model.forward = lambda x: model.layers[1](model.layers[0](x))
    model = model.bfloat16()
    x = torch.randn(8, 32, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model).double().forward(x.double())
    report = coda.patch(model, [x])
    assert report.replaced == 2
    assert 0 < report.layers[0].error <= 2 * report.layers[0].torch_error


class Remembering(nn.Module):
    """A layer that adds to a cache, and reads all of it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, cache):
        y = x + self.down(torch.relu(self.up(x)))
        cache.append(y)
        return y + sum(cache)


def test_a_cache_that_a_layer_writes_to_is_as_it_was_for_each_check():
    model = nn.Sequential()
    model.layers = nn.ModuleList([Remembering()])
    model.forward = lambda x: model.layers[0](x, cache=[])
    report = coda.patch(model, [torch.randn(8, 32)])
    assert report.replaced == 1
    assert report.layers[0].error < 1e-6
