"""The language's functions where they bend, overflow or have no number to give.

Values and gradients are held against torch's in every float type. A function without a row fails.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F

import coda
from coda.frontend import library, ops
from tests.edges.held import Taken, differences, of_coda, of_torch, wide
from tests.edges.test_rules import edges, pairs, rows, without_inf

TYPES = {
    torch.float32: coda.f32,
    torch.float64: coda.f64,
    torch.bfloat16: coda.bf16,
    torch.float16: coda.f16,
}
LABELS = torch.tensor([0, 3, 1, 7, 1, 2, 5, 6, 4, 0, 2, 1, 3, 0, 7, 4])
EPS = 1e-3


def one(name, theirs, ours=None, made=edges):
    """A row of a function of one tensor."""
    return name, ours or getattr(coda, name), theirs, lambda dtype: [made(dtype)]


def two(name, theirs, ours=None, made=pairs):
    """A row of a function of two."""
    return name, ours or getattr(coda, name), theirs, made


def finite_pairs(dtype):
    """Pairs whose second number is finite: an infinite cotangent is a sum of two infinities here.

    Kernels compute the product that torch computes.
    """
    x, y = pairs(dtype)
    return x, y.clamp(-60, 60)


def tame(dtype):
    """Numbers whose products with a cotangent do not overflow."""
    return edges(dtype) / 4


def few(dtype):
    """Rows without infinities."""
    return rows(dtype).clamp(-60, 60)


def near_one(dtype):
    """Rows of which no product leaves any type, with a row that has a zero, and without NaN."""
    x = few(dtype).nan_to_num(0.5).clamp(-1, 1) / 2 + 1
    x[0, 3] = 0
    return x


def labelled(dtype):
    """Small logits: of large ones a logsumexp, and so a loss, is known to their last digit."""
    return [rows(dtype).clamp(-5, 5), LABELS]


def tables(dtype):
    angles = torch.arange(32.0).reshape(16, 2)
    return [few(dtype), angles.cos().to(dtype), angles.sin().to(dtype)]


def turned(m, x, cos, sin):
    """RoPE of two heads of four columns, by coda or by torch."""
    if m is coda:
        return coda.rope(x.reshape(16, 2, 4), cos, sin)
    a, b = x.reshape(16, 2, 4).chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


ROWS = [
    one("exp", torch.exp),
    one("expm1", torch.expm1),
    one("exp2", torch.exp2),
    one("log", torch.log),
    one("log1p", torch.log1p),
    one("sqrt", torch.sqrt),
    one("rsqrt", torch.rsqrt),
    one("tanh", torch.tanh),
    one("sigmoid", torch.sigmoid),
    one("erf", torch.erf),
    one("sin", torch.sin),
    one("cos", torch.cos),
    one("erfc", torch.erfc),
    one("abs", torch.abs),
    one("floor", lambda x: x * x.floor(), lambda x: x * coda.floor(x)),
    one("ceil", lambda x: x * x.ceil(), lambda x: x * coda.ceil(x)),
    one("trunc", lambda x: x * x.trunc(), lambda x: x * coda.trunc(x)),
    one("round", lambda x: x * x.round(), lambda x: x * coda.round(x)),
    one("sign", lambda x: x * x.sign(), lambda x: x * coda.sign(x)),
    one("stop_gradient", lambda x: x * x.detach(), lambda x: x * coda.stop_gradient(x)),
    one("dropout", lambda x: x * 1, lambda x: coda.dropout(x, 0.0, seed=3)),
    one("uniform", lambda x: torch.where(x == x, x, 0),
        lambda x: coda.where((coda.uniform(x.shape, 3) < 1) & (x == x), x, 0.0)),
    one("square", torch.square),
    one("relu", F.relu),
    one("softplus", lambda x: F.softplus(x, threshold=700)),
    one("log_sigmoid", F.logsigmoid),
    one("silu", F.silu, made=tame),
    one("gelu", F.gelu),
    one("gelu", lambda x: F.gelu(x, approximate="tanh"), lambda x: coda.gelu(x, "tanh")),
    one("softcap", lambda x: 3 * torch.tanh(x / 3), lambda x: coda.softcap(x, 3.0)),
    one("clamp", lambda x: x.clamp(0.1, 0.3), lambda x: coda.clamp(x, 0.1, 0.3)),
    one("clamp", lambda x: x.clamp(min=0.1), lambda x: coda.clamp(x, low=0.1)),
    one("clamp", lambda x: x.clamp(max=0.1), lambda x: coda.clamp(x, high=0.1)),
    one("where", lambda x: torch.where(x > 0.1, x, 0.3), lambda x: coda.where(x > 0.1, x, 0.3)),
    one("maximum", lambda x: torch.maximum(x, x.new_tensor(0.1)), lambda x: coda.maximum(x, 0.1)),
    two("maximum", torch.maximum),
    two("minimum", torch.minimum),
    two("atan2", torch.atan2),
    two("clamp", lambda x, y: torch.clamp(x, -y, y), lambda x, y: coda.clamp(x, -y, y)),
    two("residual", torch.add),
    two("bias", lambda x, y: x + y[0], lambda x, y: coda.bias(x, y[0])),
    two("swiglu", lambda x, y: F.silu(x) * y, made=finite_pairs),
    two("geglu", lambda x, y: F.gelu(x) * y, made=finite_pairs),
    two("reglu", lambda x, y: F.relu(x) * y),
    one("softmax", lambda x: x.softmax(-1), made=without_inf),
    one("log_softmax", lambda x: x.log_softmax(-1), made=without_inf),
    one("sum", lambda x: x.sum(-1), made=rows),
    one("mean", lambda x: x.mean(-1), made=rows),
    one("max", lambda x: x.amax(-1), made=rows),
    one("max", lambda x: x.reshape(4, 4, 8).amax((0, 2)),
        lambda x: coda.max(coda.reshape(x, 4, 4, 8), axis=(0, 2)),
        made=lambda dtype: few(dtype).clamp(-1, 1)),
    one("min", lambda x: x.amin(-1), made=rows),
    one("logsumexp", lambda x: x.logsumexp(-1), made=rows),
    one("argmax", lambda x: x[:, 0] * x.argmax(-1),
        lambda x: x[:, 0] * coda.argmax(x).cast(x.dtype), made=few),
    one("argmin", lambda x: x[:, 0] * x.argmin(-1),
        lambda x: x[:, 0] * coda.argmin(x).cast(x.dtype), made=few),
    one("prod", lambda x: x.prod(-1), made=near_one),
    one("var", lambda x: x.var(-1), made=few),
    one("std", lambda x: x.std(-1), made=few),
    one("rms_norm", lambda x: F.rms_norm(x, (8,), eps=EPS), lambda x: coda.rms_norm(x, eps=EPS),
        made=few),
    one("inverse_rms", lambda x: (x.double().square().mean(-1, True) + EPS).rsqrt().to(x.dtype),
        lambda x: library.inverse_rms(x, EPS), made=few),
    one("layer_norm", lambda x: F.layer_norm(x, (8,), eps=EPS),
        lambda x: coda.layer_norm(x, eps=EPS), made=few),
    one("l2_norm", lambda x: (x.double() * (x.double().square().sum(-1, True) + EPS).rsqrt())
        .to(x.dtype), lambda x: coda.l2_norm(x, EPS), made=few),
    one("linear", lambda x: F.linear(x, x[:3]), lambda x: coda.linear(x, x[:3]), made=few),
    one("einsum", lambda x: torch.einsum("ij,kj->ik", x, x[:3]),
        lambda x: coda.einsum("i j, k j -> i k", x, x[:3]), made=few),
    one("cumsum", lambda x: x.double().cumsum(-1).to(x.dtype), made=few),
    one("arange", lambda x: x * torch.arange(1, 17, 2).to(x.dtype),
        lambda x: x * coda.arange(1, 17, 2).cast(x.dtype), made=few),
    one("iota", lambda x: x * torch.arange(8).to(x.dtype),
        lambda x: x * coda.iota(8, x.dtype), made=few),
    one("permute", lambda x: x.permute(1, 0), lambda x: coda.permute(x, 1, 0)),
    one("cast", lambda x: x.to(torch.float32), lambda x: coda.cast(x, coda.f32)),
    one("reshape", lambda x: x.reshape(-1, 4, 2), lambda x: coda.reshape(x, -1, 4, 2)),
    one("split", lambda x: x.split([3, 5], -1)[1], lambda x: coda.split(x, [3, 5])[1]),
    one("concat", lambda x: torch.cat([x, x], -1), lambda x: coda.concat([x, x])),
    one("stack", lambda x: torch.stack([x, x], -1), lambda x: coda.stack([x, x])),
    ("take", coda.take, lambda x, i: x[i], labelled),
    ("pick", coda.pick, lambda x, i: x.gather(1, i[:, None]), labelled),
    ("cross_entropy", lambda x, i: coda.cross_entropy(x, i, reduction="none"),
     lambda x, i: F.cross_entropy(x, i, reduction="none"), labelled),
    ("nll_loss", lambda x, i: coda.nll_loss(x, i, reduction="none"),
     lambda x, i: F.nll_loss(x, i, reduction="none"), labelled),
    ("rope", lambda *ts: turned(coda, *ts), lambda *ts: turned(torch, *ts), tables),
]  # fmt: skip
# What chooses or moves: torch's own numbers, to a rounding.
CHOICES = {"abs", "relu", "clamp", "where", "maximum", "minimum", "cast", "reshape", "split",
           "concat", "stack", "take", "pick", "permute"}  # fmt: skip


def public(module):
    found = inspect.getmembers(module, inspect.isfunction)
    return {n for n, f in found if f.__module__ == module.__name__ and n[0] != "_"}


def test_every_function_has_a_row():
    assert {name for name, *_ in ROWS} == public(library) | public(ops)


def traced(fn, tensors):
    """A block of one function, as what the importer gives."""
    names = [f"x{i}" for i in range(len(tensors))]
    body = eval(f"lambda {', '.join(names)}: fn({', '.join(names)})", {"fn": fn})
    shapes = [coda.Tensor[" ".join(map(str, t.shape)), TYPES.get(t.dtype, coda.i64)]
              for t in tensors]  # fmt: skip
    body.__annotations__ = dict(zip(names, shapes, strict=True))
    graph = coda.block(body).graph
    return Taken(
        graph, list(range(len(tensors))), [(0, tuple(range(graph.roots[0].rank)))], {}, set()
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r[0])
def test_a_function_at_its_edges(row, dtype):
    name, ours, theirs, made = row
    tensors = list(made(dtype))
    expected = of_torch(theirs, tensors)
    exact = expected if name in CHOICES else of_torch(theirs, wide(tensors))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    found = of_coda(traced(ours, tensors), tensors, compute)
    assert not differences(found, expected, exact)
