"""Llama-3-8B's LM head and cross entropy, 128256 words; one loss for each row, or their mean.

The best program we know (M=8192, bf16, MB): logits are stored only if asked for.

    gemm   x w_head target    -> log Σ exp of each tile, target's logit   1135  (3237 with logits)
    fold   partials           -> loss                                       17
"""

import coda

DIMS = {"M": 8192, "D": 4096, "V": 128256}


@coda.block
def loss(
    x: coda.Tensor["M D"],
    w_head: coda.Tensor["V D"],
    target: coda.Tensor["M", coda.i64],
):
    return coda.cross_entropy(x @ w_head.T, target, reduction="none")


@coda.block
def logits_and_loss(
    x: coda.Tensor["M D"],
    w_head: coda.Tensor["V D"],
    target: coda.Tensor["M", coda.i64],
):
    logits = x @ w_head.T
    return {"logits": logits, "loss": coda.cross_entropy(logits, target)}
