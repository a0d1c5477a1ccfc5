"""What users of torch and numpy try on a value of a block: refused, with what would work."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import coda
from coda.errors import CodaError, TraceError
from coda.frontend import attention, library, ops
from coda.frontend.instead import FUNCTIONS, INSTEAD, instead_of, table
from coda.frontend.tensor import Tensor
from coda.ir.dims import Dim
from coda.ir.graph import Input
from coda.ir.types import f32

PAGE = Path(__file__).parents[2] / "docs/language.md"
NAMELESS = instead_of("a name that nobody has")
ARGUMENTS = ((), (1,), (1, 1), (0.5,))


def value():
    return Tensor(Input("x", (Dim.of("M"), Dim.of(8)), f32))


def public(module):
    return [n for n in dir(module) if n[0] != "_" and callable(getattr(module, n))]


def told(error):
    """The help of an error, which says something; or it works."""
    if isinstance(error, Tensor):
        return ""
    assert error.help
    assert NAMELESS not in error.help
    return error.help


@pytest.mark.parametrize("name", sorted({*public(torch.Tensor), *INSTEAD}))
def test_methods(name):
    x = value()
    if name in dir(x):  # the language has it
        return
    with pytest.raises(TraceError) as error:
        getattr(x, name)
    told(error.value)


def refused(fn, name):
    """How a function refuses a value, for the first arguments that it does not refuse by itself."""
    for more in ARGUMENTS:
        x = value()
        forms = (x, *more), ([x, x], *more), (x, x, *more), (x, *more, x), (x, x, x), (x, 0, x, x)
        for args in forms:
            try:
                found = fn(*args)
            except CodaError as e:
                return e
            except (TypeError, ValueError, RuntimeError, IndexError, AssertionError):
                continue
            return found if isinstance(found, Tensor) else None
    return None


# Functions that take no tensors, or only print, compare or create something.
OF_TENSORS = [
    n for n in public(torch) if n in {*public(torch.Tensor), *INSTEAD} and n not in dir(value())
]


def test_functions_of_torch():
    found = {n: refused(getattr(torch, n), n) for n in OF_TENSORS}
    quiet = {n for n, e in found.items() if e is None}
    assert not quiet & COMMON
    assert len(quiet) < 20, quiet  # of other arguments, or of none
    for name in set(found) - quiet:
        told(found[name])


def test_functions_of_nn():
    for name in (
        "elu",
        "leaky_relu",
        "normalize",
        "softmin",
        "mse_loss",
        "hardtanh",
        "mish",
        "pad",
    ):
        found = refused(getattr(torch.nn.functional, name), name)
        assert found is not None, name
        told(found)


@pytest.mark.parametrize("name", sorted(n for n in public(np) if n in INSTEAD or n in FUNCTIONS))
def test_functions_of_numpy(name):
    found = refused(getattr(np, name), name)
    if name in ("arange", "linspace", "zeros", "ones", "full", "empty", "eye", "copy", "inner"):
        return  # of sizes
    assert found is not None
    told(found)


@pytest.mark.parametrize("name", ["cat", "cholesky", "argsort", "nothing_of_this_name"])
def test_names_that_coda_does_not_have(name):
    def asked(x: coda.Tensor["M D"]):
        return getattr(coda, name)(x)

    with pytest.raises(TraceError, match=f"there is no coda.{name}") as error:
        coda.block(asked)
    assert error.value.help
    assert error.value.where.file == __file__
    assert not hasattr(coda, name)


def test_attribute_errors_of_the_users_own_stay_what_they_are():
    def mine(x: coda.Tensor["M D"]):
        return x + [].nothing

    with pytest.raises(AttributeError, match="nothing"):
        coda.block(mine)


def test_functions_are_all_that_coda_has():
    defined = {
        n
        for m in (ops, library, attention)
        for n in public(m)
        if getattr(m, n).__module__ == m.__name__
    }
    assert defined & set(coda.__all__) == FUNCTIONS


def test_what_helps_exists():
    """Functions that help names are there, and no name is refused that coda has."""
    for text in set(INSTEAD.values()):
        for name in re.findall(r"coda\.(\w+)", text):
            assert name in coda.__all__, text
        for name in re.findall(r"\bx\.(\w+)\(", text):
            assert name in dir(Tensor), text
    assert not set(INSTEAD) & FUNCTIONS


def test_the_page_has_the_table(request):
    head, mark, rest = PAGE.read_text().partition("## What the language does not say\n")
    before, rows, after = re.match(r"(.*?\n\n)(\|.*?\n)(\n.*)", rest, re.S).groups()
    if request.config.getoption("--update-golden"):
        PAGE.write_text(head + mark + before + table() + after)
    assert rows == table()


# What a newcomer tries first; each has an answer of its own, or is in the language.
COMMON = {
    "abs", "add", "all", "any", "arange", "argmax", "argsort", "atan", "bmm", "cat", "chunk",
    "clamp", "clip", "concatenate", "cos", "cumprod", "cumsum", "detach", "div", "dot", "einsum",
    "elu", "exp", "expand", "eye", "flatten", "flip", "float", "floor", "fmod", "gather", "gelu",
    "half", "hypot", "isfinite", "isinf", "isnan", "log", "log10", "log2", "logical_and",
    "logsumexp", "masked_fill", "matmul", "max", "maximum", "mean", "median", "min", "mul",
    "nan_to_num", "norm", "ones_like", "outer", "pad", "permute", "pow", "prod", "rand",
    "randn_like", "reciprocal", "relu", "remainder", "repeat", "reshape", "roll", "round",
    "rsqrt", "scatter", "sigmoid", "sign", "sin", "softmax", "sort", "split", "sqrt", "square",
    "squeeze", "stack", "std", "sum", "take", "tan", "tanh", "tile", "topk", "transpose", "tril",
    "triu", "trunc", "unsqueeze", "var", "view", "where", "xlogy", "zeros_like",
}  # fmt: skip
