"""Operators of torch -> primitives: each rule means in float64 what torch computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from coda.frontend.torch_import.importer import import_nodes, value_of, why_not
from coda.integrations.dynamo import _sizes
from coda.integrations.regions import cut, is_parameter
from coda.ir.dims import Dim
from coda.ir.evaluate import evaluate


class Module(nn.Module):
    """A function as torch's tracer wants it."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *tensors):
        found = self.fn(*tensors)
        return found if isinstance(found, tuple) else (found,)


def traced(fn, *tensors, dynamic=False):
    """The ATen graph of a function; with `dynamic`, for any size of the first two of three axes."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    free, fixed = DimDynamic.DYNAMIC, DimDynamic.STATIC
    fakes = []
    for tensor in tensors:
        sizes = [free, free, fixed] if dynamic and tensor.ndim == 3 else [fixed] * tensor.ndim
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(mode.from_tensor(tensor, symbolic_context=context))
    gm, _ = aot_export_module(Module(fn), fakes, trace_joint=False, pre_dispatch=True)
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    return gm.graph


def imported(fn, *tensors, dynamic=False):
    """A function in which every operator has a rule; its results, and its arguments by fx node."""
    graph = traced(fn, *tensors, dynamic=dynamic)
    calls = [n for n in graph.nodes if n.op == "call_function"]
    calls = [n for n in calls if not isinstance(value_of(n), torch.SymInt)]
    assert [(n, why_not(n)) for n in calls if why_not(n)] == []
    (output,) = graph.find_nodes(op="output")
    returned = [n for n in output.args[0] if n.op == "call_function"]
    found = import_nodes(calls, returned, is_parameter)
    return found, returned, dict(zip(graph.find_nodes(op="placeholder"), tensors, strict=True))


def evaluated(fn, *tensors, dynamic=False):
    """What the imported graph computes in float64, under torch's axes."""
    found, returned, arguments = imported(fn, *tensors, dynamic=dynamic)
    values = [arguments[n] for n in found.inputs]
    wide = [v.detach().double() if v.is_floating_point() else v for v in values]
    known = dict(zip(found.graph.inputs, wide, strict=True))
    outputs = evaluate(found.graph.roots, known, _sizes(found))
    return [outputs[i].permute(order) for i, order in (found.outputs[n] for n in returned)]


G = torch.Generator().manual_seed(0)
X, Y = torch.randn(2, 3, 4, 8, generator=G)
W = torch.randn(8, 8, generator=G)
B = torch.randn(8, generator=G)
ROW = torch.rand(3, 4, 1, generator=G) + 0.5
TARGET = torch.tensor([1, 7, -100, 3, 0, 2, 2, 5, 6, -100, 4, 1])

