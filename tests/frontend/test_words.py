"""Words of the language: what they give and their gradients, held against torch in float64."""

import math

import pytest
import torch

import coda
from coda.frontend.ops import uniform
from coda.ir.evaluate import evaluate
from coda.ir.graph import Iota, Map
from coda.ir.scalars import SCALARS
from coda.lowering.algebra.training import derive
from tests.kernels.edges import run

T = coda.Tensor
inf, nan = math.inf, math.nan
EDGES = [-inf, -3e38, -2.5, -1.5, -0.5, -1e-40, -0.0, 0.0, 0.3, 0.5, 1.5, 2.5, 8388609.0, inf, nan]

OF_ONE = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "round": torch.round,
    "sign": torch.sign,
    "erfc": torch.erfc,
}
# Functions of [B, M, D] and what torch calls them.
OF_AXES = {
    "sum of two": (lambda x: coda.sum(x, axis=(0, 1)), lambda x: x.sum((0, 1))),
    "sum of two apart": (lambda x: x.sum(axis=(0, -1)), lambda x: x.sum((0, 2))),
    "kept": (lambda x: x.mean((-1, 1), keepdims=True), lambda x: x.mean((1, 2), keepdim=True)),
    "mean of all": (lambda x: coda.mean(x, axis=None), lambda x: x.mean()),
    "max of two": (lambda x: coda.max(x, axis=[1, 2]), lambda x: x.amax((1, 2))),
    "logsumexp": (lambda x: coda.logsumexp(x, (0, 2)), lambda x: x.logsumexp((0, 2))),
    "prod": (lambda x: coda.prod(x), lambda x: x.prod(-1)),
    "prod of a row axis": (lambda x: coda.prod(x, 1), lambda x: x.prod(1)),
    "var": (lambda x: coda.var(x), lambda x: x.var(-1)),
    "var of numpy": (lambda x: coda.var(x, correction=0), lambda x: x.var(-1, correction=0)),
    "var of two": (
        lambda x: coda.var(x, axis=(1, 2), keepdims=True),
        lambda x: x.var((1, 2), keepdim=True),
    ),
    "std": (lambda x: coda.std(x), lambda x: x.std(-1)),
    "stopped": (lambda x: x * coda.stop_gradient(x), lambda x: x * x.detach()),
    "stopped inside": (
        lambda x: x / coda.stop_gradient(coda.sqrt(coda.mean(x * x, keepdims=True))),
        lambda x: x / (x * x).mean(-1, keepdim=True).sqrt().detach(),
    ),
    "one over a dim": (lambda x: x * (1 / x.shape[-1]), lambda x: x / 6),
    "powers of a dim": (
        lambda x: x * x.shape[-1] ** -0.5 + x.shape[0] ** 2,
        lambda x: x * 6**-0.5 + 4,
    ),
    "numbers of a dim": (
        lambda x: x * (x.shape[-1] * 0.5 - 0.5) + (1 - x.shape[0]) + 2.0 ** x.shape[0],
        lambda x: x * 2.5 - 1 + 4.0,
    ),
    "a dim of dims": (lambda x: x / (x.shape[-1] // 2 + x.shape[0] * 3), lambda x: x / 9),
}


def both(fn, x):
    """What a block of one function gives on backend reference, and its gradient."""
    fn.__annotations__ = {"x": T["B M D", coda.f32]}
    leaf = x.clone().requires_grad_()
    y = coda.block(fn)(leaf, backend="reference")
    if not y.requires_grad:  # no argument has a derivative
        return y, torch.zeros_like(x)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), dx


def held(fn, theirs, x):
    leaf = x.double().requires_grad_()
    expected = theirs(leaf)
    (dx,) = torch.autograd.grad(expected, leaf, torch.ones_like(expected))
    for found, exact in zip(both(fn, x), (expected, dx), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("name", OF_AXES)
def test_of_axes(name):
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    held(*OF_AXES[name], x)


@pytest.mark.parametrize("name", OF_ONE)
def test_of_one(name):
    fn = getattr(coda, name)
    held(lambda x: fn(x), OF_ONE[name], torch.tensor(EDGES).reshape(1, 3, 5))


def test_a_product_with_zeros_has_torchs_gradient():
    x = torch.tensor([[2.0, 3.0, 4.0], [0.0, 3.0, 4.0], [0.0, 3.0, 0.0]])
    held(lambda x: coda.prod(x), lambda x: x.prod(-1), x[None])


def test_angles():
    @coda.block
    def angle(y: T["M", coda.f32], x: T["M", coda.f32]):
        return coda.atan2(y, x)

    y, x = torch.cartesian_prod(*[torch.tensor([-2.0, -0.0, 0.0, 0.5, inf])] * 2).T.contiguous()
    torch.testing.assert_close(angle(y, x, backend="reference"), torch.atan2(y, x))


@pytest.mark.parametrize("axis", [-1, 1, 0])
def test_positions_of_extremes(axis):
    def places(x: T["B M D"]):
        return coda.argmax(x, axis=axis), coda.argmin(x, axis=axis, keepdims=True)

    x = torch.randint(-2, 3, (4, 5, 6), generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, 0, 3] = x[1, 2, 1] = nan
    x[2] = inf
    x[3] = -inf
    found, least = coda.block(places)(x, backend="reference")
    assert found.dtype == torch.int64
    assert torch.equal(found, x.argmax(axis))
    assert torch.equal(least, x.argmin(axis, keepdim=True))


@coda.block
def dropped(x: T["B S D"], w: T["F D"], seed: T["1", coda.i64]):
    return coda.dropout(coda.silu(x @ w.T), 0.3, seed)


def inputs(seed=5):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g).bfloat16() for s in ((2, 24, 16), (40, 16)))
    return x, w, torch.tensor([seed])


