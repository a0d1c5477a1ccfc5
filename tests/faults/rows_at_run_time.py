"""Row counts that change from call to call: losses, embeddings and learnable scalars are built for each.

docs/tutorial.md: "Rows may change from call to call; another D or F is lowered anew". A mean over the
rows (every cross entropy), a `take` of an embedding, and in training a learnable scalar build the number
of rows in (`Program.fixed` has M): each new number of tokens is a Program of its own, and where the
kernel's text has it, a kernel to compile (seconds, in the middle of training or serving).

Right: the number of rows is a run-time value of every kernel: one Program serves all (`fixed` lacks M).
"""

import sys

import coda


@coda.block
def loss(x: coda.Tensor["M D"], w: coda.Tensor["V D"], target: coda.Tensor["M", coda.i64]):
    return coda.cross_entropy((x @ w.T).cast(coda.f32), target)


@coda.block
def embed(table: coda.Tensor["V D"], token: coda.Tensor["M", coda.i64], w: coda.Tensor["D"]):
    return coda.rms_norm(coda.take(table, token), w)


@coda.block
def scaled(x: coda.Tensor["M D"], alpha: coda.Tensor["1"], w: coda.Tensor["V D"]):
    return coda.tanh(alpha * x) @ w.T


wrong = 0
for block in (loss, embed, scaled):
    sizes = {"M": 512, "D": 256, "V": 1024}
    sizes = {k: v for k, v in sizes.items() if k in block.graph.symbols}
    for way, program in zip(
        ("forward", "backward"), block.lower_training("sm_90a", sizes), strict=True
    ):
        bad = "M" in program.fixed
        wrong += bad
        print(f"{block.__name__} {way}: built in {sorted(program.fixed)}{'  WRONG' if bad else ''}")
sys.exit(wrong > 0)
