"""The number of rows is told by the call: one Program, and its kernels, serve any of them."""

import importlib
import tracemalloc

import pytest
import torch

import coda
from coda.ir.evaluate import evaluate
from coda.kernels.rowwise.kind import ROWWISE
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.algebra.policy import DEFAULT_POLICY
from coda.lowering.algebra.training import MEMORY, derive
from coda.lowering.compiler import lower
from coda.runtime.reference import run_reference
from coda.runtime.simulate import run_simulated

T = coda.Tensor
SIZES = {"B": 2, "S": 5, "M": 16, "D": 32, "F": 48, "V": 40, "N": 24, "E": 8, "H": 2, "d": 16}
ROWS = [{"M": m, "B": b, "S": s} for m, b, s in ((1, 1, 1), (7, 3, 4), (130, 5, 26), (257, 1, 257))]
LARGE = {"B": 4, "S": 2048, "M": 8192, "D": 4096, "F": 14336, "V": 32000, "N": 8192}
LARGE |= {"E": 64, "H": 32, "d": 128}
BLOCKS = []


def case(fn):
    BLOCKS.append(coda.block(fn))
    return BLOCKS[-1]


@case
def mean_loss(x: T["M D"], w: T["V D"], t: T["M", coda.i64]):
    return coda.cross_entropy((x @ w.T).cast(coda.f32), t)


@case
def smoothed_loss(x: T["B S D"], w: T["V D"], t: T["B S", coda.i64]):
    return coda.cross_entropy(x @ w.T, t, label_smoothing=0.1, z_loss=1e-3)


@case
def sum_loss(x: T["M D"], w: T["V D"], t: T["M", coda.i64]):
    return coda.cross_entropy(x @ w.T, t, reduction="sum")


@case
def loss_of_logits(x: T["M V"], t: T["M", coda.i64]):
    return coda.cross_entropy(x, t)


@case
def embedding(table: T["V D"], token: T["B S", coda.i64], w: T["D"]):
    return coda.rms_norm(coda.take(table, token), w)


@case
def dyt(x: T["M D"], alpha: T["1"], gain: T["D"], shift: T["D"], w: T["F D"]):
    return (coda.tanh(alpha * x) * gain + shift) @ w.T


@case
def xielu(x: T["M D"], a: T["1"], c: T["1"], w1: T["F D"], w2: T["D F"]):
    h = x @ w1.T
    below = a * (coda.exp(coda.minimum(h, 0.0)) - 1 - h)
    return coda.where(h > 0, a * h * h + c * h, below) @ w2.T


@case
def temperature(x: T["M D"], w: T["V D"], tau: T["1"], t: T["M", coda.i64]):
    return coda.cross_entropy(((x @ w.T) * coda.exp(tau)).cast(coda.f32), t)


@case
def pairs_of_rows(x: T["N D"], y: T["N D"], scale: T["1"], shift: T["1"], label: T["N N"]):
    z = (x @ y.T) * coda.exp(scale) + shift
    return coda.sum(coda.sum(coda.log(1 + coda.exp(-label * z)), axis=-1), axis=-1)


@case
def mean_over_everything(x: T["M D"], w: T["F D"], y: T["M F"]):
    return coda.mean(coda.square(x @ w.T - y).reshape("M F -> (M F)"))


@case
def everything_of_arguments(x: T["M D"], y: T["M D"]):
    return coda.mean(coda.square(x - y).reshape("M D -> (M D)"))


@case
def frobenius(x: T["M D"], w: T["F D"]):
    return coda.sqrt(coda.sum(coda.square(x @ w.T).reshape("M F -> (M F)")))


@case
def scaled_by_the_largest(x: T["M D"], w: T["F D"]):
    y = x @ w.T
    return y / coda.max(abs(y).reshape("M F -> (M F)"), keepdims=True)


@case
def logsumexp_of_everything(x: T["B S D"], w: T["F D"]):
    return coda.logsumexp((x @ w.T).reshape("B S F -> (B S F)"))


@case
def variance_of_everything(x: T["M D"], w: T["F D"]):
    y = (x @ w.T).reshape("M F -> (M F)")
    return coda.mean(coda.square(y - coda.mean(y, keepdims=True)))


@case
def statistics_of_rows(x: T["M D"], w: T["D"]):
    v = coda.sum(x * w, axis=-1)
    spread = coda.mean(coda.square(v - coda.mean(v, keepdims=True)))
    return coda.max(v), coda.min(v), coda.logsumexp(v), coda.softmax(v), spread


