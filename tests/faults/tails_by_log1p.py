"""softplus, logsigmoid and mish far from zero, in float32, under backend="coda".

Right: torch's, which are exact to a few ulp (by log1p): softplus(-14) = 8.3e-07. coda computes
log(1 + exp(x)), where 1 + 8e-07 has lost almost all of it: 5 % off at -14, 20 % at logsigmoid(15),
0 from -17 on. Mamba's dt (softplus of a bias of about -5 to -10) and the losses of DPO, KTO and
ORPO (logsigmoid of confident pairs) are there.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import coda


class Head(nn.Module):
    def __init__(self, act, shift):
        super().__init__()
        self.proj = nn.Linear(64, 64)
        self.act, self.shift = act, shift
        nn.init.constant_(self.proj.bias, shift)

    def forward(self, x):
        return self.act(self.proj(x))


CASES = {
    "softplus at -7": (F.softplus, -7.0),
    "softplus at -14": (F.softplus, -14.0),
    "softplus at -18": (F.softplus, -18.0),
    "logsigmoid at 15": (F.logsigmoid, 15.0),
    "mish at -14": (F.mish, -14.0),
}
wrong = 0
for name, (act, shift) in CASES.items():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Head(act, shift)
    x = torch.randn(32, 64)
    with torch.no_grad():
        theirs, ours = model(x).double(), torch.compile(model, backend="coda")(x).double()
        exact = act(model.proj(x).double())
    errors = [float(((y - exact) / exact).abs().max()) for y in (ours, theirs)]
    bad = errors[0] > 20 * errors[1] + 1e-6
    wrong += bad
    print(
        f"{name}: relative error {errors[0]:.1e}, torch's {errors[1]:.1e}{'  WRONG' if bad else ''}"
    )
assert coda.last_report().fused
sys.exit(bool(wrong))
