"""One bad program each, and the whole message that the user sees."""

import re

import numpy as np
import pytest
import torch

import coda
from coda.errors import (
    CallError,
    CodaError,
    DimError,
    DtypeError,
    ShapeError,
    TextError,
    TraceError,
)

T = coda.Tensor


def shapes_do_not_broadcast(x: T["M D"], y: T["M F"]):
    return x + y


def contraction_without_transpose(x: T["M D"], w: T["F D"]):
    return x @ w


def contraction_of_nothing_common(x: T["M D"], w: T["F G"]):
    return x @ w


def mixed_types(x: T["M D"], y: T["M D", coda.f32]):
    return x * y


def mixed_types_in_a_contraction(x: T["M D"], w: T["F D", coda.f32]):
    return x @ w.T


def branch_on_a_value(x: T["M D"]):
    return x if x > 0 else -x


def numpy_on_a_tensor(x: T["M D"]):
    return np.exp(x)


def torch_on_a_tensor(x: T["M D"]):
    return torch.exp(x)


def write_in_place(x: T["M D"]):
    x[0] = 1.0
    return x


def iterate(x: T["M D"]):
    a, b = x
    return a + b


def unknown_dim(x: T["M D"]):
    return x.reshape("M H d")


def reduce_an_axis_that_is_not_there(x: T["M D"]):
    return coda.sum(x, axis=2)


def divide_a_dim(x: T["M 7"]):
    return coda.split(x, 2)[0]


def cannot_read_the_shape(x: T["M D"]):
    return x.reshape("M, D")


def a_name_twice(x: T["M D"], D: T["M"]):
    return x


def returns_nothing(x: T["M D"]):
    x + 1


def undeclared(x):
    return x


def a_foreign_tensor(x: T["M D"]):
    return x + torch.ones(3)


BAD = {
    shapes_do_not_broadcast: ShapeError,
    contraction_without_transpose: ShapeError,
    contraction_of_nothing_common: ShapeError,
    mixed_types: DtypeError,
    mixed_types_in_a_contraction: DtypeError,
    branch_on_a_value: TraceError,
    numpy_on_a_tensor: TraceError,
    torch_on_a_tensor: TraceError,
    write_in_place: TraceError,
    iterate: TraceError,
    unknown_dim: DimError,
    reduce_an_axis_that_is_not_there: ShapeError,
    divide_a_dim: DimError,
    cannot_read_the_shape: DimError,
    a_name_twice: DimError,
    returns_nothing: TraceError,
    undeclared: TraceError,
    a_foreign_tensor: TraceError,
}


def shown(error):
    """The message without the directory and the lines that the tests lie in."""
    text = re.sub(r"--> \S*/(test_\w+\.py):\d+:\d+", r"--> \1", str(error))
    return re.sub(r"^ *\d* \|", " |", text, flags=re.M) + "\n"


@pytest.mark.parametrize("fn", BAD, ids=lambda f: f.__name__)
def test_block(fn, golden):
    with pytest.raises(BAD[fn]) as error:
        coda.block(fn)
    golden(f"{fn.__name__}.txt", shown(error.value))


TEXTS = {
    "unknown_operation": "block f(%x: [M] bf16) {\n  %0 = frobnicate %x\n  return out = %0\n}",
    "undefined_value": "block f(%x: [M] bf16) {\n  %0 = add %x, %y\n  return out = %0\n}",
    "defined_twice": "block f(%x: [M] bf16) {\n  %x = abs %x\n  return out = %x\n}",
    "wrong_type": "block f(%x: [M] bf16) {\n  %0 = abs %x : [M] f32\n  return out = %0\n}",
    "unknown_type": "block f(%x: [M] bf17) {\n  return out = %x\n}",
    "no_text_at_all": "a block that is prose",
    "ends_early": "block f(%x: [M] bf16) {\n  %0 = abs %x\n",
    "a_sign_of_no_language": "block f(%x: [M] bf16) {\n  %0 = abs $x\n  return out = %0\n}",
    "wrong_arity": "block f(%x: [M] bf16) {\n  %0 = add %x\n  return out = %0\n}",
    "gather_of_one": "block f(%x: [M] bf16) {\n  %0 = gather %x\n  return out = %0\n}",
    "axis_from_the_left": "block f(%x: [M, D] bf16) {\n  %0 = sum %x axis 1\n  return out = %0\n}",
    "unknown_reduction": "block f(%x: [M, D] bf16) {\n  %0 = median %x axis -1\n"
    "  return out = %0\n}",
    "slice_outside": "block f(%x: [M, 8] bf16) {\n"
    "  %0 = slice %x axis -1 from 4 size 5 step 1\n  return out = %0\n}",
    "two_outputs_of_one_name": "block f(%x: [M] bf16) {\n  return out = %x, out = %x\n}",
    "wrong_shapes": "block f(%x: [M, D] bf16) {\n  %0 = contract %x, %x f32\n"
    "  %1 = contract %0, %x f32\n  return out = %1\n}",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name, golden):
    with pytest.raises(TextError) as error:
        coda.parse(TEXTS[name])
    golden(f"text_{name}.txt", shown(error.value))


