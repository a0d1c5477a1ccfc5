"""Values at the edges of float32, and how kernels are held against the reference and float64."""

import math

import torch

from coda.frontend.tensor import Tensor
from coda.ir.evaluate import evaluate
from coda.ir.graph import Reduce
from coda.ir.monoids import MONOIDS
from coda.runtime.simulate import device

INF, NAN = math.inf, math.nan
VALUES = (0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 2.5, 3.0, -3.5, 17.0, -40.0, 100.0, -100.0)
TINY = (1e-3, -1e-3, 6e-8, 1e-20, -1e-20, 1.2e-38, 1e-40, -1e-40)
LARGE = (448.0, -480.0, 65504.0, 65520.0, -7e4, 2e5, -3e6, 8388608.0, -1.3e7, 1e38, 3e38, -3e38)
EDGES = torch.tensor([*VALUES, *TINY, *LARGE, INF, -INF, NAN])


def pairs(columns=43):
    """Two matrices in which every edge meets every other one, [M, columns] with a prime of rows."""
    a, b = torch.cartesian_prod(EDGES, EDGES).T
    rows = next(m for m in (31, 37, 41, 43) if m * columns >= len(a))
    return tuple(x.repeat(2)[: rows * columns].reshape(rows, columns).contiguous() for x in (a, b))


def rows_of_edges(columns, generator):
    """Matrices of which each row is hostile to some reduction, [M, columns]."""
    plain = torch.randn(columns, generator=generator)
    made = [torch.full((columns,), v) for v in (-INF, INF, NAN, 0.0, -0.0, 1e6, 12345.678)]
    made += [torch.full((columns,), v) for v in (-1e30, -3e38 / columns, 1e-40, -1.5)]
    made += [plain, plain + 3e4, plain * (8e18 / columns**0.5), plain * 1e-18]
    for ends in ((INF, -INF), (INF, INF), (-INF, -INF), (NAN, INF), (3e38, 1.0), (88.0, -200.0)):
        for places in ((0, columns - 1), (columns // 2, 1)):
            row = plain.clone()
            row[list(places)] = torch.tensor(ends)
            made.append(row)
    one = torch.full((columns,), -INF)
    one[columns - 1] = 2.0
    return torch.stack([*made, one])


def differ(found, expected, slack):
    """Where two tensors differ: NaN and infinities exactly, numbers by more than `slack`."""
    found, expected = found.double(), expected.double()
    number = found.isfinite() & expected.isfinite()
    same = (found == expected) | (found.isnan() & expected.isnan())
    return ~torch.where(number, (found - expected).abs() <= slack, same)


def run(block, inputs, arch, sizes=None):
    """What a block's kernels give, its reference backend, and float64 rounded once, by name."""
    reference = block(*inputs, backend="reference", arch=arch)
    with device(arch, checks="raise"):
        found = block(*inputs, backend="sim", arch=arch)
    known = dict(zip(block.graph.inputs, inputs, strict=True))
    exact = evaluate(block.graph.roots, known, sizes or sizes_of(block, inputs))
    names = [name for name, _ in block.graph.outputs]
    return found, reference, dict(zip(names, exact, strict=True))


def sizes_of(block, inputs):
    """The sizes of symbols that are axes of the arguments."""
    pairs = zip(block.graph.inputs, inputs, strict=True)
    return {str(d): n for i, x in pairs for d, n in zip(i.shape, x.shape, strict=True)}


def stays_inside(y):
    """Rows [M, 1] of which no product of some values leaves float32."""
    size = y.double().abs().log2()
    above, below = size.clamp(min=0).sum(1, keepdim=True), size.clamp(max=0).sum(1, keepdim=True)
    return y.isnan().any(1, keepdim=True) | ((above < 127) & (below > -126))


def each_fold(y):
    """Each reduction of rows; a fold of pairs has them as scores, and as scores and values."""
    found = {}
    for fn, monoid in MONOIDS.items():
        values = {"": None}
        if monoid.of_pairs:
            values = {"": y.node, "_of_two": (y * 0.5 + 1.0).node}
        found |= {fn + name: Tensor(Reduce(fn, y.node, -1, v)) for name, v in values.items()}
    return found
