"""Row-wise kernels of every plan: threads for each row, rows in registers or read again.

Each shape of code is executed from its PTX at hostile values: a warp for each row and several, rows
that are no multiple of a vector or of the threads' vectors, statistics of heads, single columns
beside stores, and sums over rows. The simulator's counts show how often a row is read.
"""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import coda
from coda.ir.monoids import MONOIDS
from coda.kernels.rowwise.kind import ROWWISE
from coda.kernels.rowwise.passes import in_passes
from coda.kernels.rowwise.plan import plan
from coda.lowering.program.text import program_source
from coda.runtime.reference import run_reference
from coda.runtime.simulate import device
from tests.kernels.edges import differ, each_fold, rows_of_edges, run, stays_inside
from tests.kernels.test_kernels import ARCHS

T = coda.Tensor
SLOW = pytest.mark.slow


@coda.block
def statistics(y: T["M N", coda.f32]):
    """Each reduction as a column; of some, the row without it; and one that reads another."""
    columns = each_fold(y)
    top = coda.max(y, keepdims=True)
    away = {
        "below": y - top,
        "normal": y - coda.logsumexp(y, keepdims=True),
        "centred": y - coda.mean(y, keepdims=True),
    }
    return columns | away | {"spread": coda.max(abs(y - top))}


@coda.block
def one_sweep(y: T["M N", coda.f32]):
    """Reductions that nothing wide reads, beside a store."""
    columns = each_fold(y)
    return columns | {"twice": y * 2.0}


def plans(block, sizes, arch="sm_90a"):
    program = block.lower(arch, sizes)
    return [plan(program, k) for k in program.kernels if k.kind is ROWWISE]


def hold(found, reference, exact, y):
    """Hold results against the reference and float64, by the largest finite value of their row."""
    finite = y.nan_to_num(0.0, 0.0, 0.0).double()
    size = finite.abs().amax(1)
    for name, value in found.items():
        base = size if value.ndim == 1 else size[:, None]
        slack = base * 1e-6 + exact[name].float().abs().nan_to_num(0, 0) * 1e-5
        if name == "variance":  # of a mean that is rounded to float32
            slack = (base * 2**-22).square() + exact[name].abs().nan_to_num(0, 0) * 1e-2
        for expected in (reference[name], exact[name].float()):
            wrong = differ(value, expected, slack)
            if name == "prod":  # beyond float32 in one order of its factors and not in another
                wrong &= stays_inside(y).reshape(-1, *(1,) * (wrong.ndim - 1))
            assert not wrong.any(), (name, wrong.nonzero()[:4], value[wrong], expected[wrong])


# Columns of float32: a warp for each row; a vector that only some threads have; single elements, by
# a prime number of them; 16 warps; more than registers have.
WIDTHS = {43: 1, 776: 1, 1912: 2, 1999: 2, 12296: 16, 33000: 32}


@pytest.mark.parametrize("columns", WIDTHS)
def test_plans_of_statistics(columns):
    (found,) = plans(statistics, {"M": 8, "N": columns})
    assert found.threads == 32 * WIDTHS[columns]
    assert found.held == (columns < 33000)
    (found,) = plans(one_sweep, {"M": 8, "N": columns})
    assert (found.threads, found.sweeps) == (32 * min(8, WIDTHS[columns]), 1)


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("columns", WIDTHS)
def test_statistics_at_hostile_values(columns, arch):
    y = rows_of_edges(columns, torch.Generator().manual_seed(0))
    hold(*run(statistics, (y,), arch), y)
    hold(*run(one_sweep, (y,), arch), y)


@coda.block
def summed(y: T["M N"], g: T["N"]):
    """A norm, and sums over rows of what its statistic scales; a statistic that none reads."""
    unit = y * coda.rsqrt(coda.mean(y * y, keepdims=True) + 1e-6)
    return {
        "unit": unit * g,
        "dg": coda.sum(unit * y, axis=0),
        "db": coda.sum(y, axis=0),
        "top": coda.max(y),
    }


@coda.block
def heads(y: T["M (H d)"], g: T["d"]):
    """The same for each head of a row, whose columns neighbouring lanes have."""
    x = y.reshape("M (H d) -> M H d")
    unit = x * coda.rsqrt(coda.mean(x * x, keepdims=True) + 1e-6)
    out = (unit * g).reshape("M H d -> M (H d)")
    return {"unit": out, "total": coda.sum(out), "over": coda.sum(out * y, axis=0)}


@coda.block
def padded(x: T["M D"], w: T["N D"]):
    """Statistics of rows that a GEMM of ours wrote, which begin at multiples of 16 bytes."""
    y = x @ w.T
    z = y - coda.max(y, keepdims=True)
    unit = z * coda.rsqrt(coda.mean(z * z, keepdims=True) + 1e-3)
    return {"unit": unit, "least": coda.min(y), "lse": coda.logsumexp(z)}


