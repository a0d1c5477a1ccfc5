"""Hooks that are registered on a model after `coda.patch`.

Right: they run, as on the model before ("class, forward, parameters, hooks and names stay what they
are"): a user who patches a layer in place is told nowhere that it has been compiled. Before, a forward
hook or a full backward hook of any module in a patched layer (in transformers' models also one of
the layer itself) is silently not called, even if no call was made since `patch`: its own check has
compiled the layer already. Hooks that
change an output (steering, masking, quantisation observers, LoRA by hooks, offloading) do nothing,
and hooks that collect give empty lists. Hooks that were there before `patch` run.
Those of torch.compile'd modules are not noticed by torch either (it says so in its documentation);
`patch` promises more.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import coda


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-5)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


torch.manual_seed(0)
model, x = Model(), torch.randn(4, 64)
coda.patch(model, example=(x,))
wrong = 0

seen = []
for name in ("layers.0", "layers.1.up"):
    module = model.get_submodule(name)
    module.register_forward_hook(lambda m, a, y, name=name: seen.append(name))
    module.register_full_backward_hook(lambda m, i, o, name=name: seen.append(name + " backward"))
model(x.clone().requires_grad_()).sum().backward()
for name in ("layers.0", "layers.1.up", "layers.0 backward", "layers.1.up backward"):
    wrong += name not in seen
    print(f"hook of {name}: {'called' if name in seen else 'NOT CALLED'}")

model.layers[0].down.register_forward_hook(lambda m, a, y: 0.0 * y)
with torch.no_grad():
    ours = model(x)
    coda.unpatch(model)
    theirs = model(x)
off = float((ours - theirs).norm() / theirs.norm())
wrong += off > 1e-5
print(f"a hook that sets an output to 0: {off:.1e} away from the model without coda")
sys.exit(bool(wrong))
