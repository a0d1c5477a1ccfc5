"""A Gemma-2-9B layer between two attention cores: norms before and after, GeGLU, weights 1 + w.

A norm after a GEMM needs its whole row before the residual is added, so it costs a pass over
rows: read the GEMM's output and x, write x1 (and h = x1·w). The statistic of the next norm is taken
in the same pass. The best program we know (M=8192, bf16, MB; frozen weights in brackets): gemm 156,
rows 177, gemm 499, gemm 397, rows 294 (177), gemm 256: 1779 (1661).
"""

import coda

DIMS = {"M": 8192, "D": 3584, "F": 14336, "H": 16, "G": 8, "d": 256}


def norm(x, w):
    return coda.rms_norm(x, w, eps=1e-6, shift=1.0)


@coda.block
def layer(
    attention: coda.Tensor["M (H d)"],
    x: coda.Tensor["M D"],
    w_out: coda.Tensor["D (H d)"],
    w_post1: coda.Tensor["D"],
    w_pre2: coda.Tensor["D"],
    w_gate: coda.Tensor["F D"],
    w_up: coda.Tensor["F D"],
    w_down: coda.Tensor["D F"],
    w_post2: coda.Tensor["D"],
    w_pre1: coda.Tensor["D"],
    w_q: coda.Tensor["(H d) D"],
    w_k: coda.Tensor["(G d) D"],
    w_v: coda.Tensor["(G d) D"],
    cos: coda.Constant["M d/2"],
    sin: coda.Constant["M d/2"],
):
    x = x + norm(attention @ w_out.T, w_post1)
    h = norm(x, w_pre2)
    y = coda.geglu(h @ w_gate.T, h @ w_up.T, approximate="tanh") @ w_down.T
    x = x + norm(y, w_post2)
    h = norm(x, w_pre1)
    q = coda.rope((h @ w_q.T).reshape("M (H d) -> M H d"), cos, sin)
    k = coda.rope((h @ w_k.T).reshape("M (G d) -> M G d"), cos, sin)
    return {"x": x, "q": q, "k": k, "v": h @ w_v.T}
