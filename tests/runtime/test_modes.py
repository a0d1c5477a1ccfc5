"""Blocks under torch's modes: autocast, compile, torch.func, hooks, changes in place."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import coda
from coda.errors import CallError, UnsupportedError
from coda.ir.graph import Input, walk
from coda.kernels.gemm.mainloop import gemms
from coda.measure import random_inputs
from coda.runtime.donation import alone
from coda.runtime.weight_cache import Memo
from tests.runtime.test_call import SIZES, mlp, torch_mlp

T = coda.Tensor


@pytest.fixture
def inputs():
    return [x.double() for x in random_inputs(mlp.graph, SIZES)]


@pytest.fixture
def d():
    return torch.randn(9, 16, dtype=torch.float64)


def leaves(inputs):
    return [x.clone().requires_grad_() for x in inputs]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def expected(inputs, d):
    mine = leaves(inputs)
    return torch.autograd.grad(torch_mlp(*mine), mine, d)


@coda.block
def two(x: T["M D"], w: T["F D"], v: T["F D"]):
    return x @ w.T, x @ v.T


@coda.block
def squared(x: T["M D"], w: T["F D"]):
    h = coda.exp(x @ w.T)
    return h, h * h


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(inputs, d, reentrant):
    alone.cache_clear()  # as in the first call of a process
    mine = leaves(inputs)
    checkpoint(mlp, *mine, use_reentrant=reentrant).backward(d)
    same([x.grad for x in mine], expected(inputs, d))


def test_outputs_may_be_changed_in_place(inputs, d):
    mine = leaves(inputs)
    y = mlp(*mine)
    y.add_(1).mul_(2)
    y.backward(d)
    same([x.grad for x in mine], [2 * e for e in expected(inputs, d)])
    x, w, v = leaves([torch.randn(5, 16), torch.randn(8, 16), torch.randn(8, 16)])
    a, b = two(x, w, v)  # of one buffer
    a.add_(1)
    b.mul_(3)
    found = torch.autograd.grad(a.sum() + b.sum(), [x, w, v])
    same(found, torch.autograd.grad((x @ w.T).sum() + 3 * (x @ v.T).sum(), [x, w, v]))


def test_saved_tensors_changed_in_place_are_noticed(inputs, d):
    mine = leaves(inputs)
    y = mlp(*mine)
    with torch.no_grad():
        mine[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(d)
    h, y = squared(*leaves([torch.randn(5, 16), torch.randn(8, 16)]))
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_that_is_an_argument_has_its_own_memory():
    @coda.block
    def passed(x: T["M D"], w: T["F D"]):
        return {"x": x, "half": x[:, 8:], "y": x @ w.T}

    x, w = torch.randn(5, 16), torch.randn(8, 16)
    for mine in ([x, w], leaves([x, w])):
        found = passed(*mine)
        for name in ("x", "half"):
            found[name].zero_()
        assert bool(mine[0].all())


def test_a_graph_that_is_kept_gives_its_gradients_again(inputs, d):
    mine = leaves(inputs)
    y = mlp(*mine)
    y.backward(d, retain_graph=True)
    y.backward(d)
    same([x.grad for x in mine], [2 * e for e in expected(inputs, d)])
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(d)


def test_hooks_of_parameters_see_and_change_gradients(inputs, d):
    mine, seen = leaves(inputs), []
    mine[1].register_hook(lambda g: 2 * g)
    mine[2].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    mlp(*mine).backward(d)
    theirs = expected(inputs, d)
    same([mine[1].grad, seen[0]], [2 * theirs[1], theirs[2]])


@pytest.mark.parametrize("shape", [{}, {"M": 0}], ids=["rows", "no rows"])
def test_cotangents_of_any_layout(inputs, shape):
    x = inputs[0][: shape.get("M", 9)]
    mine = leaves([x, *inputs[1:]])
    theirs = torch.autograd.grad(torch_mlp(*mine).sum(), mine)
    same(torch.autograd.grad(mlp(*mine).sum(), mine), theirs)  # expanded
    turned = torch.ones(16, x.shape[0], dtype=x.dtype).T
    same(torch.autograd.grad(mlp(*mine), mine, turned), theirs)


def test_saved_tensors_may_be_kept_elsewhere(inputs, d):
    mine = leaves(inputs)
    with torch.autograd.graph.save_on_cpu():
        y = mlp(*mine)
    y.backward(d)
    same([x.grad for x in mine], expected(inputs, d))


def test_nothing_is_saved_in_inference_mode(inputs):
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x),
        torch.inference_mode(),
    ):
        same([mlp(*leaves(inputs))], [torch_mlp(*inputs)])
        memo, w = Memo(), torch.ones(3)
        assert memo.get("b", [w], lambda: 1) == 1
        assert memo.get("b", [w], lambda: 2) == 2  # nobody counts its changes
    assert not kept


def test_an_output_that_no_wanted_argument_reaches_needs_no_gradient():
    x, w, v = torch.randn(5, 16), torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    a, b = two(x, w, v)
    assert a.requires_grad
    assert not b.requires_grad


def test_frozen_weights_have_no_kernel():
    """A low-rank update of a frozen weight: the backward multiplies by nothing of the weight."""

    @coda.block
    def adapted(x: T["M D"], w: T["F D"], a: T["R D"], b: T["F R"]):
        return x @ w.T + (x @ a.T) @ b.T

    x, w, a, b = (torch.randn(s) for s in ((5, 16), (24, 16), (4, 16), (24, 4)))
    a.requires_grad_()
    b.requires_grad_()
    adapted(x, w, a, b).sum().backward()
    theirs = torch.autograd.grad((x @ w.T + (x @ a.T) @ b.T).sum(), [a, b])
    same([a.grad, b.grad], theirs)
    sizes = {"M": 5, "D": 16, "F": 24, "R": 4}
    backward = adapted.lower_training("sm_90a", sizes, wanted=["a", "b"])[1]
    assert len(list(gemms(backward))) == 3  # d b, d (x aᵀ), d a
    assert not {"w"} & {i.name for i in walk(backward.graph.roots) if isinstance(i, Input)}


NARROW = torch.bfloat16


def test_autocast_keeps_declared_types_and_what_does_not_multiply():
    @coda.block
    def scaled(x: T["M D"], w: T["F D"], s: T["M", coda.f32]):
        return (x @ w.T).cast(coda.f32) * s.reshape("M -> M 1")

    x, w, s = torch.randn(5, 16), torch.randn(8, 16), torch.randn(5)
    with torch.autocast("cpu", NARROW):
        found = scaled(x, w, s.to(NARROW))
        assert found.dtype == torch.float32
        assert (softmax := coda.block(_softmax))(x).dtype == torch.float32
        assert softmax(x.to(NARROW)).dtype == NARROW
    theirs = scaled(x.to(NARROW), w.to(NARROW), s.to(NARROW).float())
    torch.testing.assert_close(found, theirs)


def _softmax(x: T["M D"]):
    return coda.softmax(x)


def test_float32_programs_stay_float32_under_autocast(inputs):
    """The backward of a call may run under autocast, too: no product of it is narrowed."""
    mine = leaves([x.float() for x in inputs])
    y = mlp(*mine)
    with torch.autocast("cpu", NARROW):
        found = torch.autograd.grad(y.sum(), mine)
    same(found, torch.autograd.grad(torch_mlp(*mine).sum(), mine))


def test_mixed_types_are_refused_with_the_argument_that_set_them(inputs):
    with pytest.raises(CallError, match="`g` is f64 as `x` is") as e:
        mlp(inputs[0], *(x.float() for x in inputs[1:]))
    assert "torch.autocast" in e.value.help


@coda.block
def gained(x: T["M D"], g: T["D"]):
    return coda.softmax(x * g) * x


@coda.block
def loss(x: T["M D"], w: T["V D"], target: T["M", coda.i64]):
    return coda.cross_entropy(x @ w.T, target)


@coda.block
def gated(x: T["B S D"], w: T["F D"], c: T["S F"]):
    return coda.silu(x @ w.T) * c


def draw(*shapes):
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


# A block, the same in torch, arguments of some sizes, sizes.
DYNAMIC = {
    "mlp": (
        mlp,
        torch_mlp,
        lambda m: draw((m, 16), (16,), (24, 16), (24, 16), (16, 24)),
        [(9,), (5,), (130,)],
    ),
    "no contraction": (
        gained,
        lambda x, g: torch.softmax(x * g, -1) * x,
        lambda m: draw((m, 16), (16,)),
        [(9,), (5,), (130,)],
    ),
    "rows built in": (
        loss,
        lambda x, w, t: torch.nn.functional.cross_entropy(x @ w.T, t),
        lambda m: [*draw((m, 16), (32, 16)), torch.randint(0, 32, (m,))],
        [(9,), (5,), (130,)],
    ),
    "batches": (
        gated,
        lambda x, w, c: torch.nn.functional.silu(x @ w.T) * c,
        lambda b, s: draw((b, s, 16), (24, 16), (s, 24)),
        [(2, 5), (3, 9), (4, 7)],
    ),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_compilation_serves_all_rows(name):
    block, theirs, make, sizes = DYNAMIC[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for size in sizes:
        mine = make(*size)
        wanted = [x for x in mine if x.requires_grad]
        y = theirs(*mine)
        d = torch.randn_like(y)
        for call in (compiled, block):
            found = torch.autograd.grad(call(*mine), wanted, d)
            same(found, torch.autograd.grad(y, wanted, d, retain_graph=True))
    assert counter.frame_count == 1


def test_compiled_checkpointing_under_autocast(inputs):
    compiled = torch.compile(
        lambda *a: checkpoint(mlp, *a, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    mine = leaves([x.float() for x in inputs])
    with torch.autocast("cpu", NARROW):
        found = torch.autograd.grad(compiled(*mine).sum(), mine)
        same(found, torch.autograd.grad(mlp(*mine).sum(), mine))


def test_what_is_compiled_keeps_no_more_than_it_reads(inputs):
    """Of x @ wᵀ with a frozen w nothing but w is kept: neither x nor the output."""
    kept = []

    def f(x, w):
        return two(x, w, w)[0]

    x, w = torch.randn(5, 16, requires_grad=True), torch.randn(8, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.compile(f, backend="aot_eager", fullgraph=True)(x, w).sum().backward()
    assert [tuple(t.shape) for t in kept] == [(8, 16)]


@pytest.mark.slow
def test_under_inductor(inputs, d):
    mine = leaves(inputs)
    torch.compile(lambda *a: mlp(*a) * 2)(*mine).backward(d)
    same([x.grad for x in mine], [2 * e for e in expected(inputs, d)])


def test_under_compiled_autograd(inputs, d):
    mine = leaves(inputs)
    y = mlp(*mine)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(d)
    same([x.grad for x in mine], expected(inputs, d))


def test_torch_func(inputs, d):
    found = torch.func.grad(lambda x, *w: (mlp(x, *w) * d).sum())(*inputs)
    _, pull = torch.func.vjp(mlp, *inputs)
    theirs = expected(inputs, d)
    same([found, *pull(d)], [theirs[0], *theirs])


def _jvp(f, inputs):
    torch.func.jvp(f, tuple(inputs), tuple(inputs))


def _dual(f, inputs):
    with forward_ad.dual_level():
        f(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])


def _vmap(f, inputs):
    torch.func.vmap(f, (0, None, None, None, None))(torch.stack(inputs[:1]), *inputs[1:])


def _batched(f, inputs):
    mine = leaves(inputs)
    y = f(*mine)
    torch.autograd.grad(y, mine, torch.stack([y, y]), is_grads_batched=True)


def _twice(f, inputs):
    mine = leaves(inputs)
    (g, *_) = torch.autograd.grad(f(*mine).sum(), mine, create_graph=True)
    g.sum().backward()


def _nested(f, inputs):
    def inner(x):
        return torch.func.grad(lambda y: f(y, *inputs[1:]).sum())(x).sum()

    torch.func.grad(inner)(inputs[0])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (_jvp, "no forward-mode derivative"),
        (_dual, "no forward-mode derivative"),
        (_vmap, "not mapped over a hidden axis"),
        (_batched, "not mapped over a hidden axis"),
        (_twice, "no gradients of their own"),
        (_nested, "no gradients of their own"),
    ],
)
def test_what_a_block_has_no_program_for_is_refused(inputs, transform, message):
    with pytest.raises(UnsupportedError, match=message) as e:
        transform(mlp, inputs)
    assert e.value.help


def test_second_order_of_what_is_compiled_is_refused(inputs):
    mine = leaves(inputs)
    compiled = torch.compile(lambda *a: mlp(*a), backend="eager")
    (g, *_) = torch.autograd.grad(compiled(*mine).sum(), mine, create_graph=True)
    with pytest.raises(UnsupportedError, match="no gradients of their own"):
        g.sum().backward()


@coda.block
def activated(x: coda.Tensor["M D"], w: coda.Tensor["F D"]):
    return coda.silu(x @ w.T)


def _penalty(f, x, w):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x, w).sum(), x, create_graph=True)
    (f(x, w).sum() + g.square().sum()).backward()


def _penalty_of_a_function(f, x, w):
    def inner(x):
        return torch.func.grad(lambda y: f(y, w).sum())(x).square().sum()

    torch.func.grad(inner)(x)


def _compiled_penalty(f, x, w):
    _penalty(torch.compile(f, backend="eager"), x, w)


@pytest.mark.parametrize("penalty", [_penalty, _penalty_of_a_function, _compiled_penalty])
def test_second_order_is_refused_where_no_argument_is_saved(penalty):
    """Only the frozen weight and the pre-activation are: neither requires a gradient by itself."""
    x, w = torch.randn(4, 8), torch.randn(16, 8)
    with pytest.raises(UnsupportedError, match="no gradients of their own"):
        penalty(activated, x, w)


def test_blocks_are_copied_and_pickled_as_functions_are():
    assert copy.deepcopy([mlp])[0] is mlp
    assert pickle.loads(pickle.dumps(mlp)) is mlp
    written = coda.parse(str(two.graph))
    x, w, v = (torch.randn(s).bfloat16() for s in ((5, 16), (8, 16), (8, 16)))
    same(pickle.loads(pickle.dumps(written))(x, w, v), two(x, w, v))


def test_memory_is_traded_for_traffic(inputs, d):
    """`min` saves arguments and a number a row, `speed` no less than `balanced`."""
    saved = {}
    for memory in ("min", "balanced", "speed"):
        kept = []
        mine = leaves(inputs)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t) or t, lambda t: t
        )
        with hooks:
            y = mlp(*mine, memory=memory)
        y.backward(d)
        same([x.grad for x in mine], expected(inputs, d))
        saved[memory] = sum(t.numel() for t in kept)
    assert saved["min"] == sum(x.numel() for x in inputs) + len(inputs[0])
    assert saved["min"] < saved["balanced"] <= saved["speed"]


def test_memory_of_a_block():
    least = coda.block(memory="min")(mlp.fn)
    sizes = {s: SIZES[s] for s in mlp.graph.symbols}
    mine, asked = (
        least.lower_training("sm_90a", sizes),
        mlp.lower_training("sm_90a", sizes, memory="min"),
    )
    assert [str(p) for p in mine] == [str(p) for p in asked]
    assert [n.shape[-1] for _, n in mine[0].outputs[1:]] == [1]
    for wrong in (
        lambda: coda.block(memory="most"),
        lambda: mlp.lower_training("sm_90a", sizes, memory="most"),
    ):
        with pytest.raises(UnsupportedError, match="traded for traffic"):
            wrong()
