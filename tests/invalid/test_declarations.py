"""Declarations that Python has: each is taken in all ways of use, or refused with its line."""

import functools

import pytest
import torch
from typer.testing import CliRunner

import coda
from coda.cli import app
from coda.errors import CallError, CodaError, InternalError
from tests.invalid.test_invalid import shown

T = coda.Tensor


def defaults_none(x: T["M D"], b: T["D"] = None):
    return x if b is None else x + b


def defaults_number(x: T["M D"], eps: float = 1e-5):
    return x + eps


def defaults_text(x: T["M D"], *, kind: str = "silu"):
    return x


def defaults_bool(x: T["M D"], b: T["D"] = True):
    return x


def lists(*xs: T["M D"]):
    return xs[0]


def lists_without_type(x: T["M D"], *rest):
    return x


def keywords(x: T["M D"], **more: T["D"]):
    return x


async def waits(x: T["M D"]):
    return x


def yields(x: T["M D"]):
    yield x


async def yields_and_waits(x: T["M D"]):
    yield x


def annotated_by_torch(x: torch.Tensor):
    return x


def annotated_by_text(x: "M D"):
    return x


def annotated_by_a_wrong_text(x: 'coda.Tensor["M ("]'):
    return x


def annotated_by_division(x: "1 / 0"):
    return x


def half_annotated(x: T["M D"], b):
    return x + b


def named_as_an_option(x: T["M D"], *, memory: T["D"]):
    return x + memory


def without_arguments():
    return 1


def returns_none_of_them(x: T["M D"]):
    return None


class Held:
    def method(self, x: T["M D"]):
        return x

    def __call__(self, x: T["M D"]):
        return x


WRONG = [
    defaults_none,
    defaults_number,
    defaults_text,
    defaults_bool,
    lists,
    lists_without_type,
    keywords,
    waits,
    yields,
    yields_and_waits,
    annotated_by_torch,
    annotated_by_text,
    annotated_by_a_wrong_text,
    annotated_by_division,
    half_annotated,
    named_as_an_option,
    without_arguments,
    returns_none_of_them,
    Held.method,
]


@pytest.mark.parametrize("fn", WRONG, ids=lambda fn: fn.__qualname__)
@pytest.mark.filterwarnings("error")
def test_refused_with_the_line(fn, golden):
    with pytest.raises(CodaError) as error:
        coda.block(fn)
    assert not isinstance(error.value, InternalError)
    assert error.value.where is not None
    assert error.value.where.line == fn.__code__.co_firstlineno
    golden(f"declaration_{fn.__qualname__}.txt", shown(error.value))


@pytest.mark.parametrize(
    "value",
    [Held().method, Held(), Held, functools.partial(defaults_none), staticmethod(lists), 3],
    ids=("method", "instance", "class", "partial", "staticmethod", "number"),
)
def test_what_is_no_function_is_refused(value):
    with pytest.raises(CodaError):
        coda.block(value)


def named(x: T["M D"], w: T["F D"], *, b: T["F"], g: T["F"]):
    return coda.silu(x @ w.T + b) * g


def in_order(x: T["M D"], w: T["F D"], b: T["F"], g: T["F"]):
    return coda.silu(x @ w.T + b) * g


def only_in_order(x: T["M D"], w: T["F D"], /, b: T["F"], g: T["F"]):
    return coda.silu(x @ w.T + b) * g


def doubled(fn):
    @functools.wraps(fn)
    def call(*args, **kwargs):
        return 2 * (0.5 * fn(*args, **kwargs))

    return call


decorated = coda.block(doubled(in_order))
named_block, plain_block = coda.block(named), coda.block(in_order)
TAKEN = {
    "named": named_block,
    "only in order": coda.block(only_in_order),
    "decorated": decorated,
    "lambda": coda.nn._declared(
        lambda x, w, b, g: coda.silu(x @ w.T + b) * g, T["M D"], T["F D"], T["F"], T["F"]
    ),
}
SIZES = {"M": 5, "D": 16, "F": 24}


@pytest.mark.parametrize(
    "name",
    ["named", *(pytest.param(name, marks=pytest.mark.slow) for name in TAKEN if name != "named")],
)
def test_taken_in_all_ways_of_use(name):
    torch._dynamo.reset()
    block = TAKEN[name]
    make = torch.Generator().manual_seed(0)
    x, w, b, g = (torch.randn(s, generator=make) for s in ((5, 16), (24, 16), (24,), (24,)))
    expected = plain_block(x, w, b, g)

    @coda.block
    def outer(x: T["M D"], w: T["F D"], b: T["F"], g: T["F"]):
        return block(x, w, b=b, g=g)

    ways = [
        block,
        torch.compile(
            lambda x, w, b, g: block(x, w, b=b, g=g), backend="aot_eager", fullgraph=True
        ),
        coda.parse(str(block.graph_of(coda.f32))),
        outer,
    ]
    for way in ways:
        torch.testing.assert_close(way(x, w, b=b, g=g), expected)
        mine = [t.clone().requires_grad_() for t in (x, w, b, g)]
        theirs = [t.clone().requires_grad_() for t in (x, w, b, g)]
        way(*mine[:2], b=mine[2], g=mine[3]).sum().backward()
        plain_block(*theirs).sum().backward()
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert [i.name for i in block.graph.inputs] == ["x", "w", "b", "g"]
    assert "gemm" in str(block.explain("sm_90a", **SIZES))
    assert block.lower("sm_90a", SIZES).kernels
    assert len(block.lower_training("sm_90a", SIZES)) == 2
    for wrong in (lambda: block(x, w, b=b), lambda: block(x, w, b=b, c=g), lambda: block(x, w)):
        with pytest.raises(CallError):
            wrong()


FILE = """
import coda


@coda.block
def named(x: coda.Tensor["M D"], *, w: coda.Tensor["F D"]):
    return coda.silu(x @ w.T)
"""


def test_taken_by_the_command_line(tmp_path):
    path = tmp_path / "blocks.py"
    path.write_text(FILE)
    for command in (["explain", "--arch", "sm_90a"], ["run"]):
        found = CliRunner().invoke(app, [*command, f"{path}:named", "--dims", "M=5,D=16,F=24"])
        assert found.exit_code == 0, found.output
    path.write_text(FILE.replace('"F D"]', '"F D"] = None'))
    found = CliRunner().invoke(app, ["explain", f"{path}:named", "--dims", "M=5,D=16,F=24"])
    assert isinstance(found.exception, CodaError)
    assert "has a default" in str(found.exception)
