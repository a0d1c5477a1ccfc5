"""A Llama-3-8B layer between two attention cores: attention output to the next layer's q, k, v.

The best program we know, M=8192, bf16, MB = 10⁶ bytes; frozen weights in brackets:

    gemm   attention w_out x w_norm1   -> x1 = acc + x, h = x1·w_norm1, Σ x1²    302   (235: no h)
    fold   partials                    -> r1                                       1
    gemm   h [gate; up] r1             -> y = silu(r1·g)·(r1·u)                  537
    gemm   y down x1 w_norm2           -> x2 = acc + x1, h = x2·w_norm2, Σ x2²   554   (487: no h)
    fold   partials                    -> r2                                       1
    gemm   h [q; k; v] r2 cos sin      -> RoPE of q and k; v                     222
                                                                                1618  (1483)

CODA's hand-written program moves 2080 MB; 470 of them are pre-activations for its backward.
"""

import coda

DIMS = {"M": 8192, "D": 4096, "F": 14336, "H": 32, "G": 8, "d": 128}


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
    cos: coda.Constant["M d/2", coda.f32],
    sin: coda.Constant["M d/2", coda.f32],
):
    c, s = cos.cast(x.dtype), sin.cast(x.dtype)
    x = x + attention @ w_out.T
    h = coda.rms_norm(x, w_norm1, eps=1e-5)
    x = x + coda.swiglu(h @ w_gate.T, h @ w_up.T) @ w_down.T
    h = coda.rms_norm(x, w_norm2, eps=1e-5)
    q = coda.rope((h @ w_q.T).reshape("M (H d) -> M H d"), c, s, interleaved=True)
    k = coda.rope((h @ w_k.T).reshape("M (G d) -> M G d"), c, s, interleaved=True)
    v = (h @ w_v.T).reshape("M (G d) -> M G d")
    return {"x": x, "q": q, "k": k, "v": v}
