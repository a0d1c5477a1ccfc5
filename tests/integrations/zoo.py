"""Tiny random-weight models of transformers' families, and arguments for them."""

import torch
import transformers

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GEMMA = {**COMMON, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
GPT2 = {
    "vocab_size": 128,
    "n_embd": 64,
    "n_head": 4,
    "n_positions": 128,
    "loss_type": "ForCausalLM",
}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
GRANITE = {"residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 3.0}

PHI = {**COMMON, "hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 2}
PHI |= {"partial_rotary_factor": 0.4}  # 32 of 80 columns of a head
HEADS_OF_64 = {**COMMON, "hidden_size": 128, "num_attention_heads": 2}
FALCON = {"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "bias": False}

FAMILIES = {
    "Llama": ("LlamaConfig", COMMON),
    "Mistral": ("MistralConfig", {**COMMON, "sliding_window": 8}),
    "Qwen2": ("Qwen2Config", {**COMMON, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3Config", {**COMMON, "head_dim": 32}),
    "Gemma-2": ("Gemma2Config", GEMMA),
    "Gemma-3": ("Gemma3TextConfig", GEMMA),
    "Phi-3": ("Phi3Config", {**COMMON, "sliding_window": None}),
    "OLMo-2": ("Olmo2Config", COMMON),
    "GPT-2": ("GPT2Config", GPT2),
    "GPT-NeoX": ("GPTNeoXConfig", {**HEADS_OF_64, "rotary_pct": 0.25}),
    "StarCoder2": ("Starcoder2Config", COMMON),
    "Cohere": ("CohereConfig", COMMON),
    "Granite": ("GraniteConfig", {**COMMON, **GRANITE, "embedding_multiplier": 2.0}),
    "Phi-2": ("PhiConfig", PHI),
    "StableLM": ("StableLmConfig", {**HEADS_OF_64, "partial_rotary_factor": 0.25}),
    "GLM-4": ("Glm4Config", {**COMMON, "head_dim": 16}),
    "SmolLM3": ("SmolLM3Config", COMMON),
    "Ernie-4.5": ("Ernie4_5Config", COMMON),
    "Nemotron": ("NemotronConfig", {**COMMON, "head_dim": 32}),
    "Falcon": ("FalconConfig", FALCON),
    "BERT": ("BertConfig", {**ENCODER, "vocab_size": 128, "max_position_embeddings": 128}),
    "ViT": ("ViTConfig", {**ENCODER, "image_size": 32, "patch_size": 8}),
}
HEADS = {"BERT": "BertForMaskedLM", "ViT": "ViTForImageClassification"}
DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout")
MORE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "residual_dropout")


def build(name, layers=2, dropout=0.0, **more):
    """A model with random weights, the same for each call."""
    torch.manual_seed(0)
    config, options = FAMILIES[name]
    depth = "n_layer" if name == "GPT-2" else "num_hidden_layers"
    made = getattr(transformers, config)(**{**options, depth: layers, **more})
    for one in (*DROPOUTS, *MORE):
        if hasattr(made, one):
            setattr(made, one, dropout)
    if name in HEADS:
        return getattr(transformers, HEADS[name])(made)
    model = transformers.AutoModelForCausalLM.from_config(made)
    model.loss_type = model.loss_type or "ForCausalLM"  # GPT-2 has none, and logs that it has none
    return model


def arguments(name, dtype=torch.float32, batch=2, length=16):
    """Arguments of the forward, with labels; ids that no config takes for padding."""
    generator = torch.Generator().manual_seed(1)
    if name == "ViT":
        images = 8 * batch  # one row of logits each: the errors of two would tell nothing
        pixels = torch.randn(images, 3, 32, 32, generator=generator).to(torch.bfloat16)
        return {"pixel_values": pixels.to(dtype), "labels": torch.arange(images) % 2}
    ids = torch.randint(1, 128, (batch, length), generator=generator)
    more = {} if name == "BERT" else {"use_cache": False}
    return {"input_ids": ids, "labels": ids, **more}


def step(model, call, given):
    """The loss, the logits and all gradients of one step."""
    model.zero_grad()
    out = call(**given)
    out.loss.backward()
    gradients = {
        n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None
    }
    return out.loss.item(), out.logits.detach(), gradients


def distance(found, exact):
    """The relative distance of two tensors in the Frobenius norm."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def overall(found, exact):
    """The same, of all gradients together."""
    both = [torch.cat([g[n].double().flatten() for n in exact]) for g in (found, exact)]
    return distance(*both)
