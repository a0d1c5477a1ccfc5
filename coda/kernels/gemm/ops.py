"""Epilogue ops that quack does not have: positions, group statistics, moments, stores of pairs.

Two more correct quack's: a log Σ exp that is +inf and not NaN for +inf, and a selection by column
index that is NaN for an index out of range.
"""

from __future__ import annotations

import math
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int64, Uint32, const_expr
from quack import layout_utils
from quack.compile_utils import div_for_dtype, fake_batched
from quack.epilogue.ops import (
    ColVecReduce,
    ColVecSelect,
    EpiOp,
    GroupedColStatsBase,
    OnlineLSEReduce,
    TileStore,
    _dup_s16sat_from_s32,
    _selp_pair_f16x2,
)

from coda.kernels.device_folds import moments_merge, pivot, weighted, weighted_merge

_F16_NAN = 0x7FFF  # equals no index


class Given(EpiOp):
    """An op whose argument is known when a kernel is compiled: a launch passes nothing."""

    def host_arg_key(self, value: Any) -> Any:
        return value

    def host_fake_arg(self, key: Any, fctx: Any) -> Any:
        return key

    def host_call_arg(self, value: Any, key: Any) -> Any:
        return None

    def host_arg_form(self, value: Any) -> str:
        return "Const"

    def arg_spec_type(self, const: bool = False) -> Any:
        return cutlass.Constexpr[int]

    def param_fields(self) -> Any:
        return [(self.name, object, None)]

    def to_params(self, gemm: Any, args: Any) -> Any:
        return {self.name: None}


class Number(Given):
    """row // inner % count, or the column, in float32: a `Position` of the Program.

    Rows are those of all matrices of a batch, one matrix after another. It loads nothing.

    Args:
        name: of the epilogue's parameter.
        axis: "row" or "column".
        inner, count: as in `Position`.
    """

    fn_port = "value"

    def __init__(self, name: str, axis: str, inner: int, count: int) -> None:
        super().__init__(name)
        self.axis, self.inner, self.count = axis, inner, count

    def config_key(self) -> Any:
        return self.axis, self.inner, self.count

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        """The coordinates of a thread's elements in the tile, and the tile's first number."""
        coordinates = ctx.partition_for_epilogue_fn(
            cute.make_identity_tensor((ctx.tile_M, ctx.tile_N))
        )
        if const_expr(ctx.tiled_copy_t2r is not None):
            coordinates = ctx.tiled_copy_r2s.retile(coordinates)
        batch = ctx.tile_coord_mnkl[3]
        if const_expr(self.axis == "row"):
            first = ctx.tile_coord_mnkl[0] * ctx.tile_M
            first = first + batch * ctx.varlen_manager.len_m(batch)
        else:
            first = ctx.tile_coord_mnkl[1] * ctx.tile_N
        return cute.group_modes(coordinates, 3, cute.rank(coordinates)), first

    @cute.jit
    def begin_loop(self, gemm: Any, state: Any, epi_coord: Any) -> Any:
        mine = state[0][None, None, None, epi_coord]
        made = cute.make_rmem_tensor(cute.make_layout(cute.size(mine)), Float32)
        for i in cutlass.range_constexpr(cute.size(mine)):
            number = state[1] + mine[i][0 if const_expr(self.axis == "row") else 1]
            if const_expr(self.inner > 1):
                number = number // self.inner
            if const_expr(self.count > 0):
                number = number % self.count
            made[i] = Float32(number)
        return made


class GroupSum(GroupedColStatsBase):
    """The sum over aligned groups of columns (heads), computed before the main pass."""

    @cute.jit
    def stat_value(self, total: Any, group_cols: Any) -> Any:
        return total


class GroupMean(GroupedColStatsBase):
    """The mean over aligned groups of columns (heads), computed before the main pass."""

    @cute.jit
    def stat_value(self, total: Any, group_cols: Any) -> Any:
        return total * Float32(const_expr(1.0 / group_cols))


class LogSumExp(OnlineLSEReduce):
    """log Σ exp over the columns of a tile; +inf if a value is +inf, as in torch (quack: NaN)."""

    @cute.jit
    def _guard_neg_inf(self, m_new: Any) -> Any:
        largest = cute.arch.fmin(m_new, Float32(3.4028234663852886e38))
        return Float32(cutlass.select_(m_new == Float32(self._NEG_INF), Float32(0.0), largest))