def test_dropout_makes_its_mask_again():
    """No mask among the saved values, no random operation of torch, one rate in all kernels."""
    sizes = {"B": 2, "S": 2048, "D": 1024, "F": 1024}
    training = derive(dropped.graph, sizes)
    assert [n.dtype.name for _, n in training.forward.outputs] == ["bf16", "bf16"]
    program = dropped.lower("sm_90a", sizes)
    assert [k.kind.name for k in program.kernels] == ["gemm"]
    x, w, seed = inputs()
    x.requires_grad_()
    y = dropped(x, w, seed, backend="reference")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    kept = (y != 0).double()
    assert 0.65 < kept.mean() < 0.75
    leaf = x.detach().double().requires_grad_()
    exact = torch.nn.functional.silu(leaf @ w.double().T) * kept / 0.7
    (expected,) = torch.autograd.grad(exact, leaf, torch.ones_like(exact))
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(dx.double(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_all_and_of_nothing(p):
    x = torch.tensor([[1.0, inf, -3e38]])

    def ends(x: T["M D", coda.f32]):
        return coda.dropout(x, p, 3)

    assert torch.equal(coda.block(ends)(x, backend="reference"), torch.zeros_like(x) if p else x)


def numbers(seed, rows=512, columns=512, compute=torch.float32):
    shape = (rows, columns)
    return evaluate([uniform(shape, seed).node], {}, {}, compute)[0]


def test_random_numbers_are_uniform_and_independent():
    """Moments, and correlations with neighbours and with other seeds, within five sigmas."""
    u = numbers(0)
    assert torch.equal(u, numbers(0, compute=torch.float64).float())
    assert (u >= 0).all()
    assert (u < 1).all()
    assert torch.equal(u * 2**24, (u * 2**24).round())
    c = u.double() - 0.5
    others = [numbers(s).double() - 0.5 for s in (1, 2, 2**24, 2**40, -1)]
    pairs = [(c[:, k:], c[:, :-k]) for k in (1, 2, 3, 8, 64)]
    pairs += [(c[k:], c[:-k]) for k in (1, 2, 3, 8, 64)]
    for a, b in [*pairs, *((c, o) for o in others)]:
        assert abs((a * b).mean()) * 12 * a.numel() ** 0.5 < 5
    assert abs(c.mean()) * (12 * c.numel()) ** 0.5 < 5
    counts = torch.histc(u, 256, 0, 1)
    assert ((counts - 1024).square() / 1024).sum() < 256 + 5 * 512**0.5
    for p in (0.1, 0.5):  # no row or column has another rate
        for axis in (0, 1):
            off = ((u >= p).double().sum(axis) - 512 * (1 - p)) / (512 * p * (1 - p)) ** 0.5
            assert off.abs().max() < 5


def test_numbers_of_a_program_are_those_of_the_graph():
    """Bit for bit, of a batch too: rows are those of all leading axes."""

    def drawn(x: T["B S D", coda.f32], seed: T["", coda.i32]):
        return x * 0.0 + coda.uniform(x.shape, seed)

    x = torch.zeros(3, 5, 7)
    y = coda.block(drawn)(x, torch.tensor(9, dtype=torch.int32), backend="reference")
    assert torch.equal(y.reshape(15, 7), numbers(9, 15, 7))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_dropout_in_kernels_is_that_of_the_graph(arch):
    sizes = {"B": 2, "S": 24, "D": 16, "F": 40}
    found, reference, exact = run(dropped, inputs(2**33 + 1), arch, sizes)
    for y in (reference, exact["out"]):
        assert torch.equal(found == 0, y == 0)


def test_stops_vanish():
    def stopped(x: T["M D"], w: T["D D"]):
        return coda.stop_gradient(x @ w.T) * coda.stop_gradient(x)

    program = coda.block(stopped).lower("sm_90a", {"M": 64, "D": 64})
    assert len(program.kernels) == 1
    assert not any(SCALARS[n.fn].stops for k in program.kernels for n in k.nodes if is_map(n))


def is_map(node):
    return isinstance(node, Map)


def test_positions_are_not_differentiated():
    def with_position(x: T["M D", coda.f32]):
        return x[:, 0] * coda.argmax(x).cast(coda.f32)

    training = derive(coda.block(with_position).graph, {"M": 4, "D": 8})
    assert training.requires_grad == ("x",)
    assert not any(isinstance(n, Iota) for n in training.backward.roots)