@coda.block
def scale(x: T["M D"], w: T["D"], y: T["M 2*D"]):
    return coda.concat([x, x]) * y + coda.concat([w, w])


def good():
    return [torch.ones(3, 4), torch.ones(4), torch.ones(3, 8)]


CALLS = {
    "too_few": lambda: good()[:2],
    "rank": lambda: [good()[0], torch.ones(4, 1), good()[2]],
    "size": lambda: [good()[0], torch.ones(5), good()[2]],
    "axis_too_many": lambda: [good()[0][None], *good()[1:]],
    "type": lambda: [good()[0], good()[1].bfloat16(), good()[2]],
    "no_tensor": lambda: [1.0, *good()[1:]],
    "sparse": lambda: [good()[0].to_sparse(), *good()[1:]],
    "meta": lambda: [t.to("meta") for t in good()],
}


@pytest.mark.parametrize("name", CALLS)
def test_call(name, golden):
    with pytest.raises(CallError) as error:
        scale(*CALLS[name]())
    golden(f"call_{name}.txt", shown(error.value))


@coda.block
def heads(x: T["M (H d)"]):
    return x.reshape("M (H d) -> M H d") * 2


@coda.block
def product(x: T["M D"], w: T["F D"]):
    return x @ w.T


OPTIONS = {
    "weight_turned": lambda: product(torch.ones(3, 8), torch.ones(8, 4)),
    "memory": lambda: scale(*good(), memory="low"),
    "wanted": lambda: scale.lower_training("sm_90a", {"M": 3, "D": 4}, wanted=["q"]),
    "name_misspelt": lambda: scale(*good()[:2], z=good()[2]),
    "name_missing": lambda: scale(good()[0], y=good()[2]),
    "name_twice": lambda: scale(*good(), y=good()[2]),
    "size_untold": lambda: heads(torch.ones(3, 8)),
    "size_that_does_not_divide": lambda: heads(torch.ones(3, 8), dims={"H": 3}),
    "size_of_no_dim": lambda: heads(torch.ones(3, 8), dims={"h": 2}),
    "no_columns": lambda: heads(torch.ones(3, 0), dims={"H": 2}),
    "size_that_is_no_number": lambda: heads(torch.ones(3, 8), dims={"H": "2"}),
    "backend": lambda: heads(torch.ones(3, 8), dims={"H": 2}, backend="gpu"),
    "arch_that_is_sizes": lambda: heads.lower({"M": 3, "H": 2, "d": 4}),
    "type": lambda: heads.lower("sm_90a", {"M": 3, "H": 2, "d": 4}, torch.complex64),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_call(name, golden):
    with pytest.raises(CodaError) as error:
        OPTIONS[name]()
    golden(f"option_{name}.txt", shown(error.value))


def test_arguments_by_name():
    x, w, y = good()
    assert torch.equal(scale(x, y=y, w=w), scale(x, w, y))


def test_sizes_are_checked_before_lowering(golden):
    messages = []
    for dims in ({"M": 3}, {"M": 3, "D": 4, "E": 5}, {"M": 3, "D": -1}, {"M": 3, "D": 2.5}):
        with pytest.raises(DimError) as error:
            scale.lower("sm_90a", dims)
        messages.append(shown(error.value))
    golden("dims.txt", "\n".join(messages))


def test_an_arch_that_is_not_there(golden):
    with pytest.raises(CodaError) as error:
        scale.lower("sm_80", {"M": 3, "D": 4})
    golden("arch.txt", shown(error.value))


def test_a_slice_that_leaves_its_axis_at_these_sizes(golden):
    def first(x: T["M D"], y: T["M F"]):
        return x[:, : y.shape[-1]] + y

    block = coda.block(first)
    assert block.lower("sm_90a", {"M": 2, "D": 6, "F": 4}).kernels
    with pytest.raises(DimError) as error:
        block.lower("sm_90a", {"M": 2, "D": 4, "F": 6})
    golden("slice.txt", shown(error.value))
