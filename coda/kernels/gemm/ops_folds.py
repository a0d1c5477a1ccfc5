"""Epilogue ops that fold a row's partials, of an earlier GEMM's tiles, before the epilogue begins.

A thread takes a row of the CTA's tile: it loads the row's partials by vectors, merges them,
computes the values that the epilogue reads, once, and writes them to shared memory, where a column
vector is then read as any other. Rows outside of the matrix get 0, as those of a loaded vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr
from quack.epilogue.ops import EpiSmemBytes, VecLoad

from coda.kernels.device_folds import pivot
from coda.kernels.gemm.ops import Given

WIDE = 4  # words of a load


class RowFold(VecLoad):
    """Partials [M, parts], or (mean, M2) [M, 2 · parts], in float32 -> values of rows, in float32.

    Args:
        name: of the first value.
        of: (statistic) or (variance, mean) of a row -> the tuple of its values.
        values: the number of values.
        planes: 1 for partial sums, 2 for (mean, M2).
        scale: factor of the sum; of M2, 1 / width.
        width, count: the number of reduced values, and that of each partial but the last.
    """

    dim = 0
    fn_port = "col"

    def __init__(
        self,
        name: str,
        of: Callable[..., tuple[Any, ...]],
        *,
        values: int,
        planes: int,
        scale: float,
        width: int,
        count: int,
    ) -> None:
        super().__init__(name)
        self.of, self.values, self.planes = of, values, planes
        self.scale, self.width, self.count = scale, width, count

    def config_key(self) -> Any:
        numbers = self.values, self.planes, self.scale, self.width, self.count
        return (self.of.__module__, self.of.__name__, *numbers)

    def host_arg_key(self, value: Any) -> Any:
        return (*super().host_arg_key(value), value.shape[1])

    def host_fake_arg(self, key: Any, fctx: Any) -> Any:
        dtype, _, words = key
        shape, stride = (fctx.m, words), (words, 1)
        return cute.runtime.make_fake_tensor(dtype, shape, stride=stride, assumed_align=16)

    def to_params(self, gemm: Any, args: Any) -> Any:
        return {self.name: getattr(args, self.name)}

    def smem_bytes(self, arg_tensor: Any, cta_tile_shape_mnk: Any, *_: Any, **__: Any) -> Any:
        return EpiSmemBytes(unstaged=4 * self.values * cta_tile_shape_mnk[0])

    def smem_struct_field(self, gemm: Any, params: Any) -> Any:
        size = self.values * gemm.cta_tile_shape_mnk[0]
        return f"s_{self.name}", cute.struct.Align[cute.struct.MemRange[Float32, size], 16]

    def get_smem_tensor(self, gemm: Any, params: Any, storage_epi: Any) -> Any:
        shape = (gemm.cta_tile_shape_mnk[0], self.values)
        return getattr(storage_epi, f"s_{self.name}").get_tensor(cute.make_layout(shape))

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        first = ctx.tile_coord_mnkl[0] * ctx.tile_M
        limit = ctx.varlen_manager.len_m(ctx.batch_idx) - first
        for step in cutlass.range_constexpr(-(-ctx.tile_M // ctx.num_epi_threads)):
            row = ctx.tidx + step * ctx.num_epi_threads
            if row < ctx.tile_M:
                for i in cutlass.range_constexpr(self.values):
                    smem_tensor[row, i] = Float32(0.0)
                if row < limit:
                    found = self.folded(param[first + row, None])
                    for i in cutlass.range_constexpr(self.values):
                        smem_tensor[row, i] = found[i]
        setattr(gemm, f"rows_of_{self.name}", smem_tensor)
        return column(gemm, smem_tensor, 0, ctx)

    @cute.jit
    def folded(self, line: Any) -> Any:
        """The values of a row, from its partials."""
        if const_expr(self.planes == 1):
            return self.of(self.total(line, lambda part, count: part[0]) * Float32(self.scale))
        near = pivot(line[0], 1)
        weight = 1.0 / self.width
        mean = near + self.total(line, lambda p, n: (p[0] - near) * Float32(n * weight))
        m2 = self.total(line, lambda p, n: p[1] + (p[0] - mean) * (p[0] - mean) * Float32(n))
        return self.of(m2 * Float32(self.scale), mean)

    @cute.jit
    def total(self, line: Any, term: Callable[[Any, int], Any]) -> Any:
        """The sum over the parts of a row of `term`, which gets a part and its number of values."""
        planes = const_expr(self.planes)
        parts = const_expr(cute.size(line) // planes)
        held = loaded(line)
        last = const_expr(self.width - self.count * (parts - 1))
        total = Float32(0.0)
        for j in cutlass.range_constexpr(parts):
            count = const_expr(last if j == parts - 1 else self.count)
            total = total + term([held[planes * j + i] for i in range(planes)], count)
        return total


class FoldedRow(Given):
    """A further value of a `RowFold`, which has to be an earlier parameter.

    Args:
        name: of the value.
        fold: the name of the RowFold.
        number: which of its values.
    """

    dim = 0
    fn_port = "col"
    begin_loop = VecLoad.begin_loop

    def __init__(self, name: str, fold: str, number: int) -> None:
        super().__init__(name)
        self.fold, self.number = fold, number

    def config_key(self) -> Any:
        return self.fold, self.number

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        return column(gemm, getattr(gemm, f"rows_of_{self.fold}"), self.number, ctx)


class RowStore(VecLoad):
    """A column [M] that is written with a value of a `RowFold`, by the first CTA of each row.

    Each thread writes the rows that it folded, so no barrier is between.

    Args:
        name: of the column.
        fold: the name of the RowFold.
        number: which of its values.
    """

    dim = 0

    def __init__(self, name: str, fold: str, number: int) -> None:
        super().__init__(name)
        self.fold, self.number = fold, number

    def config_key(self) -> Any:
        return self.fold, self.number

    def smem_bytes(self, *_: Any, **__: Any) -> Any:
        return EpiSmemBytes()

    def smem_struct_field(self, gemm: Any, params: Any) -> Any:
        return None

    def get_smem_tensor(self, gemm: Any, params: Any, storage_epi: Any) -> Any:
        return None

    def needs_async_fence(self) -> bool:
        return False

    def epi_m_major_score(self, arg_tensor: Any, gemm: Any) -> int:
        return 0

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        rows = getattr(gemm, f"rows_of_{self.fold}")
        first = ctx.tile_coord_mnkl[0] * ctx.tile_M
        limit = min(ctx.varlen_manager.len_m(ctx.batch_idx) - first, ctx.tile_M)
        for step in cutlass.range_constexpr(-(-ctx.tile_M // ctx.num_epi_threads)):
            row = ctx.tidx + step * ctx.num_epi_threads
            if ctx.tile_coord_mnkl[1] == 0 and row < limit:
                param[first + row] = rows[row, self.number].to(param.element_type)
        return None

    def begin_loop(self, gemm: Any, state: Any, epi_coord: Any) -> Any:
        return None


def loaded(line: Any) -> Any:
    """The words of a row, by vectors if rows begin at their multiples."""
    words = cute.size(line)
    wide = WIDE if words % WIDE == 0 else 1
    held = cute.make_rmem_tensor(words, Float32)
    for i in range(words // wide):
        source = cute.local_tile(line, (wide,), (i,))
        cute.autovec_copy(source, cute.local_tile(held, (wide,), (i,)))
    return held


def column(gemm: Any, rows: Any, number: int, ctx: Any) -> Any:
    """The state of a loaded column vector, for value `number` of `rows` in shared memory."""
    begin = rows.iterator + number * ctx.tile_M
    layout = cute.make_layout((ctx.tile_M, ctx.tile_N), stride=(1, 0))
    mine = ctx.partition_for_epilogue_fn(cute.make_tensor(begin, layout))
    if ctx.tiled_copy_t2r is not None:
        mine = ctx.tiled_copy_r2s.retile(mine)
    subtile = cute.group_modes(mine, 3, cute.rank(mine))[None, None, None, 0]
    return [mine, cute.make_rmem_tensor(subtile.layout, gemm.acc_dtype)]
