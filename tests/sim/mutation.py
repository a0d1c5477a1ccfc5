"""Good PTX -> PTX with one fault, at a site that ran, and what reported the fault.

A mutation is a pattern of an instruction and an edit of its line. Edits that compute put their
instruction in front of the line, into a register %mutant32 or %mutant64.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import coda.sim as sim
from coda.sim.checks.observe import Observer
from coda.sim.checks.observers import MAKERS
from tests.sim.third_party.cases import Case, compare

Edit = Callable[[str], str]
BOTH = ("sm_90a", "sm_100a")
HOPPER, BLACKWELL = ("sm_90a",), ("sm_100a",)
Schedules = tuple[tuple[str, int], ...]
ALL = (("eager", 0), ("late", 0), ("random", 1), ("random", 2))


@dataclass(frozen=True)
class Mutation:
    """A fault. `seen` are the detectors that should report it: kinds of findings, errors, "values".

    The schedules are tried in order until one reports something. Sites that ran most often are
    taken: the steady state of loops; `seldom`: least often, what stands before the loops. `near`
    must match in the line that follows.
    """

    name: str
    pattern: str
    edit: Edit
    seen: tuple[str, ...]
    schedules: Schedules = ALL
    seldom: bool = False
    sites: int = 2
    near: str = ""


@dataclass(frozen=True)
class Mutant:
    """A mutation at a line of a kernel's PTX (counted from one)."""

    mutation: Mutation
    line: int
    text: str

    def apply(self, ptx: str) -> str:
        """The PTX with the fault."""
        lines = ptx.split("\n")
        old = lines[self.line - 1]
        lines[self.line - 1] = self.mutation.edit(old)
        assert lines[self.line - 1] != old, f"{self.mutation.name} does not change {old!r}"
        registers = ".reg .b32 %mutant32; .reg .b64 %mutant64;"
        return re.sub(r"(\.entry[^{]*\{)", rf"\1 {registers}", "\n".join(lines), count=1)


@dataclass(frozen=True)
class Outcome:
    """What reported a mutant first, and at which schedule; nothing if `found` is empty."""

    subject: str
    mutant: Mutant
    found: frozenset[str]
    schedule: str

    @property
    def caught(self) -> bool:
        """Whether a detector that should report it did."""
        return not self.found.isdisjoint(self.mutant.mutation.seen)

    def __str__(self) -> str:
        by = f"{', '.join(sorted(self.found)) or 'nothing'} {self.schedule}"
        site = f"line {self.mutant.line} ({self.mutant.text[:60]})"
        return f"{self.subject}: {self.mutant.mutation.name} at {site}: {by}"


def mutants(mutation: Mutation, ptx: str, ran: Counter[int], most: int) -> list[Mutant]:
    """A mutation at up to `most` lines that ran."""
    lines = ptx.split("\n")
    sites = [
        Mutant(mutation, number, line.strip())
        for number, (line, after) in enumerate(zip(lines, [*lines[1:], ""], strict=True), 1)
        if ran[number] and re.search(mutation.pattern, line) and re.search(mutation.near, after)
    ]
    sign = 1 if mutation.seldom else -1
    return sorted(sites, key=lambda x: (sign * ran[x.line], x.line))[: min(most, mutation.sites)]


# edits


def drop(line: str) -> str:
    """Nothing in its place; a scope or label on the line stays."""
    head, _, _, _, tail = _parts(line)
    return head + tail


def double(line: str) -> str:
    """Twice."""
    return f"{line} {line.strip()}"


def loosen(line: str) -> str:
    """Wait for one group less."""
    return re.sub(r"(\d+);", lambda m: f"{int(m[1]) + 1};", line)


def unguarded(line: str) -> str:
    """Without its predicate."""
    return re.sub(r"@!?%?\w+\s+", "", line, count=1)


def computed(operand: int, instruction: str) -> Edit:
    """With an operand that `instruction` changes; {0} is the old one, {1} the new."""
    register = "%mutant64" if "64" in instruction.split()[0] else "%mutant32"

    def edit(line: str) -> str:
        head, guard, opcode, operands, tail = _parts(line)
        parts = _split(operands)
        old = parts[operand].strip()
        parts[operand] = f" {register}"
        before = instruction.format(old, register)
        return f"{head}{before}; {guard}{opcode} {','.join(parts)};{tail}"

    return edit


def coordinate(line: str) -> str:
    """A tensor copy one element further along its second axis."""
    found = re.search(r"\[(%\w+), \{(%?\w+), (%?\w+)", line)
    assert found is not None, line
    moved = line.replace(found[0], f"[{found[1]}, {{{found[2]}, %mutant32", 1)
    return _before(moved, f"add.s32 %mutant32, {found[3]}, 1;")


def _before(line: str, instruction: str) -> str:
    head, rest = re.match(r"(\s*(?:\{(?!%)[^}]*?;\s*)?)(.*)$", line, re.S).groups()  # type: ignore[union-attr]
    return f"{head}{instruction} {rest}"


