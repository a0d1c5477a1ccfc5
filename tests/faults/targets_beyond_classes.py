"""Targets that are no class, in the kernels of a loss (backend sim; the GPU runs the same PTX).

Right (docs/training.md): "A target that is no class at all gives the loss NaN, and never a number that
looks right"; the reference does that. In kernels a target from V up to the end of the last tile of
columns picks a column that does not exist (an accumulator of 0), and the loss is its logsumexp, a
plausible number: a pad token that was added behind a vocabulary of 50257 is trained on. The gradient
is one of softmax alone. Torch on a GPU stops at an assertion there.
"""

import sys

import torch

import coda
from coda.runtime.simulate import device


@coda.block
def head(x: coda.Tensor["M D"], w: coda.Tensor["V D"], t: coda.Tensor["M", coda.i64]):
    return coda.cross_entropy((x @ w.T).cast(coda.f32), t, reduction="none")


torch.manual_seed(0)
x, w = torch.randn(16, 64).bfloat16(), torch.randn(50, 64).bfloat16()
t = torch.tensor([0, 49, 50, 51, 63, 64, 100, 127, 128, 255, 256, -1, -100, 7, 8, 9])
expected = head(x, w, t, backend="reference")
wrong = 0
for arch in ("sm_90a", "sm_100a"):
    with device(arch, checks="raise"):
        found = head(x, w, t, backend="sim", arch=arch)
    for target, y, e in zip(t.tolist(), found.tolist(), expected.tolist(), strict=True):
        if (y != y) != (e != e) or abs(y - e) > 0.05:
            wrong += 1
            print(
                f"{arch}, 50 classes, target {target}: the kernel gives {y:.3f}, the reference {e:.3f}"
            )
print(f"{wrong} targets differ from the reference")
sys.exit(bool(wrong))
