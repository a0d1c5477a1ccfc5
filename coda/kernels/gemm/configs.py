"""A GEMM of a Program -> its legal tile configs, ranked by estimated time.

A config has a tile, and depths of its epilogue's pipelines that leave enough stages to A and B
(`stages.py`). The estimate is the model of time (`time.py`), and for depths of one stage the round
trips of the epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coda.kernels.gemm.mainloop import Gemm
from coda.kernels.gemm.stages import Masks, PipelineStages, cta_rows, divided, masks, need, stages
from coda.kernels.gemm.time import TileGrid, Work, time_of, work
from coda.lowering.program.access import Periodic
from coda.lowering.program.epilogue import held
from coda.lowering.program.program import Program
from coda.lowering.program.target import Config, Target

RUNS = 2  # A/B stages without which a mainloop waits for itself
ENOUGH = 3  # A/B stages at which a mainloop is as fast as it gets, within 1 %
AMPLE = 4  # A/B stages after which the epilogue gives up nothing more
# Depths (loads, stores) that are tried where quack's own leave too few stages to A and B, from the
# cheapest. With one stage of stores the next subtile waits until the copy to memory has read the
# last; with one stage of loads each subtile waits for memory.
SHALLOW = ((2, 2), (2, 1), (1, 2), (1, 1))
# Values of an epilogue that registers hold at each point of a CTA's tile above 128×128, by whether
# the accumulator is in tensor memory: ptxas 13 spills in kernels of the examples that hold more.
HELD = {False: 8, True: 5}
ROUND_TRIP = 0.6e-6  # seconds that a subtile waits if a pipeline has one stage (assumed)


def legal(program: Program, kernel: Gemm, config: Config) -> str:
    """The reason why a config is illegal for a kernel; "" if it is legal."""
    return _legal(program.target, kernel, config, stages(program, kernel, config))


def _legal(target: Target, kernel: Gemm, config: Config, pipeline: PipelineStages) -> str:
    epilogue = kernel.body.epilogue
    for statistic in epilogue.statistics:
        if statistic.group and config.tile_n % statistic.group:
            return f"a group of {statistic.group} columns does not divide its tile"
    for operand in epilogue.operands:
        if not isinstance(operand.access, Periodic):
            continue
        columns = operand.access.period * epilogue.lanes
        if config.tile_n % columns and columns % config.tile_n:
            return f"a table of {columns} columns does not fit its tile"
    if pipeline.ab < RUNS:
        return f"shared memory has room for {max(pipeline.ab, 0)} stages of A and B"
    values, most = held(epilogue), HELD[target.tensor_memory]
    if values > most and cta_rows(config, target) * config.tile_n > 128 * 128:
        return (
            f"registers do not hold {values} values of the epilogue for each element or column pair"
        )
    return ""


@dataclass(frozen=True)
class Offer:
    """A config of a kernel with its depths, its stages, and the estimated seconds."""

    config: Config
    pipeline: PipelineStages
    seconds: float


def ranked(program: Program, kernel: Gemm) -> tuple[Config, ...]:
    """The legal configs by increasing estimated time; the smallest config if none is legal.

    One with fewer than `ENOUGH` A/B stages is legal only if all are.
    """
    masked, own = masks(kernel.body.epilogue), work(program, kernel)
    every = [offer(program, kernel, c, masked, own) for c in program.target.configs]
    found = [o for o in every if not _legal(program.target, kernel, o.config, o.pipeline)]
    if not found:
        return (every[-1].config,)
    found = [o for o in found if o.pipeline.ab >= ENOUGH] or found
    return tuple(o.config for o in sorted(found, key=lambda o: o.seconds))


def offer(program: Program, kernel: Gemm, config: Config, masked: Masks, own: Work) -> Offer:
    """A config with the depths of its epilogue's pipelines, no deeper than they pay, and its time.

    The depths are quack's own, unless two stages buy one of A and B up to `AMPLE`; a single stage
    only where nothing else leaves `ENOUGH`. `masked` are the masks of the epilogue, and `own` is
    the work of the kernel.
    """
    needed, target = need(program, kernel, config, masked), program.target
    chosen, pipeline = config, divided(needed, config, target)
    for loads, stores in SHALLOW:
        if pipeline.ab >= (AMPLE if min(loads, stores) > 1 else ENOUGH):
            break
        other = replace(config, loads=loads, stores=stores)
        found = divided(needed, other, target)
        if found.ab > pipeline.ab:
            chosen, pipeline = other, found
    time = time_of(own, chosen, pipeline, target)
    hidden = target.tensor_memory  # behind the mainloop of the next tile
    waits = 0 if hidden else (chosen.loads, chosen.stores).count(1)
    waves = TileGrid.of(own, chosen, target).waves
    return Offer(chosen, pipeline, time.seconds + waves * waits * needed.subtiles * ROUND_TRIP)
