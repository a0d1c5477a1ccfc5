"""`coda explain MODEL`, as a user types it."""

import json

import pytest
import torch
import transformers
from torch import nn

from coda.lowering import compiler
from tests.integrations.zoo import FAMILIES
from tests.test_cli import run

LAYERS = 5


def llama(path, layers):
    """A directory with the configuration of a Llama, and no weights."""
    _, sizes = FAMILIES["Llama"]
    transformers.LlamaConfig(**sizes, num_hidden_layers=layers).save_pretrained(path)
    return str(path)


def test_a_configuration(capsys, tmp_path, monkeypatch):
    lowered, original = [], compiler.run_stages
    monkeypatch.setattr(
        compiler, "run_stages", lambda *a, **k: lowered.append(1) or original(*a, **k)
    )
    code, out, _ = run(capsys, "explain", llama(tmp_path, LAYERS), "--dims", "B=2,S=24", "--json")
    found = json.loads(out)
    assert (code, found["graph_breaks"], found["whole"]) == (0, 0, [])
    assert [b["times"] for b in found["blocks"]] == [1, LAYERS - 1, 1]
    for block in found["blocks"]:
        side = block["forward"]
        assert side["launches"] < side["pointwise_fused"]["launches"] < side["eager"]["launches"]
        assert side["hbm_bytes"] < side["pointwise_fused"]["hbm_bytes"]
    left = {e["op"]: e for e in found["left"]}
    assert left["aten.scaled_dot_product_attention"]["times"] == LAYERS
    why = left["aten.scaled_dot_product_attention"]["why"]
    assert why == "torch has a kernel of its own for it"
    assert len(lowered) < 2 * LAYERS  # three blocks, with and without each choice


def test_tables_for_people_and_training(capsys, tmp_path):
    model = llama(tmp_path, 2)
    code, out, _ = run(capsys, "explain", model, "--dims", "S=24", "--arch", "sm_100a")
    assert code == 0
    assert "0 graph breaks" in out
    assert "aten.scaled_dot_product_attention" in out
    _, out, _ = run(capsys, "explain", model, "--dims", "S=24", "--backward", "--json")
    for block in json.loads(out)["blocks"]:
        assert block["backward"]["launches"] > 0


class Broken(nn.Module):
    """An MLP whose output's sum decides what comes next."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        y = x + self.down(torch.relu(self.up(self.norm(x))))
        torch._dynamo.graph_break()
        return y + self.down(torch.relu(self.up(self.norm(y))))


def broken():
    return Broken(), [torch.zeros(8, 64)]


def alone():
    return Broken()


def three():
    return 3


def test_a_function_that_gives_a_module(capsys):
    code, out, _ = run(capsys, "explain", f"{__name__}:broken", "--json")
    found = json.loads(out)
    assert (code, found["graph_breaks"], len(found["breaks"])) == (0, 1, 1)
    assert sum(b["times"] for b in found["blocks"]) == 2


@pytest.mark.parametrize(
    ("target", "dims", "message"),
    [
        ("no.such.module:model", "", "there is no such model"),
        (f"{__name__}:nothing", "", "there is no such model"),
        (f"{__name__}:alone", "", "on an example of its arguments"),
        (f"{__name__}:three", "", "gives no module"),
        ("nowhere/config.json", "", "the configuration nowhere/config.json cannot be read\n"),
        (f"{__name__}:broken", "M=3", "a model has no dim `M`"),
    ],
)
def test_mistakes(capsys, target, dims, message):
    code, out, err = run(capsys, "explain", target, "--dims", dims)
    assert (code, out) == (2, "")
    assert message in err


class Shuffled(nn.Module):
    """Two operators without a rule, of 1 and of 256 rows, and a table of which 8 rows are read."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4096, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x, ids):
        y = x + self.down(torch.relu(self.up(x)))
        y = y + self.table(ids).sort(dim=0).values.sum(0)
        return y.sort(dim=0).values.sort(dim=1).values


def shuffled():
    return Shuffled(), [torch.zeros(256, 64), torch.zeros(8, dtype=torch.int64)]


def test_what_is_left_to_torch_is_ranked_by_bytes(capsys):
    _, text, _ = run(capsys, "explain", f"{__name__}:shuffled", "--json")
    left = json.loads(text)["left"]
    assert [e["bytes"] for e in left] == sorted((e["bytes"] for e in left), reverse=True)
    assert (left[0]["op"], left[0]["times"]) == ("aten.sort", 3)
    rows, row = 256 * 64 * 2, 8 * 64 * 2  # bytes of bf16; a sort also writes indices of 8 bytes
    assert left[0]["bytes"] == 2 * (rows + 5 * rows) + (row + 5 * row)
    assert left[0]["takes"].startswith("nothing: it is one of the operators")
    table = next(e for e in left if e["op"] == "aten.embedding")
    assert table["bytes"] == 2 * row + 8 * 8
    assert all(e["takes"] for e in left)
    _, out, _ = run(capsys, "explain", f"{__name__}:shuffled")
    assert "what it would take" in out
