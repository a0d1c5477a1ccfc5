"""Each law alone: equal in float64, no worse on hostile values, and found where it is planted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.ir.dims import Dim
from coda.ir.evaluate import evaluate
from coda.ir.graph import Input, Map, Node, walk
from coda.ir.types import bf16, f32
from coda.lowering.algebra.laws import EXCHANGES, LAWS
from coda.lowering.algebra.rewrite import Law, instantiate, rewrite

SIZES = (1, 2, 3, 7, 16, 31)
BATCHED = [law for law in (*LAWS, *EXCHANGES) if any(v.batch for v in law.variables.values())]
BATCHES = ((2, 3), (1, 3), (2, 1), (3,), ())


def of_batches(law: Law, batches: dict[str, tuple], dtype=f32) -> dict[str, Node]:
    """Arguments for a law's variables, each with leading batch axes of its own."""
    return {
        name: Input("v_" + name, (*map(Dim.of, batches[name]), *v.shape), dtype)
        for name, v in law.variables.items()
    }


def inputs(law: Law) -> list[Node]:
    return sorted(
        {n for n in walk([law.left, law.right]) if isinstance(n, Input)}, key=lambda n: n.name
    )


def sample(law: Law, sizes: dict[str, int], seed: int, scale: float = 1.0, mean: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for node in inputs(law):
        shape = [d.size(sizes) for d in node.shape]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if node.name == "x":
            x = x * scale + mean
        values[node] = x.abs() + 0.5 if node.name == "r" else x
    return values


@pytest.mark.parametrize("law", [*LAWS, *EXCHANGES], ids=lambda law: law.name)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    lead=st.sampled_from(SIZES),
    k=st.sampled_from(SIZES),
    n=st.sampled_from(SIZES),
)
def test_both_sides_agree_in_float64(law, seed, lead, k, n):
    sizes = {"L": lead, "K": k, "N": n, "M": 4}
    left, right = evaluate([law.left, law.right], sample(law, sizes, seed), sizes)
    torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", BATCHED, ids=lambda law: law.name)
@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_both_sides_of_batches_agree_in_float64(law, data, seed):
    """Each variable has all batch axes, some of size 1, or none."""
    bound = of_batches(law, {n: data.draw(st.sampled_from(BATCHES), n) for n in law.variables})
    sizes = {a: data.draw(st.sampled_from((2, 5, 8)), a) for a in "LKN"}
    generator = torch.Generator().manual_seed(seed)
    values = {
        node: torch.rand([d.size(sizes) for d in node.shape], generator=generator).double() + 0.5
        for node in bound.values()
    }
    sides = [instantiate(side, dict(bound), {}) for side in (law.left, law.right)]
    left, right = evaluate(sides, values, sizes)
    torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", [*LAWS, *EXCHANGES], ids=lambda law: law.name)
@pytest.mark.parametrize(("scale", "mean"), [(1, 0), (1, 1e4), (1e-3, 0), (30, 0)])
def test_the_right_side_rounds_no_worse_than_declared(law, scale, mean):
    """Sides computed in float32, held against the left side in float64."""
    sizes = {"L": 8, "K": 257, "N": 16, "M": 4}
    values = sample(law, sizes, 1, scale, mean)
    values = {n: v.float().double() for n, v in values.items()}
    (exact,) = evaluate([law.left], values, sizes)
    left, right = evaluate([law.left, law.right], values, sizes, compute=torch.float32)
    if not left.isfinite().all():
        assert right.isfinite().all() or not exact.isfinite().all()
        return
    size = exact.abs().max()
    floor = 4e-7 * max(size.item(), conditioning(law, values, sizes))
    left_error = (left.double() - exact).abs().max().item()
    right_error = (right.double() - exact).abs().max().item()
    assert right_error <= law.loosens * 2 * left_error + floor


def conditioning(law: Law, values, sizes) -> float:
    """The size of the terms that a law which moves a shift adds and subtracts (float32 each)."""
    if "shift" not in law.name and law.name != "affine_past_contraction":
        return 0.0
    (x,) = [v for n, v in values.items() if n.name == "x"]
    others = [v.abs().mean().item() for n, v in values.items() if n.name in ("w", "g", "m")]
    product = x.abs().max().item()
    for value in others:
        product *= max(value, 1.0)
    return product * sizes["K"] ** 0.5


OF_BATCHES_ALONE = ("column_factor_past_contraction", "row_factor_to_other_operand")
PLANTED = [(law, ()) for law in (*LAWS, *EXCHANGES) if law.name not in OF_BATCHES_ALONE]
PLANTED += [(law, ("B", 3)) for law in BATCHED]


def on(side: Node, arguments) -> Node:
    """A side of a law on other arguments, node by node as it is written."""
    if isinstance(side, Input):
        return arguments[side.name]
    return side.with_operands([on(o, arguments) for o in side.operands])


@pytest.mark.parametrize(("law", "batch"), PLANTED, ids=lambda p: getattr(p, "name", f"{p}"))
def test_it_fires_where_it_is_planted(law, batch):
    """Planted under other operations, with dims of other names, it is found and applied."""
    dims = {"L": Dim.of("T"), "K": Dim.of("C"), "N": Dim.of("E")}
    own = {n: batch if v.batch or v.leading else () for n, v in law.variables.items()}
    arguments = {
        name: Input(node.name, tuple(d.substitute(dims) for d in node.shape), bf16)
        for name, node in of_batches(law, own).items()
    }
    computed = {n: Map("tanh", (node,)) for n, node in arguments.items()}
    for bound in (arguments, computed, {**computed, "x": arguments["x"]}):
        if batch:
            left = instantiate(law.left, {**bound, "element type": f32}, {})
        else:
            left = on(law.left, bound)
        planted = Map("exp", (Map("neg", (left,)),))
        trace = []
        (after,) = rewrite([planted], [law], lambda *_: True, trace.append)
        if trace:
            break
    assert [s.law for s in trace][:1] == [law]
    assert after.shape == planted.shape
    assert after.dtype == planted.dtype


def test_the_order_of_the_laws_does_not_matter_for_a_norm():
    from coda.ir.graph import Const, Contract, Reduce

    t, c, e = Dim.of("T"), Dim.of("C"), Dim.of("E")
    x, g, w = Input("x", (t, c), f32), Input("g", (c,), f32), Input("w", (e, c), f32)
    mean = Reduce("mean", Map("mul", (x, x)), -1)
    r = Map("rsqrt", (Map("add", (mean, Const(1e-5, f32))),))
    y = Contract(Map("mul", (Map("mul", (x, r)), g)), w, f32)
    forms = {rewrite([y], laws, lambda *_: True)[0] for laws in (LAWS, LAWS[::-1])}
    assert len(forms) == 1
