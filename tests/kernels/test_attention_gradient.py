"""The derivative of attention as one kernel, and what is saved for it: gradients are float64's."""

from dataclasses import replace

import pytest
import torch

import coda
from coda import masks
from coda.ir.attend import AttendGradient
from coda.ir.dims import show_shape
from coda.ir.text import parse, show
from coda.kernels.attention.gradient_kind import GRADIENT
from coda.kernels.attention.kind import ATTENTION
from coda.kernels.attention.problem import Backward, Band, Forward
from coda.lowering.algebra.roles import base
from coda.lowering.algebra.training import MEMORY, derive
from coda.lowering.compiler import is_taken
from coda.lowering.program.cost import launch_count
from coda.lowering.program.memory import temporary_bytes
from coda.measure import measure_gradients, random_inputs
from coda.runtime.simulate import device
from coda.sim import CHECK_KINDS
from tests.kernels.test_attention import LLAMA, SIZES, block_of, layer
from tests.kernels.test_kernels import ARCHS, hold, on_both
from tests.lowering.test_backward import check

T = coda.Tensor


@coda.block
def with_lse(q: T["B (G R) S d"], k: T["B G T d"], v: T["B G T e"]):
    return coda.attention(q, k, v, mask=masks.causal, return_lse=True)


def own_heads(mask=None):
    """As `block_of`, but no heads are shared, so that values may have other widths."""

    @coda.block
    def f(q: T["B H S d"], k: T["B H T d"], v: T["B H T e"]):
        return coda.attention(q, k, v, mask=mask, scale=0.125)

    return f


@coda.block
def capped_documents(
    q: T["B (G R) S d"], k: T["B G S d"], v: T["B G S d"], ids: T["B S", coda.i32]
):
    near = masks.every(masks.documents(ids), masks.sliding_window(60))
    return coda.attention(q, k, v, mask=near, score=masks.softcapped(2.0))


@coda.block
def by_positions(
    q: T["B (G R) S d"], k: T["B G S d"], v: T["B G S d"], t: coda.Constant["(G R) S"]
):
    """A table of heads and queries, and a factor that depends on the head."""
    return coda.attention(q, k, v, score=lambda s, b, h, i, j: t[h, i] * s)


@coda.block
def one_of_both(q: T["B H S d"], k: T["B H S d"]):
    return coda.attention(q, k, k, mask=masks.causal)


# Sizes of S and T, heads on heads, widths, and the mask.
CASES = {
    "causal, 2 on 1": (layer, LLAMA),
    "window, ragged, lse": (with_lse,
                            {"B": 1, "G": 2, "R": 1, "S": 129, "T": 200, "d": 64, "e": 64}),
    "few queries, 3 on 1": (block_of(masks.causal_from(120)),
                            {"B": 2, "G": 1, "R": 3, "S": 7, "T": 127, "d": 64, "e": 64}),
    "40 columns, 3 on 1": (block_of(masks.causal_from(120)),
                           {"B": 1, "G": 1, "R": 3, "S": 200, "T": 127, "d": 40, "e": 40}),
    "72 columns, 2 on 1": (block_of(masks.causal),
                           {"B": 1, "G": 1, "R": 2, "S": 130, "T": 140, "d": 72, "e": 72}),
    "rows without keys": (own_heads(lambda b, h, i, j: j <= i - 40),
                          {"B": 1, "H": 1, "S": 160, "T": 130, "d": 128, "e": 64}),
    "window, 64 and 128": (own_heads(masks.sliding_window(50)),
                           {"B": 1, "H": 1, "S": 160, "T": 160, "d": 64, "e": 128}),
    "all keys, 192 and 128": (own_heads(),
                              {"B": 1, "H": 1, "S": 130, "T": 160, "d": 192, "e": 128}),
    "all keys, 128": (block_of(),
                      {"B": 1, "G": 2, "R": 1, "S": 160, "T": 130, "d": 128, "e": 128}),
    "causal, 256, 2 on 1": (block_of(masks.causal),
                            {"B": 1, "G": 1, "R": 2, "S": 130, "T": 130, "d": 256, "e": 256}),
    "softcap, documents, 3 on 1": (capped_documents,
                                   {"B": 2, "G": 1, "R": 3, "S": 130, "d": 64}),
    "factors of rows, 2 on 2": (by_positions, {"B": 1, "G": 2, "R": 2, "S": 130, "d": 64}),
    "one of each": (block_of(masks.causal),
                    {"B": 1, "G": 1, "R": 1, "S": 1, "T": 1, "d": 64, "e": 64}),
    "keys as values": (one_of_both, {"B": 1, "H": 2, "S": 70, "d": 64}),
}  # fmt: skip
DEFAULT = ("keys as values", "sm_90a")
WIDE = "all keys, 192 and 128"
ARGUED = {(name, "sm_100a"): "exited" for name in CASES} | {(WIDE, "sm_90a"): "uninitialised"}


