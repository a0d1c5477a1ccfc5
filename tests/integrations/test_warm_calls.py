"""What is done once for all layers and all calls: compiling, packing, preparing launches."""

from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters

import coda
from coda.integrations import dynamo
from coda.integrations.opaque_state import hold, keeps_state
from coda.runtime import call as run
from coda.runtime import plan
from tests.integrations.zoo import arguments, build, distance

PROMPT = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(5))
GREEDY = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 9).long()}


def generate(model, tokens):
    return model.generate(PROMPT, **GREEDY, max_new_tokens=tokens, min_new_tokens=tokens)


def compiled():
    """How many graphs torch has compiled since it was last asked."""
    found = counters["stats"]["unique_graphs"]
    counters.clear()
    return found


@pytest.fixture
def void(monkeypatch):
    """Kernels are neither compiled nor launched; what is done around them is counted."""
    from coda.kernels.gemm import bind as gemm
    from coda.kernels.gemm import quack_target
    from coda.kernels.rowwise import bind as rowwise
    from coda.kernels.rowwise import launch as rowwise_target
    from coda.runtime.replay import Replays
    from coda.runtime.weight_cache import Memo

    counts = Counter()
    monkeypatch.setattr(run, "_calls", {})  # nothing that other tests have compiled
    monkeypatch.setattr(dynamo, "_blocks", {})
    for module in (run, plan):
        monkeypatch.setattr(module, "choose_backend", lambda _: "cuda")
    monkeypatch.setattr(dynamo, "choose_backend", lambda _: "reference")
    monkeypatch.setattr(quack_target, "use_cache", lambda *_: None)
    monkeypatch.setattr(
        quack_target, "import_kernel", lambda s, c, _: quack_target.Gemm(s, c, None)
    )
    monkeypatch.setattr(quack_target, "run_plan", lambda *_: counts.update(["launch"]))
    monkeypatch.setattr(rowwise_target, "load_module", lambda *_: None)

    def launch(self, a, b, d, operands):
        counts.update(["launch"])
        self.run.launched(quack_target.run_plan, (None, a, b, d, dict(operands)))

    def launch_rows(self, module, tensors):
        counts.update(["launch"])
        arguments = module.arguments(self.rows, tensors, self.run.ready, self.run.sizes)
        self.run.launched(lambda *_: counts.update(["launch"]), arguments)

    monkeypatch.setattr(gemm.GemmBinding, "start", launch)
    monkeypatch.setattr(rowwise.RowwiseBinding, "start", launch_rows)
    make, keep = Memo.get, Replays.keep

    def get(self, name, tensors, value):
        return make(self, name, tensors, lambda: counts.update(["made"]) or value())

    monkeypatch.setattr(Memo, "get", get)
    monkeypatch.setattr(
        Replays, "keep", lambda self, *a: counts.update(["recorded"]) or keep(self, *a)
    )
    return counts


def test_equal_layers_are_one_compilation():
    model = build("Llama", 3).eval()
    coda.patch(model)
    compiled()
    given = arguments("Llama")
    with torch.no_grad():
        model(**given)
        assert compiled() == 1
        model(**arguments("Llama", batch=3, length=24))
        model(**arguments("Llama", batch=5, length=31))
        assert compiled() <= 2
        model(**arguments("Llama", batch=4, length=40))
        assert compiled() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "depths"), [("Llama", (3,)), ("Llama", (2, 4)), ("GPT-2", (2, 4))]
)
def test_equal_layers_with_a_cache_are_one_compilation(name, depths):
    graphs = set()
    for layers in depths:
        torch._dynamo.reset()
        model = build(name, layers).eval()
        expected = generate(model, 6)
        coda.patch(model)
        compiled()
        assert torch.equal(generate(model, 6), expected)
        graphs.add(compiled())
        generate(model, 9)
        assert compiled() == 0
    assert len(graphs) == 1
    assert graphs.pop() <= 4


def test_a_table_made_in_each_forward_is_packed_once_for_all_layers(void):
    model = build("Llama", 3).bfloat16().eval()
    call = torch.compile(model, backend="coda")
    given = {k: v for k, v in arguments("Llama", torch.bfloat16).items() if k != "labels"}
    seen = []
    with torch.no_grad():
        for _ in range(3):
            void.clear()
            call(**given)
            seen.append(dict(void))
    graphs = {r.graph for g in coda.last_report().graphs for r in g.regions}
    assert seen[0]["recorded"] > len(graphs)
    assert "recorded" not in seen[1]
    assert seen[1] == seen[2]
    tables = 2  # cosines and sines, each by halves
    assert seen[1]["made"] == tables * sum("x2" in str(g) for g in graphs)
    assert seen[1]["launch"] == seen[0]["launch"]


@pytest.mark.slow
def test_steps_of_a_decoder_are_replayed(void, monkeypatch):
    monkeypatch.setattr("coda.integrations.patch._distance", lambda *_: 0.0)
    model = build("Llama", 2).bfloat16().eval()
    coda.patch(model)
    with torch.no_grad():
        generate(model, 4)
        void.clear()
        generate(model, 5)
        first = dict(void)
        void.clear()
        generate(model, 9)
    assert first["launch"] > 0
    assert "recorded" not in void
    assert void["made"] * 5 == first["made"] * 9
    assert void["launch"] * 5 == first["launch"] * 9


def test_an_object_that_keeps_state_is_held_as_itself():
    class Store:
        limit = 3

        def __init__(self):
            self.kept = []

        def add(self, x):
            self.kept.append(x)
            return self

    store = Store()
    assert keeps_state(store)
    for plain in (
        None,
        1,
        "a",
        torch.ones(1),
        [store],
        torch.nn.Linear(1, 1),
        Store,
        torch.bfloat16,
    ):
        assert not keeps_state(plain)
    held = hold(store)
    assert isinstance(held, Store)
    held.add(1)
    held.more = 2
    assert (store.kept, store.more, held.limit) == ([1], 2, 3)


def test_a_layer_that_returns_its_cache_returns_the_callers():
    class Store:
        def __init__(self):
            self.kept = []

        def add(self, x):
            self.kept.append(x)
            return torch.stack(self.kept).sum(0)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(64)
            self.up, self.down = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)

        def forward(self, x, store):
            y = store.add(torch.relu(self.up(self.norm(x))))
            return x + self.down(y), store

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(), Layer()])

        def forward(self, x, stores):
            for layer, store in zip(self.layers, stores, strict=True):
                x, found = layer(x, store)
                assert found is store
            return x

    model, x = Stack().eval(), torch.randn(8, 64)
    with torch.no_grad():
        expected = [model(x, s) for s in [[Store(), Store()]] for _ in range(3)]
        coda.patch(model, [x, [Store(), Store()]])
        stores = [Store(), Store()]
        for one in expected:
            assert distance(model(x, stores), one) < 1e-5
    assert [len(s.kept) for s in stores] == [3, 3]
