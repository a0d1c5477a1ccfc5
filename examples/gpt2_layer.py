"""A GPT-2 layer between two attention cores: LayerNorm with affine, biases, GELU by tanh.

StarCoder2 has the same structure; `starcoder2_layer` takes its sizes and adds RoPE. The best
program we know (GPT-2 XL, M=8192, bf16, MB): the gains go into the weights, since the mean has to
be subtracted after the contraction.

    gemm   attention w_out b x    -> x1, (n, mean, M2) of each tile            85
    fold   partials               -> mean, rsqrt(var + eps)                     1
    gemm   x1 g·w_fc …            -> y = gelu(r·acc − r·mean·Σ g·w + b)       152
    gemm   y w_proj b x1          -> x2, (n, mean, M2)                        179
    fold   partials               -> mean, rsqrt(var + eps)                     1
    gemm   x2 g·w_qkv …           -> qkv                                      120
                                                                              538
"""

import coda

DIMS = {"M": 8192, "D": 1600, "F": 6400}
STARCODER2_DIMS = {"M": 8192, "D": 4608, "F": 18432, "H": 36, "G": 4, "d": 128}


@coda.block
def layer(
    attention: coda.Tensor["M D"],
    x: coda.Tensor["M D"],
    w_out: coda.Tensor["D D"],
    b_out: coda.Tensor["D"],
    w_norm1: coda.Tensor["D"],
    b_norm1: coda.Tensor["D"],
    w_fc: coda.Tensor["F D"],
    b_fc: coda.Tensor["F"],
    w_proj: coda.Tensor["D F"],
    b_proj: coda.Tensor["D"],
    w_norm2: coda.Tensor["D"],
    b_norm2: coda.Tensor["D"],
    w_qkv: coda.Tensor["3*D D"],
    b_qkv: coda.Tensor["3*D"],
):
    x = x + coda.linear(attention, w_out, b_out)
    h = coda.layer_norm(x, w_norm1, b_norm1)
    y = coda.gelu(coda.linear(h, w_fc, b_fc), approximate="tanh")
    x = x + coda.linear(y, w_proj, b_proj)
    h = coda.layer_norm(x, w_norm2, b_norm2)
    return {"x": x, "qkv": coda.linear(h, w_qkv, b_qkv)}


@coda.block
def starcoder2_layer(
    attention: coda.Tensor["M (H d)"],
    x: coda.Tensor["M D"],
    w_out: coda.Tensor["D (H d)"],
    b_out: coda.Tensor["D"],
    w_norm1: coda.Tensor["D"],
    b_norm1: coda.Tensor["D"],
    w_fc: coda.Tensor["F D"],
    b_fc: coda.Tensor["F"],
    w_proj: coda.Tensor["D F"],
    b_proj: coda.Tensor["D"],
    w_norm2: coda.Tensor["D"],
    b_norm2: coda.Tensor["D"],
    w_q: coda.Tensor["(H d) D"],
    b_q: coda.Tensor["(H d)"],
    w_k: coda.Tensor["(G d) D"],
    b_k: coda.Tensor["(G d)"],
    w_v: coda.Tensor["(G d) D"],
    b_v: coda.Tensor["(G d)"],
    cos: coda.Constant["M d/2"],
    sin: coda.Constant["M d/2"],
):
    x = x + coda.linear(attention, w_out, b_out)
    h = coda.layer_norm(x, w_norm1, b_norm1)
    y = coda.gelu(coda.linear(h, w_fc, b_fc), approximate="tanh")
    x = x + coda.linear(y, w_proj, b_proj)
    h = coda.layer_norm(x, w_norm2, b_norm2)
    q = coda.rope(coda.linear(h, w_q, b_q).reshape("M (H d) -> M H d"), cos, sin)
    k = coda.rope(coda.linear(h, w_k, b_k).reshape("M (G d) -> M G d"), cos, sin)
    v = coda.linear(h, w_v, b_v)
    return {"x": x, "q": q, "k": k, "v": v}
