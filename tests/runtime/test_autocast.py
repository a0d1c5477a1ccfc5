"""Blocks under autocast, held to the same mathematics in torch: types, values and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F

import coda
from coda.ir.graph import walk
from tests.runtime.test_call import mlp, torch_mlp

T = coda.Tensor
NARROW = (torch.bfloat16, torch.float16)
TARGET = torch.tensor([3, 0, 30, -100, 7, 7, 12, 1, 31])


@coda.block
def linear(x: T["M D"], w: T["F D"], b: T["F"]):
    return coda.linear(x, w, b)


@coda.block
def activated(x: T["M D"], w: T["F D"]):
    return coda.silu(x @ w.T)


@coda.block
def probabilities(x: T["M D"], w: T["F D"]):
    return coda.softmax((x @ w.T).cast(coda.f32))


@coda.block
def post_norm(x: T["M D"], w: T["D D"], g: T["D"]):
    return x + coda.rms_norm(x @ w.T, g, 1e-6)


@coda.block
def sliced(x: T["M D"], w: T["F D"]):
    return x[:, :8] @ w[:, 8:16].T


@coda.block
def distance(x: T["M D"], w: T["F D"], goal: T["M F"]):
    return coda.mean(coda.mean(coda.square(x @ w.T - goal)), axis=0)


def losses(reduction):
    @coda.block
    def loss(x: T["M D"], w: T["F D"], target: T["M", coda.i64]):
        return coda.cross_entropy(x @ w.T, target, reduction=reduction, label_smoothing=0.1)

    @coda.block
    def in_two(x: T["M D"], w: T["F D"], target: T["M", coda.i64]):
        return coda.nll_loss(coda.log_softmax(x @ w.T), target, reduction=reduction)

    def theirs(x, w, t):
        return F.cross_entropy(x @ w.T, t, reduction=reduction, label_smoothing=0.1)

    def theirs_in_two(x, w, t):
        return F.nll_loss(F.log_softmax(x @ w.T, -1), t, reduction=reduction)

    shapes = ((9, 16), (32, 16))
    return {
        f"loss {reduction}": (loss, theirs, shapes, [TARGET]),
        f"loss in two {reduction}": (in_two, theirs_in_two, shapes, [TARGET]),
    }


# A block, the same in torch, shapes of its float arguments, other arguments.
CASES = {
    "residual": (mlp, torch_mlp, ((9, 16), (16,), (24, 16), (24, 16), (16, 24)), []),
    "linear": (linear, F.linear, ((9, 16), (24, 16), (24,)), []),
    "activated": (activated, lambda x, w: F.silu(x @ w.T), ((9, 16), (24, 16)), []),
    "probabilities": (
        probabilities,
        lambda x, w: (
            F.softmax((x @ w.T).float(), -1) if x.dtype != torch.float64 else F.softmax(x @ w.T, -1)
        ),
        ((9, 16), (24, 16)),
        [],
    ),
    "post-norm": (
        post_norm,
        lambda x, w, g: x + F.rms_norm(x @ w.T, (16,), g, 1e-6),
        ((9, 16), (16, 16), (16,)),
        [],
    ),
    "views": (sliced, lambda x, w: x[:, :8] @ w[:, 8:16].T, ((9, 16), (24, 16)), []),
    "a loss of one's own": (
        distance,
        lambda x, w, y: (x @ w.T - y).square().mean(-1).mean(0),
        ((9, 16), (24, 16), (9, 24)),
        [],
    ),
    **losses("mean"),
    **losses("sum"),
    **losses("none"),
}


def draw(shapes):
    make = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=make) / 2 for s in shapes]


def taken(call, given, more, narrow=None):
    """The output and the gradients, under autocast where a type is given."""
    mine = [x.clone().requires_grad_() for x in given]
    with torch.autocast("cpu", narrow, enabled=narrow is not None):
        y = call(*mine, *more)
    y.double().square().mean().backward()
    return [y.detach(), *(x.grad for x in mine)]


def off(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_types_and_errors_are_those_of_torch(name, narrow):
    block, theirs, shapes, more = CASES[name]
    given = draw(shapes)
    exact = taken(theirs, [x.double() for x in given], more)
    expected = taken(theirs, given, more, narrow)
    for found, other, right in zip(taken(block, given, more, narrow), expected, exact, strict=True):
        assert found.dtype == other.dtype
        assert found.shape == other.shape
        assert off(found, right) <= 3 * off(other, right) + 1e-6


def test_a_loss_of_16_bit_values_is_float32():
    @coda.block
    def loss(logits: T["M V"], target: T["M", coda.i64]):
        return coda.cross_entropy(logits, target)

    logits = (8 * draw([(9, 32)])[0]).bfloat16()
    exact = F.cross_entropy(logits.double(), TARGET)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = F.cross_entropy(logits, TARGET), loss(logits, TARGET)
    assert found.dtype == expected.dtype == torch.float32
    assert off(found, exact) <= 3 * off(expected, exact) + 1e-6
    assert loss(logits, TARGET).dtype == torch.bfloat16


def test_mixed_arguments_nesting_and_what_is_switched_off():
    x, w = draw([(9, 16), (24, 16)])
    for first in (x, x.bfloat16(), x.half()):
        with torch.autocast("cpu", torch.bfloat16):
            assert activated(first, w).dtype == torch.bfloat16
            with torch.autocast("cpu", torch.float16):
                assert activated(first, w).dtype == torch.float16
            with torch.autocast("cpu", enabled=False):
                torch.testing.assert_close(activated(x, w), F.silu(x @ w.T))
    with torch.autocast("cpu", torch.bfloat16):
        assert activated(x.double(), w.double()).dtype == torch.float64
    given = draw(CASES["residual"][2])
    mixed = [given[0].bfloat16(), *given[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = mlp(*mixed), torch_mlp(*mixed)
    exact = torch_mlp(*(t.double() for t in mixed))
    assert found.dtype == expected.dtype
    assert off(found, exact) <= 3 * off(expected, exact)


def test_what_a_block_types_itself_is_as_it_was():
    types = "bf16 bf16 bf16 -"
    block = CASES["loss mean"][0]
    (ne,) = [n for n in walk(block.under_autocast(types).graph.roots) if n.dtype.kind == "bool"]
    assert [a.dtype for a in ne.operands] == [coda.i64, coda.i64]


def test_the_types_of_a_call_are_those_in_which_it_was_made():
    """One block serves calls of several types, in any order."""
    given = draw(CASES["residual"][2])
    plain = mlp(*given)
    for narrow in (*NARROW, *NARROW):
        with torch.autocast("cpu", narrow):
            assert 0 < off(mlp(*given), plain.double()) < 2e-2
        torch.testing.assert_close(mlp(*given), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["loss mean", pytest.param("residual", marks=pytest.mark.slow)])
def test_compiled_calls_are_cast_as_others(name):
    block, _, shapes, more = CASES[name]
    given = draw(shapes)
    compiled = torch.compile(lambda *a: block(*a), backend="aot_eager", fullgraph=True)
    for found, other in zip(
        taken(compiled, given, more, torch.bfloat16),
        taken(block, given, more, torch.bfloat16),
        strict=True,
    ):
        torch.testing.assert_close(found, other, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("memory", ["balanced", "min"])
def test_linear_cross_entropy(reduction, memory):
    head = coda.nn.LinearCrossEntropy(64, 97, reduction=reduction, memory=memory)
    x = draw([(256, 64)])[0]
    target = torch.randint(0, 97, (256,), generator=torch.Generator().manual_seed(1))

    def theirs(x, w):
        return F.cross_entropy(F.linear(x, w), target, reduction=reduction)

    def ours(x, w):
        twin = copy.copy(head)
        twin._parameters = {"weight": w}
        return twin(x, target)

    given = [x, head.weight.detach()]
    exact = taken(theirs, [t.double() for t in given], [])
    expected = taken(theirs, given, [], torch.bfloat16)
    for found, other, right in zip(
        taken(ours, given, [], torch.bfloat16), expected, exact, strict=True
    ):
        assert found.dtype == other.dtype
        assert off(found, right) <= 3 * off(other, right) + 1e-6


def test_a_block_that_only_its_gradient_still_needs_is_kept():
    given = [t.requires_grad_() for t in draw([(9, 16), (24, 16)])]
    with torch.autocast("cpu", torch.bfloat16):
        y = coda.block(activated.fn)(*given)
    with coda.accumulate_gradients():
        y.sum().backward(retain_graph=True)
        y.sum().backward()
    expected = torch.autograd.grad(F.silu(given[0] @ given[1].T).sum(), given)
    for x, e in zip(given, expected, strict=True):
        assert off(x.grad, 2 * e.double()) < 2e-2
