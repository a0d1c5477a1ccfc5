"""Families of other kinds, in float32: torch's logits and gradients, with something in blocks."""

import pytest
import torch
import transformers

import coda
from tests.integrations.zoo import COMMON, DROPOUTS, ENCODER, MORE, distance

DEPTH = {"num_hidden_layers": 2}
TEXT = {**COMMON, **DEPTH}
GPT = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
PAIR = {"vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2}
PAIR |= {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 128}
PAIR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 0}
MASKED = {**ENCODER, **DEPTH, "vocab_size": 128, "max_position_embeddings": 128}
SSM = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
SSM |= {"mamba_chunk_size": 8, "attn_layer_indices": [1]}
SOUND = {**ENCODER, **DEPTH, "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 8]}
SOUND |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "vocab_size": 32}
SOUND |= {"num_conv_pos_embedding_groups": 4, "apply_spec_augment": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LOCAL |= {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
HYBRID = {"lru_width": 64, "attention_window_size": 16, "block_types": ["recurrent", "attention"]}
KINDS = {
    "Cohere2": ("ForCausalLM", {**TEXT, "sliding_window": 8}),
    "Apertus": ("ForCausalLM", TEXT),
    "Olmo3": ("ForCausalLM", {**TEXT, "sliding_window": 8}),
    "GPTJ": ("ForCausalLM", {**GPT, "rotary_dim": 8}),
    "XGLM": ("ForCausalLM", {"vocab_size": 128, "d_model": 64, "ffn_dim": 128, "num_layers": 2}),
    "Bloom": ("ForCausalLM", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "Olmoe": ("ForCausalLM", {**TEXT, **EXPERTS}),
    "Phimoe": ("ForCausalLM", {**TEXT, **LOCAL}),
    "Bamba": ("ForCausalLM", {**TEXT, **SSM}),
    "RecurrentGemma": ("ForCausalLM", {**TEXT, **HYBRID}),
    "ModernBert": ("ForMaskedLM", {**MASKED, "pad_token_id": 0, "cls_token_id": 1}),
    "DebertaV2": ("ForMaskedLM", {**MASKED, "relative_attention": True}),
    "Bart": ("ForConditionalGeneration", PAIR),
    "Dinov2": ("ForImageClassification", {**ENCODER, **DEPTH, "image_size": 32, "patch_size": 8}),
    "Wav2Vec2": ("Model", SOUND),
}


def made(name):
    """A model in which nothing is random but its weights, and arguments for it."""
    torch.manual_seed(0)
    head, options = KINDS[name]
    config = getattr(transformers, f"{name}Config")(**options)
    others = ("dropout", "activation_dropout", "embd_pdrop", "layerdrop", "feat_proj_dropout")
    for one in (*DROPOUTS, *MORE, *others):
        if hasattr(config, one):
            setattr(config, one, 0.0)
    model = getattr(transformers, f"{name}{head}")(config)
    if head == "Model":
        return model, {"input_values": torch.randn(2, 2000)}
    if head == "ForImageClassification":
        return model, {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4) % 2}
    ids = torch.randint(3, 128, (2, 16))
    quiet = {} if head == "ForMaskedLM" else {"use_cache": False}
    return model, {"input_ids": ids, "labels": ids, **quiet}


def trained(model, call, given):
    """The first output that is not a loss, and the gradients by name."""
    model.zero_grad()
    out = call(**given)
    y = out.logits if "logits" in out else out[0]
    (out.loss if "loss" in out else y.square().mean()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), found


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_families_of_other_kinds(name):
    model, given = made(name)
    y, gradients = trained(model, model, given)
    found, others = trained(model, torch.compile(model, backend="coda"), given)
    assert distance(found, y) < 1e-5
    assert others.keys() == gradients.keys()
    for n, exact in gradients.items():
        assert (others[n] - exact).norm() < 1e-4 * (exact.norm() + 1e-3), n
    assert coda.last_report().fused > 15
    model.eval()
    with torch.no_grad():
        exact = trained_output(model(**given))
        assert coda.patch(model, given).replaced >= 2
        assert distance(trained_output(model(**given)), exact) < 1e-5


def trained_output(out):
    """The first output that is not a loss."""
    return out.logits if "logits" in out else out[0]