class Select(ColVecSelect):
    """The value of each row at its column index [M]; rows with an index out of range stay NaN.

    quack compares the low 32 bits of an index, also with padding columns of the last tile, and uses
    −inf for "not found". Here the whole index, of 32 or 64 bits, must be a column of the matrix,
    and "not found" is NaN, with which the host fills the result.
    """

    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        state = ColVecSelect.begin(self, gemm, param, smem_tensor, ctx)
        return (*state, ctx.varlen_manager.len_n())

    def begin_loop(self, gemm: Any, state: Any, epi_coord: Any) -> Any:
        return (*ColVecSelect.begin_loop(self, gemm, state[:-1], epi_coord), state[-1])

    def fn_sink_flush(self, gemm: Any, state: Any, frag: Any) -> Any:
        self.index, self.columns = state[0], state[-1]
        return ColVecSelect.fn_sink_flush(self, gemm, state[:-1], frag)

    @cute.jit
    def _select_packed16(
        self, frag: Any, result: Any, slot: Any, row: Any, near: Any, offs: Any, count: Any
    ) -> None:
        """Store the value whose column, one of `offs` + 1, equals `near`, if in range."""
        packed = _dup_s16sat_from_s32(near)
        value = Float32(math.nan)
        for j in cutlass.range_constexpr(0, count, 2):
            second = offs[j + 1] + 1 if j + 1 < count else _F16_NAN
            other = frag[slot, j + 1] if j + 1 < count else Float32(0.0)
            both = Uint32((offs[j] + 1) | (second << 16))
            value = _selp_pair_f16x2(packed, both, frag[slot, j], other, value)
        index = self.index[row]
        inside = (index >= 0) & (index < self.columns)
        if Boolean(inside) & (value == value):
            result[row] = value


class Moments(ColVecReduce):
    """Mean and Σ(x − mean)² over the columns of a tile, as one 64-bit word: (mean, M2) in float32.

    Each thread reduces its fragment in two passes (mean, then squared deviations), and fragments,
    lanes and warps are merged by Chan, Golub and LeVeque (1983). So large sums are never
    subtracted, whatever the mean.
    """

    reduce_planes = 3

    def __init__(self, name: str) -> None:
        super().__init__(name)

    @cute.jit
    def _end_loop_values(self, state: Any, epi_coord: Any) -> Any:
        return tuple(s[None, None, None, epi_coord[0], epi_coord[1]] for s in state[:3])

    @cute.jit
    def _end_loop_smem(self, state: Any) -> Any:
        return state[3]

    @cute.jit
    def _merge(self, vals: Any, others: Any) -> Any:
        count, mean, m2 = vals
        other_count, other_mean, other_m2 = others
        return moments_merge((count, mean, m2), (other_count, other_mean, other_m2))

    @cute.jit
    def _finalize(self, vals: Any) -> Any:
        pair = cute.make_rmem_tensor(2, Float32)
        pair[0] = vals[1]
        pair[1] = vals[2]
        return cute.recast_tensor(pair, Int64)[0]

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        vector = cute.make_layout((ctx.tile_M, ctx.tile_N), stride=self._broadcast_stride())
        layout = ctx.partition_for_epilogue_fn(cute.make_rmem_tensor(vector, Float32)).layout
        planes = tuple(cute.make_rmem_tensor(layout, Float32) for _ in range(3))
        columns = ctx.partition_for_epilogue_fn(cute.make_identity_tensor((ctx.tile_M, ctx.tile_N)))
        limit = ctx.varlen_manager.len_n() - ctx.tile_coord_mnkl[1] * ctx.tile_N
        return (*planes, smem_tensor, columns, limit)

    @cute.jit
    def begin_loop(self, gemm: Any, state: Any, epi_coord: Any) -> Any:
        planes = tuple(s[None, None, None, epi_coord[0], epi_coord[1]] for s in state[:3])
        if const_expr(epi_coord[1] == 0):
            for plane in planes:
                cute.filter_zeros(plane).fill(0.0)
        columns = state[4][None, None, None, epi_coord[0], epi_coord[1]]
        return (*planes, columns, state[5])

    @cute.jit
    def fn_sink_flush(self, gemm: Any, state: Any, frag: Any) -> Any:
        ref = state[0].layout
        counts, means, m2s = (
            layout_utils.convert_layout_zero_stride(s, ref)[None, 0] for s in state[:3]
        )
        values = layout_utils.convert_layout_zero_stride(frag, ref)
        columns = layout_utils.convert_layout_zero_stride(state[3], ref)
        limit = state[4]
        width = const_expr(cute.size(values, mode=[1]))
        for row in cutlass.range(cute.size(counts), unroll_full=True):
            count = Float32(0.0)
            total = Float32(0.0)
            near = pivot(values[row, 0], width)
            for j in cutlass.range_constexpr(width):
                inside = columns[row, j][1] < limit
                count = count + cutlass.select_(inside, Float32(1.0), Float32(0.0))
                total = total + cutlass.select_(inside, values[row, j] - near, Float32(0.0))
            mean = near + total / cute.arch.fmax(count, Float32(1.0))
            m2 = Float32(0.0)
            for j in cutlass.range_constexpr(width):
                inside = columns[row, j][1] < limit
                away = values[row, j] - mean
                m2 = m2 + cutlass.select_(inside, away * away, Float32(0.0))
            merged = self._merge((counts[row], means[row], m2s[row]), (count, mean, m2))
            counts[row] = merged[0]
            means[row] = merged[1]
            m2s[row] = merged[2]


