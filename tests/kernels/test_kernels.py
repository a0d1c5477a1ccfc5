"""Generated kernels, executed from their PTX on both archs: examples, hostile sizes and values.

The simulated device stops at the first finding of its checks, so each test asserts that there is
none. Errors are held against float64 beside torch's own, op by op in the storage types.
"""

import math
import runpy
from pathlib import Path

import pytest
import torch

import coda
from coda import sim
from coda.errors import ArchError
from coda.ir.evaluate import evaluate
from coda.measure import measure, measure_gradients, random_inputs, relative
from coda.runtime.simulate import device

ROOT = Path(__file__).parents[2] / "examples"
ARCHS = ("sm_90a", "sm_100a")
T = coda.Tensor
# Several tiles in every direction and a ragged last one, and rows of RoPE tables that fit a tile.
LAYER = {"M": 300, "D": 256, "F": 320, "H": 4, "G": 2, "d": 64}
EXAMPLES = {
    "llama_mlp": ("llama_mlp", "mlp", {"M": 300, "D": 256, "F": 320}),
    "llama_layer": ("llama_layer", "layer", LAYER),
    "qwen3_layer": ("qwen3_layer", "layer", LAYER),
    "gpt2_layer": ("gpt2_layer", "layer", {"M": 300, "D": 256, "F": 320}),
    "starcoder2": ("gpt2_layer", "starcoder2_layer", LAYER),
    "neox_parallel": ("neox_parallel", "layer", {"M": 300, "D": 256, "F": 320}),
    "gemma2_layer": ("gemma2_layer", "layer", LAYER),
    "unnamed_norm": ("unnamed_norm", "mlp", {"M": 300, "D": 256, "F": 320}),
    "loss": ("lm_head_loss", "loss", {"M": 200, "D": 128, "V": 1000}),
    "logits_and_loss": ("lm_head_loss", "logits_and_loss", {"M": 200, "D": 128, "V": 1000}),
}
QUICK = {"llama_mlp"}


def on_both(names, quick):
    """(name, arch) of all cases on both archs; all but `quick` are for the long run."""
    pairs = [(name, arch) for name in names for arch in ARCHS]
    return [pytest.param(*p, marks=() if p == quick else pytest.mark.slow) for p in pairs]


def example(name):
    file, block, sizes = EXAMPLES[name]
    return runpy.run_path(str(ROOT / f"{file}.py"))[block], sizes


def hold(report, spread=0.0):
    """No output is further from float64 than torch's.

    `spread` is 1 where an error may be that of few elements: of n, it is known to 1/√n.
    """
    assert report.errors
    for error in report.errors:
        slack = 1.05 + spread * math.prod(error.shape) ** -0.5
        assert error.coda <= error.torch * slack + 1e-7, error


def hold_against_float64(block, inputs, sizes):
    hold(measure(block, block.graph, inputs, "sim", dims=sizes))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXAMPLES]
)
def test_examples_are_no_further_from_float64_than_torch(name, arch):
    block, sizes = example(name)
    inputs = random_inputs(block.graph, sizes)
    with device(arch, checks="raise") as gpu:
        hold_against_float64(block, inputs, sizes)
        assert len(gpu.report().launches) == len(block.lower(arch, sizes).kernels)
        assert not gpu.report().findings


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in EXAMPLES])
def test_gradients_of_examples_are_no_further_from_float64_than_torch_s(name, arch):
    block, sizes = example(name)
    inputs = random_inputs(block.graph, sizes)
    with device(arch, checks="raise") as gpu:
        hold(measure_gradients(block, block.graph, inputs, "sim", dims=sizes), spread=1.0)
        assert not gpu.report().findings


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("schedule", ["late", "random"])
def test_a_layer_at_other_schedules(schedule, arch):
    block, sizes = example("llama_layer")
    inputs = random_inputs(block.graph, sizes)
    with device(arch, checks="raise", schedule=schedule, seed=7):
        hold_against_float64(block, inputs, sizes)


@coda.block
def rms(x: T["M D"], g: T["D"], w: T["F D"], v: T["D F"]):
    return x + coda.silu(coda.rms_norm(x, g) @ w.T) @ v.T


@coda.block
def normed(x: T["M D"], w: T["D D"], g: T["D"], b: T["D"], w2: T["F D"]):
    y = x + x @ w.T
    return {"y": y, "z": coda.layer_norm(y, g, b) @ w2.T}


