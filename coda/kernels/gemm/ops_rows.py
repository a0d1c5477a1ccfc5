"""Epilogue ops that reduce over the rows of a tile, beyond quack's sums: log Σ exp.

A thread folds its values of a column online, as (largest, Σ exp). The lanes of a warp that have the
same columns merge their states by shuffles, each lane ending with some of the columns; the warps
exchange one number for each column through shared memory, as for a sum.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr
from quack import layout_utils
from quack.epilogue.ops import (
    RowVecReduce,
    _get_lane_warp_layouts,
    _mode_flat_stride,
    partition_for_epilogue,
)
from quack.reduce import swap_shuffle_reduce

from coda.kernels.gemm.ops import LogSumExp

LANES = 32


class RowLogSumExp(LogSumExp):
    """log Σ exp over the rows of a tile, with one partial for each tile of rows: [tiles, N].

    Rows outside of the matrix count as −inf. As in `LogSumExp`, +inf and NaN go where torch lets
    them go.
    """

    dim = 1
    epi_m_major_preference = RowVecReduce.epi_m_major_preference
    reduce_planes = 1

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        vector = cute.make_layout((ctx.tile_M, ctx.tile_N), stride=self._broadcast_stride())
        layout = ctx.partition_for_epilogue_fn(cute.make_rmem_tensor(vector, Float32)).layout
        planes = tuple(cute.make_rmem_tensor(layout, Float32) for _ in range(2))
        at = ctx.partition_for_epilogue_fn(cute.make_identity_tensor((ctx.tile_M, ctx.tile_N)))
        rows = ctx.varlen_manager.len_m(ctx.tile_coord_mnkl[3])
        return (*planes, smem_tensor, at, rows - ctx.tile_coord_mnkl[0] * ctx.tile_M)

    @cute.jit
    def fn_sink_flush(self, gemm: Any, state: Any, frag: Any) -> Any:
        """Fold a thread's values: elements of one column share a place of the two planes."""
        largest, total = state[:2]
        self._mask_oob(frag, state[2], state[3], gemm.cta_tile_shape_mnk[:2])
        columns = cute.filter_zeros(largest), cute.filter_zeros(total)
        before = cute.make_rmem_tensor(cute.size(columns[0]), Float32)
        for i in cutlass.range_constexpr(cute.size(columns[0])):
            before[i] = columns[0][i]
        for i in cutlass.range_constexpr(cute.size(frag)):
            largest[i] = cute.arch.fmax(largest[i], frag[i])
        for i in cutlass.range_constexpr(cute.size(columns[0])):
            near = self._guard_neg_inf(columns[0][i])
            columns[1][i] = columns[1][i] * cute.math.exp(before[i] - near, fastmath=True)
        for i in cutlass.range_constexpr(cute.size(frag)):
            near = self._guard_neg_inf(largest[i])
            total[i] = total[i] + cute.math.exp(frag[i] - near, fastmath=True)

    @cute.jit
    def end_loop_stage(
        self,
        gemm: Any,
        param: Any,
        state: Any,
        epi_coord: Any,
        epi_tile: Any,
        tiled_copy_t2r: Any,
        tiled_copy_r2s: Any,
        tidx: Any,
    ) -> Any:
        """Merge a stripe of columns over the lanes; warps but the first write to shared memory."""
        staged = None
        tile = gemm.cta_tile_shape_mnk[:2]
        subtiles = cute.zipped_divide(cute.make_layout(tile), epi_tile).shape[1]
        if const_expr(epi_coord[0] == subtiles[0] - 1):
            registers = const_expr(tiled_copy_t2r is None)
            copy = tiled_copy_r2s if registers else tiled_copy_t2r
            lanes, warps = _get_lane_warp_layouts(copy, registers)
            many, apart = cute.size(lanes, mode=[0]), _mode_flat_stride(lanes, 0)
            assert apart is not None, "the lanes of a column are not at one distance"
            held = self._end_loop_values(state, epi_coord)
            mine = partial(
                partition_for_epilogue,
                epi_tile=epi_tile,
                tiled_copy=copy,
                tidx=tidx,
                reference_src=registers,
            )
            at = mine(cute.make_identity_tensor(tile))
            at = at[None, None, None, epi_coord[0], epi_coord[1]]
            by = partial(layout_utils.convert_layout_zero_stride, ref_layout=held[0].layout)
            planes, columns = tuple(by(v)[None, 0] for v in held), by(at)[None, 0]
            count = const_expr(cute.size(columns, mode=[0]))
            slices = const_expr(math.gcd(count, many))
            each = const_expr(count // slices)
            if const_expr(many > 1):
                swap_shuffle_reduce(
                    planes, self._merge, num_lanes=many, lane_stride=apart, slice_elems=each
                )
            for j in cutlass.range_constexpr(each):
                planes[0][j] = self._finalize((planes[0][j], planes[1][j]))
            group = (cute.arch.lane_idx() // apart) % many
            warp = warps.get_hier_coord(cute.arch.make_warp_uniform(tidx // LANES))[0]
            smem, others = state[2], const_expr(cute.size(warps[0]) - 1)
            if warp > 0 and group < slices:
                for j in cutlass.range_constexpr(each if others else 0):
                    smem[columns[group * each + j][1], warp - 1, 0] = planes[0][j]
            writes = group < slices
            staged = (others > 0, (planes[0], columns, smem, others, warp, group, each, writes))
        return staged

    @cute.jit
    def end_loop_finish(
        self, gemm: Any, param: Any, staged: Any, tile_coord_mnkl: Any, varlen_manager: Any
    ) -> None:
        """The first warp merges the numbers of the other warps, and writes the partial."""
        values, columns, smem, others, warp, group, each, writes = staged
        width = gemm.cta_tile_shape_mnk[1]
        vector = param[tile_coord_mnkl[3], tile_coord_mnkl[0], None]
        inside = min(cute.size(vector) - tile_coord_mnkl[1] * width, width)
        target = cute.local_tile(vector, (width,), (tile_coord_mnkl[1],))
        if tile_coord_mnkl[0] < param.shape[1] and warp == 0 and writes:
            for j in cutlass.range_constexpr(each):
                column = columns[group * each + j][1]
                state = (values[j], Float32(1.0))
                for other in cutlass.range_constexpr(others):
                    state = self._merge(state, (smem[column, other, 0], Float32(1.0)))
                if column < inside:
                    target[column] = self._finalize(state)
