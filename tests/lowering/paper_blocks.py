"""Blocks as papers and their codebases write them: losses, modulation, projections, shifts.

`PAPER` has each with its sizes, by name. `baselines.json` has the frozen baselines of these.
"""

import coda


@coda.block
def grpo(
    h: coda.Tensor["B S D"],
    w: coda.Tensor["V D"],
    target: coda.Tensor["B S", coda.i64],
    old: coda.Tensor["B S", coda.f32],
    advantage: coda.Tensor["B", coda.f32],
    mask: coda.Tensor["B S", coda.f32],
):
    logits = (h @ w.T).cast(coda.f32)
    ratio = coda.exp(-coda.cross_entropy(logits, target, reduction="none") - old)
    a = advantage[:, None]
    clipped = coda.minimum(coda.maximum(ratio, 0.8), 1.2)
    loss = -coda.minimum(ratio * a, clipped * a) * mask
    return coda.mean(coda.sum(loss) / coda.sum(mask), axis=0)


@coda.block
def dpo_half(
    h: coda.Tensor["B S D"],
    w: coda.Tensor["V D"],
    target: coda.Tensor["B S", coda.i64],
    reference: coda.Tensor["B", coda.f32],
):
    logits = (h @ w.T).cast(coda.f32)
    d = coda.sum(-coda.cross_entropy(logits, target, reduction="none")) - reference
    return coda.mean(coda.log(1 + coda.exp(-d)), axis=0)


@coda.block
def entropy(h: coda.Tensor["M D"], w: coda.Tensor["V D"]):
    lp = coda.log_softmax((h @ w.T).cast(coda.f32))
    return -coda.sum(coda.exp(lp) * lp)


@coda.block
def distillation(
    h: coda.Tensor["M D"],
    w: coda.Tensor["V D"],
    teacher: coda.Tensor["M D"],
    w_teacher: coda.Tensor["V D"],
):
    student = coda.log_softmax((h @ w.T).cast(coda.f32))
    exact = coda.log_softmax((teacher @ w_teacher.T).cast(coda.f32))
    return coda.mean(coda.sum(coda.exp(exact) * (exact - student)), axis=0)


@coda.block
def grn(
    x: coda.Tensor["B S D"],
    residual: coda.Tensor["B S D"],
    w: coda.Tensor["D"],
    b: coda.Tensor["D"],
    w1: coda.Tensor["F D"],
    b1: coda.Tensor["F"],
    gain: coda.Tensor["F"],
    shift: coda.Tensor["F"],
    w2: coda.Tensor["D F"],
    b2: coda.Tensor["D"],
):
    h = coda.gelu(coda.layer_norm(x, w, b, eps=1e-6) @ w1.T + b1)
    norm = coda.sqrt(coda.sum(h * h, axis=1, keepdims=True) + 1e-12)
    share = norm / (coda.mean(norm, keepdims=True) + 1e-6)
    return residual + (h + gain * (h * share) + shift) @ w2.T + b2


@coda.block
def mla(
    x: coda.Tensor["M D"],
    w: coda.Tensor["D"],
    w_qa: coda.Tensor["Q D"],
    q_norm: coda.Tensor["Q"],
    w_qb: coda.Tensor["(H n+r) Q"],
    w_kva: coda.Tensor["K+r D"],
    kv_norm: coda.Tensor["K"],
    w_kvb: coda.Tensor["(H 2*n) K"],
    cos: coda.Tensor["M r/2"],
    sin: coda.Tensor["M r/2"],
):
    h = coda.rms_norm(x, w)
    q = (coda.rms_norm(h @ w_qa.T, q_norm) @ w_qb.T).reshape("M (H n+r) -> M H n+r")
    latent = h @ w_kva.T
    rank = w_kvb.shape[1]
    kv = coda.rms_norm(latent[:, :rank], kv_norm) @ w_kvb.T
    n = q.shape[-1] - 2 * cos.shape[-1]
    turned = coda.rope(q[..., n:], cos, sin, interleaved=True)
    key = coda.rope(latent[:, None, rank:], cos, sin, interleaved=True)
    return {"q": coda.concat([q[..., :n], turned]), "kv": kv, "key": key}


@coda.block
def hyper_connections(
    streams: coda.Tensor["M 4*D"],
    w: coda.Tensor["24 4*D"],
    b: coda.Tensor["24"],
    y: coda.Tensor["M D"],
):
    m = coda.rms_norm(streams) @ w.T + b
    pre, post = coda.sigmoid(m[:, :4]), 2 * coda.sigmoid(m[:, 4:8])
    mix = coda.exp(m[:, 8:]).reshape("M 16 -> M 4 4")
    for _ in range(3):
        mix = mix / coda.sum(mix, axis=-1, keepdims=True)
        mix = mix / coda.sum(mix, axis=-2, keepdims=True)
    s = coda.split(streams, 4)
    x = pre[:, 0:1] * s[0] + pre[:, 1:2] * s[1] + pre[:, 2:3] * s[2] + pre[:, 3:4] * s[3]
    mixed = []
    for i in range(4):
        one = post[:, i : i + 1] * y
        for j in range(4):
            one = one + mix[:, i, j][:, None] * s[j]
        mixed.append(one)
    return x, coda.concat(mixed)