@coda.block
def softmaxed(x: T["M D"], w: T["F D"]):
    logits = x @ w.T
    return {"p": coda.softmax(logits), "lse": coda.logsumexp(logits), "least": coda.min(logits)}


@coda.block
def functions(x: T["M D"], w: T["F D"], b: T["F"], y: T["M F"]):
    z = x @ w.T + b
    positive = abs(z) + 0.5
    return {
        "a": coda.tanh(z) * coda.sigmoid(z) + coda.erf(z),
        "b": coda.log(positive) + coda.sqrt(positive) - coda.rsqrt(positive) / positive,
        "c": coda.sin(z) * coda.cos(z) + coda.exp2(-positive) + positive**1.5,
        "d": coda.where(z > y, coda.maximum(z, y * 2.0), coda.minimum(z, -y)),
    }


@coda.block
def positive_part_added(x: T["M D"], w: T["F D"], y: T["M F"]):
    return x @ w.T + coda.relu(y)


def test_a_function_of_a_loaded_matrix_is_added():
    """On sm_100a quack hands out 16-bit operands as a type of their own."""
    sizes = {"M": 64, "D": 64, "F": 64}
    inputs = random_inputs(positive_part_added.graph, sizes)
    with device("sm_100a", checks="raise"):
        hold_against_float64(positive_part_added, inputs, sizes)


@coda.block
def conditions(x: T["M D"], w: T["F D"], y: T["M F"]):
    z = x @ w.T
    return z > 0, coda.silu(z), y > 0.5


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow)])
def test_conditions_are_stored(arch):
    """By a GEMM and by a pass over rows, in the first call and in a replay of it."""
    sizes = {"M": 40, "D": 64, "F": 48}
    with device(arch, checks="raise"):
        for seed in (1, 2):
            inputs = random_inputs(conditions.graph, sizes, seed)
            hold_against_float64(conditions, inputs, sizes)


@coda.block
def by_largest(x: T["M D"], w: T["F D"]):
    z = x @ w.T
    return z / coda.max(abs(z), keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("memory", ["min", "speed"])
def test_the_backward_of_a_maximum(arch, memory):
    sizes = {"M": 130, "D": 64, "F": 96}
    inputs = random_inputs(by_largest.graph, sizes)
    inputs[1][7] *= 30  # no two values are the largest of a row
    with device(arch, checks="raise"):
        report = measure_gradients(
            by_largest, by_largest.graph, inputs, "sim", dims=sizes, memory=memory
        )
        hold(report, spread=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("block", "sizes"),
    [
        (rms, {"M": 1, "D": 64, "F": 96}),
        (rms, {"M": 129, "D": 72, "F": 97}),
        (normed, {"M": 130, "D": 264, "F": 40}),
        (softmaxed, {"M": 127, "D": 40, "F": 331}),
        (functions, {"M": 127, "D": 40, "F": 136}),
        (functions, {"M": 3, "D": 40, "F": 31}),
    ],
)
def test_ragged_and_prime_sizes_and_every_function(block, sizes, arch):
    with device(arch, checks="raise"):
        hold_against_float64(block, random_inputs(block.graph, sizes), sizes)


@coda.block
def gated_heads(
    a: T["M (H d)"], g: T["M (H d)"], w_n: T["d"], w: T["D (H d)"], z: T["M H"], x: T["M D"]
):
    """Heads that are normed, gated element by element, and gated once for each head."""
    h = coda.rms_norm(a.reshape("M (H d) -> M H d"), w_n, eps=1e-5)
    h = (h * coda.sigmoid(z)[:, :, None]).reshape("M H d -> M (H d)")
    return x + (h * coda.silu(g)) @ w.T


@coda.block
def turned_heads(a: T["M (H d)"], w_n: T["d"], w: T["D (H d)"], cos: T["M d/2"], sin: T["M d/2"]):
    """Heads that are normed and rotated before a product: pairs read a head's statistic."""
    h = coda.rms_norm(a.reshape("M (H d) -> M H d"), w_n, eps=1e-5)
    return coda.rope(h, cos, sin).reshape("M H d -> M (H d)") @ w.T


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("d", [16, 64, 80])
@pytest.mark.parametrize("block", [gated_heads, turned_heads], ids=["gated", "turned"])
def test_statistics_of_heads_before_a_product(block, d, arch):
    """Also of widths that no warp takes side by side."""
    sizes = {s: {"M": 37, "H": 3, "D": 64}.get(s, d) for s in block.graph.symbols}
    with device(arch, checks="raise"):
        inputs = random_inputs(block.graph, sizes)
        hold_against_float64(block, inputs, sizes)
        report = measure_gradients(block, block.graph, inputs, "sim", dims=sizes)
        hold(report, spread=1.0)


@coda.block
def masked(x: T["M D"], w: T["F D"], keep: T["M F", coda.bool_], rows: T["M", coda.bool_]):
    y = (x @ w.T) / coda.sqrt(x.shape[-1])
    inside = ((y > 0.0) & ~(y > 1.0)) ^ (y < -1.0)
    z = coda.where(keep | inside, y, 0.0)
    return z, coda.where(rows[:, None], coda.rms_norm(z), 0.0)


@pytest.mark.parametrize("arch", ARCHS)
def test_conditions_that_are_arguments(arch):
    """A dropout's mask, in a GEMM and in a pass over rows."""
    inputs = random_inputs(masked.graph, {"M": 37, "D": 64, "F": 96})
    with device(arch):
        found = masked(*inputs)
    expected = masked(*inputs, backend="reference", arch=arch)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@coda.block
def scaled(x: T["M D"], w: T["F D"], a: T[""], b: T["1"]):
    return a * (x @ w.T) + b


def test_scalars_that_are_arguments():
    inputs = random_inputs(scaled.graph, {"M": 37, "D": 64, "F": 96})
    with device("sm_90a"):
        found = scaled(*inputs)
    expected = scaled(*inputs, backend="reference", arch="sm_90a")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow)])
