"""Primitives and the library against torch, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import coda
from coda.frontend.shapes import parse_shape
from coda.ir.evaluate import evaluate

X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
W = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
V = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
B = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def value(fn, *tensors):
    """A block of one expression, evaluated in float64."""
    kinds = {torch.float64: coda.f64, torch.int64: coda.i64, torch.bool: coda.bool_}
    names = [f"t{i}" for i in range(len(tensors))]

    def traced(*args):
        return fn(*args)

    specs = [coda.Tensor[" ".join(map(str, t.shape)), kinds[t.dtype]] for t in tensors]
    body = eval(f"lambda {', '.join(names)}: traced({', '.join(names)})", {"traced": traced})
    body.__annotations__ = dict(zip(names, specs, strict=True))
    graph = coda.block(body).graph
    return evaluate(graph.roots, dict(zip(graph.inputs, tensors, strict=True)), {})[0]


UNARY = {
    "exp": torch.exp, "exp2": torch.exp2, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "erf": torch.erf, "abs": torch.abs, "square": torch.square, "sin": torch.sin,
    "cos": torch.cos, "relu": F.relu, "silu": F.silu, "gelu": F.gelu,
    "softmax": lambda x: torch.softmax(x, -1), "log_softmax": lambda x: torch.log_softmax(x, -1),
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    torch.testing.assert_close(value(getattr(coda, name), X), UNARY[name](X))


@pytest.mark.parametrize("name", ["log", "sqrt", "rsqrt"])
def test_of_positive_numbers(name):
    torch.testing.assert_close(value(getattr(coda, name), X.abs()), getattr(torch, name)(X.abs()))


CASES = {
    "arithmetic": (lambda x, y: (2 - x) * y / (1 + y * y) - -x + x**3, 2, None),
    "matmul": (lambda x, w: x @ w.T, (X, W), lambda: X @ W.T),
    "where": (lambda x, y: coda.where(x > y, x, 0.0), 2, lambda: torch.where(X > Y, X, 0.0)),
    "maximum": (coda.maximum, 2, lambda: torch.maximum(X, Y)),
    "minimum": (coda.minimum, 2, lambda: torch.minimum(X, Y)),
    "sum": (lambda x: coda.sum(x, axis=0), 1, lambda: X.sum(0)),
    "mean": (lambda x: x.mean(keepdims=True), 1, lambda: X.mean(-1, keepdim=True)),
    "max": (lambda x: x.max(), 1, lambda: X.amax(-1)),
    "min": (lambda x: coda.min(x, axis=1), 1, lambda: X.amin(-1)),
    "logsumexp": (coda.logsumexp, 1, lambda: torch.logsumexp(X, -1)),
    "slice": (lambda x: x[1:3, ::2], 1, lambda: X[1:3, ::2]),
    "index": (lambda x: x[:, None, -1], 1, lambda: X[:, None, -1]),
    "heads": (lambda x: x.reshape(5, 2, 4)[:, 1], 1, lambda: X.reshape(5, 2, 4)[:, 1]),
    "split": (lambda x: coda.split(x, 2)[1], 1, lambda: X[:, 4:]),
    "concat": (lambda x, y: coda.concat([x, y]), 2, lambda: torch.cat([X, Y], -1)),
    "stack": (lambda x, y: coda.stack([x, y], axis=1), 2, lambda: torch.stack([X, Y], 1)),
    "geglu": (coda.geglu, 2, lambda: F.gelu(X) * Y),
    "reglu": (coda.reglu, 2, lambda: F.relu(X) * Y),
    "swiglu": (coda.swiglu, 2, lambda: F.silu(X) * Y),
    "gelu tanh": (lambda x: coda.gelu(x, "tanh"), 1, lambda: F.gelu(X, approximate="tanh")),
    "softcap": (lambda x: coda.softcap(x, 3.0), 1, lambda: 3 * torch.tanh(X / 3)),
    "rms_norm": (lambda x, w: coda.rms_norm(x, w, 1e-6), (X, V),
                 lambda: F.rms_norm(X, (8,), V, 1e-6)),
    "rms_norm 1 + w": (lambda x, w: coda.rms_norm(x, w, 1e-6, shift=1.0), (X, V),
                       lambda: F.rms_norm(X, (8,), V + 1, 1e-6)),
    "layer_norm": (lambda x, w, b: coda.layer_norm(x, w, b), (X, V, B),
                   lambda: F.layer_norm(X, (8,), V, B)),
    "l2_norm": (lambda x: coda.l2_norm(x, 0.0), 1, lambda: F.normalize(X, dim=-1)),
    "and": (lambda x, y: coda.where((x > 0) & (y > 0), x, y), 2,
            lambda: torch.where((X > 0) & (Y > 0), X, Y)),
    "or": (lambda x, y: coda.where((x > 0) | (y > 0), x, y), 2,
           lambda: torch.where((X > 0) | (Y > 0), X, Y)),
    "xor": (lambda x, y: coda.where((x > 0) ^ (y > 0), x, y), 2,
            lambda: torch.where((X > 0) ^ (Y > 0), X, Y)),
    "not": (lambda x, y: coda.where(~(x > 0), x, y), 2, lambda: torch.where(~(X > 0), X, Y)),
    "reshape -1": (lambda x: x.reshape(5, -1, 2)[:, 3], 1, lambda: X.reshape(5, -1, 2)[:, 3]),
    "numbers of dims": (lambda x: x / coda.sqrt(x.shape[-1]) * coda.exp(1.0), 1,
                        lambda: X / 8**0.5 * torch.e),
    "numbers of numpy": (lambda x: np.float64(2) * x - x / np.float32(4) + np.int64(1), 1,
                         lambda: 2 * X - X / 4 + 1),
    "linear": (coda.linear, (X, W, W[:, 0].contiguous()), None),
    "bias": (coda.bias, (X, V), lambda: X + V),
    "residual": (coda.residual, 2, lambda: X + Y),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("arithmetic", "linear")])
def test_case(name):
    fn, tensors, expected = CASES[name]
    tensors = (X, Y)[:tensors] if isinstance(tensors, int) else tensors
    torch.testing.assert_close(value(fn, *tensors), expected())


def test_arithmetic():
    found = value(CASES["arithmetic"][0], X, Y)
    torch.testing.assert_close(found, (2 - X) * Y / (1 + Y * Y) + X + X**3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_pairs_of_columns(interleaved):
    cos, sin = X[:, :2].contiguous(), X[:, 2:4].contiguous()
    found = value(
        lambda x, c, s: coda.rope(x.reshape(5, 2, 4), c, s, interleaved=interleaved), Y, cos, sin
    )
    heads = Y.reshape(5, 2, 4)
    first = slice(0, None, 2) if interleaved else slice(0, 2)
    second = slice(1, None, 2) if interleaved else slice(2, 4)
    a, b, c, s = heads[..., first], heads[..., second], cos[:, None], sin[:, None]
    torch.testing.assert_close(found[..., first], a * c - b * s)
    torch.testing.assert_close(found[..., second], b * c + a * s)


def test_partial_rotary_leaves_the_rest():
    cos, sin = X[:, :2].contiguous(), X[:, 2:4].contiguous()
    found = value(lambda x, c, s: coda.rope(x.reshape(5, 1, 8), c, s), Y, cos, sin)
    torch.testing.assert_close(found[:, 0, 4:], Y[:, 4:])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(reduction, smoothing):
    target = torch.tensor([3, 0, -100, 7, 1])
    found = value(
        lambda x, t: coda.cross_entropy(x, t, reduction=reduction, label_smoothing=smoothing),
        X, target,
    )  # fmt: skip
    expected = F.cross_entropy(X, target, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_of_a_batch(reduction):
    logits, target = X.reshape(1, 5, 8).repeat(2, 1, 1), torch.tensor([[3, 0, -100, 7, 1]] * 2)
    found = value(lambda x, t: coda.cross_entropy(x, t, reduction=reduction), logits, target)
    expected = F.cross_entropy(logits.transpose(1, 2), target, reduction=reduction)
    torch.testing.assert_close(found, expected)


def test_a_block_calls_another():
    @coda.block
    def norm(x: coda.Tensor["M D"], w: coda.Tensor["D"]):
        return coda.rms_norm(x, w)

    @coda.block
    def layer(y: coda.Tensor["B S F"], g: coda.Tensor["F"]):
        return norm(y, g) * 2.0

    @coda.block
    def written(y: coda.Tensor["B S F"], g: coda.Tensor["F"]):
        return coda.rms_norm(y, g) * 2.0

    assert layer.graph.roots == written.graph.roots


def test_z_loss_adds_the_square_of_the_logsumexp():
    target = torch.tensor([3, 0, 2, 7, 1])
    found = value(lambda x, t: coda.cross_entropy(x, t, reduction="sum", z_loss=0.5), X, target)
    lse = torch.logsumexp(X, -1)
    expected = F.cross_entropy(X, target, reduction="sum") + 0.5 * (lse**2).sum()
    torch.testing.assert_close(found, expected)


def test_take_and_pick():
    index = torch.tensor([3, 0, 2, 7, 9])
    torch.testing.assert_close(value(coda.take, X, index % 5), X[index % 5])
    found = value(coda.pick, X, index)[:, 0]
    torch.testing.assert_close(found[:4], X[range(4), index[:4]])
    assert found[4].isnan()  # never a number that looks right


@pytest.mark.parametrize(
    ("text", "shown"),
    [("M D", "M, D"), ("M 2*F", "M, 2*F"), ("M (H d)", "M, H*d"), ("M d/2", "M, d/2"), ("", "")],
)
def test_shape_language(text, shown):
    assert ", ".join(map(str, parse_shape(text))) == shown


def test_the_function_stays_reachable():
    def double(x: coda.Tensor["M D"]):
        """Twice x."""
        return x + x

    block = coda.block(double)
    assert block.fn is double
    assert block.__wrapped__ is double
    assert block.__doc__ == "Twice x."


NARROW = {torch.bfloat16: coda.bf16, torch.float16: coda.f16, torch.float32: coda.f32}
MEETS_A_NUMBER = {
    "gt": lambda m, x, n: x > n,
    "ge": lambda m, x, n: x >= n,
    "lt": lambda m, x, n: n < x,
    "eq": lambda m, x, n: x == n,
    "ne": lambda m, x, n: x != n,
    "a chosen number": lambda m, x, n: m.where(x < 0, x, n) == x,
    "a bound": lambda m, x, n: m.clamp(x, n, 2.0) == x,
}


def around(number, dtype):
    """A number in a type, its two neighbours, and its negative."""
    near = torch.tensor(number, dtype=torch.float64).to(dtype)
    ends = (torch.tensor(e, dtype=torch.float64).to(dtype) for e in (9e9, -9e9))
    return torch.stack([near, *(torch.nextafter(near, e) for e in ends), -near])


def hold_in_type(fn, theirs, x, computed):
    def ours(x: coda.Tensor["M"]):
        return fn(x)

    graph = coda.block(ours).graph_of(NARROW[x.dtype])
    for compute in computed:
        (found,) = evaluate(graph.roots, {graph.inputs[0]: x}, {"M": len(x)}, compute)
        assert torch.equal(found, theirs), compute


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("number", [0.1, 0.3, 1.0, 1e6])
@pytest.mark.parametrize("name", MEETS_A_NUMBER)
def test_a_number_that_is_compared_or_chosen_is_a_value_of_the_type(name, number, dtype):
    """The oracle in float64 agrees, too."""
    if name == "a bound" and number > 6e4:
        pytest.skip("torch refuses it in float16")
    fn, x = MEETS_A_NUMBER[name], around(number, dtype)
    computed = (torch.float64, torch.float32, None)
    hold_in_type(lambda t: fn(coda, t, number), fn(torch, x, number), x, computed)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_number_made_of_sizes_is_one_of_the_type(dtype):
    number = 4**0.5 / 3  # what is 0.6667, rounded
    x = around(number, dtype)
    hold_in_type(lambda t: t == coda.sqrt(t.shape[0]) / 3, x == number, x, (torch.float32, None))


@pytest.mark.parametrize(
    "fn", [lambda i: i * 0.5, lambda i: i > 0.5, lambda i: coda.where(i > 0, i, 0.5)]
)
def test_whole_numbers_meet_no_fraction(fn):
    def whole(i: coda.Tensor["M", coda.i64]):
        return fn(i)

    with pytest.raises(coda.errors.DtypeError, match="a number with a fraction"):
        coda.block(whole)