class SoftmaxMean(Moments):
    """log Σ exp s and Σ exp(s) v / Σ exp s over the columns of a tile, as one 64-bit word.

    A thread folds its pairs of a score s and a value v online, as (largest s, Σ e, mean), which is
    rescaled once for each fragment. Columns outside of the matrix are (−inf, 0), without a weight.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.scaled = True  # the epilogue returns two values under one name

    @cute.jit
    def _merge(self, vals: Any, others: Any) -> Any:
        return weighted_merge(vals, others)

    @cute.jit
    def _finalize(self, vals: Any) -> Any:
        pair = cute.make_rmem_tensor(2, Float32)
        pair[0] = cute.math.log(vals[1], fastmath=True) + vals[0]
        pair[1] = vals[2]
        return cute.recast_tensor(pair, Int64)[0]

    @cute.jit
    def begin_loop(self, gemm: Any, state: Any, epi_coord: Any) -> Any:
        found = Moments.begin_loop(self, gemm, state, epi_coord)
        if const_expr(epi_coord[1] == 0):
            cute.filter_zeros(found[0]).fill(-3.4028234663852886e38)
        return found

    @cute.jit
    def fn_sink_flush(self, gemm: Any, state: Any, frag: Any, scale: Any = None) -> Any:
        """Fold a thread's scores `frag` and values `scale`."""
        ref = state[0].layout
        planes = tuple(layout_utils.convert_layout_zero_stride(s, ref)[None, 0] for s in state[:3])
        scores = layout_utils.convert_layout_zero_stride(frag, ref)
        values = layout_utils.convert_layout_zero_stride(scale, ref)
        columns = layout_utils.convert_layout_zero_stride(state[3], ref)
        for row in cutlass.range(cute.size(planes[0]), unroll_full=True):
            mine, theirs = [], []
            for j in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                inside = columns[row, j][1] < state[4]
                mine.append(cutlass.select_(inside, scores[row, j], Float32(-math.inf)))
                theirs.append(cutlass.select_(inside, values[row, j], Float32(0.0)))
            before = (planes[0][row], planes[1][row], planes[2][row])
            merged = weighted_merge(before, weighted(mine, theirs))
            planes[0][row] = merged[0]
            planes[1][row] = merged[1]
            planes[2][row] = merged[2]


class HalfStore(TileStore):
    """A store of one value for each column pair, [M, N / 2], with any number of pairs."""

    def __init__(self, name: str) -> None:
        super().__init__(name, gated=True)

    def host_fake_arg(self, key: Any, fctx: Any) -> Any:
        dtype, _ = key
        batch = fctx.l if fctx.batched else None
        columns = cute.sym_int()
        return fake_batched(dtype, fctx.m, columns, batch, 1, div_for_dtype(dtype))


class PairStore(TileStore):
    """A store of adjacent column pairs, [M, N], in addition to the GEMM's own store.

    The epilogue passes both values packed into one 32-bit word. quack assumes one value per pair
    for a store in pair mode, so the host passes the first half of the columns; on the device this
    is a store of all columns.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.whole = TileStore(name)
        self.gated = True  # required by quack of a store in pair mode

    def host_fake_arg(self, key: Any, fctx: Any) -> Any:
        return HalfStore(self.name).host_fake_arg(key, fctx)

    def to_params(self, gemm: Any, args: Any) -> Any:
        half = getattr(args, self.name)
        shape = (half.shape[0], 2 * half.shape[1], *half.shape[2:])
        view = cute.make_tensor(half.iterator, cute.make_layout(shape, stride=half.stride))
        return self.whole.to_params(gemm, _Replaced(args, self.name, view))

    def store_setup(self, *args: Any) -> Any:
        return self.whole.store_setup(*args)

    @cute.jit
    def store_convert(self, gemm: Any, frag: Any, *_: Any) -> Any:
        return cute.recast_tensor(frag, getattr(gemm, self._dtype_gemm_attr()))


class SplitStore(HalfStore):
    """A store of one lane of each column pair; the lanes are `split` columns apart in the buffer.

    Pair p is column (p // split) · 2 · split + p % split of the buffer for lane 0, and `split`
    further for lane 1: with split = 2, pairs 0 1 2 3 are columns 0 1 4 5 and 2 3 6 7. The host
    passes the buffer from the lane's first column on.
    """

    def __init__(self, name: str, split: int) -> None:
        super().__init__(name)
        self.split = split

    def config_key(self) -> Any:
        return (*super().config_key(), self.split)

    def to_params(self, gemm: Any, args: Any) -> Any:
        whole = getattr(args, self.name)
        columns = whole.shape[1]
        blocks = columns // self.split
        shape = (whole.shape[0], (self.split, blocks), *whole.shape[2:])
        stride = (whole.stride[0], (1, 2 * self.split), *whole.stride[2:])
        view = cute.make_tensor(whole.iterator, cute.make_layout(shape, stride=stride))
        return super().to_params(gemm, _Replaced(args, self.name, view))


class _Replaced:
    """A view of `args` with the attribute `name` replaced by `value`."""

    def __init__(self, args: Any, name: str, value: Any) -> None:
        self._args, self._name, self._value = args, name, value

    def __getattr__(self, name: str) -> Any:
        return self._value if name == self._name else getattr(self._args, name)
