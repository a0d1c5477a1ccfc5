"""Casts down and up again: what the user rounds stays rounded, and nothing else is."""

import pytest
import torch

import coda
from coda.ir.evaluate import evaluate
from coda.ir.graph import Cast, Map, walk
from coda.ir.scalars import SCALARS
from coda.ir.types import bf16, e4m3, e5m2, f16, f32, f64, i32
from coda.measure import relative
from coda.runtime.simulate import device

T = coda.Tensor
NARROW = (bf16, f16, e4m3, e5m2)
WAYS = {
    "plain": lambda x: x,
    "views": lambda x: coda.concat(coda.split(x.reshape("M D -> M 1 D"), 2))[:, 0],
    "functions": lambda x: coda.where(abs(x) > 1.0, -x, -x) * -1.0,
    "exact functions": lambda x: -coda.maximum(-x, -abs(x)),
}


def notes(graph):
    """The roundings that the user wrote and a wider type sees."""
    return [n.fn for n in walk(graph.roots) if isinstance(n, Map) and SCALARS[n.fn].written]


def there_and_back(dtype, way, to=f32):
    def block(x: T["M D", f32]):
        return way(x.cast(dtype)).cast(to).cast(f32)

    return coda.block(block)


def values(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 64, generator=generator) * torch.logspace(-6, 3, 64)
    x[0, :8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 448, 464, 61440, -61440])
    return x


@pytest.mark.parametrize("way", ["plain", "views", "exact functions"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_value_cast_down_and_up_is_what_the_type_has_room_for(dtype, way):
    x = values()
    block = there_and_back(dtype, WAYS[way])
    assert notes(block.graph)
    assert torch.equal(block(x, backend="reference"), x.to(dtype.torch).float())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_its_cotangent_is_cast_as_torch_casts_it(dtype):
    x, d = values().requires_grad_(), values(1)
    (theirs,) = torch.autograd.grad(x.to(dtype.torch).float(), x, d)
    block = there_and_back(dtype, WAYS["plain"])
    (ours,) = torch.autograd.grad(block(x, backend="reference"), x, d)
    assert torch.equal(ours, theirs)


def test_float64_meaning_rounds_too():
    x = values().double()
    graph = there_and_back(bf16, WAYS["plain"]).graph
    (found,) = evaluate(graph.roots, {graph.inputs[0]: x}, {"M": 9, "D": 64})
    assert torch.equal(found, x.bfloat16().double())


@coda.block
def narrowed(x: T["M D", f64]):
    return x - x.cast(f32).cast(f64)


def test_float64_through_float32():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    assert torch.equal(narrowed(x, backend="reference"), x - x.float().double())


@coda.block
def fake_quantised(x: T["M D"], w: T["F D"]):
    y = x @ w.T
    scale = coda.max(abs(y), keepdims=True) / 448.0
    q = (y / scale).cast(e4m3).cast(bf16)
    return q, q * scale, y


def test_simulated_quantisation():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=generator).bfloat16() for n in (33, 48))
    q, back, y = fake_quantised(x, w, backend="reference")
    assert torch.equal(q, q.to(torch.float8_e4m3fn).bfloat16())
    assert (q.abs().amax(-1) == 448).all()
    off = (back.float() - y.float()).abs()
    step = y.abs().float() * 2**-4 + y.abs().amax(-1, keepdim=True).float() / 448 * 2**-10
    assert (off <= 1.1 * step).all()
    assert relative(back, y.double()) > 0.02


@coda.block
def two_halves(x: T["M D"], w: T["F D"], v: T["F F", bf16]):
    h = (x @ w.T).cast(f32)
    high = h.cast(bf16)
    low = (h - high.cast(f32)).cast(bf16)
    return high @ v.T + low @ v.T, high


def test_a_split_into_two_has_both_parts():
    generator = torch.Generator().manual_seed(0)
    x, w, v = (torch.randn(n, k, generator=generator) for n, k in ((16, 64), (32, 64), (32, 32)))
    w, v = w / 8, v.bfloat16() / 6
    ours, high = two_halves(x, w, v, backend="reference")
    assert torch.equal(high, (x @ w.T).bfloat16())
    exact = (x.double() @ w.double().T) @ v.double().T
    rounded = high.double() @ v.double().T
    assert relative(ours, exact) < 1.1 * relative(exact.bfloat16(), exact)
    assert relative(rounded, exact) > 0.4 * relative(exact.bfloat16(), exact)
    assert notes(two_halves.graph_of(f32)) == ["cast_bf16"]


