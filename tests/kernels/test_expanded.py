"""Expanded tensors (stride 0) as arguments of kernels and as cotangents, each along each axis."""

import pytest
import torch

import coda
from coda.kernels.tensors import aligned, is_padded
from coda.runtime.launcher import run_kernels
from coda.runtime.simulate import device
from coda.runtime.weight_cache import Memo
from tests.kernels.edges import differ, sizes_of

T = coda.Tensor
ARCHS = ("sm_90a", "sm_100a")


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 64).expand(16, 64),
        torch.zeros(16, 1).expand(16, 64),
        torch.zeros(()).expand(16, 64),
        torch.zeros(64, 1).expand(64, 16).T,
        torch.zeros(64)[None].expand(1, 64).as_strided((1, 64), (0, 1)),
    ],
    ids=["rows", "columns", "both", "transposed", "one row"],
)
def test_tma_reads_a_copy_of_what_is_expanded(x):
    x = x.bfloat16().as_strided(x.shape, x.stride())
    for transposed in (False, True):
        y = aligned(x, transposed=transposed)
        assert y is not x
        assert 0 not in y.stride()
        assert torch.equal(x, y)


def test_rows_in_one_memory_are_not_written_over():
    one = torch.zeros(1, 64).bfloat16()
    assert is_padded(one.expand(1, 64))
    assert is_padded(torch.zeros(16, 64).bfloat16())
    assert not is_padded(one.expand(16, 64))
    assert not is_padded(torch.zeros(200).as_strided((16, 64), (8, 1)))


def test_what_is_made_of_a_tensor_is_made_again_for_other_strides():
    memo, w = Memo(), torch.arange(8.0).reshape(2, 4)
    first = memo.get("sum", [w], lambda: w.sum().item())
    w.data = w.data[:1].expand(2, 4)
    assert memo.get("sum", [w], lambda: w.sum().item()) == 12 != first


@coda.block
def layer(
    x: T["M D"], w: T["N D"], r: T["M N"], b: T["N"], s: T["M", coda.f32], t: T["M", coda.i64]
):
    y = r + coda.gelu(x @ w.T + b) * s[:, None].cast(x.dtype)
    logits = y.cast(coda.f32)
    return {"y": y, "norm": coda.rms_norm(r, b), "loss": coda.cross_entropy(logits, t)}


@coda.block
def activated(x: T["M D"], w: T["N D"], r: T["M N"]):
    return r * coda.gelu(x @ w.T)


def arguments(columns):
    g = torch.Generator().manual_seed(3)
    shapes = ((16, 64), (columns, 64), (16, columns), (columns,))
    made = [torch.randn(s, generator=g).bfloat16() for s in shapes]
    return [*made, torch.rand(16, generator=g), torch.arange(16) % columns]


def expanded(x, axis):
    return x.narrow(axis, 0, 1).expand(x.shape)


def hold(inputs, arch):
    expected = layer(*inputs, backend="reference", arch=arch)
    found = layer(*inputs, backend="sim", arch=arch)
    for name, y in found.items():
        wrong = differ(y, expected[name], 0.05 + expected[name].double().abs() * 2**-7)
        assert not wrong.any(), (name, y[wrong], expected[name][wrong])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("columns", [32, 37])
def test_each_argument_expanded_over_each_axis(columns, arch):
    plain = arguments(columns)
    with device(arch, checks="raise"):
        for place, x in enumerate(plain):
            for axis in range(x.ndim):
                hold([*plain[:place], expanded(x, axis), *plain[place + 1 :]], arch)
        hold([x[:1] if i in (0, 2, 4, 5) else x for i, x in enumerate(plain)], arch)
        one_row = [expanded(x[:1], 0) if i in (0, 2, 4, 5) else x for i, x in enumerate(plain)]
        hold([x.as_strided(x.shape, (0,) * x.ndim) if len(x) == 1 else x for x in one_row], arch)


def test_arguments_expanded_over_their_rows():
    inputs = [expanded(x, 0) for x in arguments(32)[:3]]
    expected = activated(*inputs, backend="reference", arch="sm_90a")
    found = activated(*inputs, backend="sim", arch="sm_90a")
    assert not differ(found, expected, expected.double().abs() * 2**-7).any()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("columns", [32, 37])
def test_expanded_cotangents_and_arguments_of_a_backward(columns, arch):
    found = {}
    for backend in ("sim", "reference"):
        plain = arguments(columns)[:3]
        wanted = [plain[0][:1], plain[1], plain[2][:, :1]]
        x, w, r = [v.clone().requires_grad_() for v in wanted]
        with device(arch, checks="raise"):
            y = activated(x.expand(16, 64), w, r.expand(16, columns), backend=backend, arch=arch)
            y.float().sum().backward()
        found[backend] = [v.grad for v in (x, w, r)]
    for y, expected in zip(found["sim"], found["reference"], strict=True):
        assert not differ(y, expected, 0.1 + expected.double().abs() * 2**-6).any()


@pytest.mark.slow
def test_a_recorded_call_serves_arguments_of_its_strides_alone():
    """Calls in turn, contiguous and expanded, each recorded: a replay reads each as it is."""
    program_of = {}
    with device("sm_90a", checks="raise"):
        for turn in range(2):
            for over in (None, 0, 1):
                x, w, r = arguments(32)[:3]
                if over is not None:
                    x, r = expanded(x, over), expanded(r, over)
                inputs = [x + turn if over is None else x, w, r]
                sizes = sizes_of(activated, inputs)
                program = program_of.setdefault(0, activated.lower("sm_90a", sizes))
                (found,) = run_kernels(program, inputs, sizes)
                expected = activated(*inputs, backend="reference", arch="sm_90a")
                assert not differ(found, expected, expected.double().abs() * 2**-6 + 0.05).any()