def checks(name, arch):
    """All checks, but for findings that docs/sim-checks.md argues."""
    return {k: "off" if k == ARGUED.get((name, arch)) else "raise" for k in CHECK_KINDS}


def arguments(block, sizes):
    """Random ones, and numbers of documents."""
    inputs = random_inputs(block.graph, sizes, 0)
    ids = torch.arange(sizes["S"], dtype=torch.int32).expand(sizes["B"], -1) // 50
    return [ids if x.dtype == torch.int32 else x for x in inputs]


@pytest.mark.parametrize(("name", "arch"), on_both(CASES, DEFAULT))
def test_kernels(name, arch):
    block, sizes = CASES[name]
    kinds = [k.kind for p in block.lower_training(arch, sizes) for k in p.kernels]
    assert ATTENTION in kinds
    assert GRADIENT in kinds
    inputs = arguments(block, sizes)
    with device(arch, checks=checks(name, arch)) as gpu:
        for _ in range(2):  # the second call replays the first
            hold(measure_gradients(block, block.graph, inputs, "sim", dims=sizes), spread=1.0)
        assert not gpu.report().findings


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    """Of Programs in float64, and rounded where kernels round."""
    block, sizes = CASES[name]
    inputs = arguments(block, sizes)
    graph = replace(block.graph, constants=frozenset())  # of which autograd takes gradients, too
    for memory in MEMORY if block is layer else ["balanced"]:
        check(graph, [x.double() if x.is_floating_point() else x for x in inputs], sizes, memory)
    hold(measure_gradients(block, block.graph, inputs, "reference", dims=sizes), spread=1.0)


def test_a_layer_saves_no_scores():
    """It saves q, k and v in the one buffer that attention reads, o, and numbers of rows."""
    sizes = LLAMA | {"B": 1, "S": 16384}
    forward, backward = layer.lower_training("sm_90a", sizes)
    assert [k.kind.name for k in forward.kernels] == ["rows", "gemm", "attention", "gemm"]
    assert [k.kind.name for k in backward.kernels] == [
        "gemm", "attention_gradient", "rows", "rows", "gemm", "gemm", "gemm", "rows",
    ]  # fmt: skip
    assert launch_count(backward) == 12
    scores = sizes["S"] ** 2
    for program in (forward, backward):
        assert "S" not in program.fixed
        assert max(b.nbytes(sizes) for b in program.buffers.values()) < scores / 8
        assert temporary_bytes(program) < scores / 2
    training = derive(layer.graph, sizes, takes=is_taken)
    saved = [i for i in training.backward.inputs if i.name in training.saved]
    assert [(show_shape(i.shape), i.dtype.name) for i in saved] == [
        ("[B, S, 1]", "f32"),
        ("[B, S, G*R, d]", "bf16"),
        ("[B, S, G, d]", "bf16"),
        ("[B, S, G*d]", "bf16"),
        ("[B, S, G*R, d]", "bf16"),
        ("[B, G*R, S, 1]", "f32"),
    ]
    stored = [base(dict(forward.outputs)[name]) for name in training.saved]
    assert len({forward.places[node].buffer for node in stored}) == 4


@pytest.mark.parametrize("memory", MEMORY)
def test_no_scores_in_any_memory_mode(memory):
    sizes = LLAMA | {"B": 1, "S": 4096}
    forward, backward = layer.lower_training("sm_90a", sizes, memory=memory)
    kinds = [k.kind for k in (*forward.kernels, *backward.kernels)]
    assert kinds.count(GRADIENT) == 1
    assert kinds.count(ATTENTION) == (2 if memory == "min" else 1)


