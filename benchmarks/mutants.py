"""Faults put into good kernels: which are caught, and by what; the table of docs/sim-checks.md.

`python benchmarks/mutants.py` runs the mutants of tests/sim/test_mutants.py on both archs.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.sim.mutation import MUTATIONS, Outcome
from tests.sim.test_mutants import SUBJECTS, outcomes

PAGE = Path(__file__).parent.parent / "docs/sim-checks.md"
BEGIN, END = "<!-- mutants: begin -->\n", "<!-- mutants: end -->\n"
HEAD = "| fault | sm_90a | reported as | sm_100a | reported as |\n|---|---|---|---|---|\n"


def cells(found: list[Outcome]) -> str:
    """How many mutants are caught, and how often by what."""
    if not found:
        return " | "
    kinds = Counter(kind for x in found for kind in x.found if kind in x.mutant.mutation.seen)
    often = sorted(kinds.items(), key=lambda x: (-x[1], x[0]))
    by = ", ".join(f"{kind} {n}" for kind, n in often)
    return f"{sum(x.caught for x in found)} of {len(found)} | {by}"


def table(found: dict[str, list[Outcome]]) -> str:
    """A row for each mutation, and one for all."""
    rows = []
    for name in dict.fromkeys(mutation.name for mutation in MUTATIONS):
        parts = [[x for x in xs if x.mutant.mutation.name == name] for xs in found.values()]
        if any(parts):
            rows.append(f"| {name} | {' | '.join(cells(part) for part in parts)} |")
    rows.append(f"| all | {' | '.join(cells(xs) for xs in found.values())} |")
    return HEAD + "\n".join(rows) + "\n"


def main() -> None:
    """Run, print what was missed, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="keep compiled kernels here")
    cache = parser.parse_args().cache
    found: dict[str, list[Outcome]] = {}
    for arch, subjects in SUBJECTS.items():
        found[arch] = [
            x for name, one in subjects.items() for x in outcomes(name, one, arch, cache)
        ]
        print(*(f"missed on {arch}: {x}" for x in found[arch] if not x.caught), sep="\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(found) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
