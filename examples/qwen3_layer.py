"""A Qwen3-8B layer between two attention cores: QK-norm and half-split RoPE on q and k.

As Llama's, with statistics of each head of q and k taken from the accumulator before its epilogue
(M=8192, bf16, MB; frozen weights in brackets): 302 (235), 470, 504 (436), 220: 1500 (1366).
"""

import coda

DIMS = {"M": 8192, "D": 4096, "F": 12288, "H": 32, "G": 8, "d": 128}


def head(h, w, w_norm, heads, cos, sin):
    x = (h @ w.T).reshape(heads)
    return coda.rope(coda.rms_norm(x, w_norm, eps=1e-6), cos, sin)


@coda.block
def layer(
    attention: coda.Tensor["M (H d)"],
    x: coda.Tensor["M D"],
    w_out: coda.Tensor["D (H d)"],
    w_norm1: coda.Tensor["D"],
    w_gate: coda.Tensor["F D"],
    w_up: coda.Tensor["F D"],
    w_down: coda.Tensor["D F"],
    w_norm2: coda.Tensor["D"],
    w_q: coda.Tensor["(H d) D"],
    w_k: coda.Tensor["(G d) D"],
    w_v: coda.Tensor["(G d) D"],
    w_qnorm: coda.Tensor["d"],
    w_knorm: coda.Tensor["d"],
    cos: coda.Constant["M d/2"],
    sin: coda.Constant["M d/2"],
):
    x = x + attention @ w_out.T
    h = coda.rms_norm(x, w_norm1, eps=1e-6)
    x = x + coda.swiglu(h @ w_gate.T, h @ w_up.T) @ w_down.T
    h = coda.rms_norm(x, w_norm2, eps=1e-6)
    q = head(h, w_q, w_qnorm, "M (H d) -> M H d", cos, sin)
    k = head(h, w_k, w_knorm, "M (G d) -> M G d", cos, sin)
    v = (h @ w_v.T).reshape("M (G d) -> M G d")
    return {"x": x, "q": q, "k": k, "v": v}
