"""Sizes that torch knows only in the call: tokens picked by a mask, marked lengths, experts."""

import warnings

import pytest
import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import nn

import coda
from coda.integrations.report import forget_report


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(64, eps=1e-5)
        self.gate, self.up = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Masked(Mlp):
    def forward(self, x):
        return super().forward(x[x[:, 0] > 0])


class Counted(Mlp):
    """A count of tokens as a number of Python's."""

    def forward(self, x):
        n = (x[:, 0] > 0).sum().item()
        torch._check(n >= 0)
        torch._check(n <= x.shape[0])
        return super().forward(x[:n])


class Repeated(Mlp):
    def forward(self, x):
        times = (x[:, 0] > 0).long() * 2
        return super().forward(torch.repeat_interleave(x, times, 0))


class Distinct(Mlp):
    def forward(self, x):
        found = torch.unique(x[:, 0].round().long())
        return super().forward(x[: found.shape[0]])


class Joined(Mlp):
    """One token more than the mask picks, and other tokens beside."""

    def forward(self, x):
        picked = torch.cat([x[:1], x[x[:, 0] > 0]])
        return super().forward(picked), super().forward(2 * x[x[:, 1] > 0])


class Batches(Mlp):
    def forward(self, x):
        x = x.view(4, 6, 64)
        return super().forward(x[x[:, 0, 0] > 0])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 2)
        self.experts = nn.ModuleList([Mlp(), Mlp()])

    def forward(self, x):
        choice, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = torch.where(choice == number)[0]
            out = out.index_add(0, mine, expert(x[mine]))
        return out


class Loss(Mlp):
    def forward(self, x):
        kept = x[:, 1] > 0
        logits = super().forward(x)[kept] @ self.up.weight.T
        return F.cross_entropy(logits, (x[:, 2].abs() * 9).long()[kept], reduction="sum")


class Columns(nn.Module):
    """Columns that a mask picks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.out = nn.Parameter(torch.randn(96, 64) / 8), nn.Linear(96, 64)

    def forward(self, x):
        picked = torch.nonzero(x[0] > 0).squeeze(1)
        return self.out(F.silu(x[:, picked] @ self.weight[:, picked].T))


@pytest.fixture
def open_sizes():
    torch._dynamo.reset()
    forget_report()
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        yield


def results(call, model, x, training):
    with torch.set_grad_enabled(training):
        found = call(x)
    found = list(found) if isinstance(found, tuple) else [found]
    if training:
        total = sum(t.square().sum() for t in found)
        found += torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return [None if t is None else t.detach() for t in found]


def check(model, given, training):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call = torch.compile(model, backend="coda", fullgraph=True)
        for x in given:
            pairs = zip(
                results(call, model, x, training), results(model, model, x, training), strict=True
            )
            for a, b in pairs:
                if a is not None and b is not None:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
                else:
                    assert b is None or not b.any()
    assert not [w for w in seen if "please report" in str(w.message)]
    assert not [g.whole for g in coda.last_report().graphs if g.whole]


KINDS = [Masked, Counted, Repeated, Distinct, Joined, Batches, Loss, Columns]


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        (Masked, False),
        (Experts, True),
        (Columns, False),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_sizes_of_the_call(kind, training, open_sizes):
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    one = -x.abs()
    one[3, :3] = 1
    check(kind(), [x, x.flip(0, 1), one, -x.abs()], training)  # many rows, one row, none
    report = coda.last_report()
    assert report.fused >= (0 if kind is Columns else 5)
    told = [
        why for _, why in report.left if "a number of columns that is known only in the call" in why
    ]
    assert bool(told) == (kind is Columns)


@pytest.mark.parametrize(("axes", "training"), [((0,), False), ((0, 1), True)])
def test_axes_that_are_marked(axes, training, open_sizes):
    x = torch.randn(4, 8, 64)
    for axis in axes:
        torch._dynamo.decorators.mark_unbacked(x, axis)
    check(Mlp(), [x], training)
    assert coda.last_report().fused >= 5


@coda.block
def mlp(x: coda.Tensor["B S D"], w: coda.Tensor["F D"], v: coda.Tensor["D F"]):
    return x + coda.silu(x @ w.T) @ v.T


@pytest.mark.slow
def test_a_block_of_ones_own_takes_them_where_torch_compiles(open_sizes):
    w, v = torch.randn(96, 64, requires_grad=True), torch.randn(64, 96, requires_grad=True)

    def model(x):
        x = x.view(4, 6, 64)
        return mlp(x[x[:, 0, 0] > 0], w, v) * 2

    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))
        for a, b in zip(
            *(torch.autograd.grad(f(x).sum(), [w, v]) for f in (call, model)), strict=True
        ):
            torch.testing.assert_close(a, b)
