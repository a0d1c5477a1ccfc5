"""GPT-NeoX-20B's parallel block, attention output given: x + attention(ln1 x) + mlp(ln2 x).

The best program we know (M=8192, bf16, MB): both branches from one statistic and in one GEMM.

    rows   x                      -> mean, rsqrt(var + eps)                  101
    gemm   attention w_out b x    -> x + acc + b                             378
    gemm   x [g·w_fc; g·w_qkv]    -> gelu(…), qkv                           1335
    gemm   y w_proj b (x + …)     -> x1                                      906
                                                                            2720
"""

import coda

DIMS = {"M": 8192, "D": 6144, "F": 24576}


@coda.block
def layer(
    attention: coda.Tensor["M D"],
    x: coda.Tensor["M D"],
    w_out: coda.Tensor["D D"],
    b_out: coda.Tensor["D"],
    w_norm: coda.Tensor["D"],
    b_norm: coda.Tensor["D"],
    w_fc: coda.Tensor["F D"],
    b_fc: coda.Tensor["F"],
    w_proj: coda.Tensor["D F"],
    b_proj: coda.Tensor["D"],
    w_norm1: coda.Tensor["D"],
    b_norm1: coda.Tensor["D"],
    w_qkv: coda.Tensor["3*D D"],
    b_qkv: coda.Tensor["3*D"],
):
    h = coda.layer_norm(x, w_norm, b_norm)
    mlp = coda.linear(coda.gelu(coda.linear(h, w_fc, b_fc)), w_proj, b_proj)
    qkv = coda.linear(coda.layer_norm(x, w_norm1, b_norm1), w_qkv, b_qkv)
    return {"x": x + coda.linear(attention, w_out, b_out) + mlp, "qkv": qkv}
