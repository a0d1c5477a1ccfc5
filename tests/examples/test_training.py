"""The small Llama of the examples learns as torch's own does."""

import runpy
from itertools import islice
from pathlib import Path

import pytest
import torch

from coda.runtime.simulate import device

ROOT = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(ROOT / "train_llama.py"), run_name="example")


def losses(example, model, steps, bf16, **sizes):
    torch.manual_seed(0)
    data = example["batches"](steps)
    return torch.tensor(list(example["train"](example[model](**sizes), data, bf16)))


def curves(example, steps, bf16):
    return (losses(example, m, steps, bf16) for m in ("Llama", "TorchLlama"))


LONG = pytest.mark.slow


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=LONG)])
def test_losses_in_float32(example, steps):
    mine, theirs = curves(example, steps, False)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)
    assert theirs[-1] < theirs[0] / (1.5 if steps == 20 else 5)


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=LONG)])
def test_losses_in_bf16(example, steps):
    """Means of ten steps: single ones differ by the noise of bf16, as do two runs of torch's."""
    mine, theirs = (c.reshape(-1, 10).mean(1) for c in curves(example, steps, True))
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_losses_in_the_simulator(example, arch):
    sizes = {"dim": 64, "hidden": 96, "layers": 1}

    def run():
        torch.manual_seed(0)
        data = example["batches"](3, batch=2, length=24)
        return list(islice(example["train"](example["Llama"](**sizes), data, True), 3))

    expected = run()
    with device(arch, checks="raise") as gpu:
        found = run()
        assert not gpu.report().findings
    assert found == pytest.approx(expected, rel=5e-3)
    assert expected[2] < expected[0]
