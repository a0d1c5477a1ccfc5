"""Which weights are read as they lie, which are copied, and why."""

import runpy
from pathlib import Path

import pytest
import torch

import coda
from coda.ir.graph import Concat
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.weights import halves, siblings, weight_reads
from coda.lowering.program.access import Tile
from coda.runtime.prepare import one_below_another

T = coda.Tensor
ARCHS = ("sm_90a", "sm_100a")
ROOT = Path(__file__).parents[2] / "examples"
LLAMA = {"M": 8192, "D": 4096, "F": 14336, "H": 32, "G": 8, "d": 128}
GATED, TURNED = ("w_gate", "w_up"), ("w_q", "w_k", "w_v")


@pytest.fixture(scope="module")
def llama():
    return runpy.run_path(str(ROOT / "llama_layer.py"))["layer"]


def copied_bytes(program, apart=False):
    """Bytes of copies of weights that a program keeps; with `apart`, if no weights lie together."""
    reads = weight_reads(program)
    return sum(r.nbytes for r in reads if r.why or (apart and len(r.together) > 1))


def names(program):
    return {tuple(i.name for i in group) for group in siblings(program)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("M", [1, 8192, 65536])
def test_a_llama_layer_copies_no_weight(llama, M, arch):
    program = llama.lower(arch, LLAMA | {"M": M})
    assert copied_bytes(program) == 0
    assert names(program) == {GATED, TURNED}
    matrices = (2 * LLAMA["F"] + (LLAMA["H"] + 2 * LLAMA["G"]) * LLAMA["d"]) * LLAMA["D"]
    assert copied_bytes(program, apart=True) == 2 * matrices


def test_nor_does_its_training(llama):
    for program in llama.lower_training("sm_90a", LLAMA):
        assert copied_bytes(program) == 0
        assert names(program) == {GATED, TURNED}
        for node in program.prepared.values():
            assert isinstance(node, Concat) or node.rank < 2


def test_what_is_told_of_training_says_how_weights_are_read(llama):
    told = str(llama.explain_training(arch="sm_90a", **LLAMA))
    assert told.count("reads w_gate, w_up (234.9 MB) in place if they share a buffer") == 2
    assert "from a copy" not in told


def test_a_gain_that_goes_into_the_weight_is_a_copy_that_counts(llama):
    program = llama.lower("sm_90a", LLAMA, frozen=True)
    copied = [r for r in weight_reads(program) if r.why]
    assert [r.why for r in copied] == [
        "it is computed of w_gate, w_norm1, w_up",
        "it is computed of w_q, w_norm2, w_k, w_v",
    ]
    assert copied_bytes(program) == sum(r.nbytes for r in copied) > 250e6
    told = coda.Block.explain(llama, arch="sm_90a", frozen=True, **LLAMA)
    assert "from a copy: it is computed of w_gate, w_norm1, w_up" in " ".join(str(told).split())
    assert [w["copied"] for w in told.json()["weights"]].count(True) == 2


def test_explain_tells_which_weights_are_read_as_one(llama):
    told = llama.explain(arch="sm_90a", **LLAMA)
    assert "reads w_gate, w_up (234.9 MB) in place if they share a buffer" in str(told)
    (one,) = [w for w in told.json()["weights"] if w["weights"] == list(GATED)]
    assert one["together"] == list(GATED)
    assert not one["copied"]


@coda.block
def turned(x: T["M D"], w_q: T["D (H d)"], w_k: T["D (H d)"], cos: T["M d/2"], sin: T["M d/2"]):
    q = coda.rope((x @ w_q).reshape("M (H d) -> M H d"), cos, sin)
    return q, x @ w_k


@coda.block
def one_turned(x: T["M D"], w_q: T["D (H d)"], cos: T["M d/2"], sin: T["M d/2"]):
    return coda.rope((x @ w_q).reshape("M (H d) -> M H d"), cos, sin)


@coda.block
def plain(x: T["M D"], w: T["N D"]):
    return coda.gelu(x @ w.T)


@pytest.mark.parametrize(
    ("block", "sizes", "why"),
    [
        (
            turned,
            {"H": 4, "d": 64},
            "siblings that are stored transposed are contiguous along columns",
        ),
        (one_turned, {"H": 4, "d": 64}, "its rows are read in pairs, and it is stored transposed"),
        (plain, {"N": 256, "D": 100}, "its rows are padded to multiples of 16 bytes"),
        (plain, {"N": 256}, ""),
    ],
)
def test_why_there_is_a_copy(block, sizes, why):
    program = block.lower("sm_90a", {"M": 512, "D": 256} | sizes)
    assert [r.why for r in weight_reads(program)] == [why]
    assert [halves(program, k) for k in gemms(program)] == [0]


def test_matrices_one_below_another_are_one():
    whole = torch.arange(48.0).reshape(8, 6)
    parts = whole.split([3, 4, 1])
    assert torch.equal(one_below_another(parts), whole)
    assert one_below_another(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(one_below_another(parts[1:]), whole[3:])
    wide = torch.zeros(4, 12)
    assert one_below_another([wide[:2, :6], wide[2:, :6]]).stride() == (12, 1)


@pytest.mark.parametrize(
    "parts",
    [
        lambda w: (w[3:], w[:3]),
        lambda w: (w[:3], w[4:]),
        lambda w: (w[:3], w[3:].clone()),
        lambda w: (w[:3], w[3:, :5]),
        lambda w: (w[:3], w[3:].view(torch.int32)),
        lambda w: (w[:4:2], w[4:]),
        lambda w: (w[:3], w[3:3], w[3:]),
        lambda w: (),
    ],
)
def test_others_are_not(parts):
    assert one_below_another(parts(torch.zeros(8, 6))) is None


def test_stacked_weights_that_are_also_read_elementwise_keep_their_dtype():
    """Operands of contractions are prepacked as they are, and not in float32."""
    block = runpy.run_path(str(ROOT / "gpt2_layer.py"))["starcoder2_layer"]
    sizes = {"M": 128, "D": 256, "F": 512, "H": 4, "G": 2, "d": 64}
    wanted = [i.name for i in block.graph.inputs if i.name not in ("cos", "sin")]
    _, program = block.lower_training("sm_90a", sizes, wanted=wanted)
    stacked = {
        n for n, node in program.prepared.items() if isinstance(node, Concat) and node.rank == 2
    }
    found = [
        o
        for k in program.kernels
        for o in k.body.epilogue.operands
        if o.name in stacked and isinstance(o.access, Tile)
    ]
    assert found
    assert all(o.dtype == program.buffers[o.name].dtype for o in found)
