"""Sizes that torch knows only in the call (unbacked): tokens picked by a mask, `mark_unbacked`.

Right: a graph with such a size is compiled like any with an open size (its rows are a symbol
anyway), or left to torch with a sentence in the report. Before, every region of it was lost with
"coda fails on it, please report it: ..." and a RuntimeWarning in each compilation, though the model
is a common one: packed tokens (`h[mask]`), a loss over unmasked positions, routed experts, under
`torch._dynamo.config.capture_dynamic_output_shape_ops`, or inputs marked with `mark_unbacked`
(which torch's own message about recompilation recommends).
"""

import sys
import warnings

import torch
import torch.nn.functional as F
from torch import nn

import coda


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-5)
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Packed(Mlp):
    def forward(self, x):
        return super().forward(x[x[:, 0] > 0])


def look(name, model, x):
    torch._dynamo.reset()
    before = coda.last_report().fused
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        ours = torch.compile(model, backend="coda")(x)
    off = float((ours - model(x)).norm() / ours.norm())
    fused = coda.last_report().fused - before
    faults = [str(w.message) for w in seen if "please report" in str(w.message)]
    print(f"{name}: {off:.0e} away from torch, {fused} operators in blocks, {faults[:1]}")
    return off > 1e-5 or bool(faults)


torch.manual_seed(0)
torch._dynamo.config.capture_dynamic_output_shape_ops = True
wrong = look("tokens picked by a mask", Packed(), torch.randn(24, 64))
x = torch.randn(4, 8, 64)
torch._dynamo.decorators.mark_unbacked(x, 1)
wrong |= look("a length that is marked", Mlp(), x)
sys.exit(bool(wrong))
