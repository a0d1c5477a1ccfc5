"""Blocks as torch callables."""

import gc
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import coda
from coda.errors import ArchError, CallError, CodaError, UnsupportedError
from coda.measure import random_inputs

SIZES = {"M": 9, "D": 16, "F": 24}


@coda.block
def mlp(
    x: coda.Tensor["M D"],
    g: coda.Tensor["D"],
    w_gate: coda.Tensor["F D"],
    w_up: coda.Tensor["F D"],
    w_down: coda.Tensor["D F"],
):
    h = coda.rms_norm(x, g)
    return x + coda.swiglu(h @ w_gate.T, h @ w_up.T) @ w_down.T


@pytest.fixture
def inputs():
    return random_inputs(mlp.graph, SIZES)


def torch_mlp(x, g, w_gate, w_up, w_down):
    h = torch.nn.functional.rms_norm(x, (16,), g, 1e-6)
    return x + (torch.nn.functional.silu(h @ w_gate.T) * (h @ w_up.T)) @ w_down.T


def test_values(inputs):
    torch.testing.assert_close(mlp(*inputs), torch_mlp(*inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_the_type_of_the_arguments_is_the_type_of_the_block(inputs, dtype):
    found = mlp(*(x.to(dtype) for x in inputs))
    assert found.dtype == dtype
    expected = torch_mlp(*(x.double() for x in inputs))
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_one_program_serves_all_rows(inputs):
    mlp(*inputs)
    held = len(mlp._programs)
    for m in (1, 2, 100):
        x = torch.randn(m, 16, generator=torch.Generator().manual_seed(m)).bfloat16()
        torch.testing.assert_close(
            mlp(x, *inputs[1:]), torch_mlp(x, *inputs[1:]), rtol=2e-2, atol=2e-2
        )
    assert len(mlp._programs) == held


def test_empty_batch(inputs):
    assert mlp(inputs[0][:0], *inputs[1:]).shape == (0, 16)


def test_arguments_that_are_not_contiguous(inputs):
    x, g, w_gate, w_up, w_down = inputs
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    turned = w_gate.T.contiguous().T
    found = mlp(strided, g, turned, w_up, w_down)
    torch.testing.assert_close(found, mlp(*inputs))


def test_a_weight_changed_in_place_is_seen(inputs):
    before = mlp(*inputs)
    inputs[4].mul_(0.0)
    torch.testing.assert_close(mlp(*inputs), inputs[0])
    assert not torch.equal(before, inputs[0])


def test_gradients(inputs):
    mine = [x.double().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    mlp(*mine).square().sum().backward()
    torch_mlp(*theirs).square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_frozen_arguments_have_no_gradient(inputs):
    inputs[0].requires_grad_()
    mlp(*inputs).float().sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is None


def test_fake_tensors(inputs):
    with FakeTensorMode() as mode:
        found = mlp(*(mode.from_tensor(x) for x in inputs))
    assert (found.shape, found.dtype) == ((9, 16), torch.bfloat16)


def test_under_torch_compile(inputs):
    compiled = torch.compile(lambda *a: mlp(*a) * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), mlp(*inputs) * 2)


def test_torch_checks_the_operator(inputs):
    handle = mlp.handle
    checks = ("test_schema", "test_faketensor")
    given = (handle, inputs, [], "reference", "sm_90a", True)
    found = torch.library.opcheck(torch.ops.coda.block.default, given, test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")


TEXT = "block scaled(%x: [M, D] f32) {{ %0 = const {} f32 %1 = mul %x, %0 return out = %1 }}"


def test_a_handle_says_what_a_block_means():
    """Torch's compiler keeps code that names blocks; another process may make others first."""
    first, second, other = (coda.parse(TEXT.format(c)) for c in (2.0, 2.0, 3.0))
    handle = first.handle
    assert second.handle == handle != other.handle
    command = f"import coda; print(coda.parse({TEXT.format(2.0)!r}).handle)"
    printed = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert printed.stdout.strip() == handle
    del second
    gc.collect()
    x = torch.randn(3, 4)
    assert torch.equal(torch.compile(first, backend="aot_eager")(x), 2 * x)
    with pytest.raises(CallError, match="has not made"):
        torch.ops.coda.block("0" * 24, [x], [], "", "", True)


def test_several_outputs():
    @coda.block
    def two(x: coda.Tensor["M D"]):
        return x + 1.0, x * 2.0

    @coda.block
    def named(x: coda.Tensor["M D"]):
        return {"same": x, "double": x + x}

    x = torch.ones(2, 3)
    a, b = two(x)
    assert (a == 2).all()
    assert (b == 2).all()
    found = named(x)
    assert list(found) == ["same", "double"]
    assert found["same"].data_ptr() != x.data_ptr()


def test_sizes_that_shapes_do_not_tell():
    @coda.block
    def heads(x: coda.Tensor["M (H d)", coda.f32]):
        return coda.softmax(x.reshape("M (H d) -> M H d"))

    x = torch.randn(3, 8)
    with pytest.raises(CallError, match="cannot be determined"):
        heads(x)
    expected = torch.softmax(x.reshape(3, 2, 4), -1)
    torch.testing.assert_close(heads(x, dims={"H": 2}), expected)


def test_backends(inputs, monkeypatch):
    with pytest.raises(UnsupportedError, match="no such backend"):
        mlp(*inputs, backend="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ArchError, match="Hopper"):
            mlp(*inputs, backend="cuda")
    monkeypatch.setenv("CODA_BACKEND", "nothing")
    with pytest.raises(CodaError, match="CODA_BACKEND"):
        mlp(*inputs)
    monkeypatch.setenv("CODA_BACKEND", "reference")
    assert mlp(*inputs).shape == (9, 16)


@pytest.mark.gpu
def test_on_the_gpu(inputs):
    moved = [x.cuda() for x in inputs]
    found = mlp(*moved, backend="cuda")
    torch.testing.assert_close(found.cpu(), mlp(*inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("memory", ["balanced", "speed"])
def test_copies_of_frozen_weights_are_made_only_for_speed(memory, monkeypatch):
    taken = []
    ask = coda.Block.program_for

    def asked(*args, frozen, **options):
        taken.append(frozen)
        return ask(*args, frozen=frozen, **options)

    monkeypatch.setattr(coda.Block, "program_for", asked)
    block = coda.block(mlp.fn, memory=memory)
    inputs = random_inputs(block.graph, {"M": 7, "D": 16, "F": 24})
    found = block(*inputs)
    assert taken == [memory == "speed"]
    assert torch.allclose(found, torch_mlp(*inputs), rtol=0.05, atol=0.05)
