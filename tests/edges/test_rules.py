"""Every rule of the importer where its operator bends, overflows or has no number to give.

Values and gradients are held against torch's own in each float type. A rule without a row fails.
"""

import itertools
import math

import pytest
import torch

from coda.frontend.torch_import.decompose import DECOMPOSED
from coda.frontend.torch_import.operators import RULES
from tests.edges.held import differences, of_block, of_coda, of_torch, take, wide

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where some function bends or is rounded to another number in 16 bits.
CONSTANTS = (0.01, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 6.0, 14.0, 20.0)
SOME = (-math.inf, -3.0, -1.0, -0.3, -0.0, 0.0, 0.3, 1.0, 2.0, math.inf, math.nan)


def edges(dtype):
    """A matrix [N, 8] of numbers at which functions are wrong first."""
    info = torch.finfo(dtype)
    near = torch.tensor(CONSTANTS, dtype=torch.float64).to(dtype)
    up, down = (torch.nextafter(near, near * 0 + end) for end in (info.max, 0.0))
    subnormal = info.smallest_normal * info.eps
    special = [0.0, math.inf, subnormal, info.smallest_normal, info.max, info.max / 4, 1e3, 100.0]
    positive = torch.cat([near, up, down, torch.tensor(special, dtype=torch.float64).to(dtype)])
    flat = torch.cat([positive, -positive, torch.full((2,), math.nan, dtype=dtype)])
    return torch.cat([flat, flat[: -len(flat) % 8]]).reshape(-1, 8)


def pairs(dtype):
    """Two matrices [N, 11] with every pair of some numbers."""
    found = torch.tensor(list(itertools.product(SOME, SOME)), dtype=torch.float64).to(dtype)
    return found[:, 0].reshape(-1, len(SOME)), found[:, 1].reshape(-1, len(SOME))


