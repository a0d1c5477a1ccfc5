"""Every scalar function, derivative, reduction and store at the edges of what it takes.

Kernels of both kinds, executed from their PTX, are held against the reference backend and against
float64. The tables of functions and of monoids are enumerated: a new row is held here at once.
"""

import pytest
import torch

import coda
from coda.frontend.tensor import Tensor, apply
from coda.ir.scalars import SCALARS
from coda.ir.types import DTYPES
from coda.lowering.algebra.vjp import _Term
from tests.kernels.edges import differ, each_fold, pairs, rows_of_edges, run, stays_inside
from tests.kernels.test_kernels import ARCHS

T = coda.Tensor
SLOW = pytest.mark.slow
EXPONENTS = (0, 1, 2, 3, 4, 7, 9, -1, -2, -3, 0.5, -0.5, 1.5, -2.5)
NAMES = tuple(fn for fn, row in SCALARS.items() if row.of_floats and row.result != "pair")
# A sigmoid is (1 + tanh) / 2: a tail of it is known to a rounding of 1.
OF_ONE = {"sigmoid": 2**-23, "sigmoid_0": 2**-23}


def arguments(fn, a, b):
    """Tensors for a function of the table."""
    first = a > b if SCALARS[fn].chooses else a
    return ((a,), (a, b), (first, b, -a))[SCALARS[fn].arity - 1]


def functions(names):
    """A row-wise kernel of some functions, and a GEMM whose epilogue has them."""

    @coda.block
    def rows(a: T["M N", coda.f32], b: T["M N", coda.f32]):
        return {fn: apply(fn, *arguments(fn, a, b)) for fn in names}

    @coda.block
    def gemm(
        a: T["M N", coda.f32],
        b: T["M N", coda.f32],
        x: T["M K", coda.bf16],
        w: T["N K", coda.bf16],
    ):
        h = (x @ w.T).cast(coda.f32) + a
        return {fn: apply(fn, *arguments(fn, h, b)) for fn in names}

    return rows, gemm


def nothing(m, n):
    """Factors of a product of zeros, [m, 16] and [n, 16]."""
    return torch.zeros(m, 16).bfloat16(), torch.zeros(n, 16).bfloat16()


def hold_elements(block, a, b, arch, *more, steps=False):
    """Outputs of elements of a and b: to 2⁻¹⁵ of each, or of the smaller argument near 0.

    What is computed in `steps` may leave float32 on the way, and is held against the reference.
    """
    found, reference, exact = run(block, (a, b, *more), arch)
    near = torch.minimum(a.abs(), b.abs()).nan_to_num(1.0).clamp(max=1.0).double() * 1e-6
    near += 2**-126  # the smallest number that is no subnormal one
    for name, y in found.items():
        held = [reference[name]]
        if not steps and not name.startswith("rounded_"):  # float64 does not round
            held.append(exact[name].to(y.dtype))
        for expected in held:
            slack = near + OF_ONE.get(name, 0.0) + expected.double().abs() * 2**-15
            wrong = differ(y, expected, slack)
            shown = zip(a[wrong], b[wrong], y[wrong], expected[wrong], strict=True)
            assert not wrong.any(), (name, [tuple(map(float, v)) for v in shown][:8])


BY_VECTORS = pytest.param(48, "sm_100a", marks=SLOW)  # two elements at once


@pytest.mark.parametrize(
    ("columns", "arch"),
    [(43, "sm_90a"), pytest.param(43, "sm_100a", marks=SLOW), BY_VECTORS],
)
def test_every_function_of_rows(columns, arch):
    hold_elements(functions(NAMES)[0], *pairs(columns), arch)


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("first", range(0, len(NAMES), 4))
def test_every_function_in_an_epilogue(first, arch):
    a, b = pairs()
    hold_elements(functions(NAMES[first : first + 4])[1], a, b, arch, *nothing(*a.shape))


@coda.block
def powers(a: T["M N", coda.f32], b: T["M N", coda.f32]):
    return {f"power_{i}": a**n for i, n in enumerate(EXPONENTS)} | {
        "base": 2.0**b,
        "of": (a + b * 0.0) ** 3,
    }


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
def test_powers_by_numbers(arch):
    hold_elements(powers, *pairs(), arch)


@coda.block
def derivatives(a: T["M N", coda.f32], b: T["M N", coda.f32]):
    found = {}
    for fn, row in SCALARS.items():
        if row.derivative is None:
            continue
        given = arguments(fn, a, b)
        value = apply(fn, *given)
        terms = [_Term(t.node) for t in (b * 0.0 + 1.0, value, *given)]
        for i, term in enumerate(row.derivative(*terms)):
            if term is not None:
                found[f"{fn}_{i}"] = Tensor(term.node)
    return found


