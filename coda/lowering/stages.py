"""The stages of a lowering: their names, preconditions, and a record of each run.

A lowering calls `trial(name, run, value, ...)` for each stage, which returns `run(value, ...)`. The
call is checked (`CODA_CHECK=2`: the stage's precondition before, and well-formedness after), timed
and recorded. A block with choices is lowered several times; each lowering is a `Trial`, and the
chosen one is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from coda.errors import CodaError, InternalError
from coda.ir.graph import Graph, walk
from coda.ir.verify import verify, verify_nodes
from coda.lowering.algebra.chunk import Parted
from coda.lowering.algebra.columns_first import columns_first
from coda.lowering.algebra.constants import fold_constants
from coda.lowering.algebra.laws import LAWS
from coda.lowering.algebra.measure import falls
from coda.lowering.algebra.pushdown import push_down
from coda.lowering.algebra.rewrite import LawApplication, rewrite
from coda.lowering.program.epilogue import ReduceColumns
from coda.lowering.program.program import Program
from coda.lowering.program.verify import verify_program

Value = Graph | Parted | Program


def verified(value: Value, after: str) -> None:
    """Raise InternalError if the result of the stage `after` is not well formed."""
    if isinstance(value, Program):
        verify_program(value, after)
    else:
        verify(value.graph if isinstance(value, Parted) else value, after)


def _well_formed(graph: Graph) -> str:
    verify(graph, "trace")
    return ""


def _laws_ended(graph: Graph) -> str:
    steps: list[LawApplication] = []
    rewrite(graph.roots, LAWS, lambda law, node, place: False, steps.append)
    return f"the law `{steps[0].law.name}` still applies" if steps else ""


def _pushed_down(graph: Graph) -> str:
    ended = push_down(graph).roots == graph.roots
    return "" if ended else "a pick or a slice of rows can move closer to an argument"


def _columns_first(graph: Graph) -> str:
    ended = columns_first(graph).roots == graph.roots
    return "" if ended else "a reduction is over rows and columns at once"


def _constants_folded(graph: Graph) -> str:
    ended = fold_constants(graph, dict.fromkeys(graph.symbols, 1)).roots == graph.roots
    return "" if ended else "a function of constants is not evaluated"


def _placeable(parted: Parted) -> str:
    lost = parted.part_of.keys() - set(walk(parted.graph.roots))
    return (
        "a chunk refers to a node that is not in the graph"
        if lost
        else _columns_first(parted.graph)
    )


def _complete(program: Program) -> str:
    verify_program(program, "place")
    return ""


def _memory_is_open(program: Program) -> str:
    planned = program.overwrites or program.freed
    return "memory is planned already, for the present order of kernels" if planned else ""


def _partials_sized(program: Program) -> str:
    sinks = [s for k in program.kernels for s in k.body.epilogue.sinks]
    made = {s.buffer for s in sinks if isinstance(s, ReduceColumns)}
    for kernel in program.kernels:
        for one in kernel.body.epilogue.statistics:
            if one.operand in made and not one.count:
                return f"`{kernel.name}` folds `{one.operand}`, whose partials have no size"
    return ""


@dataclass(frozen=True)
class Stage:
    """A stage of the lowering.

    Attributes:
        name: as users write it, in `--stop-after` for example.
        does: its effect, in a line.
        requires: its precondition, in a line.
        missing: input -> how the input violates the precondition; "" if it holds.
    """

    name: str
    does: str
    requires: str
    missing: Callable[[Any], str]


STAGES: dict[str, Stage] = {
    name: Stage(name, does, requires, missing)
    for name, does, requires, missing in (
        (
            "laws",
            "apply the laws of the algebra until none applies",
            "types and shapes follow from operands; names are unique",
            _well_formed,
        ),
        (
            "pushdown",
            "move picks and slices of rows towards the arguments",
            "no law applies, except those marked as a choice",
            _laws_ended,
        ),
        (
            "columns",
            "reduce over columns first, then over rows",
            "picks and slices of rows are as close to the arguments as they can be",
            _pushed_down,
        ),
        (
            "constants",
            "fold constants: evaluate functions of numbers and sizes",
            "no reduction is over rows and columns at once",
            _columns_first,
        ),
        (
            "attends",
            "make attention one node, where a kernel takes it",
            "constants are folded",
            _constants_folded,
        ),
        (
            "chunks",
            "compute the largest temporary in chunks of columns",
            "constants are folded",
            _constants_folded,
        ),
        (
            "place",
            "decide which kernel computes which node, and build the kernels",
            "chunks are of nodes of the graph; no reduction is over rows and columns at once",
            _placeable,
        ),
        (
            "factor",
            "compute once the factors that the products of a kernel share",
            "a kernel reads arguments, prepacked tensors, and results of earlier kernels",
            _complete,
        ),
        (
            "order",
            "order kernels so that buffers die early",
            "memory is not planned yet",
            _memory_is_open,
        ),
        (
            "configure",
            "choose tiles and clusters, which set the sizes of partials",
            "memory is not planned yet",
            _memory_is_open,
        ),
        (
            "folds",
            "let the only reader of a row's statistic fold its partials",
            "partials have sizes, and memory is not planned yet",
            _partials_sized,
        ),
        (
            "memory",
            "liveness: when a buffer is dead, and which dead buffer a kernel writes in place",
            "partials have sizes",
            _partials_sized,
        ),
    )
}
PROGRAM = ("chunks", "place", "factor", "order", "configure", "folds", "memory")  # Graph -> Program


def stage_names(text: str, what: str) -> tuple[str, ...]:
    """Parse "laws,place". Raises CodaError, which begins with `what`, for an unknown stage."""
    names = tuple(n.strip() for n in text.split(",") if n.strip())
    for name in names:
        if name not in STAGES:
            raise CodaError(f"{what}: there is no such stage", found=name, help=", ".join(STAGES))
    return names


@dataclass(frozen=True)
class Ran:
    """One run of a stage: its input, its result, and its time in seconds."""

    stage: Stage
    before: Value
    after: Value
    seconds: float


@dataclass
class Trial:
    """One lowering, stage by stage.

    Attributes:
        check: 2 to check each stage and each law.
        only: names of the stages to run; others return their input. None for all.
        ran: the stages that ran so far.
        steps: the applications of laws so far.
    """

    check: int = 0
    only: frozenset[str] | None = None
    ran: list[Ran] = field(default_factory=list[Ran])
    steps: list[LawApplication] = field(default_factory=list[LawApplication])

    def __call__(self, name: str, run: Callable[..., Any], value: Any, *more: Any) -> Any:
        """run(value, *more), checked, timed and recorded. Raises InternalError."""
        if self.only is not None and name not in self.only:
            return value
        stage = STAGES[name]
        if self.check > 1:
            self.required(stage, value)
        start = perf_counter()
        found = run(value, *more)
        self.ran.append(Ran(stage, value, found, perf_counter() - start))
        if self.check > 1:
            verified(found, name)
        return found

    def required(self, stage: Stage, value: Any) -> None:
        """Raise InternalError if the precondition of a stage does not hold."""
        missing = stage.missing(value)
        if missing:
            raise InternalError(
                f"before `{stage.name}`: {missing}",
                found=f"the stage requires: {stage.requires}",
                help="this is a fault of coda, not of the block: please report it",
            )

    def law(self, step: LawApplication) -> None:
        """Record the application of a law. Raises InternalError if a check of it fails."""
        self.steps.append(step)
        if self.check > 1:
            verify_nodes(walk([step.after]), step.law.name)
            if not falls(step.before, step.after):
                raise InternalError(f"after `{step.law.name}`: no measure of the graph fell")


def _no_step(_: str) -> None:
    """Nobody watches."""


def _unwatched(_: str) -> AbstractContextManager[Callable[[str], None]]:
    return nullcontext(_no_step)


@dataclass
class Stages:
    """Options and record of the lowering of one block.

    Attributes:
        check: 0 for no checks; 1 to check the block and the final Program; 2 to check also before
            and after every stage, and after every law.
        show: names of the stages whose results are shown.
        tell: called with the text to show.
        watch: shows that a lowering goes on: "lowering NAME" -> a context, which gives a function
            to call with the name of each step.
        trials: the lowerings so far.
        kept: the lowering whose Program was chosen.
    """

    check: int = 1
    show: Iterable[str] = ()
    tell: Callable[[str], object] = print
    watch: Callable[[str], AbstractContextManager[Callable[[str], None]]] = _unwatched
    trials: list[Trial] = field(default_factory=list[Trial])
    kept: Trial | None = None
    _watched: ExitStack = field(default_factory=ExitStack)
    _step: Callable[[str], None] = _no_step

    def begin(self, graph: Graph) -> None:
        """Check the block. Raises InternalError if it is not well formed."""
        self._step = self._watched.enter_context(self.watch(f"lowering {graph.name}"))
        if self.check:
            verify(graph, "trace")

    def trial(self) -> Trial:
        """Begin the record of another lowering."""
        self._step(f"choice {len(self.trials) + 1}" if self.trials else "laws and placement")
        self.trials.append(Trial(self.check))
        return self.trials[-1]

    def keep(self, program: Program) -> Program:
        """Check and return the chosen Program. Raises InternalError if it is not well formed."""
        self.kept = next(t for t in self.trials if t.ran[-1].after is program)
        if self.check:
            verify(program.normal, "chunks")
            verify_program(program, "memory")
        return program

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: object) -> None:
        """Show the stages of `show`: of the chosen lowering, or of the one that failed."""
        self._watched.close()
        shown = self.kept or (self.trials[-1] if self.trials else None)
        for ran in shown.ran if shown else ():
            if ran.stage.name in self.show:
                self.tell(f"# after {ran.stage.name}\n{show_value(ran.after)}")


def show_value(value: Value) -> str:
    """The result of a stage, as text."""
    if isinstance(value, Program):
        dead = zip(value.kernels, value.freed, strict=False)
        notes = [f"  dead after {k.name}: {', '.join(names)}" for k, names in dead if names]
        return "\n".join([str(value).rstrip(), *notes]) + "\n"
    if isinstance(value, Parted):
        cuts = [f"in {len(c.columns)} parts: {c.columns} columns" for c in value.cuts]
        return "\n".join([str(value.graph).rstrip(), *cuts]) + "\n"
    return f"{str(value).rstrip()}\n"
