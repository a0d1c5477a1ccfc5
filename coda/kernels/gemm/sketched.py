"""A GEMM before its placement -> its modelled time, by the config that it would get."""

from __future__ import annotations

from coda.ir.types import bf16
from coda.kernels.gemm.configs import Case, choose
from coda.kernels.gemm.stages import Demand
from coda.kernels.gemm.time import Work, time_of
from coda.lowering.program.target import Target
from coda.lowering.program.time import Sketch, Time


def sketched(sketch: Sketch, target: Target) -> Time:
    """The modelled time of a GEMM whose epilogue stores its accumulator, or reduces it."""
    m, n, _ = sketch.problem
    carried = sketch.written / max(1, m * n)
    work = Work(sketch.problem, 1, sketch.bits, sketch.read + sketch.written, carried)
    own = bf16 if sketch.written else None
    bare = Demand((), own, (), row=0, column=0, mask=False, groups=(), sums=0, planes=0)
    case = Case(work, bare, held=1, sums=0, pairs=False, blocks=())
    best = choose(case, target).offers[0]
    return time_of(work, best.config, best.pipeline, target)
