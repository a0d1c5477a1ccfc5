"""Switches for production: CODA_DISABLE, names left to torch, the first steps of patched layers."""

import gc
import sys

import pytest
import torch
import torch._dynamo
from torch import nn

import coda
from coda.errors import CallError, CodaError, UnsupportedError
from coda.integrations import report
from coda.integrations.dynamo import backend, look
from coda.integrations.first_steps import RANDOM, FirstSteps
from coda.integrations.names import BY_NAME, patterns_of
from coda.ir.evaluate import evaluate
from coda.measure import random_inputs
from coda.runtime.in_torch import DISABLED
from tests.integrations.zoo import distance

BLOCK = sys.modules["coda.block"]


@coda.block
def mlp(x: coda.Tensor["M D"], g: coda.Tensor["D"], w: coda.Tensor["F D"], v: coda.Tensor["D F"]):
    return x + coda.silu(coda.rms_norm(x, g) @ w.T) @ v.T, x


class Mlp(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, layers=2, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList(Mlp(dropout) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def x():
    return torch.randn(32, 64)


@pytest.fixture
def off(monkeypatch):
    """CODA_DISABLE=1, and a lowering that fails."""
    monkeypatch.setenv("CODA_DISABLE", "1")

    def fails(*_, **__):
        raise AssertionError("lowered")

    monkeypatch.setattr(BLOCK, "lower", fails)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_disabled_block_is_torchs_with_torchs_gradients(off, compiled):
    sizes = {"M": 8, "D": 32, "F": 48}
    given = [t.requires_grad_() for t in random_inputs(mlp.graph, sizes)]
    call = torch.compile(mlp, backend="aot_eager") if compiled else mlp
    found, same = call(*given)
    expected = evaluate(
        mlp.graph.roots, dict(zip(mlp.graph.inputs, given, strict=True)), sizes, None
    )
    assert torch.equal(found, expected[0])
    assert same.data_ptr() != given[0].data_ptr()
    mine = torch.autograd.grad(found.sum(), given)
    theirs = torch.autograd.grad(expected[0].sum(), given)
    assert all(map(torch.equal, mine, theirs))
    with pytest.raises(CallError, match="takes 4 tensors"):
        mlp(given[0])


def test_a_disabled_model_is_torchs(off, x):
    model = Stack()
    expected = model(x)
    made = coda.patch(model, [x])
    assert [(one.replaced, one.why) for one in made.layers] == [(False, DISABLED)] * 2
    assert all(m._compiled_call_impl is None for m in model.modules())
    assert torch.equal(torch.compile(model, backend=backend)(x), expected)
    assert [g.whole for g in coda.last_report().graphs] == [DISABLED]


def test_the_switch_has_two_values(monkeypatch):
    monkeypatch.setenv("CODA_DISABLE", "yes")
    with pytest.raises(CodaError, match="CODA_DISABLE is one of 0, 1"):
        mlp(*random_inputs(mlp.graph, {"M": 8, "D": 32, "F": 48}))


def regions():
    return [r.name for g in coda.last_report().graphs for r in g.regions]


def test_modules_and_regions_are_left_to_torch_by_name(x):
    model, kept = Stack(3), []
    torch.compile(model, backend=lambda gm, inputs: kept.append((gm, inputs)) or gm.forward)(x)
    ((graph, inputs),) = kept

    def found(*leave):
        report.forget_report()
        look(graph, inputs, options={"leave": leave})
        return regions()

    assert found() == ["layers.0.up..2.down"]
    assert found("layers.1") == ["layers.0.up..down", "layers.2.up..down"]
    left = coda.last_report().left
    assert left["aten.linear", BY_NAME] == 2
    assert found("layers.1.do*") == ["layers.0.up..1.up", "layers.2.up..down"]
    assert found("layers.0.up..2.down") == []
    assert found("layers.9") == ["layers.0.up..2.down"]


def test_a_region_left_by_name_runs_in_torch(x):
    model = Stack(2)
    expected = model(x)
    call = torch.compile(model, backend=backend, options={"leave": ["layers.1"]})
    assert distance(call(x), expected) < 1e-5
    assert regions() == ["layers.0.up..down"]


def test_inside_patched_layers_too(x):
    model = Stack()
    expected = model(x)
    made = coda.patch(model, [x], leave=["down"])
    assert made.layers[0].left >= 1
    assert regions() == ["up"]
    assert distance(model(x), expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ["layers.7"]}, "`skip` has a name that nothing has"),
        ({"only": ["layer.*"]}, "`only` has a name that nothing has"),
        ({"leave": ["mlp"]}, "`leave` has a name that nothing has"),
        ({"leave": "down"}, "`leave` is a list of names"),
        ({"check": -1}, "`check` is a number of steps"),
        ({"check": True}, "`check` is a number of steps"),
    ],
)
def test_names_that_nothing_has_are_refused(x, options, message):
    with pytest.raises(CallError, match=message):
        coda.patch(Stack(), [x], **options)
    with pytest.raises(UnsupportedError, match="leave no layer"):
        coda.patch(Stack(), [x], skip=["*"])


