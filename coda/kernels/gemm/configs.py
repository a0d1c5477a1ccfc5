"""A GEMM of a Program -> its legal configs, ranked by estimated time.

The space of configs (`space.py`) is cut in three steps: what the epilogue or the shared memory
forbids (`legal`), what no estimate would choose (padding, tiles taller than the matrix, too few
tiles), and what is slower. A config has a tile, and depths of its epilogue's pipelines that leave
enough stages to A and B (`stages.py`). The estimate is the model of time (`time.py`), and for
depths of one stage the round trips of the epilogue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from coda.kernels.gemm.mainloop import Gemm
from coda.kernels.gemm.row_folds import split_folds
from coda.kernels.gemm.space import most_held, space
from coda.kernels.gemm.split_k import k_steps
from coda.kernels.gemm.stages import (
    Demand,
    Need,
    PipelineStages,
    cta_rows,
    demand,
    divided,
    narrowest,
    need,
    subtile,
)
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
ROUND_TRIP = 0.6e-6  # seconds that a subtile waits if a pipeline has one stage (assumed)
# Configs that coda's kernels have used most, by whether the accumulator is in tensor memory.
# Another one is taken if the estimate says that it is faster by more than `ERROR`, its own error.
# In tensor memory, where an epilogue takes no registers from a mainloop, `BETWEEN` is enough if
# tiles take several waves and leave no more partials. Waves are counted exactly: the quotient of
# two tiles' times was wrong by 4.4 % at the median of 63 on the H200; in one wave, by 13 % (of 42).
USUAL = {
    False: (
        Config(128, 256, (2, 1)),
        Config(256, 128, (2, 1)),
        Config(128, 128, (2, 1)),
        Config(128, 64),
    ),
    True: (
        Config(256, 256, (2, 1)),
        Config(256, 128, (2, 1)),
        Config(128, 128),
        Config(128, 64),
    ),
}
ERROR = 0.1
BETWEEN = 0.05
K_STEPS = 256  # of K that each of the CTAs that share a tile has at least
PADDING = 0.15  # of elements that a tiling may compute beyond those of the best


class Refusal(NamedTuple):
    """Why a config is not taken for a kernel: in one word, and in a sentence."""

    topic: str
    sentence: str


@dataclass(frozen=True)
class Case:
    """What decides about the configs of a GEMM.

    Attributes:
        work: its sizes and its epilogue's instructions.
        demand: what the epilogue keeps in shared memory.
        held: values that the epilogue holds at each element or column pair, of tables as well.
        sums: those of them that are reduced.
        pairs: whether operators store values of column pairs.
        blocks: columns of the blocks in which a row is read or written: tables that repeat along a
            row, and stored pairs of columns that are apart in their buffer.
    """

    work: Work
    demand: Demand
    held: int
    sums: int
    pairs: bool
    blocks: tuple[int, ...]


def case_of(program: Program, kernel: Gemm) -> Case:
    """What decides about the configs of a GEMM of a program."""
    epilogue, _ = split_folds(kernel.body.epilogue)
    wanted = demand(epilogue)
    periods = [o.access.period for o in epilogue.operands if isinstance(o.access, Periodic)]
    blocks = [p * epilogue.lanes for p in periods]
    if any(map(epilogue.apart, epilogue.stores)):
        blocks.append(2 * epilogue.split)
    return Case(
        work=work(program, kernel),
        demand=wanted,
        held=held(epilogue) + len(periods),
        sums=len(epilogue.sinks),
        pairs=epilogue.pair and bool(wanted.stored),
        blocks=tuple(dict.fromkeys(blocks)),
    )


@dataclass(frozen=True)
class Offer:
    """A config of a kernel with its depths, its stages, and the estimated seconds."""

    config: Config
    pipeline: PipelineStages
    seconds: float


@dataclass(frozen=True)
class Choice:
    """The configs of a kernel.

    Attributes:
        offers: legal ones, the best first; at least one.
        dropped: (topic, count) of the others of the space.
    """

    offers: tuple[Offer, ...]
    dropped: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        dropped = ", ".join(f"{topic} {count}" for topic, count in self.dropped)
        return f"best of {len(self.offers)} configs" + (dropped and f"; dropped: {dropped}")


def legal(program: Program, kernel: Gemm, config: Config) -> str:
    """The reason why a config is illegal for a kernel; "" if it is legal."""
    case = case_of(program, kernel)
    needed = need(case.demand, case.work.problem[1], config, program.target)
    found = refused(case, config, program.target) or crowded(
        divided(needed, config, program.target), ENOUGH
    )
    return found.sentence if found else ""


def refused(case: Case, config: Config, target: Target) -> Refusal | None:
    """Why a kernel's epilogue forbids a config, whatever its depths; None if it does not."""
    if config.dynamic and not target.launch_control:
        return Refusal("queue", "this GPU has no cluster launch control, which hands out tiles")
    for group in case.demand.groups:
        if config.tile_n % group:
            return Refusal("groups", f"a group of {group} columns does not divide its tile")
    for columns in case.blocks:
        if config.tile_n % columns and columns % config.tile_n:
            return Refusal("blocks", f"a block of {columns} columns does not fit its tile")
    if case.pairs and not target.tensor_memory and config.tile_n % 32:
        return Refusal("pairs", "stores of column pairs take tiles of a multiple of 32 columns")
    reason = _unsplit(case, config) if config.split_k > 1 else ""
    if reason:
        return Refusal("split-K", reason)
    if target.tensor_memory and cta_rows(config, target) < 128 and case.demand.sums:
        return Refusal("rows", "sums over rows take CTAs of 128 rows, whose warps have one each")
    loaded = next(iter(case.demand.loaded), None)
    stored = [d for d in (case.demand.own, loaded) if d is not None]
    least = narrowest(config, target, bits=min((d.bits for d in stored), default=16))
    if config.tile_n < least:
        return Refusal("rows", f"stores and loads of this type take {least} columns at least")
    columns = subtile(config, target, case.demand.own, loaded)[1]
    if case.held > most_held(config, target, columns=columns, sums=case.sums):
        return Refusal(
            "registers",
            f"registers do not hold {case.held} values of the epilogue for each element or "
            "column pair",
        )
    return None