@coda.block
def whole(x: T["M D", f32]):
    return x - x.cast(bf16).cast(i32).cast(f32)


def test_whole_numbers_of_a_rounded_value():
    x = torch.tensor([[2.999, -0.9999, 7.5, 300.7]])
    assert torch.equal(whole(x, backend="reference"), x - x.bfloat16().int().float())


@coda.block
def representable(x: T["M D", f32]):
    return coda.where(x.cast(bf16).cast(f32) == x, 1.0, 0.0), x.cast(f16) == 0.0


def test_tests_of_a_rounded_value():
    x = torch.tensor([[1.0, 1.001, 1e-8, 256.5, 0.0]])
    exact, zero = representable(x, backend="reference")
    assert exact.tolist() == [[1, 0, 0, 0, 1]]
    assert zero.tolist() == [[False, False, True, False, True]]


# What is not rounded.


@coda.block
def stored(x: T["M D", f32], g: T["D"], w: T["F D"]):
    return (coda.rms_norm(x).cast(bf16) * g) @ w.T, x.cast(f16)


@coda.block
def chain(x: T["M D", f32], y: T["M D"]):
    return coda.tanh(x.cast(bf16) * y + y).cast(f32)


def test_a_cast_that_is_stored_or_computed_with_is_only_a_cast():
    assert not notes(stored.graph)
    assert not notes(chain.graph)
    plain = [n for n in walk(stored.graph.roots) if isinstance(n, Cast)]
    assert len(plain) == 2


def test_the_text_form_keeps_roundings():
    graph = two_halves.graph_of(f32)
    assert coda.parse(str(graph)).graph == graph


FORMS = {
    "to": lambda h: h.to(torch.bfloat16).to(torch.float32),
    "half": lambda h: h.half().float(),
    "type_as": lambda h: h.bfloat16().type_as(h),
    "to another": lambda h: h.bfloat16().to(h),
    "promoted": lambda h: h.bfloat16() * torch.ones_like(h),
    "view": lambda h: h.bfloat16().view(4, 4, 64).reshape(16, 64).float(),
    "concatenated": lambda h: torch.cat([h.half(), h.half()], -1)[:, :64].float(),
    "twice": lambda h: h.bfloat16().half().float(),
    "float8": lambda h: h.to(torch.float8_e4m3fn).float(),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_compiler_keeps_them(form):
    torch._dynamo.reset()
    torch.manual_seed(0)
    up = torch.nn.Linear(64, 64, bias=False)

    def low(x):
        h = up(x)
        return 256 * (h - FORMS[form](h))

    x = torch.randn(16, 64)
    (x1, x2), d = (x.clone().requires_grad_() for _ in range(2)), torch.randn(16, 64)
    theirs, ours = low(x1), torch.compile(low, backend="coda")(x2)
    assert coda.last_report().fused
    assert relative(ours, theirs.double()) < 1e-2
    (dt,), (do,) = (torch.autograd.grad(y, i, d) for y, i in ((theirs, x1), (ours, x2)))
    assert relative(do, dt.double()) < 1e-2


@coda.block
def in_an_epilogue(x: T["M D"], w: T["F D"]):
    h = (x @ w.T).cast(f32)
    return [h - h.cast(t).cast(f32) for t in NARROW]


@coda.block
def in_rows(x: T["M D", f32]):
    return [x.cast(t).cast(f32) for t in NARROW]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_kernels_round_as_torch_does(arch):
    x = values()
    with device(arch, checks="raise"):
        for dtype, found in zip(NARROW, in_rows(x, backend="sim"), strict=True):
            assert torch.equal(found, x.to(dtype.torch).float()), dtype
    torch.manual_seed(0)
    a, w = torch.randn(16, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    h = a.float() @ w.float().T
    with device(arch, checks="raise"):
        for dtype, found in zip(NARROW, in_an_epilogue(a, w, backend="sim"), strict=True):
            assert relative(found, (h - h.to(dtype.torch).float()).double()) < 0.02, dtype
