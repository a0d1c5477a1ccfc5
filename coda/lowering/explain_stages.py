"""Record of a lowering -> table of stages: sizes before and after, seconds, and effect of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from coda.ir.graph import Graph, walk
from coda.lowering.algebra.chunk import Parted
from coda.lowering.algebra.policy import DEFAULT_POLICY, MemoryPolicy
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import check_dims, is_taken, lower
from coda.lowering.program.epilogue import calls
from coda.lowering.program.memory import temporary_bytes
from coda.lowering.program.program import Program
from coda.lowering.program.target import Target
from coda.lowering.program.text import show_config
from coda.lowering.stages import Ran, Stages, Trial, Value


def training_graphs(
    graph: Graph, sizes: Mapping[str, int], wanted: Sequence[str] | None, memory: str
) -> list[tuple[Graph, MemoryPolicy]]:
    """A block's training forward and backward, each with its memory policy.

    Raises CallError, DimError and UnsupportedError, as `derive` and `check_dims`.
    """
    training = derive(graph, check_dims(graph, sizes), wanted, memory=memory, takes=is_taken)
    return [(training.forward, DEFAULT_POLICY), (training.backward, training.policy())]


def record_stages(
    graphs: Sequence[tuple[Graph, MemoryPolicy]],
    sizes: Mapping[str, int],
    target: Target,
    *,
    frozen: bool,
    check: int,
    show: Iterable[str],
) -> dict[str, Stages]:
    """Lower some graphs; graph name -> record. The stages in `show` are printed.

    `check` is 0, 1 or 2, as in `Stages`.
    """
    found: dict[str, Stages] = {}
    for graph, policy in graphs:
        record = found[graph.name] = Stages(check, show)
        own = {s: n for s, n in sizes.items() if s in graph.symbols}
        lower(
            graph,
            own if len(graphs) > 1 else sizes,
            target,
            frozen=frozen,
            policy=policy,
            stages=record,
        )
    return found


def passes_table(title: str, stages: Stages) -> Table:
    """The stages of the chosen lowering, as a table; times in ms."""
    table = Table(title=title, title_justify="left")
    for column in ("stage", "before", "after", "ms", "what it did"):
        right = column not in ("stage", "what it did")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    found = pass_facts(stages)
    for one in found["stages"]:
        values = one["before"], one["after"], f"{one['seconds'] * 1e3:.1f}", one["did"]
        table.add_row(one["stage"], *values)
    lowerings = f"lowered {found['lowerings']} times, the {ordinal(found['kept'])} is kept"
    table.add_row("choices", "", "", f"{found['seconds'] * 1e3:.1f}", lowerings)
    return table


def ordinal(number: int) -> str:
    """A number as an ordinal: 1st, 2nd, 3rd, 4th."""
    teen = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def pass_facts(stages: Stages) -> dict[str, Any]:
    """The stages of the chosen lowering, as plain data; times in seconds."""
    kept = stages.kept
    assert kept is not None
    return {
        "stages": [
            {
                "stage": ran.stage.name,
                "does": ran.stage.does,
                "before": size(ran.before),
                "after": size(ran.after),
                "seconds": ran.seconds,
                "did": did(ran, kept),
            }
            for ran in kept.ran
        ],
        "lowerings": len(stages.trials),
        "kept": stages.trials.index(kept) + 1,
        "seconds": sum(ran.seconds for trial in stages.trials for ran in trial.ran),
    }


def size(value: Value) -> str:
    """The size of a stage's input or result: "41 nodes" or "3 kernels"."""
    if isinstance(value, Program):
        return f"{len(value.kernels)} kernels"
    return f"{len(_nodes(value))} nodes"


def _nodes(value: Graph | Parted) -> list[Any]:
    return list(walk((value.graph if isinstance(value, Parted) else value).roots))


def did(ran: Ran, trial: Trial) -> str:
    """The effect of a stage, in a line; "nothing" if it returned its input."""
    match ran.stage.name, ran.after:
        case "laws", _:
            counts = Counter(s.law.name for s in trial.steps)
            found = [f"{law} ×{n}" if n > 1 else law for law, n in counts.items()]
        case "chunks", Parted(cuts=cuts):
            found = [str(c) for c in cuts]
        case "place", Program(unfused=unfused):
            found = [f"{len(unfused)} not fused"] if unfused else ["all fused"]
        case "factor", Program() as program:
            found = [f"{_operations(ran.before)} -> {_operations(program)} operations a point"]
        case "order", Program() as program:
            found = [] if program is ran.before else ["launches in the order that frees memory"]
        case "configure", Program() as program:
            found = list(dict.fromkeys(show_config(k.config) for k in program.kernels if k.config))
        case "folds", Program() as program:
            assert isinstance(ran.before, Program)
            kept = {k.name for k in program.kernels}
            gone = [k.name for k in ran.before.kernels if k.name not in kept]
            found = [f"{name} into its reader" for name in gone]
        case "memory", Program() as program:
            kept = f"{temporary_bytes(program) / 1e6:.1f} MB of temporaries at most"
            found = [kept, *(f"{new} over {old}" for new, old in program.overwrites.items())]
        case _, (Graph() | Parted()) as value:
            assert not isinstance(ran.before, Program)
            new = set(_nodes(value)) - set(_nodes(ran.before))
            found = [f"{len(new)} new nodes"] if new else []
        case _:
            found = []
    return ", ".join(found) or "nothing"


def _operations(value: Value) -> int:
    """Scalar operations per element or column pair, summed over all kernels."""
    assert isinstance(value, Program)
    total = 0
    for kernel in value.kernels:
        if kernel.kind.fuses:
            epilogue = kernel.body.epilogue
            results = (*epilogue.stores, *epilogue.sinks)
            total += len(calls(e for r in results for e in r.lanes))
    return total
