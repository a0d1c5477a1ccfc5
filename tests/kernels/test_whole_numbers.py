"""Whole numbers above 2²⁴, which float32 does not hold: kernels compute none of them wrongly."""

import pytest
import torch

import coda
from coda.ir.graph import Map
from coda.runtime.simulate import device

T, i64 = coda.Tensor, coda.i64
LARGE = 1 << 24
M, N = 9, 16
X = torch.arange(M * N, dtype=torch.bfloat16).reshape(M, N)
# Neighbours of 2²⁴ and of a number that float32 rounds far away; the same again in part.
ROWS = torch.tensor([LARGE - 1, LARGE, LARGE + 1, LARGE + 3, 5, -LARGE - 1, 3 << 40, 0, LARGE + 1])
COLUMNS = torch.tensor([LARGE, LARGE + 1, LARGE - 1, (3 << 40) + 1, 3 << 40, 5, 6, 0] * 2)
TABLE = ROWS[:, None] + COLUMNS


@coda.block
def documents(x: T["M N"], a: T["M", i64], b: T["N", i64]):
    return coda.where(a[:, None] == b, x, 0.0), coda.where(a[:, None] < b, x, 0.0)


@coda.block
def remainders(x: T["M N"], a: T["M", i64]):
    return x * (a % 3)[:, None].cast(coda.bf16)


@coda.block
def chosen(x: T["M N"], a: T["M N", i64], b: T["N", i64]):
    return coda.where(x > 40, a, b)


@coda.block
def joined(x: T["M N"], a: T["M N", i64]):
    return x * 2, coda.concat([a, a + 1], -1)


@coda.block
def picked(x: T["M N"], a: T["M N", i64], y: T["M", i64]):
    return x * 2, coda.pick(a, y)


@coda.block
def lengths(x: T["M N"], a: T["M", i64]):
    j = coda.iota(x.shape[1]).cast(i64)
    return coda.where(j < a[:, None], x, 0.0), x + (a[:, None] == 5).cast(coda.bf16)


def expected():
    a, b = ROWS[:, None], COLUMNS
    y = torch.arange(M) % N
    yield documents, (X, ROWS, b), (torch.where(a == b, X, 0.0), torch.where(a < b, X, 0.0))
    yield remainders, (X, ROWS), (X * (a % 3).to(X.dtype),)
    yield chosen, (X, TABLE, b), (torch.where(X > 40, TABLE, b),)
    yield joined, (X, TABLE), (X * 2, torch.cat([TABLE, TABLE + 1], -1))
    yield picked, (X, TABLE, y), (X * 2, TABLE.gather(1, y[:, None]))
    short = torch.arange(N) < a
    yield lengths, (X, ROWS), (torch.where(short, X, 0.0), X + (a == 5).to(X.dtype))


@pytest.mark.parametrize("backend", ["reference", "sim"])
@pytest.mark.parametrize(
    ("block", "inputs", "results"), list(expected()), ids=lambda b: getattr(b, "__name__", "")
)
def test_they_are_exact(block, inputs, results, backend):
    with device("sm_90a", checks="raise"):
        found = block(*inputs, backend=backend)
    found = found if isinstance(found, tuple) else (found,)
    assert all(map(torch.equal, found, results))


def test_what_has_a_bound_is_compared_in_a_kernel():
    """Rounding keeps the order of a number and one that float32 holds."""
    program = lengths.lower("sm_90a", {"M": M, "N": N})
    assert [k.kind.name for k in program.kernels] == ["rows"]
    assert not program.unfused


def test_others_are_torchs_with_the_reason():
    program = documents.lower("sm_90a", {"M": M, "N": N})
    why = {u.node.fn: u.why for u in program.unfused if isinstance(u.node, Map)}
    assert why.keys() == {"eq", "lt"}
    assert all("larger than 2²⁴" in w for w in why.values())
