"""Why a fold of a row's partials stays a launch of its own, as `explain` says."""

import pytest

import coda
from coda.lowering.program.cost import kernel_time

T = coda.Tensor
LARGE = {"M": 65536, "K": 4096, "D": 4096, "N": 4096}


def rstd(h):
    return coda.rsqrt(coda.mean(coda.square(h), axis=-1, keepdims=True) + 1e-5)


@coda.block
def normed(x: T["M K"], w: T["D K"], v: T["N D"]):
    h = x @ w.T
    return (h @ v.T) * rstd(h)


@coda.block
def read_twice(x: T["M K"], w: T["D K"], v: T["N D"], u: T["N D"]):
    h = x @ w.T
    return (h @ v.T) * rstd(h), (coda.tanh(h) @ u.T) * rstd(h)


@coda.block
def returned(x: T["M K"], w: T["D K"]):
    h = x @ w.T
    return h, rstd(h)


@coda.block
def exponentials(x: T["M K"], w: T["D K"], v: T["N D"]):
    h = x @ w.T
    return (h @ v.T) * coda.logsumexp(h, axis=-1, keepdims=True)


def reasons(block, **sizes):
    """Kernel that only folds -> why it is apart."""
    report = block.explain("H200", **sizes)
    return report, [p["why"].partition("; ")[2] for p in report.json()["passes"]]


def test_a_fold_that_takes_longer_in_each_tile_says_by_how_much():
    report, (why,) = reasons(normed, **LARGE)
    (fold,) = [k for k in report.program.kernels if k.kind.whole_rows]
    own = kernel_time(report.program, fold).seconds * 1e6
    start = "each tile of gemm2 would fold its rows, which takes "
    assert why.startswith(start)
    assert why.endswith(f" µs where this kernel takes {own:.1f}")
    assert float(why.removeprefix(start).split()[0]) > own
    assert why in " ".join(str(report).split())


def test_a_fold_that_pays_is_no_launch():
    assert reasons(normed, **{**LARGE, "M": 2048})[1] == []


@pytest.mark.parametrize(
    ("block", "sizes", "expected"),
    [
        (read_twice, {"M": 128, "K": 64, "D": 256, "N": 64}, "2 kernels read it (gemm2, gemm3)"),
        (returned, {"M": 128, "K": 64, "D": 256}, "no kernel reads it"),
        (
            exponentials,
            {"M": 128, "K": 64, "D": 256, "N": 64},
            "gemm2 does not fold it: a GEMM folds sums and moments of rows, and no logsumexp",
        ),
        (
            normed,
            {"M": 128, "K": 64, "D": 65536, "N": 64},
            "gemm2 does not fold it: a GEMM folds at most 128 numbers of a row",
        ),
    ],
    ids=["several readers", "returned", "logsumexp", "many partials"],
)
def test_why_it_stays(block, sizes, expected):
    assert expected in reasons(block, **sizes)[1]