@case
def means_over_rows(x: T["M D"], w: T["F D"]):
    return coda.mean(x @ w.T, axis=0)


@case
def a_sequence_each(x: T["B S D"], w: T["V D"], t: T["B S", coda.i64]):
    return coda.sum(coda.pick(coda.log_softmax(x @ w.T), t)[..., 0], axis=-1)


@case
def preference(x: T["B S D"], r: T["B"], w: T["V D"], t: T["B S", coda.i64], beta: T["1"]):
    total = coda.sum(coda.pick(coda.log_softmax(x @ w.T), t)[..., 0], axis=-1)
    return coda.mean(coda.log(1 + coda.exp(-beta * (total - r))))


@case
def sizes_as_numbers(x: T["M D"], w: T["D D"]):
    return (x @ w.T) / coda.sqrt(x.shape[-1]) + coda.rsqrt(2 * x.shape[0])


@case
def balance(x: T["M D"], w: T["E D"]):
    share = coda.mean(coda.softmax(x @ w.T), axis=0)
    return coda.sum(share * share) * w.shape[0]


@case
def batch_norm(x: T["M D"], g: T["D"], w: T["F D"]):
    away = x - coda.mean(x, axis=0, keepdims=True)
    spread = coda.mean(coda.square(away), axis=0, keepdims=True)
    return (away * coda.rsqrt(spread + 1e-5) * g) @ w.T


@case
def heads_scaled(x: T["M H d"], s: T["1"], g: T["d"]):
    return coda.rms_norm(x * s, g)


def sizes_of(graph, rows=None):
    return {s: (rows or {}).get(s, SIZES[s]) for s in graph.symbols}


