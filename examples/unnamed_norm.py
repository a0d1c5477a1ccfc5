"""A norm that nobody named: x · (eps + mean |x|³)^(−1/3) · w, in a Llama-3-8B MLP.

It gets what RMSNorm gets: the program of `llama_mlp`, kernel by kernel.
"""

import coda

DIMS = {"M": 8192, "D": 4096, "F": 14336}


def cubic_norm(x, w, eps=1e-5):
    return x * (eps + coda.mean(abs(x) ** 3, keepdims=True)) ** (-1 / 3) * w


@coda.block
def mlp(
    x: coda.Tensor["M D"],
    w_norm: coda.Tensor["D"],
    w_gate: coda.Tensor["F D"],
    w_up: coda.Tensor["F D"],
    w_down: coda.Tensor["D F"],
):
    h = cubic_norm(x, w_norm)
    return x + coda.swiglu(h @ w_gate.T, h @ w_up.T) @ w_down.T
