"""A mixin for quack's GEMM classes: pipelines of the epilogue with given depths.

quack has no option for `Config.loads` and `Config.stores`. It asks the class for its stages while a
kernel is traced, before it lays out shared memory.
"""

from __future__ import annotations

import inspect
from typing import Any

import cutlass.cute as cute

from coda.errors import InternalError
from coda.kernels.gemm.stages import Need, accumulators, divide, padding


def depths(loads: int, stores: int) -> tuple[tuple[str, Any], ...]:
    """`post_init_attrs` of a launch with these depths: they are in quack's keys."""
    return (("depths", (loads, stores)),) if loads or stores else ()


class Staged:
    """A mixin of a GEMM class.

    Attributes:
        depths: stages of loaded and of stored subtiles; 0 for quack's own choice.
    """

    depths: tuple[int, int] = (0, 0)

    def _compute_stages(self, *args: Any, **options: Any) -> tuple[int, ...]:
        """quack's class method, with other depths. Raises InternalError if quack has changed."""
        compute = super()._compute_stages  # type: ignore[misc]
        usual = compute(*args, **options)
        if not any(self.depths):
            return usual
        given = inspect.signature(compute).bind(*args, **options).arguments
        need, capacity = self._need(given), given["smem_capacity"]
        if self._divided(need, (0, 0), capacity) != usual:
            raise InternalError(
                "quack divides shared memory in another way than coda.kernels.gemm.stages",
                found=f"{usual} for {need}",
                help="this is a fault of coda, not of the block: please report it",
            )
        return self._divided(need, self.depths, capacity)

    def _divided(self, need: Need, depths: tuple[int, int], capacity: int) -> tuple[int, ...]:
        """Stages in quack's order: of the accumulator if in tensor memory, A/B, D, C."""
        found = divide(need, depths, capacity)
        first = (found.accumulator,) if found.accumulator else ()
        return (*first, found.ab, found.d, found.c)

    @property
    def _tensor_memory(self) -> bool:
        return self.arch >= 100  # type: ignore[attr-defined]

    def _need(self, given: dict[str, Any]) -> Need:
        """The bytes of each part, by the arguments of `_compute_stages`."""
        rows, columns, k = given["cta_tile_shape_mnk"]
        high, wide = (cute.size(mode) for mode in given["epi_tile"])
        warps = given["warp_shape_mnk"]
        operators = self.epi_smem_bytes(  # type: ignore[attr-defined]
            given["epilogue_args"], (rows, columns, k), given["epi_tile"], warps
        )
        d = given["d_dtype"]
        share = 2 if getattr(self, "use_2cta_instrs", False) else 1  # CTAs that share a tile of B
        all_bytes = operators.unstaged + operators.d_stage + operators.c_stage
        return Need(
            ab=(rows * given["a_dtype"].width + columns // share * given["b_dtype"].width) * k // 8,
            loads=operators.c_stage,
            stores=operators.d_stage + (high * wide * d.width // 8 if d is not None else 0),
            once=operators.unstaged + padding(all_bytes, tensor_memory=self._tensor_memory),
            subtiles=rows * columns // (high * wide),
            columns=wide,
            accumulators=accumulators(columns) if self._tensor_memory else 0,
        )
