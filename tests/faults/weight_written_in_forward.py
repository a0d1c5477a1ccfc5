"""A model that clamps a weight in its forward (Gemma-3n's AltUp: `weight.data.clamp_`), in training.

Gemma-3n crashes under backend="coda" and under `coda.patch` at the first training step: "a leaf
Variable that requires grad is being used in an in-place operation" (`aten.copy_` onto the parameter,
run with gradients on). torch op by op and backend="aot_eager" train it. Inference works.

Right: the write through `.data` is made without autograd, as in torch; logits, gradients and the
clamped weight equal torch's.
"""

import sys

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.coefficients = nn.Linear(64, 64, bias=False)
        self.into, self.out = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        if self.training:
            self.coefficients.weight.data.clamp_(-0.05, 0.05)
        h = nn.functional.silu(self.into(self.coefficients(x)))
        return x + self.out(h)


x = torch.randn(16, 64)
exact = Model().train()
exact(x).square().mean().backward()

wrong = 0
for name in ("torch.compile", "Module.compile"):
    torch._dynamo.reset()
    model = Model().train()
    call = torch.compile(model, backend="coda")
    try:
        if name == "torch.compile":
            call(x).square().mean().backward()
        else:
            model.compile(backend="coda")
            model(x).square().mean().backward()
    except RuntimeError as error:
        wrong += 1
        print(f"{name}: {str(error).splitlines()[0]}  WRONG")
        continue
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    off = max(float((a.grad - b.grad).abs().max() + (a - b).abs().max()) for a, b in pairs)
    wrong += off > 1e-5
    print(f"{name}: off by {off:.1e}")
sys.exit(wrong > 0)
