"""Epilogue ops that bound register pressure by ordering a thread's columns (sm_100a).

ptxas schedules each step for all columns of a thread together. With several matrices to load and
store, that needs more than 255 registers, and values spill.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op
from quack.epilogue.ops import ColVecReduce, RowVecLoad, RowVecReduce

from coda.kernels.gemm.ops import Given

COLUMNS = 8  # reduced together over a warp; each lane holds the sum of one of them
SHARED = 4  # lanes that hold the same sum
LANES = 32


class Pause(Given):
    """A CTA fence after every few elements, across which ptxas does not schedule."""

    fn_port = "apply"

    def to_params(self, gemm: Any, args: Any) -> Any:
        gemm.points_between_pauses = getattr(args, self.name)
        return {self.name: None}

    def fn_prepare(self, gemm: Any, state: Any, paired: bool) -> Any:
        return state

    @cute.jit
    def fn_apply(self, gemm: Any, state: Any, point: Any, value: Any) -> Any:
        if point > 0 and point % gemm.points_between_pauses == 0:
            cute.arch.fence_acq_rel_cta()
        return value


class RowInTurn(RowVecLoad):
    """A float32 row vector [N], each element read from shared memory where it is used.

    quack's RowVecLoad reads all columns of a thread first, which takes a register for each.
    """

    @cute.jit
    def begin_loop(self, gemm: Any, state: Any, epi_coord: Any) -> Any:
        parts = state[0]
        return cute.group_modes(parts, 3, cute.rank(parts))[None, None, None, epi_coord]


class SumInTurn(RowVecReduce):
    """A sum over rows, with one partial for each tile of rows: [tiles, N].

    The epilogue calls it with each value. quack's own sink holds a thread's values of all columns
    until the last is computed, and then reduces over lanes: a register for each column. This one
    reduces eight columns over the warp as soon as they are computed, and a thread keeps one number
    for them. A thread has one row of the tile and its columns in order, two in each call.
    """

    fn_port = "apply"

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        columns = ctx.partition_for_epilogue_fn(cute.make_identity_tensor((ctx.tile_M, ctx.tile_N)))
        count = const_expr(cute.size(columns[None, None, None, 0, 0]))
        assert count % COLUMNS == 0, f"{count} columns of a thread are not taken {COLUMNS} at once"
        sums = cute.make_rmem_tensor(count // COLUMNS, Float32)
        return (sums, cute.make_rmem_tensor(COLUMNS, Float32), smem_tensor, columns)

    @cute.jit
    def begin_loop(self, gemm: Any, state: Any, epi_coord: Any) -> Any:
        return (state[0], state[1])

    def fn_prepare(self, gemm: Any, state: Any, paired: bool) -> Any:
        return state

    @cute.jit
    def fn_apply(self, gemm: Any, state: Any, point: Any, value: Any) -> Any:
        sums, held = state
        first = point % (COLUMNS // 2) * 2
        held[first], held[first + 1] = value[0], value[1]
        if point % (COLUMNS // 2) == COLUMNS // 2 - 1:
            sums[point // (COLUMNS // 2)] = self.reduced(held)
        return value

    @cute.jit
    def reduced(self, held: Any) -> Any:
        """Transposing reduction: 8 columns of 32 lanes -> in each lane the sum of one column."""
        lane = cute.arch.lane_idx()
        for step in cutlass.range_constexpr(3):
            half = const_expr(COLUMNS >> (step + 1))
            upper = (lane & (LANES >> (step + 1))) != 0
            for i in cutlass.range_constexpr(half):
                mine = cutlass.select_(upper, held[half + i], held[i])
                other = cutlass.select_(upper, held[i], held[half + i])
                held[i] = mine + cute.arch.shuffle_sync_bfly(other, offset=LANES >> (step + 1))
        total = held[0] + cute.arch.shuffle_sync_bfly(held[0], offset=2)
        return total + cute.arch.shuffle_sync_bfly(total, offset=1)

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
        """Warps but the first write to shared memory; lanes with equal sums write one each."""
        sums, smem, columns = state[0], state[2], state[3]
        mine = columns[None, None, None, epi_coord[0], epi_coord[1]]
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(tidx // LANES)
        groups = const_expr(cute.size(sums))
        within = (lane // 16) * 4 + (lane // 8) % 2 * 2 + (lane // 4) % 2
        found = []
        for first in cutlass.range_constexpr(0, groups, SHARED):
            count = const_expr(min(SHARED, groups - first))
            value = sums[first]
            for group in cutlass.range_constexpr(1, count):
                value = cutlass.select_(lane % SHARED == group, sums[first + group], value)
            column = mine[(first + lane % SHARED % count) * COLUMNS + within][1]
            if warp > 0 and lane % SHARED < count:
                smem[column, warp - 1, 0] = value
            found.append((value, column, lane % SHARED < count))
        return (True, (tuple(found), smem, warp))

    @cute.jit
    def end_loop_finish(
        self, gemm: Any, param: Any, staged: Any, tile_coord_mnkl: Any, varlen_manager: Any
    ) -> None:
        """The first warp adds the sums of the other warps, and writes the partial."""
        found, smem, warp = staged
        width = gemm.cta_tile_shape_mnk[1]
        others = const_expr(self._smem_warps(gemm.epi_smem_warp_shape_mnk()))
        vector = param[tile_coord_mnkl[3], tile_coord_mnkl[0], None]
        inside = min(cute.size(vector) - tile_coord_mnkl[1] * width, width)
        target = cute.local_tile(vector, (width,), (tile_coord_mnkl[1],))
        for one in cutlass.range_constexpr(len(found)):
            value, column, mine = found[one]
            if warp == 0 and mine and tile_coord_mnkl[0] < param.shape[1]:
                for other in cutlass.range_constexpr(others):
                    value = value + smem[column, other, 0]
                if column < inside:
                    target[column] = value


class ColumnSumInTurn(ColVecReduce):
    """A sum over columns, with one partial for each tile of columns: [M, tiles].

    The epilogue calls it with each value. quack's own sink keeps the values of a subtile until all
    are computed: a register for each column. This one adds them up as they are computed, in the
    same order. A thread has one row of the tile and its columns in order, two in each call.
    """

    fn_port = "apply"

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        state = ColVecReduce.begin(self, gemm, param, smem_tensor, ctx)
        rows = ctx.varlen_manager.len_m(ctx.tile_coord_mnkl[3])
        return (*state, rows, cute.make_rmem_tensor(2, Float32))

    @cute.jit
    def begin_loop(self, gemm: Any, state: Any, epi_coord: Any) -> Any:
        ColVecReduce.begin_loop(self, gemm, state, epi_coord)
        state[-1].fill(0.0)
        return state[-2:]

    def fn_prepare(self, gemm: Any, state: Any, paired: bool) -> Any:
        return state

    @cute.jit
    def fn_apply(self, gemm: Any, state: Any, point: Any, value: Any) -> Any:
        rows, both = state
        found = cute.arch.add_packed_f32x2((value[0], value[1]), (both[0], both[1]))
        both[0], both[1] = found[0], found[1]
        if point % (COLUMNS // 2) == COLUMNS // 2 - 1:
            settle(both[0], rows)
        return value

    @cute.jit
    def end_loop_stage(self, gemm: Any, param: Any, state: Any, epi_coord: Any, *rest: Any) -> Any:
        """Add the sum of a subtile to that of the tile, which is stored after the last."""
        total = state[0][None, None, None, epi_coord[0], epi_coord[1]]
        total[0] = total[0] + (state[-1][0] + state[-1][1])
        return ColVecReduce.end_loop_stage(self, gemm, param, state, epi_coord, *rest)


@dsl_user_op
def settle(value: Any, rows: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Have a value computed before the next fence.

    ptxas moves arithmetic across a fence: the additions of a long sum to its end, so that all that
    is added stays in registers. It moves no store. This one is of no thread, since a matrix has no
    negative number of `rows`, which ptxas does not know.
    """
    operands = [x.ir_value(loc=loc, ip=ip) for x in (Int32(rows), Float32(value))]
    text = "{ .reg .pred never; setp.lt.s32 never, $0, 0; @never st.shared.f32 [$0], $1; }"
    llvm.inline_asm(None, operands, text, "r,f", has_side_effects=True)
