"""What a beginner writes who knows torch: one line each, and the whole message."""

import math

import numpy as np
import pytest
import torch

import coda
from coda.errors import CodaError, InternalError
from tests.invalid.test_invalid import shown

# Arguments by name.
SPECS = {
    "x": coda.Tensor["M D"],
    "y": coda.Tensor["M D", coda.f32],
    "z": coda.Tensor["M F"],
    "v": coda.Tensor["D"],
    "n": coda.Tensor["M 8"],
    "b": coda.Tensor["B M D"],
    "h": coda.Tensor["M (H d)"],
    "t": coda.Tensor["M d"],
    "i": coda.Tensor["M", coda.i64],
    "k": coda.Tensor["M D", coda.i32],
}

LINES = {
    # Names that torch has and coda has not.
    "keyword_of_torch": lambda x: coda.softmax(x, dim=-1),
    "keyword_of_a_method": lambda x: x.mean(-1, keepdim=True),
    "argument_missing": lambda x: coda.where(x > 0, x),
    "method_float": lambda x: x.float(),
    "method_view": lambda x: x.view(-1),
    "method_transpose": lambda b: b.transpose(1, 2),
    "method_clamp": lambda x: x.clamp(-1, 1),
    "function_cat": lambda x: torch.cat([x, x]),
    "method_misspelt": lambda x: x.shpae,
    # Sizes are symbols.
    "math_of_a_dim": lambda x: x / math.sqrt(x.shape[-1]),
    "branch_on_a_dim": lambda x: x if x.shape[-1] > 3 else -x,
    "comparison_of_a_dim": lambda x: x if x.shape[-1] == 128 else -x,
    "dim_modulo_a_number": lambda x: x * (x.shape[-1] % 2),
    # Values of another kind.
    "branch_by_and": lambda x: coda.where(x > 0 and x < 1, x, 0.0),
    "conditions_without_brackets": lambda x, y: coda.where((x > 0) & x, x, 0.0),
    "array_on_the_left": lambda x: np.ones(3) * x,
    "tensor_on_the_left": lambda x: torch.ones(3) + x,
    "exp_of_whole_numbers": lambda k: coda.exp(k),
    "whole_numbers_plus_floats": lambda x, k: x + k,
    "condition_times_floats": lambda x: (x > 0) * x,
    "condition_that_is_a_number": lambda x: coda.where(x, x, 0.0),
    # Shapes.
    "product_with_a_vector": lambda x, v: x @ v,
    "product_of_batches": lambda b: b @ b,
    "product_of_other_batches": lambda b: b @ b.permute(2, 1, 0),
    "einsum_of_other_sizes": lambda b: coda.einsum("b m d, m b k -> d k", b, b),
    "transpose_of_a_batch": lambda b: b.T,
    "axes_that_change_places": lambda h: h.reshape("M (H d) -> H M d"),
    "reshape_from_another_shape": lambda x: x.reshape("M (H d) -> M H d"),
    "reshape_by_a_float": lambda x: x.reshape(2.5),
    "tables_as_wide_as_heads": lambda h, t: coda.rope(h.reshape("M (H d) -> M H d"), t, t),
    "classes_as_floats": lambda x, z: coda.cross_entropy(x, z),
    "smoothing_by_percent": lambda x, i: coda.cross_entropy(x, i, label_smoothing=10),
    # Lists, axes and indices.
    "split_into_none": lambda x: coda.split(x, 0)[0],
    "split_along_a_name": lambda x: coda.split(x, 2, "D")[0],
    "split_into_too_little": lambda n: coda.split(n, [3, 3])[0],
    "concat_of_arguments": lambda x: coda.concat(x, x),
    "concat_of_two_types": lambda x, y: coda.concat([x, y]),
    "concat_along_no_axis": lambda x: coda.concat([x, x], axis=5),
    "stack_of_two_shapes": lambda x, z: coda.stack([x, z]),
    "take_at_a_number": lambda x: coda.take(x, 3),
    "sum_over_an_axis_twice": lambda x: coda.sum(x, axis=(1, -1)),
    "var_over_axes_of_no_number": lambda x: coda.var(x, axis="D"),
    "argmax_over_two_axes": lambda b: coda.argmax(b, axis=(0, 1)),
    "argmax_of_whole_numbers": lambda k: coda.argmax(k),
    "dropout_by_percent": lambda x: coda.dropout(x, 10, 0),
    "dropout_by_a_float": lambda x, y: coda.dropout(x, 0.1, y),
    "dropout_without_a_seed": lambda x: coda.dropout(x, 0.1),
    "dropout_by_many_seeds": lambda x, i: coda.dropout(x, 0.1, i),
    "index_by_a_tensor_of_floats": lambda x: x[x],
    "index_by_tensors_apart": lambda x, i: x[i, None, i],
    "index_by_more_tensors_than_axes": lambda x, i: x[i, i, i],
    "index_by_tensors_of_other_sizes": lambda x, i: x[i, coda.iota(3)],
    "index_by_a_condition": lambda x: x[x > 0],
    "index_with_two_ellipses": lambda x: x[..., ...],
    "quotient_by_a_tensor": lambda i: i // i,
    "quotient_by_nothing": lambda i: i % 0,
    "quotient_of_a_number": lambda i: 8 // i,
    "quotient_of_floats": lambda x: x // 2,
    "range_backwards": lambda x: coda.arange(4, 0, -1),
    "range_of_nothing": lambda x: coda.arange(4, 4),
    "range_of_a_fraction": lambda x: coda.arange(0.5),
    "slice_backwards": lambda x: x[:, ::-1],
    "slice_outside_an_axis": lambda n: n[:, 4:12],
}


@pytest.mark.parametrize("name", LINES)
def test_line(name, golden):
    fn = LINES[name]
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    fn.__annotations__ = {n: SPECS[n] for n in names}
    with pytest.raises(CodaError) as error:
        coda.block(fn)
    assert not isinstance(error.value, InternalError)
    golden(f"misuse_{name}.txt", shown(error.value))


DECLARATIONS = {
    "three_parts": lambda: coda.Tensor["M D", coda.f32, "x"],
    "a_type_of_torch": lambda: coda.Tensor["M D", torch.float32],
    "a_list": lambda: coda.Tensor[["M", "D"]],
    "no_elements": lambda: coda.Tensor["M D-D"],
    "a_float": lambda: coda.Tensor["M 2.5*D"],
    "called": lambda: coda.Tensor("M D"),
    "no_function": lambda: coda.block(3),
    "no_annotation": lambda: coda.block(lambda x: x),
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_declaration(name, golden):
    with pytest.raises(CodaError) as error:
        DECLARATIONS[name]()
    golden(f"declared_{name}.txt", shown(error.value))


def test_torchs_names_of_functions():
    with pytest.raises(AttributeError, match=r"no attribute 'cat'; write coda.concat\(\[a, b\]\)"):
        _ = coda.cat


def test_an_error_of_the_users_own_stays_what_it_is():
    def mine(x: coda.Tensor["M D"]):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        coda.block(mine)