def test_a_gradient_that_is_not_wanted_has_no_buffer():
    block, sizes = block_of(masks.causal), SIZES | {"e": 16}
    _, backward = block.lower_training("sm_90a", sizes, wanted=["k"])
    (kernel,) = backward.kernels
    assert [p.part for p in kernel.mainloop.parts] == ["dk"]
    assert set(backward.buffers) >= set(kernel.writes())
    inputs = random_inputs(block.graph, sizes, 0)
    found = measure_gradients(block, block.graph, inputs, "reference", dims=sizes, wanted=["k"])
    hold(found, spread=1.0)


def test_the_text_of_a_derivative_is_read_back():
    training = derive(with_lse.graph, SIZES | {"e": 16}, takes=is_taken)
    for graph in (training.forward, training.backward):
        again = parse(show(graph))
        assert again.roots == graph.roots
    node = training.backward.roots[0]
    assert isinstance(node, AttendGradient)
    assert node.given[0] is not None


@coda.block
def with_bias(q: T["B (G R) S d"], k: T["B G T d"], v: T["B G T e"], bias: T["(G R)"]):
    return coda.attention(q, k, v, score=lambda s, b, h, i, j: s * bias[h])


REFUSED = {
    "other widths of values": (block_of(), SIZES),
    "gradients of captured tensors": (with_bias, SIZES | {"e": 16}),
}


def test_captured_tensors_without_a_gradient_are_read():
    sizes = SIZES | {"e": 16}
    kinds = [
        [
            k.kind
            for p in with_bias.lower_training("sm_90a", sizes, wanted=wanted)
            for k in p.kernels
        ]
        for wanted in (["q", "k", "v"], ["q", "bias"])
    ]
    assert [GRADIENT in found for found in kinds] == [True, False]


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_differentiates_is_as_before(name):
    block, sizes = REFUSED[name]
    kinds = [k.kind for p in block.lower_training("sm_90a", sizes) for k in p.kernels]
    assert GRADIENT not in kinds
    assert ATTENTION not in kinds


def tile(width, width_v, **options):
    return Backward(Forward("", False, "bf16", width, width_v, **options)).tile


def test_tiles_have_whole_passes_of_the_launches_around_them():
    """A launch before the main one has passes of 32 or 64 rows: 80 rows end within one."""
    for widths in ((128, 128), (128, 64), (64, 128), (104, 96)):
        for band in (Band(), Band(upper=True, diagonal=True)):
            assert tile(*widths, band=band).rows == 64
    assert (tile(64, 64).rows, tile(256, 256).columns, tile(192, 128).columns) == (128, 48, 96)
    assert [Backward(Forward("", t, "bf16", 72, 72)).multiple for t in (False, True)] == [16, 32]
    assert tile(64, 64, scores="def score(…): …").rows == 64  # 128 rows take a stack
    one = Backward(Forward("", False, "bf16", 96, 96, 2))
    assert one.scratch(3, 2, (100, 130)) == {
        "delta": (3, 4, 128), "lse_log2": (3, 4, 128),
        "dq": (3, 4, 128 * 96), "dk": (3, 2, 256 * 96), "dv": (3, 2, 256 * 96),
    }  # fmt: skip
    pairs = Backward(Forward("", True, "bf16", 128, 128, 2)).scratch(1, 1, (1, 300))
    assert pairs["dk"] == (1, 1, 512 * 128)


@coda.block
def by_hand(q: T["B H S d"], k: T["B H T d"], v: T["B H T e"], bias: coda.Constant["S T"]):
    return coda.softmax(q @ k.mT * 0.125 + bias) @ v


@pytest.mark.parametrize(
    "backend", ["reference", *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHS)]
)
def test_a_row_without_keys_makes_gradients_nan_as_in_torch(backend):
    sizes = {"B": 1, "H": 2, "S": 40, "T": 70, "d": 64, "e": 64}
    *others, bias = random_inputs(by_hand.graph, sizes)
    bias[3] = float("-inf")
    kinds = [k.kind for p in by_hand.lower_training("sm_90a", sizes) for k in p.kernels]
    assert GRADIENT in kinds
    arch = backend if backend in ARCHS else "sm_90a"
    ours, theirs = ([x.clone().requires_grad_() for x in others] for _ in range(2))
    with device(arch, checks="off"):  # findings are those of other cases
        where = "sim" if backend in ARCHS else backend
        y = by_hand(*ours, bias, backend=where, arch=arch)
        y[:, 1].float().sum().backward()
    q, k, v = theirs
    z = (q @ k.mT * 0.125 + bias).softmax(-1) @ v
    z[:, 1].float().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad.isnan(), b.grad.isnan())
        assert b.grad.isnan().any()
