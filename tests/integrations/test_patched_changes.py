"""What happens to a model after `coda.patch`: hooks, replaced parts, modes; as without coda."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as of_all
from torch.nn.utils import parametrizations, parametrize, prune

import coda


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(32, eps=1e-5)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.drop = nn.Dropout(0.25)

    def forward(self, x, scale=1.0):
        return x + scale * self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return x


X = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def step(model):
    """The output and all gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    x = X.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def made():
    """A patched model that was called, and one that was not patched."""
    torch._dynamo.reset()
    model, twin = Model().eval(), Model().eval()
    coda.patch(model, example=(X,))
    same(step(model), step(twin))
    return model, twin


@pytest.fixture
def pair(made):
    yield made
    for model in made:
        model.load_state_dict(Model().state_dict())
    same(step(made[0]), step(made[1]))  # what was changed is taken back


def layer(model):
    return model.layers[1]


def collect(seen):
    return lambda module, *given: seen.append(type(module).__name__)


# (module, what to register, hook of the model's tests: seen -> callable, options)
HOOKS = {
    "forward": ("register_forward_hook", collect, {}),
    "forward that changes": ("register_forward_hook", lambda s: lambda m, a, y: 2 * y, {}),
    "forward with keywords": (
        "register_forward_hook",
        lambda seen: lambda m, a, k, y: seen.append((len(a), *k)),
        {"with_kwargs": True},
    ),
    "before": ("register_forward_pre_hook", lambda s: lambda m, a: (a[0] * 0.5, *a[1:]), {}),
    "before with keywords": (
        "register_forward_pre_hook",
        lambda seen: lambda m, a, k: (seen.append(tuple(k)), ((a[0] + 1, *a[1:]), k))[1],
        {"with_kwargs": True},
    ),
    "backward": ("register_full_backward_hook", collect, {}),
    "backward that changes": (
        "register_full_backward_hook",
        lambda s: lambda m, i, o: (None if i[0] is None else 3 * i[0], *i[1:]),
        {},
    ),
    "before the backward": (
        "register_full_backward_pre_hook",
        lambda s: lambda m, o: (2 * o[0],),
        {},
    ),
}


@pytest.mark.parametrize("where", ["", "up"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_run_and_are_removed_again(pair, name, where):
    method, hook, options = HOOKS[name]
    seen, handles = ([], []), []
    for model, mine in zip(pair, seen, strict=True):
        module = layer(model).get_submodule(where)
        handles.append(getattr(module, method)(hook(mine), **options))
    found, expected = step(pair[0]), step(pair[1])
    same(found, expected)
    assert seen[0] == seen[1]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    "register",
    [
        of_all.register_module_forward_hook,
        of_all.register_module_forward_pre_hook,
        of_all.register_module_full_backward_hook,
        of_all.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_of_all_modules_run(pair, register):
    seen = ([], [])
    for model, mine in zip(pair, seen, strict=True):
        handle = register(collect(mine))
        step(model)
        handle.remove()
    assert seen[0] == seen[1]
    assert "Linear" in seen[0]


def test_hooks_that_were_there_before_run_and_may_go():
    torch._dynamo.reset()
    model, twin = Model().eval(), Model().eval()
    seen = ([], [])
    handles = [
        [
            layer(one).up.register_forward_hook(lambda m, a, y: 2 * y),
            layer(one).register_forward_hook(collect(mine)),
            layer(one).down.register_full_backward_hook(collect(mine)),
        ]
        for one, mine in zip((model, twin), seen, strict=True)
    ]
    coda.patch(model, example=(X,))
    for mine in seen:
        mine.clear()
    same(step(model), step(twin))
    assert seen[0] == seen[1]
    for mine in handles:
        for handle in mine:
            handle.remove()
    same(step(model), step(twin))
    assert len(seen[0]) == len(seen[1]) == 2


def test_a_module_that_comes_with_hooks(pair):
    """And one whose hooks were put into its dict by hand."""
    for by_hand in (False, True):
        seen = ([], [])
        for model, mine in zip(pair, seen, strict=True):
            before = layer(model).up
            other = copy.deepcopy(before)
            if by_hand:
                other._forward_hooks[-1] = collect(mine)
            else:
                other.register_forward_hook(collect(mine))
            step(model)
            layer(model).up = other
            step(model)
            layer(model).up = before
        assert seen[0] == seen[1] == ["Linear"]


class Double(nn.Module):
    def forward(self, w):
        return 2 * w


def other_forward(module):
    plain = type(module.up).forward
    module.up.forward = lambda x: 3 * plain(module.up, x)


def other_forward_of_the_layer(module):
    plain = type(module).forward
    module.forward = lambda x, scale=1.0: 3 * plain(module, x, scale)


def other_module(module):
    module.down = nn.Sequential(nn.Linear(48, 32), nn.Tanh())


def module_of_the_same_class(module):
    module.down = nn.Linear(48, 32)


def other_parameter(module):
    module.up.weight = nn.Parameter(torch.randn(48, 32))


def wider(module):
    module.up, module.down = nn.Linear(32, 64), nn.Linear(64, 32)


def parametrized(module):
    parametrize.register_parametrization(module.up, "weight", Double())


def weight_norm(module):
    parametrizations.weight_norm(module.down)


def pruned(module):
    prune.l1_unstructured(module.up, "weight", 0.5)


def training(module):
    module.train()


def other_rate(module):
    module.train()
    module.drop.p = 0.5


def frozen(module):
    module.up.weight.requires_grad_(False)
    module.norm.requires_grad_(False)


def without_bias(module):
    module.up.bias = None


SELDOM = [
    other_forward_of_the_layer,
    other_module,
    other_parameter,
    wider,
    weight_norm,
    pruned,
    other_rate,
    without_bias,
]


@pytest.mark.parametrize(
    "change",
    [
        other_forward,
        module_of_the_same_class,
        parametrized,
        training,
        frozen,
        *(pytest.param(change, marks=pytest.mark.slow) for change in SELDOM),
    ],
)
def test_what_is_changed_after_the_patch(change):
    torch._dynamo.reset()
    model, twin = Model().eval(), Model().eval()
    coda.patch(model, example=(X,))
    same(step(model), step(twin))
    for one in (model, twin):
        torch.manual_seed(7)
        change(layer(one))
    expected = step(twin)
    for _ in range(2):
        same(step(model), expected)