@coda.block
def gate(x: coda.Tensor["B S D"], c: coda.Tensor["B D"], w: coda.Tensor["D D"]):
    return x + coda.tanh(c)[:, None, :] * (x @ w.T)


@coda.block
def adaln(
    x: coda.Tensor["B S D"],
    c: coda.Tensor["B D"],
    w_mod: coda.Tensor["3*D D"],
    b_mod: coda.Tensor["3*D"],
    w1: coda.Tensor["F D"],
    b1: coda.Tensor["F"],
    w2: coda.Tensor["D F"],
    b2: coda.Tensor["D"],
):
    shift, scale, gate = coda.split(coda.silu(c) @ w_mod.T + b_mod, 3)
    h = coda.layer_norm(x, eps=1e-6) * (1 + scale[:, None, :]) + shift[:, None, :]
    h = coda.gelu(h @ w1.T + b1, "tanh") @ w2.T + b2
    return x + gate[:, None, :] * h


def shifted(x, by):
    return coda.concat([x[:, :by] * 0.0, x[:, :-by]], axis=1)


@coda.block
def canon(x: coda.Tensor["B S D"], w: coda.Tensor["4 D"]):
    y = x + x * w[3]
    for t in range(1, 4):
        y = y + shifted(x, t) * w[3 - t]
    return y


@coda.block
def token_shift(
    x: coda.Tensor["B S D"], mix: coda.Tensor["D"], w1: coda.Tensor["F D"], w2: coda.Tensor["D F"]
):
    return coda.square(coda.relu((x + (shifted(x, 1) - x) * mix) @ w1.T)) @ w2.T


@coda.block
def clip(
    a: coda.Tensor["N D"],
    b: coda.Tensor["N D"],
    scale: coda.Tensor["1", coda.f32],
    target: coda.Tensor["N", coda.i64],
):
    logits = (coda.l2_norm(a) @ coda.l2_norm(b).T).cast(coda.f32) * scale
    own = coda.pick(logits, target)[:, 0]
    return coda.mean(0.5 * (coda.logsumexp(logits) + coda.logsumexp(logits, axis=0)) - own, axis=0)


def act(g, u):
    g, u = coda.minimum(g, 7.0), coda.maximum(coda.minimum(u, 7.0), -7.0)
    return (u + 1) * (g * coda.sigmoid(g * 1.702))


@coda.block
def alternating(
    x: coda.Tensor["M D"],
    norm: coda.Tensor["D"],
    w: coda.Tensor["2*F D"],
    b: coda.Tensor["2*F"],
    w_down: coda.Tensor["D F"],
):
    both = coda.rms_norm(x, norm) @ w.T + b
    return x + act(both[:, 0::2], both[:, 1::2]) @ w_down.T


@coda.block
def apart(
    x: coda.Tensor["M D"],
    norm: coda.Tensor["D"],
    w_gate: coda.Tensor["F D"],
    w_up: coda.Tensor["F D"],
    b_gate: coda.Tensor["F"],
    b_up: coda.Tensor["F"],
    w_down: coda.Tensor["D F"],
):
    h = coda.rms_norm(x, norm)
    return x + act(h @ w_gate.T + b_gate, h @ w_up.T + b_up) @ w_down.T


@coda.block
def into(
    x: coda.Tensor["M D"],
    norm: coda.Tensor["D"],
    w_z: coda.Tensor["I D"],
    w_x: coda.Tensor["I+2*G*N D"],
    w_dt: coda.Tensor["H D"],
    bias: coda.Tensor["H"],
):
    h = coda.rms_norm(x, norm)
    dt = (h @ w_dt.T + bias).cast(coda.f32)
    dt = coda.maximum(dt, 0.0) + coda.log(1 + coda.exp(-abs(dt)))
    return {"z": h @ w_z.T, "x": h @ w_x.T, "dt": dt}


@coda.block
def out(
    y: coda.Tensor["M I"],
    z: coda.Tensor["M I"],
    norm: coda.Tensor["I"],
    x: coda.Tensor["M D"],
    w: coda.Tensor["D I"],
):
    groups = (y * coda.silu(z)).reshape(y.shape[0], 4, y.shape[1] // 4)
    return x + (coda.rms_norm(groups).reshape(*y.shape) * norm) @ w.T


LARGE = {"M": 8192, "D": 4096, "F": 14336, "V": 128256, "B": 8, "S": 1024}
SEQUENCES = {"B": 8, "S": 1024, "D": 2048, "F": 8192}
SHIFTED = {"B": 4, "S": 2048, "D": 4096, "F": 14336}
MAMBA = {"M": 8192, "D": 4096, "I": 8192, "H": 128, "G": 8, "N": 128}
PAPER = {
    **dict.fromkeys((grpo, dpo_half, entropy, distillation, alternating, apart), LARGE),
    **dict.fromkeys((gate, adaln), SEQUENCES),
    **dict.fromkeys((canon, token_shift), SHIFTED),
    **dict.fromkeys((into, out), MAMBA),
    grn: {"B": 64, "S": 196, "D": 768, "F": 3072},
    mla: {"M": 8192, "D": 7168, "Q": 1536, "K": 512, "H": 128, "n": 128, "r": 64},
    hyper_connections: {"M": 8192, "D": 2048},
    clip: {"N": 8192, "D": 1024},
}
