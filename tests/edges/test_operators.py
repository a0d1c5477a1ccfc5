"""Torch's operator database through the importer: what coda takes gives what torch gives.

Each sample is taken as the operator alone, and, where its first tensor is a matrix of finite
numbers, after a product with the identity, as a block. What coda does not take is left alone.
"""

import fnmatch
import itertools
import random

import pytest
import torch
from torch.utils import _pytree as pytree

from coda.errors import CodaError
from coda.frontend.torch_import.importer import why_not
from coda.frontend.torch_import.left import rows
from tests.edges.database import op_db
from tests.edges.held import (
    NotTaken,
    differences,
    errors_nearby,
    of_block,
    of_coda,
    of_torch,
    take,
    trace,
    wide,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = {op.full_name: op for op in op_db}
MISSES = 8  # an operator none of whose first samples are taken is one that coda has no rule for
PARTS = 12  # of the database, each a test
# For the quick run: operators that coda takes, drawn anew when the list changes.
KNOWN = (
    "add", "addmm", "div.no_rounding_mode", "exp", "expm1", "eq", "log1p", "le", "mul",
    "masked_fill", "maximum", "minimum", "nn.functional.celu", "nn.functional.elu",
    "nn.functional.gelu", "nn.functional.hardsigmoid", "nn.functional.hardswish",
    "nn.functional.hardtanh", "nn.functional.leaky_relu",
    "nn.functional.linear", "nn.functional.logsigmoid", "nn.functional.mish",
    "nn.functional.relu", "nn.functional.relu6", "nn.functional.selu",
    "nn.functional.silu", "nn.functional.softplus", "rsqrt", "sigmoid", "softmax", "where",
    "addcdiv", "addmv", "atan", "atan2", "ceil", "clamp", "clamp_max", "clamp_min", "erfc",
    "expand_as", "floor", "fmax", "fmin", "frac", "isfinite", "isinf", "isnan", "lerp", "log10",
    "log2", "logical_and", "logical_not", "logit", "mv", "nan_to_num", "nn.functional.glu",
    "nn.functional.hardshrink", "nn.functional.prelu", "nn.functional.softshrink",
    "nn.functional.threshold", "pow", "round", "sgn", "sign", "tan", "tril", "triu", "trunc",
    "true_divide",
)  # fmt: skip

# What a sample's tensors are divided by, where torch's float64 is not exact, and why.
TAME = {
    # Of logits 10³ apart a weight is 1 − 10⁻²⁸, which float64 has as 1: the derivative of its own
    # logit is 0 there, and minus the sum of all others' in coda, whatever the type.
    "nn.functional.multi_head_attention_forward": 4,
}


def called(op, sample):
    """A sample as a function of its tensors, and these."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def fn(*tensors):
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        first, args, named = pytree.tree_unflatten(filled, spec)
        return op.op(first, *args, **named)

    return fn, [leaves[i] for i in places]


def after_a_product(fn, tensors):
    """The same of a matrix times the identity; None where that is not the same."""
    x = tensors[0]
    if not (x.is_floating_point() and x.ndim > 1 and x.numel() and x.isfinite().all()):
        return None
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    return lambda x, eye, *rest: fn(x @ eye, *rest), [x, eye, *tensors[1:]]


def problems(fn, tensors, run):
    """What is wrong with a function. Raises NotTaken."""
    taken = take(fn, tensors)
    try:
        theirs = of_torch(fn, tensors)
    except RuntimeError as e:  # a sample that torch itself cannot run or differentiate
        raise NotTaken(str(e)) from e
    try:
        exact = of_torch(fn, wide(tensors))
    except RuntimeError:  # a type is written in the sample
        exact = theirs
    try:
        ours = run(taken, tensors)
    except CodaError as e:  # its region stays torch's
        raise NotTaken(e.message) from e
    alike = are_alike(tensors)
    found = differences(ours, theirs, exact, alike=alike)
    if found and alike and exact is not theirs:
        found = differences(ours, theirs, exact, alike=True, also=errors_nearby(fn, tensors))
    return found


def are_alike(tensors):
    """Whether numbers are as samples have them: finite, and none far larger than others."""
    floats = [t for t in tensors if t.is_floating_point() and t.numel()]
    return all(bool(t.isfinite().all()) and float(t.abs().max()) < 100 for t in floats)


def first(count, op, made_by, dtype):
    """The first samples; the generator is closed, or it switches gradients off while one is traced.

    It is torch's own generator: what `op.sample_inputs` returns holds it, and cannot be closed.
    """
    made = made_by(op, "cpu", dtype, False) if made_by else ()
    try:
        return list(itertools.islice(made, count))
    finally:
        made.close() if hasattr(made, "close") else None


def tried(op, dtype, count):
    """How many samples of an operator are taken, and all that is wrong with them."""
    kinds = op.sample_inputs_func, op.reference_inputs_func
    samples = [sample for kind in kinds for sample in first(count, op, kind, dtype)]
    taken, missed, wrong = 0, 0, []
    for sample in samples:
        fn, tensors = called(op, sample)
        if op.full_name in TAME:
            tensors = [t / TAME[op.full_name] if t.is_floating_point() else t for t in tensors]
        dense = all(t.layout == torch.strided for t in tensors)
        if not tensors or not dense or (not taken and missed >= MISSES):
            break
        forms = [((fn, tensors), of_coda)]
        product = after_a_product(fn, tensors)
        forms += [(product, of_block)] if product else []
        for (one, given), run in forms:
            try:
                found = problems(one, given, run)
            except NotTaken:
                missed += 1
                continue
            taken += 1
            shapes = [list(t.shape) for t in given]
            wrong += [f"{op.full_name} {shapes}: {w}" for w in found]
    return taken, wrong


def supported(name, dtype):
    return dtype in OPERATORS[name].supported_dtypes("cpu")


@pytest.mark.parametrize(
    "dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow)], ids=str
)
def test_some_operators(dtype):
    torch.manual_seed(0)
    names = random.Random(str(dtype)).sample(KNOWN, 4)
    for name in (n for n in names if supported(n, dtype)):
        taken, wrong = tried(OPERATORS[name], dtype, 2)
        assert taken, name
        assert not wrong


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_operators(dtype, part):
    """The whole database, in parts. The tracer's own refusals (sizes by values) are not coda's."""
    torch.manual_seed(0)
    names = sorted(n for n in OPERATORS if supported(n, dtype))[part::PARTS]
    found = {name: tried(OPERATORS[name], dtype, 10) for name in names}
    assert not [n for n in set(KNOWN) & set(names) if not found[n][0]]
    assert not [w for _, some in found.values() for w in some]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_every_operator_that_stays_torch_s_has_a_reason(part):
    """A row of the table (`left.py`) or a sentence of its rule: none is only without a rule."""
    torch.manual_seed(0)
    unsaid = {}
    for op in [o for o in op_db if supported(o.full_name, torch.float32)][part::4]:
        for sample in first(3, op, op.sample_inputs_func, torch.float32):
            fn, tensors = called(op, sample)
            try:
                nodes = trace(fn, tensors).graph.nodes
            except NotTaken:
                continue
            left = {n.target: why_not(n) for n in nodes if n.op == "call_function"}
            unsaid |= {t: (op.full_name, w) for t, w in left.items() if "has no rule" in w}
    assert not unsaid


def test_the_table_of_what_stays_torch_s_names_operators():
    every = (name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names())
    aten = {part for n in every if "::" not in n for part in (n, n.partition(".")[0])}
    patterns = [p for _, names in rows() for p in names if not p.startswith("torch_nn.")]
    assert not [p for p in patterns if not fnmatch.filter(aten, p)]


@pytest.mark.parametrize(
    "name", ["new_full", "new_ones", "new_zeros", "nn.functional.cross_entropy"]
)
def test_values_without_columns_or_of_one_column_are_computed_or_refused(name):
    """Each sample is torch's, or refused with a sentence: no other error leaves the compiler."""
    torch.manual_seed(0)
    taken, wrong = tried(OPERATORS[name], torch.float32, 3)
    assert taken
    assert not wrong