def rows(dtype):
    """Rows [N, 8]: ordinary ones, and with one or two numbers that break sums."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=g)
    for i, odd in enumerate((math.inf, -math.inf, math.nan, 1e3, -1e3, 0.0, 60.0)):
        x[i, i % 8] = odd
    x[7] = 0.0
    x[8] = -math.inf
    x[9] = 2.0  # all are the largest
    x[10, 2] = x[10, 5] = 3.0
    x[11], x[12] = x[11] * 1e-4, x[12] * 1e-6
    x[13, :2] = math.inf
    return x.to(dtype)


def without_inf(dtype):
    """The same rows without +inf."""
    x = rows(dtype)
    return torch.where(x == math.inf, 5.0, x)


PLAIN = (
    aten.neg.default, aten.abs.default, aten.exp.default, aten.exp2.default, aten.expm1.default,
    aten.log.default, aten.log1p.default, aten.sqrt.default, aten.rsqrt.default,
    aten.reciprocal.default, aten.square.default, aten.tanh.default, aten.sigmoid.default,
    aten.erf.default, aten.sin.default, aten.cos.default, aten.relu.default, aten.relu6.default,
    aten.silu.default, aten.mish.default, aten.hardsigmoid.default, aten.hardswish.default,
    aten.log_sigmoid.default, aten.selu.default,
    aten.floor.default, aten.ceil.default, aten.trunc.default, aten.round.default,
    aten.sign.default, aten.sgn.default, aten.frac.default, aten.isnan.default,
    aten.isinf.default, aten.isfinite.default, aten.erfc.default, aten.log2.default,
    aten.log10.default, aten.tan.default, aten.atan.default, aten.deg2rad.default,
    aten.rad2deg.default, aten.special_ndtr.default,
    aten.logical_not.default, aten.asin.default, aten.acos.default, aten.sinh.default,
    aten.cosh.default, aten.asinh.default, aten.acosh.default, aten.atanh.default,
    aten.signbit.default, aten.sinc.default, aten.isposinf.default,
    aten.isneginf.default,
)  # fmt: skip
SOFTMAXES = (
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default,
    aten.cross_entropy_loss.default,
)  # fmt: skip
# Operators of one tensor and numbers.
OF_ONE = {
    **{op: [()] for op in PLAIN},
    aten.gelu.default: [(), {"approximate": "tanh"}],
    aten.softplus.default: [(), (0.5, 3.0), (2.0, 0.3)],
    aten.leaky_relu.default: [(), (0.3,)],
    aten.elu.default: [(), (2.0,), (0.3, 1.5, 0.5)],
    aten.celu.default: [(), (2.0,)],
    aten.hardtanh.default: [(), (0.0, 6.0), (0.1, 0.3)],
    aten.clamp.default: [(-1.0, 1.0), (0.1, 0.3), (None, 0.1), (0.3,), (0.5, -0.5)],
    aten.clamp_min.default: [(0.0,), (0.1,)],
    aten.clamp_max.default: [(0.0,), (0.1,)],
    aten.pow.Tensor_Scalar: [(n,) for n in (0, 0.5, -0.5, 1, 2, 3, -1, -2, 4, 0.0, 2.0)],
    aten.nan_to_num.default: [(), (0.1, 3.0, -3.0)],
    aten.logit.default: [(), (0.1,)],
    aten.hardshrink.default: [(), (0.3,)],
    aten.softshrink.default: [(), (0.3,)],
    aten.threshold.default: [(0.1, 0.3)],
    aten.fmod.Scalar: [(0.3,), (-2.0,), (0.0,), (math.inf,)],
    aten.remainder.Scalar: [(0.3,), (-2.0,), (0.0,), (math.inf,)],
    aten.copysign.Scalar: [(0.3,), (-0.0,)],
    aten.add.Scalar: [(0.1,), (math.inf,), (1, 2)],
    aten.sub.Scalar: [(0.1,), (1, 2)],
    aten.mul.Scalar: [(0.1,), (0.0,), (math.inf,)],
    aten.div.Scalar: [(0.1,), (3,), (0.0,), (math.inf,), (1e-40,), (3e38,)],
    aten.rsub.Scalar: [(0.1,), (1, 2)],
    **{
        getattr(aten, fn).Scalar: [(0.1,), (0.3,), (0,), (1e6,), (math.nan,)]
        for fn in ("eq", "ne", "lt", "le", "gt", "ge")
    },
}  # fmt: skip

CONDITION = torch.tensor([True, False] * 61)[:121].reshape(-1, 11)
# Operators of two tensors; functions where they take a condition as well.
OF_TWO = {
    **dict.fromkeys(
        (
            aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Tensor,
            aten.maximum.default, aten.minimum.default, aten.eq.Tensor, aten.ne.Tensor,
            aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.fmax.default,
            aten.fmin.default, aten.atan2.default, aten.pow.Tensor_Tensor,
            aten.clamp_min.Tensor,
            aten.clamp_max.Tensor, aten.true_divide.Tensor,
            aten.fmod.Tensor, aten.remainder.Tensor,
            aten.copysign.Tensor, aten.hypot.default, aten.logaddexp.default,
            aten.logaddexp2.default, aten.xlogy.Tensor, aten.special_xlog1py.default,
            aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default,
        ),
        None,
    ),
    aten.div.Tensor_mode: lambda op, x, y: op(x, y, rounding_mode="floor")
    * op(x, y, rounding_mode="trunc"),
    aten.div.Scalar_mode: lambda op, x, y: op(x, -0.3, rounding_mode="floor") + y,
    aten.floor_divide.default: lambda op, x, y: op(x.detach(), y.detach()) * x,
    aten.floor_divide.Scalar: lambda op, x, y: op(x.detach(), -0.3) * y,
    aten.heaviside.default: lambda op, x, y: op(x.detach(), y.detach()) * x,
    aten.remainder.Scalar_Tensor: lambda op, x, y: op(2.0, x.detach()) + y,
    aten.ldexp.Tensor: lambda op, x, y: op(x, y),
    aten.dot.default: lambda op, x, y: op(x[4, :5], y[4, :5]),
    aten.vdot.default: lambda op, x, y: op(x[4, :5], y[4, :5]),
    aten.addr.default: lambda op, x, y: op(x, x[0], y[0], beta=0.5),
    aten.dist.default: lambda op, x, y: op(x[4:6, 1:4], y[4:6, 1:4]),
    aten.binary_cross_entropy_with_logits.default: lambda op, x, y: op(x, y, None, None, 0),
    aten.addcdiv.default: lambda op, x, y: op(x, y, y + 3.0, value=0.3),
    aten.lerp.Scalar: lambda op, x, y: op(x, y, 0.3),
    aten.lerp.Tensor: lambda op, x, y: op(x, y, y * 0.3),
    aten.pow.Scalar: lambda op, x, y: op(2.0, x) + y,
    aten.clamp.Tensor: lambda op, x, y: op(x, y, y + 1.0),
    aten.where.Scalar: lambda op, x, y: op(x > 0.3, 0.1, 0.2).to(x.dtype) * x + y,
    aten.masked_fill.Tensor: lambda op, x, y: op(x, y > 0.3, y[0, 0]),
    aten.prelu.default: lambda op, x, y: op(x, y[0]),
    aten.bitwise_and.Tensor: lambda op, x, y: op(x > 0.3, y > 0.3),
    aten.bitwise_or.Tensor: lambda op, x, y: op(x > 0.3, y > 0.3),
    aten.bitwise_xor.Tensor: lambda op, x, y: op(x > 0.3, y > 0.3),
    aten.bitwise_not.default: lambda op, x, y: op(x > y),
    aten.mse_loss.default: lambda op, x, y: op(x, y, 0),
    aten.smooth_l1_loss.default: lambda op, x, y: op(x, y, 0, 0.3),
    aten.huber_loss.default: lambda op, x, y: op(x, y, 0, 0.3),
    aten.addcmul.default: lambda op, x, y: op(x, y, y, value=0.3),
    aten.where.self: lambda op, x, y: op(x > 0.3, x, y),
    aten.where.ScalarOther: lambda op, x, y: op(y > 0.3, x, 0.1) + x,
    aten.where.ScalarSelf: lambda op, x, y: op(x > 0.3, 0.1, y),
    aten.masked_fill.Scalar: lambda op, x, y: op(x, y > 0.3, 0.1),
}  # fmt: skip
LABELS = torch.tensor([0, 3, 1, 7, 1, 2, 5, 6, 4, 0, 2, 1, 3, 0, 7, 4])
# Functions of rows.
OF_ROWS = {
    aten.softmax.int: lambda op, x: op(x, -1),
    aten._softmax.default: lambda op, x: op(x, -1, False),
    aten.log_softmax.int: lambda op, x: op(x, 1),
    aten._log_softmax.default: lambda op, x: op(x, 1, False),
    aten.logsumexp.default: lambda op, x: op(x, [-1]),
    aten.mean.dim: lambda op, x: op(x, [-1]),
    aten.sum.dim_IntList: lambda op, x: op(x, [-1], True),
    aten.amax.default: lambda op, x: op(x, [-1]),
    aten.amin.default: lambda op, x: op(x, [-1]),
    aten.var.dim: lambda op, x: op(x, [-1], False),
    aten.var.correction: lambda op, x: op(x, [-1], correction=0),
    aten.prod.dim_int: lambda op, x: op(x, -1),
    aten.argmax.default: lambda op, x: op(x, -1),
    aten.argmin.default: lambda op, x: op(x, 1, True),
    aten.std.dim: lambda op, x: op(x, [-1]),
    aten.std.correction: lambda op, x: op(x, [-1], correction=0),
    aten.linalg_vector_norm.default: lambda op, x: op(x, 2, [-1]),
    aten.norm.ScalarOpt_dim: lambda op, x: op(x, 1, [-1], True),
    aten.glu.default: lambda op, x: op(x, -1),
    aten.addmv.default: lambda op, x: op(x[:, 0], x, x[0]),
    aten.mv.default: lambda op, x: op(x, x[0]),
    aten.layer_norm.default: lambda op, x: op(x, [8]),
    aten.rms_norm.default: lambda op, x: op(x, [8]),
    aten._fused_rms_norm.default: lambda op, x: op(x, [8], None, None)[0],
    aten.cross_entropy_loss.default: lambda op, x, labels: op(x, labels, None, 0),
    aten.nll_loss.default: lambda op, x, labels: op(x, labels, None, 0),
    aten.nll_loss_nd.default: lambda op, x, labels: op(x, labels, None, 0),
    aten.linear.default: lambda op, x: op(x, x[:4]),
    aten.matmul.default: lambda op, x: op(x, x[:8]),
    aten.mm.default: lambda op, x: op(x, x[:8]),
    aten.addmm.default: lambda op, x: op(x[0], x, x[:8], beta=0.3, alpha=0.1),
    aten.bmm.default: lambda op, x: op(x[None], x[None, :8]),
    aten.baddbmm.default: lambda op, x: op(x[None], x[None], x[None, :8], beta=0.3, alpha=0.1),
    aten.einsum.default: lambda op, x: op("ij,kj->ik", [x, x[:3]]),
}
OF_ROWS |= {
    aten.sum.default: lambda op, x: op(x.reshape(4, 4, 8)[:, 1:]) + op(x[3]),
    aten.mean.default: lambda op, x: op(x[7:]),
    aten.max.default: lambda op, x: op(x) + op(x[9]),
    aten.min.default: lambda op, x: op(x) + op(x[9]),
    aten.prod.default: lambda op, x: op(x[9]),
    aten.max.dim: lambda op, x: op(x, 0),
    aten.min.dim: lambda op, x: op(x, -1, True),
    aten.aminmax.default: lambda op, x: op(x, dim=0),
    aten.any.default: lambda op, x: op(x),
    aten.any.dim: lambda op, x: op(x, 1),
    aten.any.dims: lambda op, x: op(x, [0], True),
    aten.all.default: lambda op, x: op(x),
    aten.all.dim: lambda op, x: op(x, 1),
    aten.all.dims: lambda op, x: op(x, [0], True),
    aten.var.default: lambda op, x: op(x[9:13]),
    aten.std.default: lambda op, x: op(x[9:13], False),
    aten.var_mean.correction: lambda op, x: op(x[9:13], [0], correction=0),
    aten.var_mean.dim: lambda op, x: op(x[9:13], [-1]),
    aten.var_mean.default: lambda op, x: op(x[9:13]),
    aten.std_mean.correction: lambda op, x: op(x[9:13], [0, 1]),
    aten.std_mean.dim: lambda op, x: op(x[9:13], [0]),
    aten.std_mean.default: lambda op, x: op(x[9:13]),
    aten.norm.Scalar: lambda op, x: op(x[9:13], 2),
    aten.cumsum.default: lambda op, x: op(x[7:], 0),
    aten.index.Tensor: lambda op, x, labels: op(x, [labels[:4], labels[4:8]]),
    aten.gather.default: lambda op, x, labels: op(op(x, 1, labels[:, None]), 0, labels[:, None]),
    aten.take.default: lambda op, x, labels: op(x, labels),
    aten.index_select.default: lambda op, x, labels: op(x, 1, labels[:3]),
}
# What moves elements, or only their types.
OF_WHOLES = {
    aten.view.default: lambda op, x: op(x, [x.shape[0], 2, 4]),
    aten.reshape.default: lambda op, x: op(x, [-1, 4]),
    aten._unsafe_view.default: lambda op, x: op(x, [x.shape[0], 2, 4]),
    aten.flatten.using_ints: lambda op, x: op(x, 0, 1),
    aten.unflatten.int: lambda op, x: op(x, 1, [2, 4]),
    aten.unsqueeze.default: lambda op, x: op(x, 1),
    aten.squeeze.default: lambda op, x: op(x[:, None]),
    aten.squeeze.dim: lambda op, x: op(x[:, None], 1),
    aten.squeeze.dims: lambda op, x: op(x[:, None], [1]),
    aten.alias.default: lambda op, x: op(x),
    aten.detach.default: lambda op, x: op(x) * x,
    aten.tril.default: lambda op, x: op(x, 1),
    aten.triu.default: lambda op, x: op(x, -1),
    aten.roll.default: lambda op, x: op(x, [3, -1], [1, 0]),
    aten.rot90.default: lambda op, x: op(x, 1, [0, 1]),
    aten.pixel_shuffle.default: lambda op, x: op(x[:8].reshape(1, 4, 2, 8), 2),
    aten.pixel_unshuffle.default: lambda op, x: op(x[:8].reshape(1, 1, 8, 8), 2),
    aten.channel_shuffle.default: lambda op, x: op(x[:8].reshape(1, 4, 2, 8), 2),
    aten.narrow_copy.default: lambda op, x: op(x, 1, 2, 3),
    aten.flip.default: lambda op, x: op(x, [0, 1]),
    aten.repeat.default: lambda op, x: op(x, [2, 1, 3]),
    aten.constant_pad_nd.default: lambda op, x: op(x, [1, -2, 0, 3], 0.1),
    aten.slice_scatter.default: lambda op, x: op(x, x[:, :3] * 2, 1, 1, 4),
    aten.select_scatter.default: lambda op, x: op(x, x[0] * 2, 0, -2),
    aten.fill.Scalar: lambda op, x: op(x, 0.1) * x,
    aten.fill.Tensor: lambda op, x: op(x, x[0, 0]),
    aten.zeros_like.default: lambda op, x: op(x) + x,
    aten.ones_like.default: lambda op, x: op(x) * x,
    aten.full_like.default: lambda op, x: op(x, 0.1) * x,
    aten.new_zeros.default: lambda op, x: op(x, [3, 8]) + x[:3],
    aten.new_ones.default: lambda op, x: op(x, [3, 8]) * x[:3],
    aten.new_full.default: lambda op, x: op(x, [8], 0.3) * x,
    aten.zeros.default: lambda op, x: op([8]) + x,
    aten.ones.default: lambda op, x: op([8]) * x,
    aten.full.default: lambda op, x: op([8], 0.3) * x,
    aten.alias_copy.default: lambda op, x: op(x),
    aten.view_copy.default: lambda op, x: op(x, [-1, 4]),
    aten.expand_copy.default: lambda op, x: op(x[:, None], [-1, 3, -1]),
    aten.permute_copy.default: lambda op, x: op(x, [1, 0]),
    aten.transpose_copy.int: lambda op, x: op(x, 0, 1),
    aten.t_copy.default: lambda op, x: op(x),
    aten.unsqueeze_copy.default: lambda op, x: op(x, 1),
    aten.squeeze_copy.default: lambda op, x: op(x[:, None]),
    aten.squeeze_copy.dim: lambda op, x: op(x[:, None], 1),
    aten.squeeze_copy.dims: lambda op, x: op(x[:, None], [1]),
    aten.slice_copy.Tensor: lambda op, x: op(x, 1, 1, 8, 3),
    aten.select_copy.int: lambda op, x: op(x, 1, -2),
    aten.split_copy.Tensor: lambda op, x: op(x, 3, 1)[2],
    aten.split_with_sizes_copy.default: lambda op, x: op(x, [5, 3], 1)[1],
    aten.unbind_copy.int: lambda op, x: op(x, 1)[3],
    aten.expand_as.default: lambda op, x: op(x[:1], x),
    aten.broadcast_to.default: lambda op, x: op(x[:1], [3, 8]),
    aten.view_as.default: lambda op, x: op(x, x[None]),
    aten.reshape_as.default: lambda op, x: op(x, x[None]),
    aten.movedim.int: lambda op, x: op(x[None], 0, 1),
    aten.swapaxes.default: lambda op, x: op(x, 0, 1),
    aten.mT.default: lambda op, x: op(x[None]),
    aten.unsafe_split.Tensor: lambda op, x: op(x, 3, 1)[2],
    aten.unsafe_chunk.default: lambda op, x: op(x, 3, 1)[1],
    aten.clone.default: lambda op, x: op(x),
    aten.contiguous.default: lambda op, x: op(x),
    aten.lift_fresh_copy.default: lambda op, x: op(x),
    aten.expand.default: lambda op, x: op(x[:, None], [-1, 3, -1]),
    aten.permute.default: lambda op, x: op(x, [1, 0]),
    aten.transpose.int: lambda op, x: op(x, 0, 1),
    aten.t.default: lambda op, x: op(x),
    aten.numpy_T.default: lambda op, x: op(x),
    aten.dropout.default: lambda op, x: op(x, 0.5, False),
    aten.slice.Tensor: lambda op, x: op(x, 1, 1, 8, 3),
    aten.select.int: lambda op, x: op(x, 1, -2),
    aten.narrow.default: lambda op, x: op(x, 1, 2, 3),
    aten.split.Tensor: lambda op, x: op(x, 3, 1)[2],
    aten.split_with_sizes.default: lambda op, x: op(x, [5, 3], 1)[1],
    aten.chunk.default: lambda op, x: op(x, 3, 1)[1],
    aten.unbind.int: lambda op, x: op(x, 1)[3],
    aten.cat.default: lambda op, x: op([x, x[:, :3]], 1),
    aten.stack.default: lambda op, x: op([x, x], -1),
    aten._to_copy.default: lambda op, x: op(x, dtype=torch.float32),
    aten.to.dtype: lambda op, x: op(x, torch.float32),
    aten.to.dtype_layout: lambda op, x: op(x, dtype=torch.float32),
    aten.type_as.default: lambda op, x: op(x, x.to(torch.float32)),
}
# What chooses or moves gives torch's own numbers, to a rounding.
CHOICES = {
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.leaky_relu.default, aten.abs.default,
    aten.neg.default, aten.maximum.default, aten.minimum.default, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, *OF_WHOLES,
}  # fmt: skip


def finite_first(dtype):
    """Pairs whose first number is finite, and whose second is a number."""
    x, y = pairs(dtype)
    return x.nan_to_num(0.5, 2.0, -2.0), y.nan_to_num(0.5, math.inf, -math.inf)


def few_of(dtype):
    """Numbers whose products with π and with each other are finite."""
    return edges(dtype).clamp(-1e3, 1e3)


def inside(dtype):
    """Pairs of which no logarithm is infinite where it is multiplied by 0."""
    x, y = pairs(dtype)
    return x, torch.where((x == 0) & ((y == 0) | (y == -1) | (y == math.inf)), 0.5, y)


# Where torch's own number is one of several: what is left out of the values, and why.
TAME = {
    # Of an infinite dividend torch's derivative is NaN, or infinite; a NaN's sign is no one's.
    (aten.remainder.Tensor,): finite_first,
    (aten.copysign.Tensor,): finite_first,
    # Of an infinite angle there is no sine.
    (aten.sinc.default,): few_of,
    # A derivative is infinite or NaN where the value is 0.
    (aten.xlogy.Tensor,): inside,
    (aten.special_xlog1py.default,): inside,
    **{
        (aten.copysign.Scalar, n): lambda dtype: edges(dtype).nan_to_num(0.5).clamp(-60, 60)
        for n in (0.3, -0.0)
    },
    # The remainder of a number of 10³⁸ is in torch's vectors that of another.
    (aten.fmod.Scalar, 0.3): lambda dtype: edges(dtype).clamp(-60, 60),
    (aten.remainder.Scalar, 0.3): lambda dtype: edges(dtype).clamp(-60, 60),
    # Below 0 there is no value; of -0 and -inf torch takes the other side of the pole.
    (aten.pow.Tensor_Scalar, -0.5): lambda dtype: edges(dtype).abs(),
    # d · x overflows at the largest number before it meets the other's derivative, which is 0.
    (aten.mish.default,): lambda dtype: edges(dtype) / 4,
    (aten.silu.default,): lambda dtype: edges(dtype) / 4,
    # Beside an infinity, where the variance is NaN, a derivative is infinite in torch or NaN.
    (aten.var.dim,): lambda dtype: rows(dtype).clamp(-5, 5),
    (aten.var.correction,): lambda dtype: rows(dtype).clamp(-5, 5),
    # Outside of its domain torch's derivative is that of the formula, or NaN.
    (aten.logit.default,): lambda dtype: edges(dtype).clamp(0, 1),
    # Of a row with infinities torch has the product of the others if any row has a 0.
    (aten.prod.dim_int,): lambda dtype: rows(dtype).nan_to_num(1.0).clamp(-5, 5),
    # If it is NaN, its gradient is NaN all over, as that of amax; torch gives it to the NaNs.
    (aten.max.default,): lambda dtype: rows(dtype).nan_to_num(0.5),
    (aten.min.default,): lambda dtype: rows(dtype).nan_to_num(0.5),
    # With +inf among its values a row is NaN all over in torch; by its logsumexp it is 0 beside it.
    **{(op,): without_inf for op in SOFTMAXES},
}


def cases():
    """(operator, name, function, what makes its tensors in a type)."""
    for op, options in OF_ONE.items():
        for given in options:
            args, named = ((), given) if isinstance(given, dict) else (given, {})
            fn = lambda x, op=op, args=args, named=named: op(x, *args, **named)  # noqa: E731
            made = TAME.get((op, *args), edges)
            yield op, f"{op} {given}", fn, lambda dtype, made=made: [made(dtype)]
    for op, written in OF_TWO.items():
        fn = lambda x, y, op=op, w=written: w(op, x, y) if w else op(x, y)  # noqa: E731
        yield op, str(op), fn, TAME.get((op,), pairs)
    for table, made in ((OF_ROWS, rows), (OF_WHOLES, edges)):
        for op, written in table.items():
            more = [LABELS] if written.__code__.co_argcount == 3 else []
            tame = TAME.get((op,), made)
            fn = lambda *ts, op=op, w=written: w(op, *ts)  # noqa: E731
            yield op, str(op), fn, lambda dtype, made=tame, more=more: [made(dtype), *more]


CASES = list(cases())


def test_every_rule_has_a_row():
    assert {op for op, *_ in CASES} == {*RULES, *DECOMPOSED}


def hold(case, dtype, run):
    op, _, fn, made = case
    tensors = list(made(dtype))
    taken = take(fn, tensors)
    assert op in taken.operators
    theirs = of_torch(fn, tensors)
    exact = theirs if op in CHOICES else of_torch(fn, wide(tensors))
    assert not differences(run(taken, tensors), theirs, exact)


def types(quick):
    """The types, of which all but one are for the long run."""
    return [pytest.param(d, id=str(d), marks=[pytest.mark.slow] * (d != quick)) for d in DTYPES]


@pytest.mark.parametrize("dtype", types(torch.bfloat16))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[1])
def test_a_rule_at_its_edges(case, dtype):
    """What the rule says, and the derivative of that."""
    hold(case, dtype, of_coda)


@pytest.mark.parametrize("dtype", types(torch.float32))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[1])
def test_a_block_of_a_rule_at_its_edges(case, dtype):
    """What kernels compute of it, forward and backward, by backend reference."""
    hold(case, dtype, of_block)
