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


LOSSES = [focal, capped, ppo, warm_distillation, reverse_kl, jensen_shannon]