@SLOW
@pytest.mark.parametrize("columns", [77, 1999])
def test_rows_with_a_tail(columns):
    """All but the last few columns are read by vectors, also by several warps."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=g).bfloat16() for n in (37, columns))
    with device("sm_90a", checks="raise"):
        found = padded(x, w, backend="sim", arch="sm_90a")
    expected = padded(x, w, backend="reference", arch="sm_90a")
    for name, y in found.items():
        torch.testing.assert_close(y, expected[name], rtol=1e-2, atol=1e-2)


@SLOW
@pytest.mark.parametrize("schedule", ["late", "random"])
@pytest.mark.parametrize(("block", "columns"), [(statistics, 1912), (one_sweep, 12296)])
def test_warps_of_a_row_wait_for_each_other(block, columns, schedule):
    y = rows_of_edges(columns, torch.Generator().manual_seed(0))[:8]
    with device("sm_90a", checks="raise", schedule=schedule, seed=3) as gpu:
        block(y, backend="sim", arch="sm_90a")
        assert not gpu.report().findings


# Columns of bf16 and the threads of a row; more than registers have are computed apart.
SUMMED = {96: 32, 504: 64, 2000: 256, 4104: 512, 40008: 32}


def hold_sums(block, inputs, arch):
    with device(arch, checks="raise") as gpu:
        found = block(*inputs, backend="sim", arch=arch)
        assert not gpu.report().findings
    exact = block(*(x.double() for x in inputs), backend="reference", arch=arch)
    for name, x in found.items():
        scale = exact[name].abs().max().item()
        torch.testing.assert_close(x.double(), exact[name], rtol=1e-2, atol=4e-3 * scale)


@pytest.mark.parametrize("columns", SUMMED)
def test_plans_of_sums_over_rows(columns):
    (found, *_) = plans(summed, {"M": 8, "N": columns})
    assert (found.threads, found.summed) == (SUMMED[columns], columns < 40000)


@pytest.mark.parametrize(("columns", "vector"), [(12288, 8), (14336, 4), (18432, 8)])
def test_vectors_of_sums_over_rows(columns, vector):
    """Shorter ones only where they leave fewer registers empty, of the threads that a row has."""

    @coda.block
    def two(y: T["M N"], z: T["M N"]):
        return {"dot": coda.sum(y * z), "dy": coda.sum(y, axis=0), "dz": coda.sum(z, axis=0)}

    program = two.lower("sm_90a", {"M": 8, "N": columns})
    assert f"zero_vectors({vector}, " in program_source(program)


@pytest.mark.parametrize(
    ("columns", "arch"),
    [
        pytest.param(n, a, marks=() if (n, a) == (504, "sm_90a") else SLOW)
        for n in SUMMED
        for a in ARCHS
    ],
)
def test_sums_over_rows(columns, arch):
    g = torch.Generator().manual_seed(0)
    rows = 130 if columns < 40000 else 3
    y, w = (torch.randn(*s, generator=g).bfloat16() for s in ((rows, columns), (columns,)))
    hold_sums(summed, (y, w), arch)


@coda.block
def unread(y: T["M N"], z: T["M N"]):
    """Sums over rows beside statistics that no column reads: a row need not be held."""
    return {"dot": coda.sum(y * z), "dy": coda.sum(y, axis=0), "dz": coda.sum(z * y, axis=0)}


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
def test_sums_over_rows_that_are_not_held(arch):
    (found, *_) = plans(unread, {"M": 8, "N": 18440})
    assert (found.threads, found.summed, found.held) == (256, True, False)
    g = torch.Generator().manual_seed(0)
    y, z = (torch.randn(67, 18440, generator=g).bfloat16() for _ in range(2))
    hold_sums(unread, (y, z), arch)


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("count", "size"), [(3, 64), (5, 128), (9, 256)])
def test_sums_over_rows_of_heads(count, size, arch):
    g = torch.Generator().manual_seed(0)
    y, w = (torch.randn(*s, generator=g).bfloat16() for s in ((67, count * size), (size,)))
    hold_sums(heads, (y, w), arch)


@coda.block
def normalised(y: T["M N"]):
    """A statistic whose terms are stored."""
    z = y.cast(coda.f32)
    return {"soft": coda.softmax(y), "lse": coda.logsumexp(z), "top": coda.max(z)}


@coda.block
def centred(y: T["M N"]):
    """The same of a variance, about a mean that is stored too."""
    z = y.cast(coda.f32)
    away = z - coda.mean(z, keepdims=True)
    spread = coda.mean(away * away)
    unit = away * coda.rsqrt(coda.mean(away * away, keepdims=True) + 1e-5)
    return {"unit": unit, "mean": coda.mean(z), "variance": spread}


@coda.block
def wide_range(y: T["M N", coda.f32]):
    """Float32, of which a plain sum is not exact; terms that no store reads."""
    z = y - coda.mean(y, keepdims=True)
    log = y - coda.logsumexp(y, keepdims=True)
    return {"unit": z * coda.rsqrt(coda.mean(z * z, keepdims=True) + 1e-5), "log": log}


def passed(block, columns):
    """A block's Program, and the same with its statistics in two passes."""
    program = block.lower("sm_90a", {"M": 5, "N": columns})
    (kernel,) = [k for k in program.kernels if k.kind is ROWWISE]
    epilogue = in_passes(kernel.body.epilogue, columns)
    other = replace(kernel, body=replace(kernel.body, epilogue=epilogue))
    kernels = tuple(other if k is kernel else k for k in program.kernels)
    return program, replace(program, kernels=kernels)


