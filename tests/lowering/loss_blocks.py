"""Losses over a vocabulary and over pairs, as codebases of post-training and contrastive ones do.

`LOSSES` are the blocks; `SIZES` has every symbol of theirs, as large as in practice.
"""

import coda

T, f32, i64 = coda.Tensor, coda.f32, coda.i64
SIZES = {"B": 8, "S": 1024, "M": 8192, "N": 8192, "D": 4096, "E": 1024, "V": 128256}


@coda.block
def focal(h: T["M D"], w: T["V D"], target: T["M", i64]):
    ce = coda.cross_entropy((h @ w.T).cast(f32), target, reduction="none")
    p = coda.exp(-ce)
    return coda.mean((1 - p) * (1 - p) * ce, axis=0)


@coda.block
def capped(h: T["M D"], w: T["V D"], target: T["M", i64]):
    logits = 32.0 * coda.tanh((h @ w.T).cast(f32) / 32.0)
    return coda.cross_entropy(logits, target)


@coda.block
def warm_distillation(h: T["M D"], w: T["V D"], teacher: T["M D"], w_teacher: T["V D"]):
    student = coda.log_softmax((h @ w.T).cast(f32) / 2.0)
    exact = coda.softmax((teacher @ w_teacher.T).cast(f32) / 2.0)
    return -coda.mean(coda.sum(exact * student), axis=0)


@coda.block
def ppo(h: T["B S D"], w: T["V D"], target: T["B S", i64], old: T["B S", f32], gain: T["B S", f32]):
    lp = coda.log_softmax((h @ w.T).cast(f32))
    entropy = -coda.sum(coda.exp(lp) * lp)
    ratio = coda.exp(coda.pick(lp, target)[:, :, 0] - old)
    clipped = coda.minimum(coda.maximum(ratio, 0.8), 1.2)
    loss = -coda.minimum(ratio * gain, clipped * gain) - 0.01 * entropy
    return coda.mean(coda.mean(loss), axis=0)


@coda.block
def entropy(h: T["M D"], w: T["V D"]):
    p = coda.softmax((h @ w.T).cast(f32))
    lp = coda.log_softmax((h @ w.T).cast(f32))
    return -coda.mean(coda.sum(p * lp), axis=0)


@coda.block
def entropy_of_logits(logits: T["M V"]):
    lp = coda.log_softmax(logits.cast(f32))
    return -coda.sum(coda.exp(lp) * lp)


@coda.block
def expected(h: T["M D"], w: T["V D"], places: T["V", f32]):
    """A number between classes, as box regressions and value heads have it."""
    return coda.sum(coda.softmax((h @ w.T).cast(f32)) * places)


@coda.block
def reverse_kl(h: T["M D"], w: T["V D"], teacher: T["M D"], w_teacher: T["V D"]):
    student = coda.log_softmax((h @ w.T).cast(f32))
    exact = coda.log_softmax((teacher @ w_teacher.T).cast(f32))
    return coda.mean(coda.sum(coda.exp(student) * (student - exact)), axis=0)


@coda.block
def jensen_shannon(h: T["M D"], w: T["V D"], teacher: T["M D"], w_teacher: T["V D"]):
    s = coda.log_softmax((h @ w.T).cast(f32))
    t = coda.log_softmax((teacher @ w_teacher.T).cast(f32))
    both = coda.exp(s), coda.exp(t)
    middle = coda.log(0.5 * (both[0] + both[1]))
    parts = both[0] * (s - middle), both[1] * (t - middle)
    return coda.mean(coda.sum(0.5 * (parts[0] + parts[1])), axis=0)


def log_probabilities(h, w, target):
    return -coda.cross_entropy((h @ w.T).cast(f32), target, reduction="none")


@coda.block
def grpo_with_kl(
    h: T["B S D"],
    w: T["V D"],
    target: T["B S", i64],
    old: T["B S", f32],
    ref: T["B S", f32],
    gain: T["B", f32],
    mask: T["B S", f32],
):
    lp = log_probabilities(h, w, target)
    ratio, a, d = coda.exp(lp - old), gain[:, None], ref - lp
    clipped = coda.minimum(coda.maximum(ratio, 0.8), 1.2)
    loss = -coda.minimum(ratio * a, clipped * a) + 0.04 * (coda.exp(d) - d - 1)
    return coda.mean(coda.sum(loss * mask) / coda.sum(mask), axis=0)


@coda.block
def gspo(
    h: T["B S D"],
    w: T["V D"],
    target: T["B S", i64],
    old: T["B S", f32],
    gain: T["B", f32],
    mask: T["B S", f32],
):
    lp = log_probabilities(h, w, target)
    s = coda.exp(coda.sum((lp - old) * mask) / coda.sum(mask))
    clipped = coda.minimum(coda.maximum(s, 0.8), 1.2)
    return -coda.mean(coda.minimum(s * gain, clipped * gain), axis=0)


@coda.block
def simpo(
    h: T["B S D"],
    g: T["B S D"],
    w: T["V D"],
    won: T["B S", i64],
    lost: T["B S", i64],
    m_won: T["B S", f32],
    m_lost: T["B S", f32],
):
    a = coda.sum(log_probabilities(h, w, won) * m_won) / coda.sum(m_won)
    b = coda.sum(log_probabilities(g, w, lost) * m_lost) / coda.sum(m_lost)
    return coda.mean(coda.log(1 + coda.exp(0.5 - 2.0 * (a - b))), axis=0)


@coda.block
def orpo(h: T["B S D"], w: T["V D"], target: T["B S", i64], other: T["B", f32]):
    lp = coda.mean(log_probabilities(h, w, target))
    odds = lp - coda.log(1 - coda.exp(lp)) - other
    return coda.mean(0.1 * coda.log(1 + coda.exp(-odds)) - lp, axis=0)


def pairs(a, b):
    return (coda.l2_norm(a) @ coda.l2_norm(b).T).cast(f32)


@coda.block
def clip(a: T["N E"], b: T["N E"], scale: T["1", f32], target: T["N", i64]):
    logits = pairs(a, b) * scale
    own = coda.pick(logits, target)[:, 0]
    both = coda.logsumexp(logits) + coda.logsumexp(logits, axis=0)
    return coda.mean(0.5 * both - own, axis=0)


@coda.block
def info_nce(a: T["N E"], b: T["N E"], target: T["N", i64]):
    return coda.cross_entropy(pairs(a, b) / 0.0625, target)


@coda.block
def siglip(a: T["N E"], b: T["N E"], scale: T["1", f32], bias: T["1", f32], target: T["N", i64]):
    logits = pairs(a, b) * scale + bias
    own = coda.pick(logits, target)[:, 0]
    return coda.mean(coda.sum(coda.log(1 + coda.exp(logits))) - own, axis=0)


@coda.block
def over_rows(a: T["N E"], b: T["M E"]):
    return coda.logsumexp((a @ b.T).cast(f32), axis=0)


@coda.block
def given_logits(logits: T["M V"], target: T["M", i64]):
    return coda.cross_entropy(logits.cast(f32), target, reduction="none")


@coda.block
def own_probability(h: T["M D"], w: T["V D"], target: T["M", i64]):
    p = coda.softmax((h @ w.T).cast(f32))
    return coda.mean(1 - coda.pick(p, target)[:, 0], axis=0)


LOSSES = [
    *(focal, capped, ppo, warm_distillation, reverse_kl, jensen_shannon),
    *(grpo_with_kl, gspo, simpo, orpo),
    *(given_logits, own_probability),
    *(entropy, entropy_of_logits, expected),
    *(clip, info_nce, siglip, over_rows),
]
