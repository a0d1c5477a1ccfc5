"""Indexing by tensors of ints: values and gradients are torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coda
from coda.errors import CallError
from coda.frontend.tensor import Tensor
from coda.ir.dims import Dim
from coda.ir.evaluate import evaluate
from coda.ir.graph import Gather, Graph, Input, walk
from coda.ir.text import parse, show
from coda.ir.types import f64, i64
from tests.ir.test_vjp import check
from tests.lowering.test_random_blocks import SETTINGS

SIZES = {"V": 4, "W": 3, "B": 2, "S": 5}
TABLE = Input("t", (Dim.of("V"), Dim.of(2), Dim.of("W"), Dim.of(3)), f64)
SHAPES = ((), ("S",), ("B", "S"), ("B", 1), (1, "S"))


@st.composite
def indices(draw):
    """Indices of a table's axes, some tensors and ints side by side: of coda, of torch."""
    count = draw(st.integers(1, 3))
    first = draw(st.integers(0, 4 - count))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=count, max_size=count))
    single = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    single[0] = False
    before = [draw(st.sampled_from((slice(None), slice(1, None), None))) for _ in range(first)]
    inputs, items = [], list(before)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    at = sum(b is not None for b in before)
    for i in range(count):
        size = TABLE.shape[at + i].size(SIZES)
        if single[i]:
            items.append(draw(st.integers(-2, 1)))
            continue
        node = Input(f"i{i}", tuple(Dim.of(d) for d in shapes[i]), i64)
        shape = [d.size(SIZES) for d in node.shape]
        high = size - 1 if at + i < first and before[at + i] is not None else size
        inputs.append((node, torch.randint(0, high, shape, generator=generator)))
        items.append(inputs[-1])
    return inputs, items


@settings(SETTINGS, max_examples=80)
@given(indices())
def test_what_torch_gives(spec):
    inputs, items = spec
    mine = tuple(Tensor(i[0]) if isinstance(i, tuple) else i for i in items)
    theirs = tuple(i[1] if isinstance(i, tuple) else i for i in items)
    y = Tensor(TABLE)[mine].node
    graph = Graph("f", (TABLE, *(n for n, _ in inputs)), (("y", y),))
    assert parse(show(graph)) == graph
    value = torch.randn([d.size(SIZES) for d in TABLE.shape], dtype=torch.float64)
    tensors = [value, *(x for _, x in inputs)]
    (found,) = evaluate([y], dict(zip(graph.inputs, tensors, strict=True)), SIZES)
    torch.testing.assert_close(found, value[theirs], rtol=0, atol=0)
    check(graph, tensors, SIZES)


@pytest.mark.parametrize("order", ["t[i, j]", "t[j, i]", "t[i]", "t[:, j]", "t[:, i, j]"])
def test_what_counts_an_axis_is_a_view(order):
    """It reads each element once, so that a kernel reads them in place."""
    table = Input("t", (Dim.of("V"),) * 3, f64)
    value = torch.randn(4, 4, 4, dtype=torch.float64)
    i, j = coda.iota(Dim.of("V"))[:, None], coda.iota(Dim.of("V"))
    y = eval(order, {"t": Tensor(table), "i": i, "j": j}).node
    assert not any(isinstance(n, Gather) for n in walk([y]))
    expected = eval(order, {"t": value, "i": torch.arange(4)[:, None], "j": torch.arange(4)})
    (found,) = evaluate([y], {table: value}, SIZES)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_diagonal_is_no_view():
    table = Tensor(Input("t", (Dim.of("V"), Dim.of("V")), f64))
    i = coda.iota(Dim.of("V"))
    value = torch.randn(4, 4, dtype=torch.float64)
    (found,) = evaluate([table[i, i].node], {table.node: value}, SIZES)
    assert torch.equal(found, value.diagonal())


NUMBERS = torch.tensor([-9, -8, -1, 0, 1, 6, 7, 8, 2**24 - 1, 2**40])


@pytest.mark.parametrize("n", [1, 3, 7, 2**24 - 1])
def test_whole_quotients_are_rounded_down(n):
    x = Input("x", (Dim.of(len(NUMBERS)),), i64)
    graph = Graph("f", (x,), (("q", (Tensor(x) // n).node), ("r", (Tensor(x) % n).node)))
    assert parse(show(graph)) == graph
    q, r = evaluate(graph.roots, {x: NUMBERS}, {})
    assert q.tolist() == [k // n for k in NUMBERS.tolist()]
    assert r.tolist() == [k % n for k in NUMBERS.tolist()]


@pytest.mark.parametrize("ends", [(5,), (2, 9), (2, 9, 3), (0, 8, 2), (-3, 4, 7)])
def test_ranges(ends):
    (found,) = evaluate([coda.arange(*ends).node], {}, {})
    assert torch.equal(found.long(), torch.arange(*ends))


def test_a_range_up_to_a_dim():
    s = Dim.of("S")
    first, even = coda.arange(1, s + 2), coda.arange(0, s * 2, 2)
    assert first.shape == (s + 1,)
    assert even.shape == (s,)
    found = evaluate([first.node, even.node], {}, {"S": 3})
    assert [x.tolist() for x in found] == [[1, 2, 3, 4], [0, 2, 4]]


@coda.block
def table_of_biases(x: coda.Tensor["S T"], t: coda.Tensor["N H", coda.f32]):
    away = coda.minimum(coda.abs(coda.iota(x.shape[0])[:, None] - coda.iota(x.shape[1])), 7)
    return x.cast(coda.f32) + coda.sum(t[away], axis=-1)


def test_a_block_computes_with_it():
    x, t = torch.randn(5, 6).bfloat16(), torch.randn(8, 3)
    away = (torch.arange(5)[:, None] - torch.arange(6)).abs().clamp(max=7)
    torch.testing.assert_close(table_of_biases(x, t), x.float() + t[away].sum(-1))
    with pytest.raises(CallError, match="a table of 4"):
        table_of_biases(torch.randn(9, 2).bfloat16(), t[:4].contiguous())
