"""A contraction whose full rows are reduced shares a GEMM, or has one of its own: the cheaper."""

import pytest

import coda
from coda.lowering.compiler import lower
from coda.lowering.placement import place
from coda.lowering.placement.siblings import own_gemms
from coda.lowering.program.price import price

T = coda.Tensor


@coda.block
def two_losses(x: T["M D"], w: T["V D"], v: T["V D"], a: T["M", coda.i64], b: T["M", coda.i64]):
    return coda.cross_entropy(x @ w.T, a) + coda.cross_entropy(x @ v.T, b)


@coda.block
def one_reduced(x: T["M D"], w: T["V D"], v: T["V D"]):
    return x @ w.T, coda.sum(coda.square(x @ v.T))


@coda.block
def both_stored(x: T["M D"], w: T["V D"], v: T["V D"]):
    a, b = x @ w.T, x @ v.T
    return a, b, coda.sum(coda.square(b))


@coda.block
def normalised(x: T["M D"], w: T["V D"], v: T["V D"]):
    return x @ w.T, coda.softmax(x @ v.T)


BLOCKS = (two_losses, one_reduced, both_stored, normalised)
SIZES = ((6, 16, 40), (8192, 4096, 128), (8192, 4096, 4096), (8192, 512, 32000))


def ways(block, dims, monkeypatch):
    """The Program as it is decided, and with its contractions forced together and alone."""
    sizes = dict(zip("MDV", dims, strict=True))
    found = [lower(block.graph, sizes, frozen=True)]
    for forced in (lambda groups: groups, lambda groups: {c: (c,) for c in groups}):
        monkeypatch.setattr(place, "own_gemms", lambda groups, *_, f=forced: (f(groups), {}))
        found.append(lower(block.graph, sizes, frozen=True))
    return found


@pytest.mark.parametrize("dims", SIZES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=[b.__name__ for b in BLOCKS])
def test_the_cheaper_way_is_taken(block, dims, monkeypatch):
    decided, together, alone = (price(p) for p in ways(block, dims, monkeypatch))
    assert decided == (alone if alone.undercuts(together) else together)
    assert together != alone


def test_each_way_is_the_cheaper_one_somewhere(monkeypatch):
    cheaper = set()
    for dims in SIZES:
        _, together, alone = ways(one_reduced, dims, monkeypatch)
        cheaper.add(price(together).undercuts(price(alone)))
        monkeypatch.setattr(place, "own_gemms", own_gemms)
    assert cheaper == {True, False}


def test_what_is_no_sink_since_its_gemm_is_shared_says_so():
    report = one_reduced.explain("sm_90a", M=8192, D=4096, V=128)
    (why,) = {u["why"] for u in report.json()["unfused"]}
    assert why == (
        "its operand shares a GEMM with other columns, and alone in one would change the modelled "
        "time by +30.1 µs, launches by +1 and bytes by +62.9 MB"
    )


@coda.block
def typed(x: T["M D"], w: T["V D"], v: T["V D"], s: T["H D"], b: T["H"]):
    """Mamba-2's projections: z and x in bf16, and dt, a softplus, in float32."""
    dt = (x @ s.T + b).cast(coda.f32)
    dt = coda.maximum(dt, 0.0) + coda.log(1 + coda.exp(-abs(dt)))
    return x @ w.T, x @ v.T, dt


@pytest.mark.parametrize(
    ("sizes", "gemms"),
    [({"M": 8192, "D": 4096, "V": 8192, "H": 128}, 2), ({"M": 6, "D": 16, "V": 40, "H": 8}, 1)],
)
def test_siblings_of_other_types_share_a_gemm_if_that_costs_less(sizes, gemms):
    """A matrix of float32 as wide as z, x and dt is 600 MB, and one more launch is not."""
    program = typed.lower("sm_90a", sizes)
    assert len(program.kernels) == gemms
    stored = [b.nbytes(program.sizes) for b in program.buffers.values() if b.kind == "output"]
    exact = sizes["M"] * (2 * 2 * sizes["V"] + 4 * sizes["H"])
    assert (sum(stored) == exact) == (gemms == 2)