def _unsplit(case: Case, config: Config) -> str:
    """The reason why K cannot be split among CTAs; "" if it can."""
    if case.demand.own is None:
        return "the GEMM stores no matrix by itself, as one whose K is split has to"
    if k_steps(case.work.problem[2], case.work.bits) < config.split_k:
        return f"K has fewer k-steps than the {config.split_k} CTAs that would share a tile"
    return ""


def crowded(pipeline: PipelineStages, least: int) -> Refusal | None:
    """Why a config's shared memory is too small; None if A and B have enough stages."""
    if pipeline.ab >= least:
        return None
    stages = max(pipeline.ab, 0)
    return Refusal("memory", f"shared memory has room for {stages} stages of A and B")


def ranked(program: Program, kernel: Gemm) -> tuple[Config, ...]:
    """The legal configs, the best first; the smallest usual one if none is legal."""
    return tuple(o.config for o in choice(program, kernel).offers)


def choice(program: Program, kernel: Gemm) -> Choice:
    """The configs of a kernel: those that are legal, ranked, and the number of the others."""
    return choose(case_of(program, kernel), program.target)


@lru_cache(maxsize=1024)
def choose(case: Case, target: Target) -> Choice:
    """The configs of a kernel of a target of which only this is known."""
    every = space(target)
    dropped: Counter[str] = Counter()
    legal = [c for c in every if not _counted(refused(case, c, target), dropped)]
    offers = list(_offers(case, _worth_it(legal, case, target, dropped), target))
    found = [o for o in offers if not _counted(crowded(o.pipeline, ENOUGH), dropped)]
    if not found:  # every config waits for memory, if there is one
        found = [o for o in offers if o.pipeline.ab >= RUNS]
        found = found or list(_offers(case, USUAL[target.tensor_memory][-1:], target))
        dropped.pop("memory", None)
    return Choice(_in_order(found, case, target), tuple(sorted(dropped.items())))


def _counted(reason: Refusal | None, dropped: Counter[str]) -> bool:
    """Whether there is a reason, which is counted then."""
    dropped.update([reason.topic] if reason else ())
    return reason is not None


