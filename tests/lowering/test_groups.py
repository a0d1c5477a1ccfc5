"""The kernels of what is no contraction, by the baseline: what no kernel can do is split."""

import coda
from coda.lowering.program.cost import pointwise_fused
from coda.lowering.program.groups import groups

M, D = 2048, 1024
SIZES = {"M": M, "D": D}
MATRIX = 2 * M * D


def kernels(block):
    """(matrices read, matrices written, partials, folds) of each kernel of a block."""
    found = groups(block.graph, SIZES)
    return [(*map(matrices, (g.reads, g.writes)), len(g.parts), len(g.folds)) for g in found]


def matrices(nodes):
    return sum(n.nbytes(SIZES) == MATRIX for n in nodes)


def test_a_row_is_normalised_by_one_kernel():
    @coda.block
    def norm(x: coda.Tensor["M D"], w: coda.Tensor["D"]):
        return coda.softmax(coda.rms_norm(x, w))

    assert kernels(norm) == [(1, 1, 0, 0)]


def test_a_mean_of_all_ends_a_kernel_and_what_reads_it_reads_again():
    @coda.block
    def scaled(x: coda.Tensor["M D"]):
        return x * coda.sigmoid(coda.mean(x.reshape(x.shape[0] * x.shape[1])))

    assert sorted(kernels(scaled)) == [(0, 0, 0, 1), (1, 0, 1, 0), (1, 1, 0, 0)]
    assert pointwise_fused(scaled.graph, SIZES).hbm_bytes == 3 * MATRIX + 2 * 2


def test_what_comes_before_a_fold_is_computed_again():
    """Of tanh(x) the last kernel reads x, and that of x and y is stored: three matrices or two."""

    @coda.block
    def one(x: coda.Tensor["M D"]):
        y = coda.tanh(x)
        return y * coda.mean(y.reshape(y.shape[0] * y.shape[1]))

    @coda.block
    def three(x: coda.Tensor["M D"], y: coda.Tensor["M D"], z: coda.Tensor["M D"]):
        y = x * y + z
        return y * coda.mean(y.reshape(y.shape[0] * y.shape[1]))

    assert sorted(kernels(one)) == [(0, 0, 0, 1), (1, 0, 1, 0), (1, 1, 0, 0)]
    assert sorted(kernels(three)) == [(0, 0, 0, 1), (1, 1, 0, 0), (3, 1, 1, 0)]


def test_sums_that_are_returned_are_folded_by_one_kernel():
    @coda.block
    def both(x: coda.Tensor["M D"], y: coda.Tensor["M D"]):
        z = x * y
        return coda.sum(z, axis=0), coda.sum(x + z, axis=0).cast(coda.f32)

    assert kernels(both) == [(2, 0, 2, 0), (0, 0, 0, 2)]


def test_a_number_for_each_row_is_reduced_by_one_cta():
    @coda.block
    def mean(loss: coda.Tensor["M", coda.f32], mask: coda.Tensor["M", coda.f32]):
        return coda.sum(loss * mask) / coda.sum(mask)

    assert len(groups(mean.graph, {"M": M})) == 1


def test_the_parts_of_a_group_that_nothing_connects_any_more_stay_one_kernel():
    """Two rows' statistics that meet in a scalar alone: without the scalar they are apart."""

    @coda.block
    def ratio(x: coda.Tensor["M D"], y: coda.Tensor["M D"]):
        return coda.mean(coda.sum(coda.exp(x)) * 2, axis=0) / coda.mean(coda.sum(y), axis=0)

    assert kernels(ratio) == [(2, 0, 2, 0), (0, 0, 0, 2)]
