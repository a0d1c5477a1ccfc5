"""Cold compiles of a Llama layer and model: backend coda beside Inductor, as ratios in one run.

Both are torch.compile's first call, Dynamo's part included, without any cache; coda runs on the
CPU reference, torch op by op around its blocks. `python benchmarks/model_compile.py [LAYERS ...]`.
"""

import os
import sys
import tempfile
import time

os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "CODA_FALLBACK": "eager"}
os.environ |= {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(), "CODA_BACKEND": "reference"}

import torch
import torch._dynamo
import transformers
from rich.console import Console
from rich.table import Table

from coda.integrations import dynamo

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 512}
SIZES |= {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 256}


def build(layers):
    """A model of so many layers and arguments for it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return model, {"input_ids": torch.randint(1, 500, (2, 32)), "use_cache": False}


def seconds(backend, layers, training):
    """The first call: what is compiled, and one run."""
    torch._dynamo.reset()
    dynamo._blocks.clear()
    model, given = build(layers)
    model.train(training)
    call = torch.compile(model, backend=backend)
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        logits = call(**given).logits
    if training:
        logits.float().square().mean().backward()
    return time.perf_counter() - start


def main():
    torch.set_num_threads(1)
    depths = [int(a) for a in sys.argv[1:]] or [1, 4, 16, 32]
    for backend in (dynamo.backend, "inductor"):
        seconds(backend, 1, True)  # imports
    table = Table("layers", "", "coda s", "Inductor s", "ratio", title="first call")
    for layers in depths:
        for training in (False, True):
            ours, theirs = (seconds(b, layers, training) for b in (dynamo.backend, "inductor"))
            numbers = f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}"
            table.add_row(str(layers), "training" if training else "inference", *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
