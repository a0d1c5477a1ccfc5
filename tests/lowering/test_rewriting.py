"""Rewriting comes to an end, since a measure falls, and at one form, whatever comes first."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.ir.dims import Dim
from coda.ir.graph import Contract, Graph, Input, Map, Node, Permute, Reduce, walk
from coda.ir.scalars import SCALARS
from coda.ir.types import bf16, f32
from coda.lowering.algebra.laws import EXCHANGES, LAWS
from coda.lowering.algebra.measure import Order, additions
from coda.lowering.algebra.rewrite import instantiate, rewrite, substituted
from coda.lowering.algebra.training import exchanged as exchanged_sums

H, M, K, ONE = Dim.of("H"), Dim.of("M"), Dim.of("K"), Dim.of(1)
SHAPES = ((M, K), (M, ONE), (K,), (K, K), (K, M), (ONE, K), (M, K, K), (ONE, K, K))
SHAPES += ((H, M, K), (H, M, ONE), (H, K, K), (H, K, M), (H, ONE, K), (H, K, ONE), (K, ONE))


def shapes_of(law, batch=()):
    """Shapes of a law's variables: all axes are columns but the leading ones."""
    over_rows = any(v.axes[0] == "L" and not v.leading for v in law.variables.values())
    axes = {"1": ONE, "L": M if over_rows else K}
    return {
        name: batch * (v.leading or v.batch)
        + (M,) * v.leading
        + tuple(axes.get(a, K) for a in v.axes)
        for name, v in law.variables.items()
    }


def leaves(dtype):
    """A few arguments of each shape."""
    return {s: [Input(f"i{n}{i}", s, dtype) for i in range(2)] for n, s in enumerate(SHAPES)}


def planted(seed, laws, count):
    """A graph in which left sides of laws stand in and beside each other, and on other nodes."""
    draw = random.Random(seed)
    pool = leaves(draw.choice((bf16, f32)))
    made = []
    for _ in range(count):
        law = draw.choice(laws)
        batched = any(v.batch for v in law.variables.values()) and draw.random() < 0.5
        shapes = shapes_of(law, (H,) * batched)
        bound = {n: draw.choice(pool[shape][-3:]) for n, shape in shapes.items()}
        node = instantiate(law.left, {**bound, "element type": draw.choice((bf16, f32))}, {})
        if draw.random() < 0.3:
            node = Map(draw.choice(("exp", "neg", "tanh")), (node,))
        if node.shape in pool:
            pool[node.shape].append(node)
        made.append(node)
    return tuple(dict.fromkeys(made))


ONE_WAY = [law for law in (*LAWS, *EXCHANGES) if not law.name.startswith("row_sum_exchanged")]


def replaced(roots, known):
    """The roots with all nodes of `known` replaced, also those that a replacement brings back."""
    while (new := substituted(roots, known)) != roots:
        roots = new
    return roots


@settings(max_examples=60)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 7))
def test_a_measure_falls_with_every_law(seed, count):
    roots = planted(seed, ONE_WAY, count)
    steps = []
    end = rewrite(roots, ONE_WAY, lambda *_: True, steps.append)
    known = {}
    for step in steps:
        known[step.before] = step.after
        before, roots = additions(roots), replaced(roots, known)
        after = additions(roots)
        assert after <= before, step.law.name
        assert after < before or Order().is_larger(step.before, step.after), step.law.name
    assert roots == end


@pytest.mark.parametrize("law", ONE_WAY, ids=lambda law: law.name)
def test_no_law_can_be_turned_round(law):
    """The measure says which side is the right one."""
    assert additions([law.right]) <= additions([law.left])
    fewer = additions([law.right]) < additions([law.left])
    assert fewer or Order().is_larger(law.left, law.right)
    assert fewer or not Order().is_larger(law.right, law.left)


class Forms:
    """Numbers of graphs, the same for those that differ in the order of factors and terms alone."""

    def __init__(self):
        self.numbers = {}

    def of(self, roots):
        """The numbers of roots."""
        known, factors = {}, {}
        for node in walk(roots):
            below = [known[o] for o in node.operands]
            row = SCALARS[node.fn] if isinstance(node, Map) else None
            if row and row.powers and set(row.powers) <= {1, 2}:
                powers = [int(p) for p in row.powers]
                each = [factors[o] * p for o, p in zip(node.operands, powers, strict=True)]
                below = sorted(f for some in each for f in some)
                what = "product"
            else:
                what = [getattr(node, n) for n in node.identity]
                what = str([x for x in what if not isinstance(x, Node | tuple)])
                below = sorted(below) if row and row.commutes else below
            form = type(node).__name__, what, node.shape, tuple(below)
            known[node] = self.numbers.setdefault(form, len(self.numbers))
            factors[node] = below if what == "product" else [known[node]]
        return [known[r] for r in roots]


def exchanged(roots):
    """The same graph with the operands of what commutes the other way round."""
    new = {}
    for node in walk(roots):
        operands = [new[o] for o in node.operands]
        if isinstance(node, Map) and SCALARS[node.fn].commutes:
            operands.reverse()
        new[node] = node.with_operands(operands) if operands else node
    return tuple(new[r] for r in roots)


# It puts operands side by side in the order in which they come.
ORDERLESS = [law for law in LAWS if law.name != "contractions_together"]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 5))
def test_one_form_whatever_comes_first(seed, count):
    roots = planted(seed, ORDERLESS, count)
    forms = Forms()

    def end(some, laws=ORDERLESS):
        return forms.of(rewrite(some, laws, lambda *_: True))

    first = end(roots)
    assert end(roots[::-1])[::-1] == first
    assert end(exchanged(roots)) == first
    assert end(roots, ORDERLESS[::-1]) == first


def test_sums_are_not_exchanged_to_and_fro():
    """Where the forward has both contractions, the sum stays over the one that it is over."""
    x, y = Input("x", (M, K), f32), Input("y", (M, K), f32)
    w = Input("w", (K, K), f32)
    mine, other = Contract(y, w, f32), Contract(x, Permute(w, (1, 0)), f32)
    total = Reduce("sum", Map("mul", (x, mine)), -1)
    for known, wanted in (((other,), other), ((mine, other), mine), ((mine,), mine)):
        outputs = tuple((f"out{i}", node) for i, node in enumerate(known))
        ((_, found),) = exchanged_sums([("g", total)], Graph("f", (x, y, w), outputs))
        assert wanted in found.operands[0].operands
