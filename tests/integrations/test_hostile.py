"""Whatever a model does, backend coda computes what torch does; at worst nothing is fused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coda
from tests.integrations.zoo import distance


class Block(nn.Module):
    """An MLP with a norm and a residual: something to fuse."""

    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def agree(model, *given, fused=True, rel=1e-5):
    """Outputs and gradients by coda and by torch are the same; whether blocks were made."""
    report_before = coda.last_report().fused
    compiled = torch.compile(model, backend="coda")
    results = []
    for call in (model, compiled):
        torch.manual_seed(11)
        model.zero_grad()
        fresh = [t.clone().requires_grad_(t.requires_grad) for t in given]
        y = call(*fresh)
        if y.requires_grad:
            y.square().mean().backward()
        grads = [p.grad for p in (*fresh, *model.parameters()) if p.grad is not None]
        results.append([y.detach(), *(g.clone() for g in grads)])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        assert distance(b, a) < rel
    assert (coda.last_report().fused > report_before) == fused
    return results[0]


X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(2))


def test_hooks_run():
    model, calls = Block(), []
    model.up.register_forward_hook(lambda m, a, y: y * 2)
    model.norm.register_forward_pre_hook(lambda m, a: calls.append(1))
    agree(model, X)
    assert calls


def test_shared_weights_get_the_sum_of_their_gradients():
    model = Block()
    model.down.weight = nn.Parameter(torch.randn(64, 128) / 8)
    model.extra = nn.Linear(64, 64)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = model, Block()
            self.two.up.weight = self.one.up.weight

        def forward(self, x):
            return self.two(self.one(x))

    agree(Tied(), X)


def test_gradients_are_asked_for_and_not():
    model = Block()
    compiled = torch.compile(model, backend="coda")
    for wanted in ([True, True], [False, True], [False, False], [True, False]):
        model.up.weight.requires_grad_(wanted[0])
        model.norm.weight.requires_grad_(wanted[1])
        model.zero_grad()
        compiled(X).sum().backward()
        assert (model.up.weight.grad is not None) == wanted[0]
        assert (model.norm.weight.grad is not None) == wanted[1]
        assert model.down.weight.grad is not None


def test_no_grad_inside_the_graph_stops_gradients():
    class Stopped(Block):
        def forward(self, x):
            with torch.no_grad():
                gate = torch.sigmoid(self.up(self.norm(x)))
            return x + self.down(F.gelu(self.up(self.norm(x))) * gate) * x.detach()

    agree(Stopped(), X.clone().requires_grad_())


def test_writes_to_arguments_and_buffers_happen():
    class Counting(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(64))

        def forward(self, x):
            y = super().forward(x)
            self.total.add_(y.detach().sum((0, 1)))
            y += 1
            return y * self.total.mean()

    one, two = Counting(), Counting()
    two.load_state_dict(one.state_dict())
    compiled = torch.compile(two, backend="coda")
    with torch.no_grad():
        for _ in range(2):
            assert distance(compiled(X), one(X)) < 1e-5
    assert distance(two.total, one.total) < 1e-5
    assert coda.last_report().fused


def test_control_flow_on_data_breaks_the_graph_and_nothing_else():
    class Branching(Block):
        def forward(self, x):
            y = super().forward(x)
            if y.sum() > 1e6:
                return y * 2
            return super().forward(y)

    agree(Branching(), X)


def test_an_operator_that_nobody_knows():
    @torch.library.custom_op("coda_tests::halve", mutates_args=())
    def halve(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    halve.register_fake(torch.empty_like)
    halve.register_autograd(lambda ctx, d: d / 2)

    class Odd(Block):
        def forward(self, x):
            return super().forward(halve(super().forward(x)))

    agree(Odd(), X.clone().requires_grad_())
    assert any("halve" in op for op, _ in coda.last_report().left)


def test_dropout_draws_and_stays_torchs():
    class Dropping(Block):
        def forward(self, x):
            return super().forward(F.dropout(super().forward(x), 0.5, self.training))

    model = Dropping()
    agree(model, X)
    model.eval()
    agree(model, X)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float64])
def test_types_that_coda_leaves_alone(dtype):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(64, 64, dtype=dtype), requires_grad=False)

        def forward(self, x):
            return (x @ self.w + x * 2) @ self.w.T

    model = Plain()
    x = torch.arange(128).reshape(2, 64).to(dtype)
    assert torch.equal(torch.compile(model, backend="coda")(x), model(x))
    assert coda.last_report().fused == 0


def test_autocast_around_and_inside():
    model = Block()
    compiled = torch.compile(model, backend="coda")
    with torch.autocast("cpu", torch.bfloat16):
        one, two = compiled(X), model(X)
    assert one.dtype == two.dtype
    assert distance(one.detach(), two.detach()) < 1e-2
    assert coda.last_report().fused

    class Inside(Block):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    agree(Inside(), X, rel=1e-2)


def test_strided_and_empty_arguments():
    model = Block().eval()
    compiled = torch.compile(model, backend="coda", dynamic=True)
    with torch.no_grad():
        for x in (X, X.transpose(0, 1), X[:, ::2], X[:, :1], X[:0]):
            y = compiled(x)
            assert y.shape == x.shape
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


def test_the_rest_by_inductor(monkeypatch):
    monkeypatch.setenv("CODA_FALLBACK", "inductor")
    agree(Block(), X.clone().requires_grad_())


def test_inductor_after_weights_were_moved_into_one_memory(monkeypatch):
    class Gated(Block):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(64, 128)

        def forward(self, x):
            h = self.norm(x)
            return torch.cumsum(x.detach(), -1) + self.down(F.silu(self.gate(h)) * self.up(h))

    monkeypatch.setenv("CODA_FALLBACK", "inductor")
    model = Gated()
    agree(model, X.clone().requires_grad_())
    assert model.gate.weight.untyped_storage()._cdata == model.up.weight.untyped_storage()._cdata


def test_inductor_tells_graphs_apart_that_differ_within_a_block(monkeypatch, tmp_path):
    """It keeps compiled graphs by their text, in which a block is a name."""
    monkeypatch.setenv("CODA_FALLBACK", "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for eps in (1e-6, 10.0):
        torch._dynamo.reset()
        model = Block()
        model.norm.eps = eps
        agree(model, X.clone().requires_grad_())


def test_two_results_and_a_graph_that_returns_its_argument():
    class Both(Block):
        def forward(self, x):
            y = super().forward(x)
            return torch.stack([y, x, y.relu()]).transpose(0, 1)

    agree(Both(), X.clone().requires_grad_())


def test_the_entry_point_is_the_backend():
    import tomllib
    from importlib import import_module
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["torch_dynamo_backends"]["coda"].split(":")
    assert callable(getattr(import_module(module), name))


def test_parts_of_one_value_inside_and_outside_of_a_block():
    class Parted(Block):
        def forward(self, x):
            a, b, c = self.up(self.norm(x)).split([64, 32, 32], -1)
            y = x + self.down(torch.cat([a.relu(), torch.cumsum(b, -1), c.sigmoid()], -1))
            return y * b.flip(-1).sum()

    agree(Parted(), X.clone().requires_grad_())


def test_writes_into_parts_of_a_value_have_gradients():
    class Writing(Block):
        def forward(self, x):
            y = super().forward(x)
            y[..., :16] = torch.cumsum(y[..., 16:32], -1)
            z = torch.zeros_like(y)
            z[:, 1:] = y[:, :-1]
            return super().forward(z) + y

    agree(Writing(), X.clone().requires_grad_())


def test_a_transform_within_the_graph():
    class Mapped(Block):
        def forward(self, x):
            y = super().forward(x)
            return torch.func.vmap(lambda row: row * row.sum())(y)

    agree(Mapped(), X.clone().requires_grad_())
    assert any("torch.func" in why for _, why in coda.last_report().left)


def test_hooks_of_parameters_and_of_gradients_run():
    model, seen = Block(), []
    model.up.weight.register_hook(lambda d: seen.append(1) or d * 2)
    x = X.clone().requires_grad_()
    y = torch.compile(model, backend="coda")(x)
    y.register_hook(lambda d: d * 3)
    y.sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    y = model(x)
    y.register_hook(lambda d: d * 3)
    y.sum().backward()
    assert len(seen) == 2
    for name, p in model.named_parameters():
        assert distance(found[name], p.grad) < 1e-5
    assert coda.last_report().fused


def test_devices_that_differ_within_a_model():
    class Two(Block):
        def __init__(self):
            super().__init__()
            self.elsewhere = Block().to("meta")

        def forward(self, x):
            return super().forward(x), self.elsewhere(x.to("meta"))

    class Mixed(Block):
        def __init__(self):
            super().__init__()
            self.up.to("meta")

    model = Two()
    here, there = torch.compile(model, backend="coda")(X)
    assert distance(here.detach(), Block.forward(model, X).detach()) < 1e-5
    assert (there.device.type, there.shape) == ("meta", X.shape)
    with pytest.raises(RuntimeError, match="meta"):
        torch.compile(Mixed(), backend="coda")(X)


def test_a_fault_of_codas_is_not_the_models(monkeypatch):
    from coda.integrations.rebuild import Rebuild

    def fail(_):
        raise KeyError("nobody")

    monkeypatch.setattr(Rebuild, "run", fail)
    model = Block()
    with pytest.warns(RuntimeWarning, match="please report it"):
        y = torch.compile(model, backend="coda")(X)
    assert distance(y.detach(), model(X).detach()) < 1e-5
    assert coda.last_report().fused == 0
    assert "KeyError" in str(coda.last_report())
