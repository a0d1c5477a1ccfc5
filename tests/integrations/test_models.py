"""Whole models of transformers under backend coda: logits and gradients beside torch's own."""

import pytest
import torch
from torch._dynamo.utils import counters

import coda
from coda.ir.graph import Concat
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.program.cost import hbm_bytes
from tests.integrations.zoo import FAMILIES, arguments, build, distance, overall, step

QUICK = ("Llama",)
OTHERS = [pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in QUICK]


def three(name, dtype):
    """One model in float64, by torch and by coda, with the same (rounded) weights."""
    plain, ours, exact = (build(name) for _ in range(3))
    plain, ours = plain.to(dtype), ours.to(dtype)
    exact = exact.double()
    exact.load_state_dict({k: v.double() for k, v in plain.state_dict().items()})
    return exact, plain, ours


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_logits_and_gradients_are_as_near_to_float64_as_torchs(name):
    exact, plain, ours = three(name, torch.bfloat16)
    counters.clear()
    compiled = torch.compile(ours, backend="coda")
    _, y, g = step(exact, exact, arguments(name, torch.float64))
    _, y1, g1 = step(plain, plain, arguments(name, torch.bfloat16))
    _, y2, g2 = step(ours, compiled, arguments(name, torch.bfloat16))
    assert not counters["graph_break"]
    assert g1.keys() == g2.keys()
    assert distance(y2, y) <= 1.2 * distance(y1, y)
    assert overall(g2, g) <= 1.2 * overall(g1, g)
    report = coda.last_report()
    assert not [g.whole for g in report.graphs if g.whole]
    assert report.fused > 15
    for region in (r for g in report.graphs for r in g.regions):
        kernels = [*region.forward.program.kernels, *region.backward.program.kernels]
        torchs = [k.mainloop.node for k in kernels if k.kind is TORCH]
        assert all(isinstance(n, Concat) and name == "GPT-NeoX" for n in torchs), "q, k, v by heads"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_every_family_without_gradients(name):
    exact, plain, ours = (m.eval() for m in three(name, torch.bfloat16))
    compiled = torch.compile(ours, backend="coda")
    with torch.no_grad():
        y = exact(**arguments(name, torch.float64)).logits
        y1 = plain(**arguments(name, torch.bfloat16)).logits
        y2 = compiled(**arguments(name, torch.bfloat16)).logits
    assert distance(y2, y) <= 1.2 * distance(y1, y)
    for region in (r for g in coda.last_report().graphs for r in g.regions):
        assert not [k for k in region.forward.program.kernels if k.kind is TORCH]


def test_a_layer_of_llama_is_the_best_program_known():
    model = build("Llama", layers=3).to(torch.bfloat16).eval()
    compiled = torch.compile(model, backend="coda")
    with torch.no_grad():
        compiled(**arguments("Llama"))
    (graph,) = coda.last_report().graphs
    first, second, third, last = graph.regions
    assert second.graph is third.graph
    for region in (second, third):
        names = [k.name[:4] for k in region.forward.program.kernels]
        assert names == ["gemm", "gemm", "gemm", "gemm"]
    assert [k.name for k in first.forward.program.kernels] == ["rows0", "gemm1"]
    reasons = {why for (name, why), _ in graph.left.items() if name == "aten.linear"}
    assert not reasons
    assert "aten.scaled_dot_product_attention" in str(coda.last_report())
    assert hbm_bytes(last.forward.program) < last.forward.pointwise.hbm_bytes


@pytest.mark.slow
def test_one_graph_for_all_sizes_of_a_batch():
    model = build("Llama", layers=1)
    compiled = torch.compile(model, backend="coda", dynamic=True)
    for batch, length in ((2, 16), (3, 24)):
        given = arguments("Llama", batch=batch, length=length)
        _, logits, gradients = step(model, compiled, given)
        _, logits1, gradients1 = step(model, model, given)
        assert distance(logits, logits1) < 1e-5
        assert overall(gradients, gradients1) < 1e-5
    assert len(coda.last_report().graphs) == 1


def test_shapes_that_torch_fixes_share_their_blocks():
    model = build("Llama", layers=1).eval()
    compiled = torch.compile(model, backend="coda", dynamic=False)
    with torch.no_grad():
        for length in (16, 24):
            given = arguments("Llama", length=length)
            assert distance(compiled(**given).logits, model(**given).logits) < 1e-5
    one, other = coda.last_report().graphs
    assert [r.graph for r in one.regions] == [r.graph for r in other.regions]
