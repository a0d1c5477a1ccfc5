"""A mixin for quack's GEMM classes: an epilogue of elements is called for two columns at once.

Values are converted to a dtype of 16 bits two at a time, and a pair that is also stored shares the
instruction. quack calls the epilogue for two neighbouring columns on sm_100a, for each column on
sm_90a. Here it is two on both: `rounded_bf16` of (y[j], y[j + 1]) is one instruction.

Sums are added up as their values are computed. quack keeps the values of a subtile until it has
all, which takes a register for each.
"""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from quack.epilogue.math import Pair
from quack.epilogue.ops import ColVecReduce, RowVecReduce

SUMS = (ColVecReduce, RowVecReduce)  # coda has these of quack's sinks, and for sums alone


class TwoColumns:
    """A mixin of a GEMM class, whose epilogue computes a `Pair` of neighbouring columns."""

    def epi_visit_subtile(
        self, params: Any, epi_loop_tensors: Any, tRS_rD: Any, tRS_rC: Any = None
    ) -> Any:
        """quack's loop over a thread's columns of a subtile, two in each step."""
        gemm: Any = self
        ops = {op.name: op for op in gemm._epi_ops}
        loaded = {}
        for name, kind in gemm._epi_mod_operands:
            loaded[name] = epi_loop_tensors[name]
            if kind == "tile":
                loaded[name] = loaded[name].to(gemm.acc_dtype)
            elif kind == "value":
                loaded[name] = ops[name].fn_prepare(gemm, loaded[name], False)
        outputs = tuple(
            cute.make_rmem_tensor(tRS_rD.layout.shape, gemm.acc_dtype)
            for _ in gemm._epi_mod_outputs
        )
        sinks = gemm._make_sink_tmps(ops, tRS_rD.layout.shape)
        names = ("D", *gemm._epi_mod_outputs, *gemm._epi_mod_sinks)
        results = dict(zip(names, (tRS_rD, *outputs, *sinks), strict=True))
        added = {n: epi_loop_tensors[n] for n in gemm._epi_mod_sinks if type(ops[n]) in SUMS}
        for i in range(0, cute.size(tRS_rD), 2):
            both = {
                name: (
                    loaded[name] if kind == "scalar" else Pair(loaded[name][i], loaded[name][i + 1])
                )
                for name, kind in gemm._epi_mod_operands
            }
            for name, value in gemm._epi_mod_fn(Pair(tRS_rD[i], tRS_rD[i + 1]), **both).items():
                if name in added:
                    self.add(added[name], i, value)
                else:
                    self.keep(results[name], i, value)
        for name, values in zip(gemm._epi_mod_sinks, sinks, strict=True):
            if name not in added:
                parts = values if isinstance(values, tuple) else (values,)
                ops[name].fn_sink_flush(gemm, epi_loop_tensors[name], *parts)
        return outputs

    def add(self, total: Any, first: int, value: Any) -> None:
        """Add the values of two columns to a sum, in whose registers equal elements are aliased."""
        for lane in (0, 1):
            total[first + lane] = total[first + lane] + value[lane]

    def keep(self, registers: Any, first: int, value: Any) -> None:
        """Keep the values of two columns; of a fold of pairs, those of both its parts."""
        if isinstance(registers, tuple):
            for mine, part in zip(registers, value, strict=True):
                self.keep(mine, first, part)
        else:
            registers[first], registers[first + 1] = value[0], value[1]