def test_options_of_the_backend_are_refused(x):
    for options, message in (
        ({"skip": []}, "one option, `leave`"),
        ({"leave": 3}, "list of names"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):
            torch.compile(Stack(), backend=backend, options=options)(x)
    assert patterns_of(["a", "b"], "leave") == ("a", "b")


def steps(model, x, count=4):
    """The outputs of some training steps without an optimizer."""
    found = []
    for _ in range(count):
        found.append(model(x))
        found[-1].square().mean().backward()
    return found


def test_the_first_steps_are_compared_and_then_coda_runs(x):
    model = Stack()
    expected = model(x)
    made = coda.patch(model, [x], check=2)
    assert "torch, until all are seen" in str(made).replace("\n", " ")
    found = steps(model, x)
    assert all(torch.equal(y, expected) for y in found[:2])  # torch's own
    assert all(distance(y, expected) < 1e-5 for y in found[2:])
    one = made.steps[0]
    assert (one.name, one.forwards, one.backwards, one.why) == ("layers.0", 2, 2, "")
    seen = [v.tensor for v in one.values if v.step == 1]
    parameters = [f"gradient of {n}" for n, _ in model.layers[0].named_parameters()]
    assert seen == ["output 0", *parameters]  # the model's input needs no gradient
    assert "gradient of argument 0" in [v.tensor for v in made.steps[1].values]
    assert all(v.good and 0 < v.coda.norm < 1e-5 for v in one.values)
    with torch.no_grad():  # other kernels, compared as well
        model(x)
    assert one.forwards == 3


def scaled_gradient(layer, x):
    y = Mlp.forward(layer, x)
    return y + 1e-2 * (y - y.detach())


CALLS = {
    "output 0": lambda layer, x: Mlp.forward(layer, x) * (1 + 1e-4),
    "gradient of up.weight": lambda layer, x: scaled_gradient(layer, x),
}


@pytest.mark.parametrize("tensor", CALLS)
def test_a_wrong_layer_stays_torchs_and_says_so(x, tensor):
    layer = Mlp()
    expected, called = layer(x), []

    def call(*given):
        called.append(1)
        return CALLS[tensor](*given)

    first = FirstSteps("layers.0", call, 3)

    def one_step():
        y = first(layer, x)
        y.sum().backward()
        return y

    with pytest.warns(RuntimeWarning, match="torch runs layers.0, as in all of its steps so far"):
        y = one_step()
    wrong = [v for v in first.report.values if not v.good]
    assert tensor in [v.tensor for v in wrong]
    assert first.report.wrong is wrong[0]
    assert "away from float64" in first.report.why
    count = len(called)
    assert torch.equal(y, expected)
    assert torch.equal(first(layer, x), expected)
    assert len(called) == count


def test_a_call_that_fails_and_random_numbers_are_reported(x):
    def fails(*_):
        raise ValueError("no")

    first = FirstSteps("layers.0", fails, 1)
    with pytest.warns(RuntimeWarning, match="a comparison fails: ValueError: no"):
        assert torch.equal(first(layer := Mlp(), x), layer(x))
    first = FirstSteps("layers.0", Mlp.forward, 1)
    with pytest.warns(RuntimeWarning, match="draws random numbers"):
        first(Mlp(0.5).train(), x)
    assert first.report.why == RANDOM


def test_comparisons_draw_no_random_numbers_and_pass_by_hooks_of_saved_tensors(x):
    layer, packed = Mlp(), []

    def call(layer, x):
        return Mlp.forward(layer, x) + 0 * torch.rand_like(x)

    first = FirstSteps("layers.0", call, 1)
    before = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
        Mlp.forward(layer, x)
        alone = len(packed)
        y = first(layer, x)
    assert len(packed) == 2 * alone
    y.sum().backward()
    assert torch.equal(before, torch.get_rng_state())
    assert (first.report.forwards, first.report.backwards) == (1, 1)


def test_a_step_whose_backward_never_comes_is_not_waited_for(x):
    layer = Mlp()
    first = FirstSteps("layers.0", lambda layer, x: Mlp.forward(layer, x) + 1e-7, 1)
    y = first(layer, x)
    assert torch.equal(first(layer, x), Mlp.forward(layer, x))  # still torch's
    del y
    gc.collect()  # torch's hook holds the graph in a cycle
    assert not torch.equal(first(layer, x), Mlp.forward(layer, x))
    assert (first.report.forwards, first.report.backwards) == (1, 0)