def arguments(graph, sizes, dtype=torch.float64):
    """Small numbers, and indices that every table has."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for node in graph.inputs:
        shape = [d.size(sizes) for d in node.shape]
        if node.dtype.kind == "int":
            found.append(torch.randint(0, 8, shape, generator=generator))
        else:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) / 2
            found.append(values.to(dtype or node.dtype.torch))
    return found


def programs(block, memory="balanced", arch="sm_90a"):
    """The forward and the backward, lowered once."""
    sizes = sizes_of(block.graph)
    training = derive(block.graph, sizes, memory=memory)
    for graph, policy in (
        (training.forward, DEFAULT_POLICY),
        (training.backward, training.policy()),
    ):
        yield lower(graph, {s: sizes[s] for s in graph.symbols}, arch, policy=policy)


def serves(program, rows):
    """Whether a Program says in float64 what its graph means for this number of rows."""
    sizes = sizes_of(program.graph, rows)
    inputs = arguments(program.graph, sizes)
    known = dict(zip(program.graph.inputs, inputs, strict=True))
    exact = evaluate(program.graph.roots, known, sizes)
    found = run_reference(program, inputs, exact=True, sizes=sizes)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
def test_one_program_serves_any_number_of_rows(block):
    for program in programs(block):
        assert not program.fixed & {"M", "B", "S"}
        written = [name for kernel in program.kernels for name in kernel.writes()]
        assert len(written) == len(set(written)), "a kernel has each result once"
        for rows in ({}, *ROWS):
            serves(program, rows)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
def test_so_do_those_that_trade_memory(block, memory):
    for program in programs(block, memory, "sm_100a"):
        assert not program.fixed & {"M", "B", "S"}
        for rows in ({}, *ROWS):
            serves(program, rows)


NO_ROWS = [mean_loss, dyt, everything_of_arguments, a_sequence_each, sizes_as_numbers]


@pytest.mark.parametrize("block", NO_ROWS, ids=lambda b: b.__name__)
def test_no_rows_are_a_number_of_rows(block):
    """A mean over none is NaN, and a sum 0, as in torch."""
    for program in programs(block):
        serves(program, {"M": 0, "S": 0})


SCALARS = [dyt, xielu, temperature, frobenius, mean_over_everything, logsumexp_of_everything]
SCALARS += [everything_of_arguments, statistics_of_rows]


@pytest.mark.parametrize("block", SCALARS, ids=lambda b: b.__name__)
def test_sums_over_everything_are_kernels(block):
    """Partials for each row, and a fold of what rows have: nothing is left to torch."""
    for program in programs(block):
        assert not any(k.kind is TORCH for k in program.kernels)
        for kernel in program.kernels:
            narrow = kernel.kind is ROWWISE and kernel.mainloop.width <= SIZES["F"]
            assert narrow or kernel.kind is not ROWWISE


def peak_of_lowering(block, arch):
    """The most memory that lowering a forward and a backward has at once, in bytes."""
    sizes = {s: LARGE[s] for s in block.graph.symbols}
    tracemalloc.start()
    try:
        block.lower_training(arch, sizes)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "block", [dyt, pairs_of_rows, scaled_by_the_largest], ids=lambda b: b.__name__
)
def test_lowering_takes_memory_for_columns_alone(block):
    """64 MB hold arrays of V columns many times over, and none of M·F elements (0.9 GB each)."""
    assert peak_of_lowering(block, "sm_90a") < 64e6


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
def test_every_lowering_takes_memory_for_columns_alone(block, arch):
    assert peak_of_lowering(block, arch) < 64e6


def test_kernels_have_no_number_of_rows():
    """The text of a pass over rows is the same for whatever number the Program was lowered for."""
    for block in (mean_loss, dyt, a_sequence_each):
        few, many = (
            block.lower_training("sm_90a", sizes_of(block.graph, rows))
            for rows in ({"M": 16, "S": 5}, {"M": 4096, "S": 1024})
        )
        for a, b in zip(few, many, strict=True):
            assert a.fixed == b.fixed
            assert [k.mainloop.width for k in a.kernels if k.kind is ROWWISE] == [
                k.mainloop.width for k in b.kernels if k.kind is ROWWISE
            ]
            assert str(a).count("rows M") == str(b).count("rows M")


def test_a_size_that_counts_rows_is_an_operand():
    (forward, _) = programs(sizes_as_numbers)
    assert len(forward.kernels) == 1
    assert "scalar f32 = 2*M" in str(forward)


def test_a_matrix_of_pairs_has_its_rows_built_in():
    """N is the number of columns of the product too."""
    for program in programs(pairs_of_rows):
        assert "N" in program.fixed


def test_calls_with_other_numbers_of_rows_lower_nothing(monkeypatch):
    lowered = []
    face = importlib.import_module("coda.block")
    monkeypatch.setattr(face, "lower", lambda *a, **k: lowered.append(a) or lower(*a, **k))
    block = coda.block(mean_loss.fn)
    w = torch.randn(40, 32, requires_grad=True)
    for rows in (5, 9, 33):
        x = torch.randn(rows, 32, requires_grad=True)
        t = torch.randint(0, 40, (rows,))
        loss = block(x.bfloat16(), w.bfloat16(), t, backend="reference")
        loss.backward()
        expected = torch.nn.functional.cross_entropy(x @ w.T, t)
        torch.testing.assert_close(loss.float(), expected.detach(), rtol=2e-2, atol=2e-2)
        assert len(lowered) == 2, "a forward and a backward"


@case
def folds(x: T["B S D"], w: T["D"]):
    v = coda.sum(x * w, axis=-1)
    flat = v.reshape("B S -> (B S)")
    away = flat - coda.mean(flat, keepdims=True)
    return coda.mean(v), coda.max(flat), coda.min(v), coda.logsumexp(flat), coda.mean(away * away)


def simulated(program, rows):
    """Hold kernels in bf16 against float64, by the largest number of each result."""
    sizes = sizes_of(program.graph, rows)
    inputs = arguments(program.graph, sizes, None)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = evaluate(program.graph.roots, dict(zip(program.graph.inputs, wide, strict=True)), sizes)
    for a, b in zip(run_simulated(program, inputs, sizes), exact, strict=True):
        numbers = b[b.isfinite()].abs()
        scale = float(numbers.max()) if numbers.numel() else 1.0
        torch.testing.assert_close(
            a.double(), b.reshape(a.shape), rtol=2e-2, atol=2e-2 * scale, equal_nan=True
        )


COUNTS = [{"B": 1, "S": 1}, {"B": 3, "S": 4}, {"B": 5, "S": 257}, {"B": 2, "S": 0}]


def test_kernels_that_fold_rows():
    """Of one and of many rows each, by one compiled kernel for any number of them."""
    (forward, _) = programs(folds)
    for rows in COUNTS[:3]:
        simulated(forward, rows)


KERNELS = [mean_loss, dyt, xielu, scaled_by_the_largest, variance_of_everything, a_sequence_each]
KERNELS += [everything_of_arguments, sizes_as_numbers, statistics_of_rows]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("block", KERNELS, ids=lambda b: b.__name__)
def test_kernels_for_any_number_of_rows(block, arch):
    for program in programs(block, arch=arch):
        for rows in (*ROWS, {"M": 0, "S": 0}):
            simulated(program, rows)