@SLOW
@pytest.mark.parametrize(("columns", "arch"), [*((43, arch) for arch in ARCHS), BY_VECTORS])
def test_every_derivative(columns, arch):
    a, b = pairs(columns)
    hold_elements(derivatives, a, b, arch, steps=True)


@coda.block
def reduced_rows(y: T["M N", coda.f32]):
    return each_fold(y) | {"over_rows": coda.sum(y, axis=0)}


@coda.block
def reduced_products(y: T["M N", coda.f32], x: T["M K", coda.bf16], w: T["N K", coda.bf16]):
    h = (x @ w.T).cast(coda.f32) + y
    return each_fold(h) | {"over_rows": coda.sum(h, axis=0)}


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("columns", [43, 131])
@pytest.mark.parametrize("block", [reduced_rows, reduced_products], ids=["rows", "gemm"])
def test_every_reduction(block, columns, arch):
    y = rows_of_edges(columns, torch.Generator().manual_seed(0))
    more = nothing(*y.shape) if block is reduced_products else ()
    found, reference, exact = run(block, (y, *more), arch)
    finite = y.nan_to_num(0.0, 0.0, 0.0).double()
    for name, value in found.items():
        axis = 0 if name == "over_rows" else 1
        size = finite.abs().amax(axis, keepdim=True).reshape(value.shape)
        slack = size * 1e-6 + exact[name].float().abs().nan_to_num(0, 0) * 1e-5
        if name == "variance":  # of a mean that is rounded to float32
            slack = (size * 2**-22).square() + exact[name].abs().nan_to_num(0, 0) * 1e-2
        for expected in (reference[name], exact[name].float()):
            wrong = differ(value, expected, slack)
            if name == "prod":  # beyond float32 in one order of its factors and not in another
                wrong &= stays_inside(y)
            assert not wrong.any(), (name, wrong.nonzero()[:4], value[wrong], expected[wrong])


@coda.block
def ragged_sums(x: T["M K"], w: T["N K"], r: T["M", coda.f32], g: T["N", coda.f32]):
    """Sums of what is not 0 at 0, and of what is 0 times infinity, in tiles that are not full."""
    h = (x @ w.T).cast(coda.f32)
    return {
        "count": coda.sum(coda.where(h > -10.0, 1.0, 0.0)),
        "mean": coda.mean(coda.sigmoid(h)),
        "by_row": coda.sum(h * r[:, None]),
        "by_column": coda.sum(h * g, axis=0),
        "cos": coda.sum(coda.cos(h), axis=0),
    }


@coda.block
def bare_sum(x: T["M K"], w: T["N K"]):
    return coda.sum(coda.exp(0.1 * (x @ w.T)))


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=SLOW)])
def test_a_ragged_sum_of_a_product_alone(arch):
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, 16, generator=g).bfloat16() for n in (5, 50))
    expected = bare_sum(x, w, backend="reference", arch=arch)
    found = bare_sum(x, w, backend="sim", arch=arch)
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
def test_ragged_sums_with_infinite_factors(arch):
    g = torch.Generator().manual_seed(1)
    x, w = (torch.rand(n, 16, generator=g).bfloat16() + 0.1 for n in (37, 53))
    r, c = torch.randn(37, generator=g), torch.randn(53, generator=g)
    for vector in (r, c):
        vector[3:7] = torch.tensor([float("inf"), float("nan"), float("-inf"), 3e38])
    found, reference, _ = run(ragged_sums, (x, w, r, c), arch)
    for name, y in found.items():
        wrong = differ(y, reference[name], reference[name].abs().double() * 1e-3 + 1e-3)
        if name == "by_column":  # the sum of a column whose gain is infinite may be NaN
            wrong &= ~(c.isinf() & y.isnan())
        assert not wrong.any(), (name, y[wrong], reference[name][wrong])


FLOATS = [d for d in DTYPES.values() if d.kind == "float" and d.name != "f64"]


def stores(kinds):
    """A row-wise kernel and a GEMM that store what they are given in each of some types."""

    @coda.block
    def rows(a: T["M N", coda.f32]):
        return {d.name: a.cast(d) for d in kinds}

    @coda.block
    def gemm(a: T["M N", coda.f32], x: T["M K", coda.bf16], w: T["N K", coda.bf16]):
        h = (x @ w.T).cast(coda.f32) + a
        return {d.name: h.cast(d) for d in kinds}

    return rows, gemm


@SLOW
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kinds", [FLOATS[:2], FLOATS[2:4], FLOATS[4:]], ids=str)
def test_every_store(kinds, arch):
    a = pairs(48)[0]
    for block, more in zip(stores(kinds), ((), nothing(*a.shape)), strict=True):
        found, reference, _ = run(block, (a, *more), arch)
        for name, y in found.items():
            wrong = differ(y, reference[name], 0.0)
            assert not wrong.any(), (block, name, a[wrong][:9], y[wrong][:9])