def _offers(case: Case, configs: Iterable[Config], target: Target) -> Iterator[Offer]:
    """Each config with its depths, its stages and its time."""
    planned: dict[tuple[int, ...], tuple[Need, Config, PipelineStages]] = {}
    for config in configs:
        tile = cta_rows(config, target), config.tile_m, config.tile_n, config.pingpong
        if tile not in planned:
            needed = need(case.demand, case.work.problem[1], config, target)
            planned[tile] = needed, *deepened(needed, config, target)
        needed, like, pipeline = planned[tile]
        waves = TileGrid.of(case.work.split(config.split_k), config, target).waves
        dynamic = target.launch_control and waves > 1  # as the library; one wave has no queue
        like = replace(like, cluster=config.cluster, split_k=config.split_k, dynamic=dynamic)
        time = time_of(case.work, like, pipeline, target).seconds
        hidden = target.tensor_memory  # behind the mainloop of the next tile
        waits = 0 if hidden else (like.loads, like.stores).count(1)
        yield Offer(like, pipeline, time + waves * waits * needed.subtiles * ROUND_TRIP)


def deepened(needed: Need, config: Config, target: Target) -> tuple[Config, PipelineStages]:
    """A config with depths of the epilogue's pipelines that are no deeper than they pay.

    The depths are quack's own, unless two stages buy one of A and B up to `AMPLE`; a single stage
    only where nothing else leaves `ENOUGH`.
    """
    chosen, pipeline = config, divided(needed, config, target)
    for loads, stores in SHALLOW:
        if pipeline.ab >= (AMPLE if min(loads, stores) > 1 else ENOUGH):
            break
        other = replace(config, loads=loads, stores=stores)
        found = divided(needed, other, target)
        if found.ab > pipeline.ab:
            chosen, pipeline = other, found
    return chosen, pipeline


def _worth_it(
    found: list[Config], case: Case, target: Target, dropped: Counter[str]
) -> list[Config]:
    """The configs without those that no estimate would choose, which are counted."""
    (m, n, k), matrices = case.work.problem, case.work.matrices
    half = target.multiprocessors // 2

    def padded(config: Config) -> int:
        return -(-m // config.tile_m) * config.tile_m * -(-n // config.tile_n) * config.tile_n

    def busy(config: Config) -> int:
        return matrices * -(-m // cta_rows(config, target)) * -(-n // config.tile_n)

    def shared(config: Config) -> bool:
        """Whether CTAs share tiles that leave half of the SMs idle, in one wave, a long K."""
        once = TileGrid.of(case.work.split(config.split_k), config, target).waves == 1
        return once and busy(config) < half and k >= K_STEPS * config.split_k

    height = max(-(-m // 64) * 64, min((c.tile_m for c in found), default=0))
    most = (1 + PADDING) * min(map(padded, found), default=0)
    enough = half if any(busy(c) >= half and c.split_k == 1 for c in found) else 0
    kept: list[Config] = []
    for config in found:
        if config.tile_m > height:
            dropped["height"] += 1
        elif padded(config) > most:
            dropped["padding"] += 1
        elif config.split_k > 1 and not shared(config):
            dropped["split-K"] += 1
        elif config.split_k == 1 and busy(config) < enough:
            dropped["few tiles"] += 1
        else:
            kept.append(config)
    return kept


def _in_order(offers: Iterable[Offer], case: Case, target: Target) -> tuple[Offer, ...]:
    """Offers by increasing time; before the fastest, one that is as fast within the error.

    It is a usual config, or else one whose tiles are of one CTA each, and whose clusters are pairs
    of CTAs along the rows.
    """
    usual = USUAL[target.tensor_memory]
    order = {plain: i for i, plain in enumerate(usual)}

    def rank(offer: Offer) -> int:
        plain = replace(offer.config, loads=0, stores=0, dynamic=False)
        last = len(usual) + (plain.cluster[1] > 1) + 2 * (plain.split_k > 1)
        return order.get(plain, last)

    def near(found: list[Offer], error: float) -> Offer:
        close = [o for o in found if o.seconds * (1 - error) <= found[0].seconds]
        return min(close, key=lambda o: max(rank(o), len(usual) - 1))

    found = sorted(offers, key=lambda o: (o.seconds, rank(o)))
    first = near(found, ERROR)
    if target.tensor_memory and TileGrid.of(case.work, first.config, target).waves > 1:
        most = _partials(case, first.config, target)
        first = near([o for o in found if _partials(case, o.config, target) <= most], BETWEEN)
    return (first, *(o for o in found if o is not first))


def _partials(case: Case, config: Config, target: Target) -> int:
    """The partials that the tiles of a GEMM leave, in numbers, and the sums of shared tiles."""
    m, n, _ = case.work.problem
    of_rows = case.demand.sums * n * -(-m // cta_rows(config, target))
    return of_rows + case.demand.planes * m * -(-n // config.tile_n) + (config.split_k - 1) * m * n
