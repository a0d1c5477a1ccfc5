"""Llama-3-8B's MLP: x + down(swiglu(rms_norm(x))).

The best program we know, M=8192, bf16, MB = 10⁶ bytes; frozen weights in brackets:

    rows   x w_norm            -> h = x·w_norm, r = rsqrt(mean x² + eps)    134   (67: no h)
    gemm   h [gate; up] r      -> y = silu(r·g)·(r·u)                       537
    gemm   y down x            -> x + acc                                   487
                                                                           1158  (1091)
"""

import coda

DIMS = {"M": 8192, "D": 4096, "F": 14336}


@coda.block
def mlp(
    x: coda.Tensor["M D"],
    w_norm: coda.Tensor["D"],
    w_gate: coda.Tensor["F D"],
    w_up: coda.Tensor["F D"],
    w_down: coda.Tensor["D F"],
):
    h = coda.rms_norm(x, w_norm, eps=1e-5)
    return x + coda.swiglu(h @ w_gate.T, h @ w_up.T) @ w_down.T