def addressed(offset: int) -> Edit:
    """With its first address in brackets moved by some bytes."""

    def edit(line: str) -> str:
        def moved(match: re.Match[str]) -> str:
            return f"[{match[1]}+{int(match[2] or 0) + offset}]"

        return re.sub(r"\[([%\w]+)(?:\+(\d+))?\]", moved, line, count=1)

    return edit


def always(line: str) -> str:
    """Nothing in its place but that the predicate which it writes is set."""
    head, guard, _, operands, tail = _parts(line)
    return f"{head}{guard}setp.eq.s32 {_split(operands)[0].strip()}, 0, 0;{tail}"


def replaced(old: str, new: str) -> Edit:
    """With a part of its text replaced."""
    return lambda line: re.sub(old, new, line, count=1)


_PARTS = re.compile(
    r"(?P<head>(?:\s*\{(?=\s*\.)|\s*\.reg[^;]*;|\s*[\w$]+:(?!:))*\s*)"
    r"(?P<guard>@!?%?\w+\s+)?(?P<op>[\w.:]+)\s*(?P<operands>[^;]*);(?P<tail>.*)$",
    re.S,
)


def _parts(line: str) -> tuple[str, str, str, str, str]:
    match = _PARTS.match(line)
    assert match is not None, line
    return match["head"], match["guard"] or "", match["op"], match["operands"], match["tail"]


def _split(operands: str) -> list[str]:
    return re.split(r",(?![^{\[]*[}\]])", operands)


# running


class Ran(Observer):
    """Counts the lines of the instructions of every block that runs."""

    lines: Counter[int] | None = None
    kernel = ""

    def block(self, block: Any, number: int, g: Any, m: Any) -> None:
        if Ran.lines is None or Ran.kernel not in self.machine.grid.launch.kernel:
            return
        warps = len(self.machine.rows(g))
        for ins in block.instructions:
            Ran.lines[ins.line] += warps


MAKERS.append(lambda machine: [Ran(machine)] if Ran.lines is not None else [])


class Bench:
    """A kernel that is compiled once, whose PTX is replaced at each launch.

    `kernel` is a part of the name of the kernel that is changed, of several that are launched;
    `ran` counts the warps that ran each of its lines.
    """

    def __init__(
        self, case: Case, gpu: sim.Device, kernel: str = "", schedules: Schedules = ()
    ) -> None:
        torch.manual_seed(0)
        self.gpu, self.problem = gpu, case.make()
        self.mutant: Mutant | None = None
        self.ptx = ""
        found = gpu.store.find

        def find(cubin: bytes, name: str) -> str:
            text = found(cubin, name)
            if kernel not in name:
                return text
            self.ptx = text
            return text if self.mutant is None else self.mutant.apply(text)

        gpu.store.find = find  # type: ignore[method-assign]
        self.ran = self._good(kernel, schedules or ALL)

    def _good(self, kernel: str, schedules: Schedules) -> Counter[int]:
        """Run without a fault at every schedule: no findings; the lines that ran."""
        Ran.lines, Ran.kernel = Counter(), kernel
        try:
            for schedule, seed in schedules:
                assert not self.run(schedule, seed), (schedule, self.findings)
            return Ran.lines
        finally:
            Ran.lines = None

    def run(self, schedule: Any, seed: int) -> set[str]:
        """What one run reports: kinds of findings, the name of an error, "values"."""
        gpu = self.gpu
        gpu.options = replace(gpu.options, schedule=schedule, seed=seed, instructions=self.budget)
        before = len(gpu.launched)
        self.message = ""
        try:
            compare(self.problem, self.problem.launch())
            found = set()
        except sim.SimError as error:
            found = {type(error).__name__}
            self.message = str(error)
        except AssertionError as error:
            found = {"values"}
            self.message = str(error)
        launches = gpu.launched[before:]
        if self.mutant is None:
            self.budget = max(self.budget, 4 * sum(x.result.warp_instructions for x in launches))
        self.findings = [str(f) for x in launches for f in x.result.findings]
        return found | {f.kind for x in launches for f in x.result.findings}

    budget = 1_000_000

    def reported(self, mutant: Mutant) -> tuple[set[str], str]:
        """What reports a mutant first, and at which schedule."""
        self.mutant = mutant
        try:
            for schedule, seed in mutant.mutation.schedules:
                found = self.run(schedule, seed)
                if found:
                    return found, schedule
            return set(), ""
        finally:
            self.mutant = None


# what is done to kernels

ARRIVE = r"mbarrier\.arrive\.(?!expect)"
TRY_WAIT = r"mbarrier\.try_wait\.parity"
LOOP = TRY_WAIT + r"\S*\s+P1,"  # a peek that fails wrongly falls into the loop
LOAD = r"cp\.async\.bulk\.tensor\.\S*\.shared::\w+\.global"
TILE_STORE = r"stmatrix|st\.shared\.v4\S*\s+\[%r\d+\], \{%r"  # what is stored is no constant
STUCK = ("Deadlock", "Livelock", "Fault")
ORDER = ("race",)

