"""A model's weights stay its own: those that kernels read as one share a buffer."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

import coda
from tests.integrations.zoo import arguments, build, distance

GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def groups(model):
    for layer in model.model.layers:
        for part, names in GROUPS.items():
            yield [getattr(getattr(layer, part), n).weight for n in names]


def together(model):
    """For each group of siblings, whether they fill one memory, in whichever order."""
    found = []
    for group in groups(model):
        memory = {w.untyped_storage().data_ptr() for w in group}
        filled = group[0].untyped_storage().nbytes() == sum(w.numel() for w in group) * (
            group[0].element_size()
        )
        found.append(len(memory) == 1 and filled)
    return found


@pytest.fixture
def llama():
    return build("Llama").eval()


@pytest.fixture
def patched(llama):
    coda.patch(llama)
    return llama


def logits(model, call=None):
    with torch.no_grad():
        return (model if call is None else call)(**arguments("Llama")).logits


def test_all_layers_of_a_patched_model_share_their_own_weights(patched):
    assert together(patched) == [True] * 4
    assert coda.last_report().copied == 0
    assert len({g[0].untyped_storage().data_ptr() for g in groups(patched)}) == 4
    others = [p for n, p in patched.named_parameters() if "norm" in n or "down" in n or "o_" in n]
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in others)


def test_what_is_saved_is_what_was_saved(patched, tmp_path):
    plain = build("Llama")
    for name, value in plain.state_dict().items():
        mine = patched.state_dict()[name]
        assert torch.equal(mine, value)
        assert mine.is_contiguous()
    torch.save(plain.state_dict(), tmp_path / "plain")
    torch.save(patched.state_dict(), tmp_path / "shared")
    size = (tmp_path / "plain").stat().st_size
    assert (tmp_path / "shared").stat().st_size <= size
    safetensors.torch.save_file(patched.state_dict(), tmp_path / "tensors")
    assert (tmp_path / "tensors").stat().st_size < size * 1.1
    patched.save_pretrained(tmp_path / "model")
    loaded = type(plain).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(loaded), logits(plain.eval()))
    again = build("Llama").eval()
    again.load_state_dict(torch.load(tmp_path / "shared"))
    assert torch.equal(logits(again), logits(loaded))


def test_a_compiled_model_shares_and_does_so_again_after_a_move(llama):
    expected = logits(llama)
    compiled = torch.compile(llama, backend="coda")
    assert distance(logits(llama, compiled), expected) < 1e-5
    assert together(llama) == [True] * 4
    llama.to(torch.bfloat16)
    assert together(llama) == [False] * 4
    assert distance(logits(llama, compiled), expected) < 2e-2
    assert together(llama) == [True] * 4
    assert coda.last_report().copied == 0


def test_a_copy_of_a_model_has_weights_of_its_own(patched):
    twin = copy.deepcopy(patched)
    assert together(twin) == [False] * 4
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.zero_()
    assert distance(logits(patched), logits(build("Llama").eval())) < 1e-5
    coda.patch(twin)
    assert together(twin) == [True] * 4


def test_a_parameter_that_is_replaced_is_read(patched):
    plain = build("Llama").eval()
    for model in (patched, plain):
        torch.manual_seed(1)
        new = torch.randn_like(model.model.layers[0].mlp.gate_proj.weight)
        model.model.layers[0].mlp.gate_proj.weight = nn.Parameter(new)
    assert distance(logits(patched), logits(plain)) < 1e-5


def test_tied_embeddings_stay_tied():
    model = build("Qwen2").eval()
    place = model.model.embed_tokens.weight.data_ptr()
    torch.compile(model, backend="coda")(**arguments("Qwen2"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == place


def test_weights_that_somebody_flattened_are_left_alone(llama):
    expected = logits(llama)
    every = [p for g in groups(llama) for p in g]
    flat = torch.zeros(sum(p.numel() + 64 for p in every))
    for p, part in zip(every, flat.split([p.numel() + 64 for p in every]), strict=True):
        part[:-64].copy_(p.detach().flatten())
        p.data = part[:-64].view_as(p)
    places = [p.data_ptr() for p in every]
    report = coda.patch(llama)
    assert [p.data_ptr() for p in every] == places
    layer = sum(p.numel() for p in every) // 2
    assert coda.last_report().copied == report.layers[0].copied == layer * 4
    assert "is a part of a larger memory" in " ".join(str(coda.last_report()).split())
    assert distance(logits(llama), expected) < 1e-5


def test_frozen_weights_are_shared_and_not_folded(llama):
    llama.requires_grad_(False)
    expected = logits(llama)
    coda.patch(llama)
    assert distance(logits(llama), expected) < 1e-5
    assert together(llama) == [True] * 4
    assert coda.last_report().copied == 0


@pytest.mark.slow
def test_adapters_train_on_shared_weights():
    import peft

    model = build("Llama").eval()
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    model = peft.get_peft_model(model, config)
    coda.patch(model)
    layer = model.base_model.model.model.layers[1]
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    assert coda.last_report().copied == 0
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**arguments("Llama")).loss.backward()
        optimizer.step()
    for name, value in layer.named_parameters():
        assert torch.equal(value, before[name]) == ("lora" not in name)