@pytest.mark.parametrize("block", [normalised, centred])
def test_statistics_in_two_passes_are_the_same(block):
    y = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, two = passed(block, 96)
    monoids = {s.monoid for k in two.kernels for s in k.body.epilogue.statistics}
    assert not monoids & {m.name for m in MONOIDS.values() if m.passes}
    found, expected = (run_reference(p, (y.double(),), exact=True) for p in (two, one))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_two_passes_only_where_they_save_something_and_lose_nothing():
    for block in (wide_range, statistics):
        one, two = passed(block, 96)
        assert one.kernels[0].body.epilogue == two.kernels[0].body.epilogue
    for block, columns, twice in (
        (normalised, 4096, True),
        (normalised, 12288, True),
        (normalised, 65536, False),  # 128 terms of each of 512 threads
        (normalised, 131072, False),  # read again
    ):
        (found,) = plans(block, {"M": 8, "N": columns})
        assert found.passes is twice


def hold_passes(y, arch):
    """Hold results against float64: torch's softmax, and all but what leaves float32 (1e38²)."""
    size = y.float().nan_to_num(0.0, 0.0, 0.0).abs().amax(1)
    finite, far = y.isfinite().all(1), size > 1e15
    for block in (normalised, centred):
        found, reference, exact = run(block, (y,), arch)
        for name, value in found.items():
            expected, slack = exact[name].float(), exact[name].float().abs() * 1e-5
            if name == "soft":
                expected = reference[name].float()
                expected[finite] = y[finite].double().softmax(1).float()
                slack = expected.abs() * 2**-8 + 2e-38  # powers flush what is not normal
            elif name in ("unit", "variance"):
                expected[far] = reference[name][far]
                slack = expected.abs() * 1e-4 + (1e-5 if name == "unit" else 0)
            else:
                slack = slack + size * 2**-22
            wrong = differ(value.float(), expected, slack.nan_to_num(0.0))
            assert not wrong.any(), (name, wrong.nonzero()[:4], value[wrong], expected[wrong])


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("columns", [43, 776, 12296])
def test_two_passes_at_hostile_values(columns, arch):
    y = rows_of_edges(columns, torch.Generator().manual_seed(0)).bfloat16()
    hold_passes(y, arch)


ROOT = Path(__file__).parents[2]


def documented():
    """(arch, kernel) -> the cells of the tables of docs/rows.md."""
    found, arch = {}, ""
    for line in (ROOT / "docs/rows.md").read_text().splitlines():
        if line.startswith("### "):
            arch = line.removeprefix("### ")
        elif arch and re.match(r"\| [a-z]", line) and not line.startswith("| kernel"):
            name, *cells = line.strip("| ").split(" | ")
            found[arch, name] = [None if c == "–" else float(c) for c in cells]
    return found


def test_the_table_beside_quack():
    """Each row is read once, and nothing is spilled; widths and threads are those of the plan."""
    rows = runpy.run_path(str(ROOT / "benchmarks/rows.py"))
    table = documented()
    assert table.keys() == {(a, n) for a in ARCHS for n in rows["BLOCKS"]}
    for (arch, name), cells in table.items():
        program = rows["program_of"](name, arch)
        (kernel,) = [k for k in program.kernels if k.kind is ROWWISE]
        assert cells[0] == kernel.mainloop.width == rows["width_of"](name)
        assert cells[2] == plan(program, kernel).threads
        assert (cells[-2], cells[-1]) == (0, 1.0)


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "name", ["rms_norm", "layer_norm", "softmax", "logsumexp", "dlogits", "rope_backward"]
)
def test_rows_are_moved_once(name, arch):
    rows = runpy.run_path(str(ROOT / "benchmarks/rows.py"))
    assert rows["moved"](name, arch) <= 1.05