CASES = {
    "arithmetic": (lambda x, y: (x + 2 * y - 1) / 3 * (1 - x) / (y * y + 1), X, Y),
    "alpha": (lambda x, y: torch.add(x, y, alpha=3) - torch.sub(x, y, alpha=2), X, Y),
    "powers": (lambda x: x.abs() ** 0.5 + x**2 + x**3 + (x * x + 1) ** -0.5 + x.abs() ** 1.5, X),
    "unary": (lambda x: x.exp() + x.tanh() * x.sigmoid() - x.erf() + x.sin() * x.cos(), X),
    "logs": (lambda x: (x * x + 1).log() + (x * x + 1).rsqrt() + (x * x + 1).reciprocal(), X),
    "in place": (lambda x, y: (x * 1).add_(y).mul_(2).relu_(), X, Y),
    "written rows": (lambda x, y: torch.cat([x, y], -1).mul_(2.0), X, Y),
    "silu": (F.silu, X),
    "gelu": (lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"), X),
    "others": (lambda x: F.hardswish(x) + F.mish(x) + F.leaky_relu(x, 0.1) + F.softplus(x), X),
    "clamped": (lambda x: x.clamp(-0.5, 0.5) + F.relu6(x) + x.clamp(min=0) + F.logsigmoid(x), X),
    "max and min": (lambda x, y: torch.maximum(x, y) * torch.minimum(x, y), X, Y),
    "where": (lambda x, y: torch.where(x > y, x, 0.0) + x.masked_fill(y < 0, 3.0), X, Y),
    "comparisons": (lambda x, y: (x >= y).to(torch.float32) + (x != 0).float(), X, Y),
    "means": (lambda x: x.mean(-1, keepdim=True) + x.sum(-1)[..., None] + x.amax(-1, True), X),
    "variance": (lambda x: x.var(-1, unbiased=False, keepdim=True) * x, X),
    "softmax": (lambda x: x.softmax(-1) + F.log_softmax(x, -1) + x.logsumexp(-1, True), X),
    "layer norm": (lambda x, w, b: F.layer_norm(F.layer_norm(x, (8,)), (8,), w, b), X, B, B + 1),
    "rms norm": (lambda x, w: F.rms_norm(x, (8,), w, 1e-5) + F.rms_norm(x, (8,)), X, B),
    "linear": (lambda x, w, b: F.linear(x, w, b) + F.linear(x, w), X, W, B),
    "matmul": (lambda x, w: x @ w + torch.matmul(x, w.T), X, W),
    "batches": (lambda x, y: x @ y.mT + torch.matmul(x[0], y.mT) + torch.bmm(x, y.mT), X, Y),
    "baddbmm": (lambda x, y: torch.baddbmm(x[..., :4], x, y.mT, beta=2, alpha=3), X, Y),
    "heads": (lambda x, y: (x.view(3, 4, 2, 4).transpose(1, 2) @ y.view(3, 4, 2, 4)
        .permute(0, 2, 3, 1)).softmax(-1), X, Y),
    "einsum": (lambda x, y: torch.einsum("bid,bjd->bji", x, y) * 2, X, Y),
    "einsum with a weight": (lambda x, w: torch.einsum("...d,ed->...e", x, w) * 2, X, W),
    "addmm": (lambda b, x, w: torch.addmm(b, x.view(-1, 8), w, beta=2, alpha=3), B, X, W),
    "addcmul": (lambda x, y: torch.addcmul(x, x, y, value=2), X, Y),
    "broadcast": (lambda x, r, b: x * r + b, X, ROW, B),
    "views": (lambda x: x.view(3, 4, 2, 4).transpose(1, 2).mul(2).transpose(1, 2).flatten(-2), X),
    "ones": (lambda x: (x.unsqueeze(1) * 2).squeeze(1) + x[:, None].expand(3, 1, 4, 8)[:, 0], X),
    "halves": (lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1) * x, X),
    "turns": (lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * x, X),
    "chunks": (lambda x: x.chunk(2, -1)[0] * x.split([3, 5], -1)[1][..., :4], X),
    "selected": (lambda x: x.select(-1, 3) + x[..., -1] + x.unbind(-1)[2] * x[..., 1:2].sum(-1), X),
    "narrowed": (lambda x: x.narrow(2, 1, 3) * 2, X),
    "dropout in eval": (lambda x: F.dropout(x, 0.5, training=False) * 2, X),
    "loss": (lambda x, t: F.cross_entropy(x.view(-1, 8), t, label_smoothing=0.1), X, TARGET),
    "sum of losses": (lambda x, t: F.cross_entropy(x.view(-1, 8), t, reduction="sum"), X, TARGET),
    "nll": (lambda x, t: F.nll_loss(F.log_softmax(x.view(-1, 8), -1), t), X, TARGET),
    "a part of the rows": (lambda x, w: F.linear(x, w)[:, 1:3] * 2, X, W),
}  # fmt: skip


NAMED = (
    "views",
    "ones",
    "loss",
    "sum of losses",
    "nll",
    "a part of the rows",
    "batches",
    "baddbmm",
    "heads",
    "einsum",
)  # they name their sizes
ANY_ROWS = [(n, True) for n in CASES if n not in NAMED]


