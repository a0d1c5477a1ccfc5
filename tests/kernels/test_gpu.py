"""The same kernels on a real GPU: every example, forward and backward, and hostile sizes.

Sizes are larger than the simulator's, so that persistent kernels take several tiles each.
"""

import pytest
import torch

import coda
from coda.measure import measure, measure_gradients, random_inputs, relative
from tests.kernels.test_kernels import EXAMPLES, example, functions, hold, normed, rms, softmaxed

pytestmark = pytest.mark.gpu
LARGE = {"M": 1111, "D": 1024, "F": 1408, "H": 16, "G": 4, "d": 64, "V": 12800}


def on_gpu(block, sizes, seed=0):
    return [x.cuda() for x in random_inputs(block.graph, sizes, seed)]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, large):
    block, sizes = example(name)
    sizes = {s: LARGE[s] for s in sizes} if large else sizes
    hold(measure(block, block.graph, on_gpu(block, sizes), "cuda", dims=sizes))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_of_examples(name, large):
    block, sizes = example(name)
    sizes = {s: LARGE[s] for s in sizes} if large else sizes
    report = measure_gradients(block, block.graph, on_gpu(block, sizes), "cuda", dims=sizes)
    hold(report, spread=1.0)


@pytest.mark.parametrize(
    ("block", "sizes"),
    [
        (rms, {"M": 1, "D": 64, "F": 96}),
        (rms, {"M": 1031, "D": 72, "F": 997}),
        (normed, {"M": 130, "D": 264, "F": 40}),
        (softmaxed, {"M": 127, "D": 40, "F": 331}),
        (functions, {"M": 3, "D": 40, "F": 31}),
        (functions, {"M": 1031, "D": 40, "F": 1000}),
    ],
)
def test_ragged_and_prime_sizes_and_every_function(block, sizes):
    hold(measure(block, block.graph, on_gpu(block, sizes), "cuda", dims=sizes))


def test_calls_of_other_sizes_and_streams_replay():
    sizes = {"M": 300, "D": 256, "F": 320}
    with torch.no_grad():
        for rows in (300, 17, 0, 300, 1):
            inputs = on_gpu(rms, {**sizes, "M": rows}, seed=rows)
            expected = rms(*inputs, backend="reference")
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                found = rms(*inputs, backend="cuda")
                torch.cuda.current_stream().synchronize()
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_cuda_graph_captures_a_warm_call():
    sizes = {"M": 300, "D": 256, "F": 320}
    inputs = on_gpu(rms, sizes)
    with torch.no_grad():
        expected = rms(*inputs, backend="cuda").clone()
        graph = torch.cuda.CUDAGraph()
        rms(*inputs, backend="cuda")
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = rms(*inputs, backend="cuda")
        found.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_gradients_are_added_in_place_by_replays():
    x, *weights = on_gpu(rms, {"M": 300, "D": 256, "F": 320})
    mine, theirs = ([w.clone().requires_grad_() for w in weights] for _ in range(2))
    mine[1].main_grad = torch.zeros(weights[1].shape, device="cuda")
    for step in range(4):
        d = torch.randn_like(x)
        with coda.accumulate_gradients():
            rms(x, *mine, backend="cuda").backward(d)
        rms(x, *theirs, backend="reference").backward(d)
        if step == 1:
            held = mine[2].grad
    assert mine[1].grad is None
    assert mine[2].grad is held
    for found, w in zip([mine[0].grad, mine[1].main_grad, held], theirs, strict=True):
        assert relative(found, w.grad) < 2e-2


def test_weights_in_one_buffer_are_read_in_place_by_warm_calls():
    block, sizes = example("llama_mlp")
    x, norm, gate, up, down = on_gpu(block, sizes)
    gate, up = (torch.nn.Parameter(w.clone()) for w in (gate, up))
    coda.share_weights(gate, up)
    with torch.no_grad():
        for _ in range(3):
            found = block(x, norm, gate, up, down, backend="cuda")
            expected = block(x, norm, gate, up, down, backend="reference")
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
            up.mul_(1.25)