def test_a_mean_far_larger_than_the_deviation(arch):
    sizes = {"M": 70, "D": 256, "F": 40}
    inputs = random_inputs(normed.graph, sizes)
    inputs[0] = (inputs[0].double() + 1e3).to(inputs[0].dtype)
    inputs[1] *= 0.0
    with device(arch, checks="raise"):
        hold_against_float64(normed, inputs, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_infinities_and_nan_go_where_torch_lets_them_go(arch):
    sizes = {"M": 5, "D": 64, "F": 300}
    x = torch.zeros(5, 64)
    x[:, 0] = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0])
    x[3, 1] = float("nan")
    w = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    w[7, 0] = float("-inf")
    w[:, 1] = 0.0
    inputs = [x.bfloat16(), w.bfloat16()]
    with device(arch, checks="raise"), torch.no_grad():
        found = softmaxed(*inputs, backend="sim")
    known = dict(zip(softmaxed.graph.inputs, inputs, strict=True))
    plain = evaluate(softmaxed.graph.roots, known, sizes, None)
    exact = evaluate(softmaxed.graph.roots, known, sizes)
    # With +inf among its values a softmax is NaN all over in torch; exp(x − logsumexp x) is 0.
    found["p"], plain[0], exact[0] = (t[[0, 1, 3, 4]] for t in (found["p"], plain[0], exact[0]))
    for name, p, e in zip(found, plain, exact, strict=True):
        assert torch.equal(found[name].isnan(), p.isnan()), name
        assert torch.equal(found[name].isinf(), p.isinf()), name
        good = p.isfinite()
        assert relative(found[name][good], e[good]) <= relative(p[good], e[good]) * 1.05, name


def test_an_empty_batch_launches_nothing():
    sizes = {"M": 0, "D": 64, "F": 96}
    with device("sm_90a", checks="raise") as gpu:
        found = rms(*random_inputs(rms.graph, sizes), backend="sim")
        assert gpu.report().launches == []
    assert found.shape == (0, 64)


def test_the_device_decides_and_the_arch_must_fit():
    sizes = {"M": 2, "D": 64}

    @coda.block
    def double(x: T["M D"]):
        return x + x

    x = torch.randn(2, 64).bfloat16()
    with device("sm_100a", checks="raise") as gpu:
        assert torch.equal(double(x), x + x)
        assert len(gpu.report().launches) == len(double.lower("sm_100a", sizes).kernels) == 1
        with pytest.raises(ArchError, match="does not run on a simulated sm_100a"):
            double(x, backend="sim", arch="sm_90a")
    assert sim.active() is None
    assert torch.equal(double(x, backend="sim"), x + x)


def test_devices_with_and_without_a_cache_follow_each_other(tmp_path):
    @coda.block
    def negative(x: T["M D"]):
        return -x

    x = torch.randn(2, 64).bfloat16()
    for cache in (None, tmp_path, None):
        with sim.device("sm_90a", checks="raise", cache=cache):
            assert torch.equal(negative(x), -x)