MUTATIONS = (
    Mutation("proxy fence dropped", r"fence\.proxy\.async", drop, ORDER),
    Mutation("mbarrier fence dropped", r"fence\.mbarrier_init", drop, ORDER),
    Mutation("block barrier dropped", r"bar(?:rier)?\.sync\s", drop, (*ORDER, *STUCK)),
    Mutation(
        "barrier of more threads", r"bar(?:rier)?\.sync\s+\d+, \d+;",
        replaced(r"\d+;", "512;"), STUCK,
    ),
    Mutation("bulk wait dropped", r"cp\.async\.bulk\.wait_group", drop, (*ORDER, "exited")),
    Mutation("bulk wait loosened", r"cp\.async\.bulk\.wait_group", loosen, (*ORDER, "exited")),
    Mutation("bulk commit dropped", r"cp\.async\.bulk\.commit_group", drop, (*ORDER, "exited")),
    Mutation("wgmma wait dropped", r"wgmma\.wait_group", drop, (*ORDER, "in-flight")),
    Mutation("wgmma wait loosened", r"wgmma\.wait_group", loosen, (*ORDER, "in-flight")),
    Mutation("wgmma commit dropped", r"wgmma\.commit_group", drop, (*ORDER, "in-flight")),
    Mutation("wgmma fence dropped", r"wgmma\.fence", drop, ("in-flight",), seldom=True, sites=1),
    Mutation("tcgen05 commit dropped", r"tcgen05\.commit", drop, STUCK),
    Mutation("tcgen05 load wait dropped", r"tcgen05\.wait::ld", drop, ORDER),
    Mutation("tcgen05 store wait dropped", r"tcgen05\.wait::st", drop, ORDER),
    Mutation("tensor memory kept", r"tcgen05\.dealloc", drop, ("leak",)),
    Mutation("arrival dropped", ARRIVE, drop, STUCK),
    Mutation("arrival doubled", ARRIVE, double, (*ORDER, *STUCK)),
    Mutation(
        "transaction count over", r"mbarrier\.arrive\.expect_tx",
        computed(-1, "add.s32 {1}, {0}, 128"), STUCK,
    ),
    Mutation(
        "transaction count short", r"mbarrier\.arrive\.expect_tx",
        computed(-1, "sub.s32 {1}, {0}, 128"), STUCK,
    ),
    Mutation("wait skipped", TRY_WAIT, always, (*ORDER, *STUCK, "exited")),
    Mutation(
        "parity flipped", LOOP, computed(2, "xor.b32 {1}, {0}, 1"), (*ORDER, *STUCK, "exited")
    ),
    Mutation("barrier count over", r"mbarrier\.init", computed(-1, "add.s32 {1}, {0}, 1"), STUCK),
    Mutation("copy of a shifted box", LOAD, coordinate, ("values",)),
    Mutation("store of a tile dropped", TILE_STORE, drop, ("uninitialised", "values")),
    Mutation(
        "store of a tile moved", TILE_STORE, addressed(16),
        ("values", "uninitialised"),
    ),
    Mutation(
        "swizzle of an operand", r"wgmma\.mma_async",
        computed(-6, "xor.b64 {1}, {0}, 0x4000000000000000"), ("values",),
    ),
    Mutation(
        "swizzle of an operand", r"tcgen05\.mma\S*kind",
        computed(2, "xor.b64 {1}, {0}, 0xc000000000000000"), ("values",),
    ),
    Mutation("cp.async wait dropped", r"cp\.async\.wait_", drop, (*ORDER, "uninitialised")),
    Mutation("copy of scales dropped", r"tcgen05\.cp", drop, ("uninitialised", "values")),
    Mutation("release dropped", r"st\.release", drop, STUCK),
    Mutation("release weakened", r"st\.release", replaced(r"\.release\.gpu", ""), ORDER),
    Mutation("acquire weakened", r"ld\.acquire", replaced(r"\.acquire\.gpu", ""), (*ORDER, *STUCK)),
    Mutation("cluster arrival dropped", r"barrier\.cluster\.arrive", drop, STUCK),
    Mutation("cluster barrier dropped", r"barrier\.cluster\.wait", drop, (*ORDER, *STUCK)),
    Mutation(
        "bound of a store removed", r"^\s*@!?%p\d+ bra", drop, ("Fault", "values"),
        near=r"^\s*st\.global",
    ),
    Mutation(
        "bound of a load removed", r"^\s*@!?%p\d+ bra", drop, ("Fault",),
        near=r"^\s*ld\.global",
    ),
    Mutation(
        "bound of a copy removed", r"cp\.async\.c\w\.shared\.global.*, \d+, %r",
        replaced(r"(\d+), %r\d+;", r"\1, \1;"), ("Fault",),
    ),
)  # fmt: skip