@pytest.mark.parametrize(("name", "dynamic"), [*((n, False) for n in CASES), *ANY_ROWS])
def test_a_rule_means_what_torch_computes(name, dynamic):
    fn, *tensors = CASES[name]
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    if name == "rms norm":
        expected = F.rms_norm(wide[0], (8,), wide[1], 1e-5)
        expected = expected + F.rms_norm(wide[0], (8,), None, torch.finfo(torch.float32).eps)
    elif name == "in place":
        expected = ((wide[0] + wide[1]) * 2).relu()
    else:
        expected = fn(*wide).double()
    (found,) = evaluated(fn, *tensors, dynamic=dynamic)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_rows_get_symbols_where_sizes_are_numbers():
    """Sixteen tokens are told from sixteen columns."""

    def fn(x, w, table):
        return (x @ w).view(2, 16, 4, 4).transpose(1, 2) * table

    found, *_ = imported(fn, torch.randn(2, 16, 16), torch.randn(16, 16), torch.randn(16, 4))
    x, w, table = found.graph.inputs
    n = [Dim.of("n0"), Dim.of("n1")]
    assert x.shape == (*n, Dim.of(16))
    assert w.shape == (Dim.of(16), Dim.of(16))
    assert table.shape == (n[1], Dim.of(4))
    ((_, order),) = found.outputs.values()
    assert order == (0, 2, 1, 3)


def test_equal_layers_are_one_graph():
    """Torch's names of arguments, symbols and lines are not in it."""

    def mlp(x, v, w):
        return F.gelu(x @ v) @ w

    def other(a, b, c):
        hidden = torch.matmul(a, b)
        return torch.matmul(F.gelu(hidden), c)

    v, w = torch.randn(8, 16), torch.randn(16, 8)
    one, *_ = imported(mlp, torch.randn(5, 3, 8), v, w)
    two, *_ = imported(other, torch.randn(7, 2, 8), v, w)
    three, *_ = imported(other, torch.randn(6, 4, 8), v, w, dynamic=True)
    assert one.graph == two.graph
    assert one.graph == three.graph


def test_parts_of_heads_are_products_of_their_own():
    """q, k and v beside each other in every head: rows of the weight, put together."""

    def fn(x, w):
        q, k, v = (x @ w.T).view(5, 2, 12).chunk(3, -1)
        return q.neg(), k * 2, v.exp()

    x, w = torch.randn(5, 8), torch.randn(24, 8)
    found, *_ = imported(fn, x, w)
    assert str(found.graph).count("contract") == 3
    for a, b in zip(evaluated(fn, x, w), fn(x.double(), w.double()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_what_coda_has_no_rule_for_says_so():
    """Each reason is a sentence for the report."""

    def fn(x, i):
        y = F.dropout(x, 0.5) + x.cumprod(0) + x.norm(3.0)
        return y, i + 1, x.double().exp(), torch.complex(x, x)

    graph = traced(fn, torch.randn(4, 4), torch.arange(3))
    reasons = {str(n.target): why_not(n) for n in graph.nodes if n.op == "call_function"}
    assert reasons["aten.dropout.default"] == "dropout draws random numbers"
    assert reasons["aten.cumprod.default"] == "it is a scan of other functions than sums"
    assert reasons["aten.linalg_vector_norm.default"] == "a norm of order 3.0"
    assert reasons["aten.exp.default"] == "float64 is torch's"
    assert reasons["aten.complex.default"] == "complex numbers are torch's"
    assert reasons["aten.add.Tensor"] == "arithmetic on integers"


def test_products_of_batches_whose_columns_a_call_tells_are_torch_s():
    """Kernels beside them would be compiled for each number of tokens."""

    def fn(x, y):
        return torch.bmm(x, y.mT), torch.einsum("bid,bjd->bij", x, y), torch.einsum("bid->i", x)

    for dynamic in (True, False):
        graph = traced(fn, X, Y, dynamic=dynamic)
        left = [why_not(n) for n in graph.nodes if "mm" in str(n.target) or "sum" in str(n.target)]
        says = "a batched contraction whose number of columns is known only in the call"
        assert left == ([says, says, ""] if dynamic else ["", "", ""])


def test_regions_end_at_products_of_two_batches():
    """A block of both sides would have that product by torch, and be for one number of tokens."""

    def fn(x, w, v):
        q, k = (F.gelu(x @ w) * 2).chunk(2, -1)
        p = torch.einsum("bid,bjd->bij", q, k).softmax(-1)
        return F.silu(torch.einsum("bid,ed->bie", torch.bmm(p, k), v)) + x

    found = cut(traced(fn, X, W, torch.randn(8, 4, generator=G)))
    names = [[str(n.target) for n in region] for region in found.regions]
    assert [sum("matmul" in n or "einsum" in n for n in region) for region in names] == [1, 1]
    left = {str(n.target) for n, why in found.left.items() if "two batches" in why}
    assert left == {"aten.einsum.default", "aten.bmm.default"}
